"""Calibration under many configurations at once: what one by one gives, from one pass and one program."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from ptqjax.config import QuantizationConfig, Rule
from ptqjax.errors import ConfigError, DataError
from ptqjax.ir import Model
from ptqjax.ranges.calibrate import calibrate, calibrate_and_report, calibrate_each
from ptqjax.ranges.search import choose_encoding
from tests.models import build, node

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


DATA = [{"x": floats(4, 3, 8, 8) * spread} for spread in (1, 3, 0.5)]


@pytest.fixture(scope="module")
def model() -> Model:
    """Two convolutions, a sum, a pool and a product: ties, groups, a bias, a parameter that is added."""
    nodes = [
        node("Conv", ["x", "w1", "b1"], "c1", pads=(1, 1, 1, 1)),
        node("Relu", ["c1"], "r1"),
        node("Conv", ["r1", "w2"], "c2", pads=(1, 1, 1, 1)),
        node("Add", ["c2", "r1"], "a"),
        node("Mul", ["a", "m"], "p"),
        node("GlobalAveragePool", ["p"], "g"),
        node("Flatten", ["g"], "f"),
        node("MatMul", ["f", "w3"], "y"),
    ]
    params = {"w1": floats(6, 3, 3, 3), "b1": floats(6) * 1e8, "w2": floats(6, 6, 3, 3), "m": floats(1, 6, 1, 1)}
    return build(nodes, params | {"w3": floats(6, 5)}, input_shape=("n", 3, 8, 8), outputs=["y"])


CONFIGS = [
    QuantizationConfig(ranges="min-max"),
    QuantizationConfig(ranges="sqnr", weights="int4"),
    QuantizationConfig(ranges="sqnr", activations="uint4", activations_symmetric="unsigned"),
    QuantizationConfig(ranges="mse", granularity="tensor", weights="int6"),
    QuantizationConfig(ranges="moving-average", activations="int8", activations_symmetric=True, exclude=("a",)),
    QuantizationConfig(ranges="percentile:99", rules=(Rule(tensors=("r1", "w2"), ranges="entropy"),)),
    QuantizationConfig(activations="uint16", weights="int3", exclude=("p", "w3")),
    QuantizationConfig(weights="float8_e4m3fn", activations="float8_e5m2", biases="float"),
    QuantizationConfig(weights="bfloat16", activations="float16", biases="float"),
    QuantizationConfig(ranges="sqnr", compatibility="aimet"),
    QuantizationConfig(ranges="min-max", weights="int8", activations="uint8", power_of_two=True),
    QuantizationConfig(ranges="min-max"),
]


def assert_equal(found: Any, expected: Any) -> None:
    """To the bit, leaves and structure."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_many_configurations_give_what_each_gives_alone(model: Model) -> None:
    together = calibrate_each(model, DATA, CONFIGS)
    for config, (encodings, report) in zip(CONFIGS, together, strict=True):
        alone, alone_report = calibrate_and_report(model, DATA, config)
        assert_equal(encodings, alone)
        assert report == alone_report
    assert any(report for _, report in together)  # a bias that raised its weight's scale


def test_one_pass_and_one_trace_serve_all_configurations(model: Model, traces: list[None]) -> None:
    passes: list[int] = []

    def stream() -> Iterator[dict[str, np.ndarray]]:
        passes.append(0)
        yield from DATA

    class Batches:
        def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
            return stream()

    calibrate_each(model.replace(graph=model.graph), Batches(), CONFIGS)
    assert len(passes) == 1
    assert len(traces) <= 1
    traces.clear()
    calibrate_each(model, DATA, CONFIGS[::-1])
    assert not traces  # their order is not part of the program


def test_configurations_are_calibrated_without_data_too(model: Model) -> None:
    configs = [
        QuantizationConfig(weights=name, exclude=("x", "r1", "c2", "a", "p", "g", "y")) for name in ("int4", "int8")
    ]
    for config, (encodings, _) in zip(configs, calibrate_each(model, None, configs), strict=True):
        assert_equal(encodings, calibrate(model, None, config))


def test_frozen_encodings_are_kept_by_all(model: Model) -> None:
    frozen = {"r1": choose_encoding(np.asarray([0.0, 9.0], np.float32), dtype="uint8", ranges="min-max")}
    for encodings, _ in calibrate_each(model, DATA, CONFIGS[:3], frozen=frozen):
        assert encodings["r1"] is frozen["r1"]


def test_errors_say_which_configuration_or_batch_they_are_about(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"configuration 1: .*nowhere"):
        calibrate_each(model, DATA, [CONFIGS[0], QuantizationConfig(exclude=("nowhere",))])
    with pytest.raises(DataError, match="batches is empty"):
        calibrate_each(model, [], CONFIGS[:2])
    assert calibrate_each(model, DATA, []) == ()
