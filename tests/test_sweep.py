"""Sweeps: rows are what quantize and evaluate give, shared choices do not depend on order, interrupted ones go on."""

import csv
import io
import itertools
import json
import xml.etree.ElementTree as ET
from dataclasses import fields
from importlib import resources

import jax
import numpy as np
import pytest

import ptqjax
from ptqjax import pipeline
from ptqjax.errors import ConfigError, DataError, OutputError
from ptqjax.experiments import sweeping as module
from ptqjax.experiments.many import middle_ones, quantize_each
from ptqjax.experiments.metrics import Metric
from ptqjax.experiments.table import SweepRow, SweepTable
from ptqjax.fit import selection

from .models import Chain

RNG = np.random.default_rng(0)
CALIBRATION = [{"x": RNG.normal(size=(n, 3, 6, 6)).astype(np.float32)} for n in (6, 6)]
EVALUATION = [{"x": RNG.normal(size=(8, 3, 6, 6)).astype(np.float32)}]
LABELS = RNG.integers(0, 16, 8)
Config = ptqjax.QuantizationConfig

CONFIGS = {
    "coarse": Config(weights="int3", activations="uint4", scaling="ranges", granularity="tensor"),
    "float biases": Config(weights="int6", scaling="ranges", biases="float", headroom=1.2),
    "uncorrected": Config(scaling="ranges", correct="none", ranges="min-max"),
    "some in float": Config(activations="uint16", scaling="ranges", exclude=("x",)),
    "unequalized": Config(weights="int4", equalize=False),
    "analytic": Config(weights="int5", equalize=False, correct="analytic"),
}


@pytest.fixture(scope="module")
def model():
    """Conv, batch norm, Clip, depthwise Conv, batch norm, Conv: [n, 3, 6, 6] -> [n, 4, 2, 2]."""
    chain = Chain(3, dtype=np.float32, size=6, seed=3).conv(6).norm().clip()
    return chain.depthwise().norm().conv(4, kernel=1, bias=True).build()


@pytest.fixture(scope="module")
def table(model):
    metrics = ("sqnr_db", "agreement", "top1")
    return ptqjax.sweep(model, CALIBRATION, CONFIGS, metrics=metrics, evaluation=EVALUATION, labels=LABELS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_what_quantize_and_evaluate_give(model, table, name):
    result = ptqjax.quantize(model, CALIBRATION, CONFIGS[name])
    run = ptqjax.simulate(result.model, result.encodings)
    found = ptqjax.evaluate(
        lambda x: run(result.model.params, result.encodings, x),
        EVALUATION,
        labels=LABELS,
        reference=lambda x: ptqjax.apply(model.graph, model.params, x),
    )
    row = table.row(name)
    assert row.metrics == {"sqnr_db": found.sqnr, "agreement": found.agreement, "top1": found.top1}
    assert row.num_quantized == sum(bool(encoding.enabled) for encoding in result.encodings.values())
    assert row.config is CONFIGS[name]


def test_quantize_each_gives_the_bits_and_reports_of_quantize(model):
    each = quantize_each(model, iter(CALIBRATION), list(CONFIGS.values()))
    for config, found in zip(CONFIGS.values(), each, strict=True):
        alone = ptqjax.quantize(model, CALIBRATION, config)
        assert alone.model.graph == found.model.graph
        jax.tree.map(np.testing.assert_array_equal, alone.model.params, found.model.params)
        jax.tree.map(np.testing.assert_array_equal, alone.encodings, found.encodings)
        assert alone.reports == found.reports
        assert [stage.name for stage in alone.stages] == [stage.name for stage in found.stages]


def test_a_choice_that_is_shared_is_that_of_the_middle_one(model):
    """Per channel "auto" chooses among off, ranges and noise: the choice of the middle one is what all get."""
    configs = {bits: Config(weights=f"int{bits}") for bits in (2, 5, 16)}
    named = {str(bits): config for bits, config in configs.items()}
    rows = ptqjax.sweep(model, CALIBRATION, named, evaluation=EVALUATION)
    assert [row.chosen_by for row in rows] == ["5", "5", "5"]
    middle = ptqjax.quantize(model, CALIBRATION, configs[5])
    taken = quantize_each(model, CALIBRATION, [configs[2]], choose=[configs[5]])[0]
    assert taken.model.graph == middle.model.graph
    chosen = [record for record in middle.reports["equalize"] if record.transform == "choose"]
    assert [record for record in taken.reports["equalize"] if record.transform == "choose"] == chosen


def test_shared_choices_do_not_depend_on_the_order():
    configs = [Config(weights="int2"), Config(), Config(activations="uint4"), Config(weights="int4", ranges="mse")]
    configs += [Config(granularity="tensor"), Config(weights="int4", granularity="tensor"), Config(scaling="ranges")]
    expected = {config: configs[source] for config, source in zip(configs, middle_ones(configs), strict=True)}
    assert expected[configs[0]] == expected[configs[1]] != configs[0]
    assert expected[configs[6]] == configs[6]  # what is not chosen is each one's own
    assert expected[configs[4]] == expected[configs[5]] == configs[5]
    for order in itertools.islice(itertools.permutations(configs), 0, None, 97):
        assert {c: order[source] for c, source in zip(order, middle_ones(order), strict=True)} == expected


def row(name, sqnr_db, cost, error=0.0):
    figures = dict.fromkeys(("model_bytes", "stored_bytes", "num_quantized", "program"), 1)
    figures |= dict.fromkeys(("mean_weight_bits", "mean_activation_bits"), 1.0)
    metrics = {"sqnr_db": sqnr_db, "error": error}
    return SweepRow(name=name, config=Config(), metrics=metrics, bit_operations=cost, chosen_by=name, **figures)


def test_the_front_is_what_no_other_row_beats():
    rows = [
        row(str(i), float(sqnr), float(cost), error)
        for i, (sqnr, cost, error) in enumerate(RNG.integers(0, 6, size=(40, 3)))
    ]
    table = SweepTable(rows=tuple(rows), higher_is_better={"sqnr_db": True, "error": False}, seconds={}, batching=())

    def beats(a, b, metric, sign):
        gain, saving = sign * (a[metric] - b[metric]), b["bit_operations"] - a["bit_operations"]
        return gain >= 0 and saving >= 0 and (gain > 0 or saving > 0)

    for metric, sign in (("sqnr_db", 1), ("error", -1)):
        front = table.pareto(metric)
        expected = {b.name for b in rows if not any(beats(a, b, metric, sign) for a in rows)}
        assert {found.name for found in front} == expected
        costs = [found["bit_operations"] for found in front]
        assert costs == sorted(costs)


def test_finer_grids_cost_more(table):
    coarse, wide = table.row("coarse"), table.row("some in float")
    assert (coarse.mean_weight_bits, coarse.mean_activation_bits) == (3, 4)
    assert coarse.bit_operations < wide.bit_operations
    assert coarse.model_bytes < wide.model_bytes


def test_a_table_is_a_sequence_whose_columns_have_names(table):
    assert len(table) == len(CONFIGS)
    assert [found.name for found in table] == list(CONFIGS) == [table[i].name for i in range(len(table))]
    assert table[0]["sqnr_db"] == table[0].metrics["sqnr_db"]
    with pytest.raises(ConfigError, match=r"'sqnr' is unknown.*sqnr_db"):
        _ = table[0]["sqnr"]
    with pytest.raises(ConfigError, match=r"no row 'course'.*coarse"):
        table.row("course")
    with pytest.raises(ConfigError, match=r"cost='bits'"):
        table.pareto(cost="bits")


def test_what_is_not_a_number_is_not_on_the_front():
    rows = (row("nan", np.nan, 1.0), row("a", 3.0, 2.0), row("b", 5.0, 4.0))
    table = SweepTable(rows=rows, higher_is_better={"sqnr_db": True}, seconds={}, batching=())
    assert [each.name for each in table.pareto()] == ["a", "b"]


def test_csv_and_json_hold_every_figure_and_setting(table, tmp_path):
    text = table.to_csv(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == text
    lines = list(csv.DictReader(io.StringIO(text)))
    rows = json.loads(table.to_json(tmp_path / "t.json"))["rows"]
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == rows
    for found, line, entry in zip(table, lines, rows, strict=True):
        figures = {name: found[name] for name in ("sqnr_db", "top1", "bit_operations", "mean_weight_bits")}
        assert {name: float(line[name]) for name in figures} == figures == {name: entry[name] for name in figures}
        assert line["chosen_by"] == entry["chosen_by"] == found.name
        assert {field.name for field in fields(Config)} == entry["config"].keys() <= line.keys()
        assert (line["weights"], json.loads(line["exclude"])) == (found.config.weights, list(found.config.exclude))


def test_json_has_no_numbers_that_json_has_not():
    table = SweepTable(rows=(row("a", np.inf, 1.0),), higher_is_better={"sqnr_db": True}, seconds={}, batching=())
    (entry,) = json.loads(table.to_json(), parse_constant=pytest.fail)["rows"]
    assert entry["sqnr_db"] == "Infinity"


def test_the_picture_has_a_mark_for_each_row_and_joins_the_front(table):
    picture = ET.fromstring(table.to_svg(cost="model_bytes"))  # noqa: S314 - our own
    space = "{http://www.w3.org/2000/svg}"
    kinds = [mark.get("class") for mark in picture.iter(f"{space}circle")]
    assert (len(kinds), kinds.count("front")) == (len(table), len(table.pareto(cost="model_bytes")))
    assert picture.find(f"{space}path").get("d").count("L") == kinds.count("front") - 1


def test_an_interrupted_sweep_goes_on_behind_the_rows_that_are_there(model, table, tmp_path, monkeypatch):
    path, made = tmp_path / "rows.jsonl", []
    original = module.evaluate_variants
    settings = {"metrics": ("sqnr_db", "agreement", "top1"), "evaluation": EVALUATION, "labels": LABELS}

    def interrupted(model, variants, *arguments, **more):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.extend(variant.name for variant in variants)
        return original(model, variants, *arguments, **more)

    monkeypatch.setattr(module, "_TOGETHER", 2)
    monkeypatch.setattr(module, "evaluate_variants", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ptqjax.sweep(model, CALIBRATION, CONFIGS, journal=path, **settings)
    assert len(path.read_text().splitlines()) == 4
    with path.open("a") as file:
        file.write('{"key": "half a li')
    made.append("resumed")
    found = ptqjax.sweep(model, CALIBRATION, CONFIGS, journal=path, **settings)
    assert made == [*list(CONFIGS)[:4], "resumed", *list(CONFIGS)[4:]]
    assert [each.metrics for each in found] == [each.metrics for each in table]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == len(CONFIGS)
    again = ptqjax.sweep(model, CALIBRATION, CONFIGS, journal=path, **settings)
    assert again.rows == found.rows
    assert len(made) == len(CONFIGS) + 1


def test_rows_are_written_before_the_next_ones_are_made_and_searches_serve_all(model, tmp_path, monkeypatch):
    """Per channel "auto" takes a search, which the three share; parts of one row have the rows of a single part."""
    configs = {str(bits): Config(weights=f"int{bits}") for bits in (4, 5, 6)}
    expected = ptqjax.sweep(model, CALIBRATION, configs, evaluation=EVALUATION)
    path, lines, searched = tmp_path / "rows.jsonl", [], []
    calibrate, with_data = pipeline.calibrate_and_measure, selection._with_data

    def calibrated(*arguments, **settings):
        lines.append(len(path.read_text().splitlines()))
        return calibrate(*arguments, **settings)

    monkeypatch.setattr(module, "_TOGETHER", 1)
    monkeypatch.setattr(pipeline, "calibrate_and_measure", calibrated)
    monkeypatch.setattr(selection, "_with_data", lambda *a: (searched.append(1), with_data(*a))[1])
    found = ptqjax.sweep(model, CALIBRATION, configs, evaluation=EVALUATION, journal=path)
    assert lines == [0, 1, 2]
    assert len(searched) == 1
    assert [each.as_dict() for each in found] == [each.as_dict() for each in expected]


@pytest.mark.parametrize("text", ["my notes", '{"my": "data"}', '{"key" : 1'])
def test_a_single_line_that_is_no_row_is_left_alone(model, tmp_path, text):
    """It has no end, as a row that was not written to its end has none."""
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(OutputError, match="line 1 is no row of a sweep"):
        ptqjax.sweep(model, CALIBRATION, {"a": Config(equalize=False, correct="none")}, journal=path)
    assert path.read_text() == text


def test_what_is_wrong_is_found_before_anything_is_made(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "quantize_in_parts", None)
    good = [Config(equalize=False)]
    with pytest.raises(OutputError, match="name a file in a folder that can be"):
        ptqjax.sweep(model, CALIBRATION, good, journal=tmp_path / "nowhere" / "rows.jsonl")
    with pytest.raises(DataError, match="evaluation: batches is empty"):
        ptqjax.sweep(model, CALIBRATION, good, evaluation=iter([]))
    with pytest.raises(DataError, match="evaluation: batch 0 has the input 'y'"):
        ptqjax.sweep(model, CALIBRATION, good, evaluation=[{"y": EVALUATION[0]["x"]}])
    with pytest.raises(DataError, match="batches: batches is empty"):
        ptqjax.sweep(model, [], good)
    for name in ("bit_operations", "name", "weights", "config"):
        metric = Metric(name=name, init=float, update=lambda state, _: state, finish=float)
        with pytest.raises(ConfigError, match=f"'{name}' is another column"):
            ptqjax.sweep(model, CALIBRATION, good, metrics=(metric,))


def test_a_target_that_is_changed_in_its_file_is_another(tmp_path):
    path = tmp_path / "own.toml"
    text = (resources.files("ptqjax.targets") / "ort-cpu.toml").read_text()
    path.write_text(text)
    chosen = module._chosen([Config(target=str(path))], "each")["target=" + str(path)]
    before = module._text(chosen)
    path.write_text(text.replace("bounds_per_channel = true", "bounds_per_channel = false"))
    assert path.read_text() != text
    assert module._text(chosen) != before


def test_rows_of_other_data_settings_or_metrics_are_not_taken(model, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    one = {"a": Config(equalize=False, correct="none")}
    counted, original = [], module.evaluate_variants
    monkeypatch.setattr(module, "evaluate_variants", lambda *a, **k: (counted.append(1), original(*a, **k))[1])
    other = [{"x": CALIBRATION[0]["x"] + np.float32(0.125)}]
    calls = [
        (CALIBRATION, one, {}),
        (other, one, {"evaluation": CALIBRATION}),
        (CALIBRATION, {"a": Config(equalize=False, correct="none", weights="int7")}, {}),
        (CALIBRATION, one, {"metrics": ("sqnr_db",)}),
    ]
    for data, configs, settings in [*calls, *calls]:
        ptqjax.sweep(model, data, configs, journal=path, **settings)
    assert len(counted) == len(calls)


def test_a_file_that_is_no_journal_is_left_alone(model, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    with pytest.raises(OutputError, match="line 1 is no row of a sweep"):
        ptqjax.sweep(model, CALIBRATION, {"a": Config(equalize=False, correct="none")}, journal=path)
    assert path.read_text() == "my notes\n"


def test_errors_name_the_configuration(model):
    with pytest.raises(ConfigError, match=r"'bad': .*'nothing\*'"):
        ptqjax.sweep(
            model, CALIBRATION, {"good": Config(equalize=False), "bad": Config(exclude=("nothing*",), equalize=False)}
        )
    with pytest.raises(ConfigError, match="'x': scaling='learned' needs calibration data"):
        ptqjax.sweep(model, None, {"x": Config(scaling="learned")}, evaluation=EVALUATION)
    with pytest.raises(ConfigError, match="configuration 1: "):
        quantize_each(model, CALIBRATION, [Config(equalize=False), Config(equalize=False, exclude=("nothing*",))])
    with pytest.raises(ConfigError, match="configurations is empty"):
        ptqjax.sweep(model, CALIBRATION, [])
    with pytest.raises(ConfigError, match="choose='all'"):
        ptqjax.sweep(model, CALIBRATION, [Config()], choose="all")
    with pytest.raises(DataError, match="no samples to evaluate on"):
        ptqjax.sweep(model, None, [Config()])


@pytest.mark.parametrize("setting", ["choose", "names"])
def test_quantize_each_takes_one_for_each_configuration(model, setting):
    with pytest.raises(ConfigError, match=f"{setting} has 0 elements; expected 1"):
        quantize_each(model, CALIBRATION, [Config()], **{setting: []})


def test_configurations_without_names_are_called_by_what_differs():
    found = module._named([Config(), Config(weights="int4", exclude=("a", "b")), Config(), Config(weights="int4")])
    assert list(found) == ["defaults", "weights=int4 exclude=a,b", "defaults #2", "weights=int4"]
    assert len(module._named([Config(exclude=("a #2",)), Config(exclude=("a",)), Config(exclude=("a",))])) == 3


def test_metrics_of_ones_own_have_their_column_and_direction(model, tmp_path):
    def update(state, seen):
        (found,), (wanted,) = seen.found.values(), seen.wanted.values()
        return max(state, float(np.abs(found - wanted).max()))

    worst = Metric(name="worst", init=lambda: 0.0, update=update, finish=np.float32, higher_is_better=False)
    configs = {bits: Config(weights=f"int{bits}", equalize=False, correct="none") for bits in (2, 8)}
    named = {str(bits): config for bits, config in configs.items()}
    found = ptqjax.sweep(model, CALIBRATION, named, metrics=(worst,), journal=tmp_path / "rows.jsonl")
    assert found.row("8")["worst"] < found.row("2")["worst"]
    assert [each.name for each in found.pareto("worst")] == ["2", "8"]
