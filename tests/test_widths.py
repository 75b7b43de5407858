"""64-bit numbers inside graphs whose inputs and outputs are narrower: concrete arrays keep their width."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx.parser
import pytest

from ptqjax.errors import ModelError
from ptqjax.lowering import apply
from ptqjax.onnx_io import read

_HEADER = '<ir_version: 8, opset_import: ["" : 17]>'

_CLIPPED = """
g (float[2, 3] x) => (float[2] y) <int64 zero = {0}, int64 large = {9223372036854775807}> {
  i = ArgMax <axis = 1, keepdims = 0> (x)
  c = Clip(i, zero, large)
  y = Cast <to = 1> (c)
}
"""

_SUMMED = """
g (float[2, 3] x) => (float[2] y) <int64 large = {5000000000}, int64 million = {1000000}> {
  i = ArgMax <axis = 1, keepdims = 0> (x)
  s = Add(i, large)
  q = Div(s, million)
  y = Cast <to = 1> (q)
}
"""

_CAST_IN_A_BRANCH = """
g (float[2] x, bool c) => (float[2] y) {
  y = If(c) <
    then_branch = wide () => (float[2] a) { d = Cast <to = 11> (x)  p = Mul(d, d)  s = Sign(p)  a = Cast <to = 1> (s) },
    else_branch = same () => (float[2] b) { b = Identity(x) }
  >
}
"""

_A_SEQUENCE_IS_NO_TENSOR = """
g (float[2] x) => (float[2] y) { s = SequenceConstruct(x, x)  y = Add(s, x) }
"""


def _model(text):
    return read(onnx.parser.parse_model(_HEADER + text))


@pytest.mark.parametrize(("text", "expected"), [(_CLIPPED, [2, 0]), (_SUMMED, [5000, 5000])], ids=["clip", "sum"])
def test_constants_beyond_32_bits_do_not_wrap_around(text, expected):
    model, x = _model(text), np.array([[1, 2, 3], [9, 4, 3]], np.float32)
    np.testing.assert_array_equal(apply(model.graph, model.params, {"x": x})["y"], np.float32(expected))
    with pytest.warns(UserWarning, match="'large' is of a 64-bit type"):
        jax.jit(lambda x: apply(model.graph, model.params, {"x": x}))(x)


def test_a_cast_to_64_bits_inside_a_branch_keeps_its_width():
    """The square of 1e-30 is no number of float32 but 0."""
    model = _model(_CAST_IN_A_BRANCH)
    outputs = apply(model.graph, model.params, {"x": np.full(2, 1e-30, np.float32), "c": np.array(True)})
    np.testing.assert_array_equal(outputs["y"], np.ones(2, np.float32))


def test_a_sequence_that_reaches_an_operator_on_tensors_is_an_error_that_names_the_node():
    model = _model(_A_SEQUENCE_IS_NO_TENSOR)
    with pytest.raises(ModelError, match=r"Add \(producing 'y'\) cannot be computed on TensorSequence, float32\[2\]"):
        apply(model.graph, model.params, {"x": np.ones(2, np.float32)})


def test_what_32_bit_jax_has_narrowed_is_widened_to_what_the_graph_declares():
    """A convolution takes operands of one type."""
    model = _model("""
    g (double[1, 1, 2, 2] x) => (double[1, 1, 1, 1] y) <double[1, 1, 2, 2] w = {1, 2, 3, 4}> { y = Conv(x, w) }
    """)
    outputs = apply(model.graph, model.params, {"x": jnp.ones((1, 1, 2, 2))})
    assert outputs["y"].dtype == np.float64
    np.testing.assert_array_equal(outputs["y"], np.full((1, 1, 1, 1), 10.0))
