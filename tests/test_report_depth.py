"""What is measured along the depth: against NumPy, tensor by tensor, and independent of how the samples are cut."""

import dataclasses

import numpy as np
import pytest

from ptqjax.encodings.encoding import Encoding, make_encoding
from ptqjax.ir import Model
from ptqjax.report import depth
from ptqjax.report.depth import measure_depth, pieces
from ptqjax.report.tensor_runs import runs_in_runtime
from tests.models import build, node


def network() -> Model:
    """y = relu(x a) b, and z = min(y, 1): what lies above 1 is cut off next."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(5, 6)), "b": rng.normal(size=(6, 4)), "one": np.ones(())}
    nodes = [
        node("MatMul", ["x", "a"], "h"),
        node("Relu", ["h"], "r"),
        node("MatMul", ["r", "b"], "y"),
        node("Min", ["y", "one"], "z"),
    ]
    params = {name: value.astype(np.float32) for name, value in params.items()}
    return build(nodes, params, input_shape=("N", 5), outputs=["z"])


def grid(scale: float, *, dtype: str = "int8") -> Encoding:
    return make_encoding(np.float32(scale), np.float32(0), dtype=dtype)


ENCODINGS = {"x": grid(0.02), "a": grid(0.03), "r": grid(0.05, dtype="uint4"), "b": grid(0.2, dtype="int4")}
BOTH = ENCODINGS | {"y": grid(1 / 127), "z": grid(1 / 127)}


def data(count: int = 20) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 5)).astype(np.float32)


def rounded(value: np.ndarray, encoding: Encoding) -> np.ndarray:
    codes = np.clip(np.round(value / encoding.scale), encoding.qmin, encoding.qmax)
    return codes * np.float64(encoding.scale)


def test_every_sum_is_that_of_the_two_models_computed_apart():
    model, x = network(), data(16)
    found = measure_depth(model, model, ENCODINGS, [{"x": x}]).sums
    a, b = (model.params[name].astype(np.float64) for name in "ab")
    v = np.maximum(rounded(x, ENCODINGS["x"]) @ rounded(a, ENCODINGS["a"]), 0)
    q, exact = rounded(v, ENCODINGS["r"]), np.maximum(x @ a, 0)
    outside = v > (15 + 0.5) * 0.05
    assert 0 < outside.mean() < 1
    assert found["r"].signal == pytest.approx(np.sum(exact**2), rel=1e-4)
    assert found["r"].noise == pytest.approx(np.sum((q - exact) ** 2), rel=1e-3)
    assert found["r"].own_noise == pytest.approx(np.sum((q - v) ** 2), rel=1e-3)
    assert found["r"].clip_noise == pytest.approx(np.sum((q - v)[outside] ** 2), rel=1e-3)
    assert found["r"].num_clipped == outside.sum()
    assert found["r"].num_values == v.size
    assert found["b"].own_noise == pytest.approx(np.sum((rounded(b, ENCODINGS["b"]) - b) ** 2), rel=1e-4)
    z = np.minimum(q @ rounded(b, ENCODINGS["b"]), 1)
    assert found["z"].noise == pytest.approx(np.sum((z - np.minimum(exact @ b, 1)) ** 2), rel=1e-3)
    assert found["z"].own_noise == 0  # it has no grid


def test_the_runtime_and_the_compiled_program_find_the_same(monkeypatch):
    model, x = network(), data(16)
    names = ("x", "r", "y", "z")
    assert runs_in_runtime(model, model, BOTH, names, {"x": x}) is not None
    in_runtime = measure_depth(model, model, BOTH, [{"x": x}])
    monkeypatch.setattr(depth, "runs_in_runtime", lambda *_: None)
    compiled = measure_depth(model, model, BOTH, [{"x": x}])
    assert list(in_runtime.sums) == list(compiled.sums)
    for name, sums in in_runtime.sums.items():
        np.testing.assert_allclose(sums, compiled.sums[name], rtol=1e-4, err_msg=name)
    for name, histogram in in_runtime.histograms.items():
        np.testing.assert_array_equal(histogram.counts, compiled.histograms[name].counts)


def test_how_samples_are_cut_makes_no_difference():
    model, x = network(), data(16)
    whole = measure_depth(model, model, ENCODINGS, [{"x": x}])
    parts = measure_depth(model, model, ENCODINGS, [{"x": x[:4]}, {"x": x[4:8]}, {"x": x[8:]}])
    assert whole.num_samples == parts.num_samples == 16
    for name, sums in whole.sums.items():
        assert sums.noise == pytest.approx(parts.sums[name].noise, rel=1e-4)
        assert sums.num_values == parts.sums[name].num_values
    for name, histogram in whole.histograms.items():
        assert np.array_equal(histogram.counts, parts.histograms[name].counts)


def test_histograms_hold_what_meets_the_grid():
    model, x = network(), data(8)
    found = measure_depth(model, model, ENCODINGS, [{"x": x}]).histograms
    assert set(found) == {"x", "r"}
    assert found["x"].counts.sum() == x.size
    width = 2.0 ** int(found["x"].exponent)
    expected = np.histogram(x, bins=(np.arange(4097) - 2048) * width)[0]
    assert np.array_equal(found["x"].counts, expected)


def test_a_corrected_bias_counts_as_noise_or_as_its_cure():
    model = network()
    shifted = dataclasses.replace(model, params=model.params | {"a": model.params["a"] + np.float32(0.5)})
    none = {name: encoding.replace(enabled=np.asarray(False)) for name, encoding in ENCODINGS.items()}
    found = measure_depth(model, shifted, none, [{"x": data(8)}]).sums
    assert found["r"].noise > 0.01 * found["r"].signal
    assert found["r"].own_noise == found["r"].num_clipped == 0


def test_what_the_next_operator_cuts_off_is_no_loss_of_the_grid():
    model, x = network(), data(8)
    assert "y" not in measure_depth(model, model, BOTH, [{"x": x}]).sums
    unlike = BOTH | {"y": grid(1 / 100)}
    found = measure_depth(model, model, unlike, [{"x": x}]).sums
    assert found["y"].num_clipped > 0


def test_no_more_samples_are_read_than_asked_for():
    graph = network().graph
    batches = [{"x": data(20)}, {"x": data(20)}]
    assert [len(piece["x"]) for piece in pieces(graph, batches, 32)] == [8, 8, 8, 8]
    assert [len(piece["x"]) for piece in pieces(graph, batches, 3)] == [3]
    assert [len(piece["x"]) for piece in pieces(graph, [{"x": data(5)}] * 3, 100)] == [5, 5, 5]


def test_batches_of_a_fixed_size_stay_whole():
    model = network()
    spec = dataclasses.replace(model.graph.inputs[0], shape=(20, 5))
    graph = dataclasses.replace(model.graph, inputs=(spec,))
    assert [len(piece["x"]) for piece in pieces(graph, [{"x": data(20)}] * 3, 32)] == [20, 20]
