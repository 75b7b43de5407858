"""Integer products against integer arithmetic in NumPy, and against ONNX Runtime."""

import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.ops.convolution import conv
from ptqjax.ops.integer import conv_integer, matmul_integer
from tests.single_node import assert_as_in_onnxruntime


def _integers(dtype, *shape, seed=0):
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape).astype(dtype)


@pytest.mark.parametrize("w_type", [np.int8, np.uint8])
@pytest.mark.parametrize("x_type", [np.int8, np.uint8])
def test_products_of_integers_are_exact(x_type, w_type):
    """With sums far above 2**24, where float32 is not."""
    a, b = _integers(x_type, 2, 3, 4, 2000), _integers(w_type, 2000, 5, seed=1)
    rows, columns = _integers(x_type, 2, 3, 4, 1, seed=2), _integers(w_type, 5, seed=3)
    expected = (a.astype(np.int64) - rows) @ (b.astype(np.int64) - columns)
    found = np.asarray(matmul_integer(a, b, rows, columns))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int32


def test_a_vector_of_zero_points_is_one_per_row():
    a, b, rows = _integers(np.uint8, 4, 6), _integers(np.int8, 6, 5, seed=1), _integers(np.uint8, 4, seed=2)
    expected = (a.astype(np.int64) - rows[:, None]) @ b.astype(np.int64)
    np.testing.assert_array_equal(matmul_integer(a, b, rows), expected)


@pytest.mark.parametrize(
    ("a", "b"), [((6,), (6, 5)), ((4, 6), (6,)), ((6,), (6,)), ((2, 4, 6), (6,)), ((6,), (3, 6, 5))]
)
def test_vectors_are_multiplied_as_matmul_does(a, b):
    x, w = _integers(np.uint8, *a), _integers(np.int8, *b, seed=1)
    zero = np.array(3, np.uint8)
    np.testing.assert_array_equal(matmul_integer(x, w, zero), np.matmul(x.astype(np.int64) - 3, w.astype(np.int64)))


@pytest.mark.parametrize("w_type", [np.int8, np.uint8])
def test_matrix_products_are_onnxruntimes(w_type):
    a = _integers(np.uint8, 2, 4, 6)
    b = _integers(w_type, 2, 6, 5, seed=1)
    if w_type == np.int8:
        b = b // np.int8(2)  # 7 bits: the runtime's sums of 8 saturate on CPUs without VNNI
    inputs = [a, b, np.array(7, np.uint8), np.array(9, w_type)]
    assert_as_in_onnxruntime("MatMulInteger", inputs, atol=0, opset=10, outputs=(np.int32,), jit=True)


@pytest.mark.parametrize("group", [1, 2])
def test_integer_convolutions_are_onnxruntimes(group):
    window = {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2], "group": group}
    x, w = _integers(np.uint8, 2, 4, 8, 9), _integers(np.uint8, 6, 4 // group, 3, 2, seed=1)
    inputs = [x, w, np.array(120, np.uint8), np.array(9, np.uint8)]
    assert_as_in_onnxruntime("ConvInteger", inputs, atol=0, opset=10, outputs=(np.int32,), jit=True, **window)


def test_zero_points_of_a_convolution_may_be_one_per_output_channel():
    x, w, zeros = _integers(np.int8, 1, 3, 6, 5), _integers(np.int8, 4, 3, 3, 3, seed=1), _integers(np.int8, 4, seed=2)
    kernels = jnp.asarray(w, np.float32) - zeros.reshape(-1, 1, 1, 1)
    expected = conv(jnp.asarray(x, np.float32) + 3, kernels, pads=(1, 1, 1, 1))
    found = conv_integer(x, w, np.array(-3, np.int8), zeros, pads=(1, 1, 1, 1))
    np.testing.assert_array_equal(found, np.asarray(expected).astype(np.int32))
