"""What a report says: complete, in a stable order, the same for the same run, and readable without a network."""

import dataclasses
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ptqjax.config import QuantizationConfig
from ptqjax.encodings.encoding import make_encoding
from ptqjax.ir import Graph, Model, Node, Record, TensorSpec
from ptqjax.report import MeasuredStage, Row, facts, inspect, measure, page, tables, to_json
from ptqjax.report.facts import activation_ranges, weight_ranges
from ptqjax.report.plots import channel_plot, range_bar, spread
from ptqjax.report.texts import figure_texts
from ptqjax.transforms import equalize, fold_batch_norms
from tests.models import mobile_block

VOID = {"meta", "link", "br", "line", "rect", "path"}
MARK = re.compile(r"M[\d.]+ ([\d.]+)V([\d.]+)")  # from the widest of the channels that share it to the narrowest


def model(scale: float = 1.0) -> Model:
    """One dense layer, x w^T, its weight times `scale`."""
    weight = np.arange(1, 13, dtype=np.float32).reshape(4, 3) * np.float32(scale)
    float32 = np.dtype("float32")
    graph = Graph(
        name="dense",
        inputs=(TensorSpec(name="x", dtype=float32, shape=("N", 3)),),
        outputs=(TensorSpec(name="y", dtype=float32, shape=("N", 4)),),
        nodes=(Node(op_type="Gemm", inputs=("x", "w"), outputs=("y",), attributes=(("transB", 1),)),),
        parameters=("w",),
    )
    return Model(graph=graph, params={"w": weight})


def encodings() -> dict:
    per_channel = np.array([3, 6, 9, 12], np.float32) / np.float32(127)
    return {
        "w": make_encoding(per_channel, np.zeros(4, np.float32), dtype="int8", axis=0),
        "x": make_encoding(np.float32(0.5), np.float32(10), dtype="uint8"),
    }


@pytest.fixture
def found() -> dict:
    return facts(
        source={"model": "<net>.onnx", "num_samples": 3},
        settings={"weights": "int8", "activations": "uint8", "granularity": "channel"},
        device="cpu: cpu",
        rows=[
            Row(stage="float", metrics={"top1": 0.9}),
            Row(stage="fold", metrics={"float_sqnr_db": np.inf, "sqnr_db": np.float64(12.5), "agreement": 0.75}),
        ],
        records=[
            Record(
                transform="fold",
                done=True,
                what="folded",
                where=("y", "w"),
                before={"ratio": 8.0},
                after={"ratio": 2.0},
            ),
            Record(transform="fold", done=False, what="left alone", where=("x",), reason="it has <two> readers & more"),
        ],
        encodings=encodings(),
        before=model(2.0),
        after=model(),
    )


class Balance(HTMLParser):
    """Fails where a tag is closed that is not the last one opened; collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        self.fetched += [tag] if tag in ("script", "link", "iframe") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def test_json_is_the_same_for_the_same_run_and_holds_everything(found):
    text = to_json(found)
    assert text == to_json(found)
    data = json.loads(text)
    assert list(data) == [
        "source",
        "settings",
        "device",
        "versions",
        "model",
        "measured_in",
        "stages",
        "records",
        "encodings",
        "weight_ranges",
        "activation_ranges",
    ]
    assert data["stages"][1]["metrics"]["float_sqnr_db"] == "inf"  # JSON has no infinity
    assert data["records"][1]["reason"] == "it has <two> readers & more"
    assert {"python", "jax", "numpy", "onnx"} <= set(data["versions"])


def test_a_grid_is_described_by_the_range_it_spans(found):
    x, w = found["encodings"]["x"], found["encodings"]["w"]
    assert (x["kind"], x["dtype"], x["minimum"], x["maximum"]) == ("activation", "uint8", -5.0, 122.5)
    assert (w["kind"], w["axis"]) == ("weight", 0)
    assert w["maximum"] == pytest.approx(12.0)
    assert w["scale"] == pytest.approx([3 / 127, 6 / 127, 9 / 127, 12 / 127])


def test_weight_ranges_are_per_output_channel_before_and_after(found):
    assert found["weight_ranges"] == {"w": {"before": [6.0, 12.0, 18.0, 24.0], "after": [3.0, 6.0, 9.0, 12.0]}}


def test_page_is_well_formed_and_fetches_nothing(found):
    parser = Balance()
    parser.feed(page(found))
    assert parser.open == []
    assert parser.fetched == []
    assert not re.search(r"url\(|@import|https?://", page(found))


def test_page_escapes_names_and_says_what_was_left_alone_and_why(found):
    html = page(found)
    assert "&lt;net&gt;.onnx" in html
    assert "it has &lt;two&gt; readers &amp; more" in html
    assert "1 done, 1 left alone" in html
    assert "exact" in html  # the SQNR of a stage that changed nothing


def test_page_of_a_run_without_samples_or_transforms(found):
    assert "No transform ran" in page(found | {"stages": [], "records": []})


def test_plot_draws_every_channel_twice_even_dead_ones():
    svg = channel_plot([0.0, 1.0, 1e-30], [1.0, 1.0, 0.0], label="a < b")
    assert len(MARK.findall(svg)) == 6
    assert "nan" not in svg
    assert "a &lt; b" in svg


@pytest.mark.parametrize("ranges", [[0.0], [0.0, 0.0], [1e-38, 1e38], [5.0]])
def test_plot_of_any_ranges_stays_inside_its_frame(ranges):
    marks = MARK.findall(channel_plot(ranges, ranges, label=""))
    heights = [float(height) for mark in marks for height in mark]
    assert len(heights) == 4 * len(ranges)
    assert all(0 <= height <= 132 for height in heights)


def test_plot_of_many_channels_stays_small_and_keeps_the_outliers():
    ranges = [1.0] * 5000
    ranges[1234] = 1000.0
    svg = channel_plot([1.0] * 5000, ranges, label="")
    assert len(svg) < 12000
    tops = [float(top) for top, _ in MARK.findall(svg)]
    assert tops.count(min(tops)) == 1  # one mark reaches up to the outlier


def test_spread_leaves_dead_channels_out():
    assert spread([0.0, 1e-9, 2.0, 8.0]) == 4.0
    assert spread([0.0, 0.0]) == 1.0


def test_bar_of_an_empty_range_is_still_visible():
    assert 'width="0.8"' in range_bar(0.0, 0.0, extent=0.0)


def test_measure_compares_with_the_float_model():
    source = model()
    batches = [{"x": np.eye(3, dtype=np.float32)}, {"x": -np.eye(3, dtype=np.float32)}]
    labels = np.array([3, 3, 3, 0, 0, 0])
    stage = MeasuredStage(name="fold", model=source, encodings=encodings(), keeps_function=True)
    (first, second), _ = measure(source, [stage], batches, labels)
    same = {"float_sqnr_db": np.inf, "sqnr_db": np.inf, "agreement": 1.0}
    assert (first.stage, first.metrics) == ("float", same | {"top1": 1.0})
    bare = {"float_sqnr_db": np.inf, "sqnr_db": np.inf}  # nothing was run that tells what outputs look like
    assert measure(source, [], batches, None).rows == (Row(stage="float", metrics=bare),)
    assert measure(source, [stage], batches, None).rows[0].metrics == same  # without labels too
    assert second.metrics["float_sqnr_db"] == np.inf
    assert 20 < second.metrics["sqnr_db"] < 70  # 7 bits of weight: 6 dB a bit, x on a coarse grid that holds 0 and 1


def test_classes_are_those_of_the_first_output_whatever_its_name():
    graph = Graph(
        name="two",
        inputs=(TensorSpec(name="x", dtype=np.dtype("float32"), shape=("N", 3)),),
        outputs=tuple(TensorSpec(name=name, dtype=np.dtype("float32"), shape=("N", 3)) for name in ("z", "a")),
        nodes=(
            Node(op_type="Relu", inputs=("x",), outputs=("z",)),
            Node(op_type="Neg", inputs=("x",), outputs=("a",)),
        ),
    )
    x = np.array([[-5, 1, 2], [3, -5, 2]], np.float32)
    ((row,), _) = measure(Model(graph=graph, params={}), [], [{"x": x}], np.array([2, 0]))
    assert row.metrics["top1"] == 1.0


def test_an_operator_has_one_name_whichever_domain_it_is_from(capsys):
    float32 = np.dtype("float32")
    graph = Graph(
        name="domains",
        inputs=(TensorSpec(name="x", dtype=float32, shape=("N", 3)),),
        outputs=(TensorSpec(name="y", dtype=float32, shape=("N", 3)),),
        nodes=(
            Node(op_type="Relu", inputs=("x",), outputs=("h",)),
            Node(op_type="Relu", inputs=("h",), outputs=("y",), domain="elsewhere"),
        ),
        opsets=(("", 17), ("elsewhere", 1)),
    )
    found = inspect(Model(graph=graph, params={}))
    assert found.contents["operators"] == {"Relu": 1, "elsewhere.Relu": 1}
    assert [entry.operator for entry in found.without_lowering] == ["elsewhere.Relu"]
    tables.print_inspection(Path("net.onnx"), found)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["elsewhere.Relu", "1", "no", "lowering"] in lines
    assert ["Relu", "1"] in lines


def test_an_operator_without_lowering_is_listed_with_its_domain_opset_number_and_nodes(capsys):
    float32, flag = np.dtype("float32"), np.dtype("bool")
    inner = Graph(
        name="branch",
        inputs=(),
        outputs=(TensorSpec(name="z", dtype=float32, shape=None),),
        nodes=(Node(op_type="Mystery", inputs=("h6",), outputs=("z",), domain="my.company", name="inside"),),
    )
    names = ["x", *(f"h{i}" for i in range(7))]
    chain = [
        Node(op_type="Mystery", inputs=(a,), outputs=(b,), domain="my.company", name="" if a == "x" else f"from {a}")
        for a, b in itertools.pairwise(names)
    ]
    choice = Node(
        op_type="If", inputs=("c",), outputs=("y",), attributes=(("else_branch", inner), ("then_branch", inner))
    )
    graph = Graph(
        name="unknown",
        inputs=(TensorSpec(name="x", dtype=float32, shape=(3,)), TensorSpec(name="c", dtype=flag, shape=())),
        outputs=(TensorSpec(name="y", dtype=float32, shape=None),),
        nodes=(*chain, choice),
        opsets=(("", 17), ("my.company", 3)),
    )
    found = inspect(Model(graph=graph, params={}))
    (entry,) = found.without_lowering
    assert (entry.operator, entry.domain, entry.opset) == ("my.company.Mystery", "my.company", 3)
    assert [node.output for node in entry.nodes] == [*names[1:], "z", "z"]
    assert found.contents["operators"] == {"my.company.Mystery": 9, "If": 1}
    tables.print_inspection(Path("net.onnx"), found)
    printed = " ".join(capsys.readouterr().out.split())
    assert "my.company Mystery 3 9 producing 'h0', from h0, from h1, from h2, from h3 and 4 more" in printed
    assert "@ptqjax.lowers" in printed


def test_a_model_that_can_be_run_lists_no_operator_without_lowering(capsys):
    assert inspect(model()).without_lowering == ()
    tables.print_inspection(Path("net.onnx"), inspect(model()))
    assert "lowering" not in capsys.readouterr().out


@pytest.mark.parametrize(("granularity", "per"), [("tensor", ["tensor"]), ("channel", ["axis", "-1"])])
def test_a_bias_has_as_many_scales_as_its_weight(capsys, granularity, per):
    plain = model()
    nodes = (Node(op_type="Gemm", inputs=("x", "w", "b"), outputs=("y",), attributes=(("transB", 1),)),)
    graph = dataclasses.replace(plain.graph, nodes=nodes, parameters=("b", "w"))
    biased = Model(graph=graph, params=plain.params | {"b": np.ones(4, np.float32)})
    tables.print_inspection(Path("net.onnx"), inspect(biased, QuantizationConfig(granularity=granularity)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1 : 2 + len(per)] for line in lines if line[:1] == ["b"]] == [["int32", *per]]


def test_a_weight_is_found_by_what_it_produces_where_its_name_is_another():
    before, after = model(2.0), model()
    graph = dataclasses.replace(
        after.graph,
        nodes=(dataclasses.replace(after.graph.nodes[0], inputs=("x", "w_copy")),),
        parameters=("w_copy",),
    )
    renamed = Model(graph=graph, params={"w_copy": after.params["w"]})
    assert weight_ranges(before, renamed) == {
        "w_copy": {"before": [6.0, 12.0, 18.0, 24.0], "after": [3.0, 6.0, 9.0, 12.0]}
    }


def test_every_scaled_place_has_its_plots_and_the_most_changed_come_first():
    folded, _ = fold_batch_norms(mobile_block(dtype=np.float32))
    scaled, records = equalize(folded)
    names = {
        name for record in records if record.transform == "scale_channels" and record.done for name in record.where
    }
    grids = {name: make_encoding(np.float32(1), np.float32(0), dtype="uint8") for name in scaled.graph.producers}
    ranges = weight_ranges(folded, scaled)
    assert names & set(scaled.params) == set(ranges)
    activations = activation_ranges(folded, scaled, grids)
    assert activations
    assert any(pair["before"] != pytest.approx(pair["after"]) for pair in activations.values())


def test_only_the_most_changed_tensors_are_shown_at_once(found):
    same = {"before": [1.0, 2.0], "after": [1.0, 2.0]}
    ranges = {f"same{i}": same for i in range(20)} | {"changed": {"before": [1.0, 8.0], "after": [1.0, 1.0]}}
    html = page(found | {"weight_ranges": ranges, "activation_ranges": {}})
    assert "1 of 21 tensors changed" in html
    shown, folded = html.partition("<h2>Ranges of the weights")[2].split("<summary>The others", 1)
    assert shown.count("<figure>") == 12
    assert shown.index("changed</code>") < shown.index("same0</code>")
    assert folded.partition("</details>")[0].count("<figure>") == 9


def test_inspection_says_of_each_place_what_and_why_with_figures_before_and_after(capsys):
    tables.print_inspection(Path("net.onnx"), inspect(mobile_block(dtype=np.float32)))
    printed = capsys.readouterr().out
    assert re.search(r"scale_channels: 2 places it would change, \d it would leave alone", printed)
    assert re.search(r"\d → \d", printed)
    assert "graph output" in printed


def test_figures_known_on_one_side_are_stated_plainly():
    assert figure_texts({"ratio": 8.0}, {"ratio": 2.0, "channels": 3.0}) == ["ratio: 8 → 2", "channels: 3"]
