"""The choice among ways to scale: the closed form says what is tried, and what is tried shares its programs."""

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ptqjax
from ptqjax.config import QuantizationConfig, Rule
from ptqjax.errors import ConfigError
from ptqjax.fit import scale_as_configured, selection, trials, ways
from ptqjax.fit.trials import Trial, judged
from ptqjax.fit.ways import steps_of
from ptqjax.metrics.sums import decibels_of_mean, mean_ratio
from ptqjax.placement.own_reads import with_own_reads
from ptqjax.ranges.calibrate import calibrate_and_measure
from ptqjax.ranges.headroom import widened
from ptqjax.transforms import prepare
from ptqjax.transforms.rescale import rescale, with_free_bounds
from ptqjax.transforms.ties import find_ties
from tests.test_ties import Net

EXAMPLES = Path(__file__).parents[1] / "examples"
PER_CHANNEL = QuantizationConfig(granularity="channel")


@pytest.fixture(scope="module")
def unequal():
    """The network of the quickstart, whose channels differ by orders of magnitude: 27 dB are predicted to be won."""
    return prepare(ptqjax.fold_batch_norms(ptqjax.read(EXAMPLES / "digits.onnx"))[0])[0]


@pytest.fixture(scope="module")
def alike(unequal):
    """The same, scaled as its batch norms say: by them nothing is left to be won."""
    return ptqjax.equalize(unequal, scaling="noise", steps=steps_of(QuantizationConfig(granularity="tensor")))[0]


def batches():
    samples = np.load(EXAMPLES / "digits_calibration.npz")["input"]
    return [{"input": samples[start : start + 16]} for start in range(0, 64, 16)]


def tried(report):
    return [
        record.what.split(",")[0].removeprefix("scaling ") for record in report if record.what.startswith("scaling")
    ]


def predicted(report):
    (record,) = [record for record in report if "predicted gain, dB" in record.after]
    return record.after["predicted gain, dB"]


def test_what_is_predicted_to_win_clearly_has_no_scaling_at_all_to_beat(unequal):
    choice = scale_as_configured(unequal, batches(), PER_CHANNEL)
    assert predicted(choice.report) > 20
    assert set(tried(choice.report)) == {"off", "ranges", "noise"}
    assert tried(choice.report).count("off") == 1 < tried(choice.report).count("noise")
    assert choice.scaling in {"ranges", "noise"}


def test_nothing_but_the_model_as_it_is_is_tried_where_little_is_predicted(alike):
    choice = scale_as_configured(alike, batches(), PER_CHANNEL)
    assert predicted(choice.report) < 3
    assert set(tried(choice.report)) == {"off"}
    assert choice.model.graph == alike.graph


def test_thorough_tries_all_whatever_is_predicted(alike):
    choice = scale_as_configured(alike, batches(), replace(PER_CHANNEL, effort="thorough"))
    assert set(tried(choice.report)) == {"off", "ranges", "noise"}


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_fast_takes_the_word_of_the_prediction(unequal, alike, granularity):
    config = QuantizationConfig(granularity=granularity, effort="fast")
    for model, name, headroom in ((unequal, "noise", 1.2), (alike, "off", 1.0)):
        choice = scale_as_configured(model, batches(), config)
        assert not tried(choice.report)
        assert not [record for record in choice.report if record.transform == "learn_scales"]
        assert (choice.scaling, choice.headroom) == (name, headroom)


def test_eight_samples_predict_a_clear_win_as_batch_norms_do(unequal):
    """Without statistics the gain is measured."""
    without = unequal.replace(statistics={})
    gains = [predicted(scale_as_configured(each, batches(), replace(PER_CHANNEL, effort="fast")).report)
             for each in (unequal, without)]  # fmt: skip
    assert min(gains) > 20


def test_all_candidates_share_the_programs_that_look_and_judge(unequal, monkeypatch):
    """One trace of each for the trial's shape: the model left as it is has a bound per channel there, too."""
    traces = {"ptqjax.ranges.observing": 0, "ptqjax.fit.quantized_pass": 0}
    for name in traces:
        module = importlib.import_module(name)
        original = module.interpret

        def counted(*arguments, original=original, name=name, **settings):
            traces[name] += 1
            return original(*arguments, **settings)

        monkeypatch.setattr(module, "interpret", counted)
    # another graph than other tests have: what they traced does not count here
    model = unequal.replace(graph=replace(unequal.graph, name="shared programs"))
    scale_as_configured(model, batches(), replace(PER_CHANNEL, effort="thorough"))
    assert set(traces.values()) == {1}


def test_free_bounds_keep_the_function_and_the_structure_of_scaled_models(unequal):
    free = with_free_bounds(unequal)
    scaled = scale_as_configured(unequal, batches(), replace(PER_CHANNEL, scaling="noise")).model
    assert free.graph == scaled.graph
    x = batches()[0]
    wanted, found = (ptqjax.apply(model.graph, model.params, x)["output"] for model in (unequal, free))
    np.testing.assert_array_equal(found, wanted)


# What is kept of what was tried


def trial(decibels, name="off", correct="empirical", **changed):
    return Trial(
        name=name,
        model=ptqjax.read(EXAMPLES / "digits.onnx"),
        report=(),
        headroom=1.0,
        correct=correct,
        decibels=decibels,
        **changed,
    )


@pytest.mark.parametrize(
    ("with_it", "without", "is_kept"), [(30.0, 29.0, True), (30.0, 30.0, True), (29.9, 30.0, False)]
)
def test_a_stage_is_kept_where_it_is_no_worse_on_samples_held_back(with_it, without, is_kept):
    best, other, third = trial(with_it), trial(without, correct="none"), trial(without - 1)
    verdict = judged("correct", best, [third, other])
    assert verdict.kept is (best if is_kept else other)
    (record,) = verdict.records
    assert record.done is is_kept
    assert record.what == "stage correct"
    assert record.reason.startswith("kept: on samples held back" if is_kept else "left out: on samples held back")
    assert judged("correct", best, []) == (best, ())


@pytest.fixture
def calibrated(monkeypatch):
    """The models that trials calibrate, as they are told."""
    found = []

    def spied(model, *arguments, **settings):
        found.append(model)
        return calibrate_and_measure(model, *arguments, **settings)

    monkeypatch.setattr(trials, "calibrate_and_measure", spied)
    return found


def test_what_is_chosen_is_what_was_judged_and_what_its_name_gives(unequal, calibrated):
    choice = scale_as_configured(unequal, batches(), PER_CHANNEL)
    assert any(choice.model is model for model in calibrated)
    named = scale_as_configured(unequal, batches(), replace(PER_CHANNEL, scaling=choice.scaling))
    assert named.model.graph == choice.model.graph
    for name, value in choice.model.params.items():
        np.testing.assert_array_equal(named.model.params[name], value, err_msg=name)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("correct", ["empirical", "none"])
def test_what_is_worse_than_no_scaling_on_samples_held_back_is_never_kept(unequal, monkeypatch, granularity, correct):
    """Whatever is predicted: here scales are of another network, by mistake."""
    whole = ways.Ways.scaled

    def mistaken(self, name, config):
        model, report = whole(self, name, config)
        ties = find_ties(model)
        wild = np.append(0.0, np.random.default_rng(0).normal(0, 3, ties.num_scales - 1))
        return (model if name == "off" else rescale(model, ties, wild)), report

    monkeypatch.setattr(ways.Ways, "scaled", mistaken)
    config = QuantizationConfig(granularity=granularity, correct=correct)
    choice = scale_as_configured(unequal, batches(), config)
    assert predicted(choice.report) > 20
    records = [record for record in choice.report if record.what.startswith("scaling")]
    found = {record.what: record.after["SQNR on samples held back, dB"] for record in records}
    (kept,) = [record.what for record in records if record.done]
    assert found[kept] >= max(value for what, value in found.items() if what.startswith("scaling off"))
    if granularity == "channel":  # per tensor, the model as it is may be worse still
        assert choice.scaling == "off"
        assert choice.model is unequal


def test_each_candidate_is_judged_with_the_grids_that_its_name_headroom_and_correction_give(unequal):
    """As an independent path has it: scaled, calibrated, widened and corrected on one half, simulated on the other."""
    config = replace(PER_CHANNEL, effort="thorough")
    choice = scale_as_configured(unequal, batches(), config)
    samples = np.concatenate([batch["input"] for batch in batches()])
    used, held = ([{"input": samples[start::2][i : i + 16]} for i in (0, 16)] for start in (0, 1))
    records = [record for record in choice.report if record.what.startswith("scaling")]
    assert len(records) >= 6
    for record in records:
        name, headroom, correct = (part.split(" ")[-1] for part in record.what.split(", "))
        one = replace(config, scaling=name, correct=correct)
        model = scale_as_configured(unequal, batches(), one).model
        seen = calibrate_and_measure(model, used, [one], labels=[""])
        encodings = widened(model, seen.each[0][0], float(headroom), one, seen.num_values)
        rounded = model if correct == "none" else ptqjax.correct_biases(model, encodings, used)[0]
        simulate = ptqjax.simulate(rounded, encodings)
        evaluated = ptqjax.evaluate(
            lambda batch, params=rounded.params, given=encodings, simulate=simulate: simulate(params, given, batch),
            held,
            reference=lambda batch: ptqjax.apply(unequal.graph, unequal.params, batch),
        )
        assert record.after["SQNR on samples held back, dB"] == pytest.approx(evaluated.sqnr, abs=0.5), record.what


def test_what_finds_grids_at_run_time_is_judged_with_reads_of_its_own(calibrated):
    net = Net(rank=1, channels=8, dtype=np.float32).add("GlobalAveragePool").add("Flatten").matmul(8, 6).add("Relu")
    shortcut = net.tensor
    model = net.matmul(6, 6).add("Add", shortcut).matmul(6, 3).build()
    config = QuantizationConfig(activations="dynamic", granularity="channel", effort="thorough")
    random = np.random.default_rng(0)
    samples = [{"x": random.normal(size=(16, 8, 5)).astype(np.float32)} for _ in range(4)]
    assert with_own_reads(model, config) is not model, "the sum reads unrounded what a product rounds"
    scale_as_configured(model, samples, config)
    assert calibrated
    assert all(with_own_reads(each, config) is each for each in calibrated)


def stage_record(choice, stage):
    (record,) = [record for record in choice.report if record.what == f"stage {stage}"]
    return record


def test_a_correction_that_loses_on_samples_held_back_is_left_out(alike, monkeypatch):
    off_by_much = alike.replace(params=alike.params | {"classifier.bias": alike.params["classifier.bias"] + 5})
    monkeypatch.setattr(trials, "correct_each", lambda *_, **__: ((off_by_much, ()),))
    choice = scale_as_configured(alike, batches(), PER_CHANNEL)
    assert choice.correct == "none"
    assert not stage_record(choice, "correct").done


def test_what_is_judged_is_held_against_the_model_before_its_biases_were_corrected(alike):
    """As an independent path has it: calibrated on all, corrected on one batch, simulated on the other."""
    config = replace(PER_CHANNEL, headroom=1.0, scaling="off")
    given = [{"input": np.concatenate([batch["input"] for batch in batches()[i : i + 2]])} for i in (0, 2)]
    choice = scale_as_configured(alike, given, replace(config, scaling="auto"))
    found = {record.what.rpartition(" ")[2]: record for record in choice.report if record.what.startswith("scaling")}
    used, held = given[:1], given[1:]
    assert choice.calibrated is not None
    for correct, record in found.items():
        encodings = ptqjax.calibrate(alike, given, config)
        model = alike if correct == "none" else ptqjax.correct_biases(alike, encodings, used)[0]
        simulate = ptqjax.simulate(model, encodings)
        evaluated = ptqjax.evaluate(
            lambda batch, model=model, given=encodings, simulate=simulate: simulate(model.params, given, batch),
            held,
            reference=lambda batch: ptqjax.apply(alike.graph, alike.params, batch),
        )
        measured = record.after["SQNR on samples held back, dB"]
        assert measured == pytest.approx(evaluated.sqnr, abs=0.5)  # single roundings may flip


def test_equalization_that_loses_on_samples_held_back_is_left_out_as_a_whole(unequal, alike, monkeypatch):
    """The model that absorption is to have made is the one whose channels differ by orders of magnitude.

    Without batch norms: nobody can tell beforehand.
    """
    monkeypatch.setattr(selection, "_candidates", lambda *_: ("off",))
    unequal, alike = (model.replace(statistics={}) for model in (unequal, alike))
    choice = scale_as_configured(unequal, batches(), PER_CHANNEL, plain=alike)
    assert choice.model is alike
    assert not choice.absorbs
    record = stage_record(choice, "equalize")
    assert not record.done
    assert record.after["gain on samples held back, dB"] < -3
    choice = scale_as_configured(alike, batches(), PER_CHANNEL, plain=unequal)
    assert choice.model is alike
    assert choice.absorbs
    assert stage_record(choice, "equalize").done


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_absorption_that_is_predicted_to_gain_nothing_is_left_out_without_a_trial(unequal, alike, monkeypatch, effort):
    monkeypatch.setattr(selection, "_candidates", lambda *_: ("off",))
    config = replace(PER_CHANNEL, effort=effort)
    choice = scale_as_configured(unequal, batches(), config, plain=alike)
    assert choice.model is alike
    assert not choice.absorbs
    (record,) = [record for record in choice.report if record.what == "absorbed biases"]
    assert record.after["predicted gain, dB"] < -3
    assert not [record for record in choice.report if record.what == "stage equalize"]
    assert scale_as_configured(alike, batches(), config, plain=unequal).absorbs


def test_what_is_learned_begins_without_the_absorption_that_was_left_out(unequal, alike, monkeypatch):
    begun = []

    def learned(model, *_, **__):
        begun.append(model)
        return model, ()

    monkeypatch.setattr(selection, "_candidates", lambda *_: ("off",))
    monkeypatch.setattr(selection, "learn_scales", learned)
    policy = replace(selection.POLICIES["balanced"], learning_steps=1)
    monkeypatch.setattr(selection, "POLICIES", {**selection.POLICIES, "balanced": policy})
    choice = scale_as_configured(unequal, batches(), QuantizationConfig(granularity="tensor"), plain=alike)
    assert not choice.absorbs
    (model,) = begun
    expected = with_free_bounds(alike).params
    assert model.params.keys() == expected.keys()
    assert all(np.array_equal(model.params[name], value) for name, value in expected.items())


def test_an_output_of_zeros_adds_nothing_to_the_noise_that_trials_are_judged_by():
    one, other, zeros = (4.0, 1.0), (2.0, 0.25), (0.0, 3.0)
    assert decibels_of_mean({"a": one, "b": other, "c": zeros}) == -10 * np.log10(
        mean_ratio({"a": one, "b": other, "c": zeros})
    )
    assert mean_ratio({"a": one, "b": other, "c": zeros}) == pytest.approx((1 / 4 + 1 / 8) / 3)
    assert decibels_of_mean({"a": zeros}) == decibels_of_mean({}) == decibels_of_mean({"a": (4.0, np.nan)}) == -np.inf
    assert decibels_of_mean({"a": (4.0, 0.0)}) > 3000


def test_what_changes_nothing_is_not_judged(alike):
    choice = scale_as_configured(alike, batches(), replace(PER_CHANNEL, correct="none"))
    assert [record for record in choice.report if record.what.startswith("stage")] == []


def test_names_that_match_nothing_are_found_before_anything_runs(unequal, monkeypatch):
    monkeypatch.setattr(selection, "_expected_gain", None)  # the first thing that would run
    for config in (replace(PER_CHANNEL, exclude=("nosuch*",)), replace(PER_CHANNEL, exclude_nodes=("nosuch",))):
        with pytest.raises(ConfigError, match="nosuch"):
            scale_as_configured(unequal, batches(), config)


def test_operators_that_scaling_makes_are_no_mistake(alike):
    rule = Rule(operators=("Min",), of="activations", dtype="uint16")  # of its Clips
    config = replace(PER_CHANNEL, rules=(rule,), scaling="noise")
    assert scale_as_configured(alike, batches(), config).model.graph.nodes
