"""Subgraphs: branches and loops compute what ONNX Runtime computes, under jit as well, and have gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from ptqjax.config import QuantizationConfig
from ptqjax.errors import DataDependentError, ModelError
from ptqjax.lowering import apply
from ptqjax.onnx_io import read
from ptqjax.ranges.calibrate import calibrate
from ptqjax.simulation import simulate

_HEADER = '<ir_version: 8, opset_import: ["" : 17]>'

_BRANCHES = """
g (float[2, 3] x, bool c) => (float[2, 3] y) {
  w = Exp(x)
  y = If(c) <
    then_branch = plus () => (float[2, 3] a) { a = Add(w, x) },
    else_branch = minus () => (float[2, 3] b) { t = Sub(w, x)  b = Relu(t) }
  >
}
"""

_COUNTED = """
g (float[2, 3] x) => (float[2, 3] y, float[4, 3] rows) <int64 n = {4}, bool t = {1}> {
  y, rows = Loop(n, t, x) <
    body = b (int64 i, bool c, float[2, 3] v) => (bool o, float[2, 3] z, float[3] row) {
      o = Identity(c)
      k = Cast <to = 1> (i)
      s = Add(v, k)
      z = Tanh(s)
      first = Constant <value_ints = [0]> ()
      r = Gather <axis = 0> (z, first)
      row = Squeeze(r, first)
    }
  >
}
"""

_CONDITIONAL = """
g (float[3] x, int64 n) => (float[3] y) <bool t = {1}, float limit = {50.0}> {
  y = Loop(n, t, x) <
    body = b (int64 i, bool c, float[3] v) => (bool o, float[3] z) {
      z = Add(v, v)
      m = ReduceMax <keepdims = 0> (z)
      o = Less(m, limit)
    }
  >
}
"""

_UNBOUNDED = """
g (float[3] x) => (float[3] y) <bool t = {1}, int64 n = {9223372036854775807}, float limit = {50.0}> {
  y = Loop(n, t, x) <
    body = b (int64 i, bool c, float[3] v) => (bool o, float[3] z) {
      z = Add(v, v)
      m = ReduceMax <keepdims = 0> (z)
      o = Less(m, limit)
    }
  >
}
"""

_ENDLESS = """
g (float[1] x) => (float[1] y) {
  y = Loop(, , x) <
    body = b (int64 i, bool c, float[1] v) => (bool o, float[1] z) { o = Identity(c)  z = Add(v, v) }
  >
}
"""

_GROWING = """
g (float[1, 3] x, int64 n) => (float[N, 3] y) <bool t = {1}> {
  y = Loop(n, t, x) <
    body = b (int64 i, bool c, float[M, 3] v) => (bool o, float[K, 3] z) {
      o = Identity(c)
      z = Concat <axis = 0> (v, x)
    }
  >
}
"""

_SCAN = """
g (float[3] start, float[4, 3] x, float[3, 4] w) => (float[3] last, float[3, 4] sums) {
  last, sums = Scan(start, x, w) <
    num_scan_inputs = 2, scan_input_axes = [0, 1], scan_input_directions = [1, 0],
    scan_output_axes = [1], scan_output_directions = [1],
    body = b (float[3] s, float[3] e, float[3] f) => (float[3] t, float[3] u) {
      p = Mul(e, f)
      t = Add(s, p)
      u = Identity(t)
    }
  >
}
"""

_MISMATCHED = """
g (float[2, 3] x, bool c) => (float[N, 3] y) {
  y = If(c) <
    then_branch = twice () => (float[4, 3] a) { a = Concat <axis = 0> (x, x) },
    else_branch = once () => (float[2, 3] b) { b = Relu(x) }
  >
}
"""


def _proto(text):
    return onnx.parser.parse_model(_HEADER + text)


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _cases():
    x, three = _random(2, 3), _random(3)
    return [
        pytest.param(_BRANCHES, {"x": x, "c": np.array(True)}, id="then"),
        pytest.param(_BRANCHES, {"x": x, "c": np.array(False)}, id="else"),
        pytest.param(_COUNTED, {"x": x}, id="counted"),
        pytest.param(_CONDITIONAL, {"x": np.abs(three), "n": np.array(100)}, id="ends by its condition"),
        pytest.param(_CONDITIONAL, {"x": np.abs(three), "n": np.array(2)}, id="ends by its count"),
        pytest.param(_CONDITIONAL, {"x": three, "n": np.array(0)}, id="no trip"),
        pytest.param(_UNBOUNDED, {"x": np.abs(three)}, id="ends by its condition, the count has no end"),
        pytest.param(_UNBOUNDED.replace("Loop(n, ", "Loop(, "), {"x": np.abs(three)}, id="has no count"),
        pytest.param(_SCAN, {"start": three, "x": _random(4, 3), "w": _random(3, 4)}, id="scan"),
    ]


@pytest.mark.filterwarnings("ignore:tensor 'n' is of a 64-bit type")
@pytest.mark.parametrize(("text", "inputs"), _cases())
def test_subgraphs_compute_what_onnx_runtime_computes(text, inputs):
    proto = _proto(text)
    expected = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, inputs)
    model = read(proto)
    concrete = apply(model.graph, model.params, inputs)
    jitted = jax.jit(apply, static_argnums=0)(model.graph, model.params, inputs)
    for (name, value), wanted in zip(concrete.items(), expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)  # a few roundings
        np.testing.assert_allclose(jitted[name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("text", "inputs"), [(_COUNTED, {}), (_BRANCHES, {"c": np.array(True)})])
def test_gradients_go_through_loops_and_branches(text, inputs):
    model, x = read(_proto(text)), _random(2, 3)

    def total(x):
        return sum(jnp.sum(output) for output in apply(model.graph, model.params, {"x": x, **inputs}).values())

    step = np.zeros_like(x)
    step[0, 2] = 1e-2
    slope = (total(x + step) - total(x - step)) / 2e-2
    np.testing.assert_allclose(jax.grad(total)(x)[0, 2], slope, rtol=1e-2)  # second order in the step


def test_branches_of_two_shapes_need_a_known_condition():
    model, x = read(_proto(_MISMATCHED)), _random(2, 3)
    for condition, rows in ((True, 4), (False, 2)):
        outputs = apply(model.graph, model.params, {"x": x, "c": np.array(condition)})
        assert outputs["y"].shape == (rows, 3)
    with pytest.raises(DataDependentError, match=r"If \(producing 'y'\).*outside jit"):
        jax.jit(apply, static_argnums=0)(model.graph, model.params, {"x": x, "c": np.array(True)})


@pytest.mark.filterwarnings("ignore:tensor 'n' is of a 64-bit type")
def test_a_loop_whose_values_grow_needs_a_known_count():
    model, x = read(_proto(_GROWING)), _random(1, 3)
    outputs = apply(model.graph, model.params, {"x": x, "n": np.array(3)})
    np.testing.assert_array_equal(outputs["y"], np.repeat(x, 4, axis=0))
    with pytest.raises(DataDependentError, match=r"Loop \(producing 'y'\): the number of its trips depends on data"):
        jax.jit(apply, static_argnums=0)(model.graph, model.params, {"x": x, "n": np.array(3)})


def test_a_loop_without_an_end_is_refused():
    model = read(_proto(_ENDLESS))
    with pytest.raises(ModelError, match="neither a number of trips nor a condition"):
        apply(model.graph, model.params, {"x": _random(1)})


def test_a_model_with_branches_is_quantized_outside_of_them():
    model = read(_proto(_BRANCHES))
    batches = [{"x": _random(2, 3, seed=seed), "c": np.array(seed == 0)} for seed in range(2)]
    encodings = calibrate(model, batches, QuantizationConfig(target="generic-per-channel"))  # rounds everywhere
    assert set(encodings) >= {"x", "w"}
    outputs = simulate(model, encodings)(model.params, encodings, batches[0])
    expected = apply(model.graph, model.params, batches[0])
    # rounded three times, on grids of 255 steps over the range of the values
    np.testing.assert_allclose(outputs["y"], expected["y"], atol=4 * float(np.ptp(expected["y"])) / 255)
