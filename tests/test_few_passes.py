"""What spares passes and programs changes no result: parameters rounded before, means kept, either side's table."""

import importlib
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

import ptqjax
from ptqjax.agreement import saturates_here
from ptqjax.config import QuantizationConfig
from ptqjax.errors import ConfigError
from ptqjax.fit.bias_correction import correct_each, layer_axes
from ptqjax.ranges.calibrate import calibrate, calibrate_and_measure
from ptqjax.report.facts import PLAIN_SESSION
from ptqjax.report.measure import RUNTIME, SIMULATION, MeasuredStage, measure
from ptqjax.simulation import round_parameters, simulate
from tests.models import mobile_block

X = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32)
BATCHES = [{"x": X[:4]}, {"x": X[4:]}]


@pytest.fixture(scope="module")
def model():
    return mobile_block(dtype=np.float32)


@pytest.mark.parametrize("settings", [{}, {"granularity": "tensor", "weights": "int4"}, {"exclude": ("*",)}])
def test_a_model_with_rounded_parameters_simulates_what_the_model_does(model, settings):
    encodings = calibrate(model, BATCHES, QuantizationConfig(**settings))
    rounded, left = round_parameters(model, encodings)
    assert not set(left) & set(model.params)
    wanted, found = (
        simulate(each, grids)(each.params, grids, BATCHES[0]) for each, grids in ((model, encodings), (rounded, left))
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("bound", [2**28, 0])
def test_means_of_the_calibrating_pass_correct_as_measured_ones_do(model, monkeypatch, bound):
    """Also where they are too many to be kept: then they are measured again."""
    monkeypatch.setattr(importlib.import_module("ptqjax.ranges.observing"), "_MOST_BYTES_OF_MEANS", bound)
    seen = calibrate_and_measure(model, BATCHES, [QuantizationConfig()], measured=layer_axes(model))
    assert (seen.means is None) is (bound == 0)
    encodings = seen.each[0][0]
    ((kept, _),) = correct_each(model, [encodings], BATCHES, means=seen.means)
    ((measured, _),) = correct_each(model, [encodings], BATCHES)
    for name, value in measured.params.items():  # sums of a channel, in another program: units in the last place
        np.testing.assert_allclose(kept.params[name], value, rtol=1e-5, atol=1e-6)


def test_the_table_is_simulated_where_the_runtime_takes_a_model_not(model, monkeypatch):
    encodings = calibrate(model, BATCHES)
    stages = [MeasuredStage(name="fold", model=model, encodings=encodings, keeps_function=True)]
    in_runtime = measure(model, stages, BATCHES, None)

    def refuse(*_, **__):
        raise ConfigError("onnxruntime is not installed")

    monkeypatch.setattr(importlib.import_module("ptqjax.report.measure"), "session", refuse)
    simulated = measure(model, stages, BATCHES, None)
    assert (in_runtime.by, simulated.by) == (RUNTIME, SIMULATION)
    one, other = (table.rows[1].metrics["sqnr_db"] for table in (in_runtime, simulated))
    assert abs(one - other) < 3  # roundings that fall otherwise, on a few numbers


def test_a_simulated_table_has_no_row_of_a_plain_session(model, monkeypatch):
    """The simulation's sums are exact: such a row would show what no session without options computes."""
    encodings = calibrate(model, BATCHES)
    stage = MeasuredStage(name="fold", model=model, encodings=encodings, keeps_function=True)
    plain = replace(stage, name=PLAIN_SESSION, is_plain=True, keeps_function=False)
    stages = [stage, plain]
    assert [row.stage for row in measure(model, stages, BATCHES, None).rows] == ["float", "fold", PLAIN_SESSION]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert [row.stage for row in measure(model, stages, BATCHES, None).rows] == ["float", "fold"]


def test_a_model_whose_sums_may_saturate_is_explained_without_the_runtime(model, monkeypatch):
    config = QuantizationConfig(equalize=False, correct="none", ranges="min-max")
    result = ptqjax.quantize(model, BATCHES, replace(config, target="generic-per-channel"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    saturates_here.cache_clear()
    try:
        facts = ptqjax.explain(model, result, BATCHES, config, full=False)
        assert not saturates_here()
    finally:
        saturates_here.cache_clear()
    assert facts["saturating"]
    assert [row["stage"] for row in facts["stages"]] == ["float", "fold"]


def test_grids_of_all_rows_are_from_the_same_samples(model, monkeypatch):
    """Also where the table itself is of the first 64 alone."""
    explanation = importlib.import_module("ptqjax.report.explanation")
    seen = []

    def watched(model, batches, config):
        seen.append(sum(len(batch["x"]) for batch in batches))
        return calibrate(model, batches, config)

    batches = [{"x": np.tile(X, (12, 1, 1, 1))}, {"x": 2 * X}]
    config = QuantizationConfig(scaling="ranges", correct="none", ranges="min-max", rounding="nearest")
    result = ptqjax.quantize(model, batches, config)
    monkeypatch.setattr(explanation, "calibrate", watched)
    facts = ptqjax.explain(model, result, batches, config, full=False)
    assert facts["measured_on"] == "72 of the 78 calibration samples"
    assert seen == [78]
