"""Reductions and products: old opsets, empty sets, integers, what is left where nothing is summed."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ptqjax.errors import ModelError
from ptqjax.ops import find_lowering
from ptqjax.ops.layout import to_channels_last, to_onnx
from tests.both_modes import assert_both_as_in_onnxruntime, assert_same, in_jit, in_numpy
from tests.single_node import by_us, single_node

_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
_ROUNDING = 1e-5  # sums of two dozen float32 values, in another order


def _random(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def _drawn(*shape, low=1, high=6, dtype=np.int64, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def _axes(*axes):
    return np.array(axes, np.int64)


@pytest.mark.parametrize("name", _REDUCTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int64])
def test_reductions_are_those_of_onnx_runtime(name, dtype):
    """With positive numbers: the logarithm of what is negative is no integer."""
    x, op_type = _drawn(2, 3, 2, dtype=dtype), f"Reduce{name}"
    input_since = 13 if name == "Sum" else 18
    for opset, inputs, attributes in (
        (8, [x], {"keepdims": 0}),
        (11, [x], {"axes": [1, -1]}),
        (input_since, [x, _axes(-2)], {"keepdims": 0}),
        (input_since, [x, _axes()], {}),
        (input_since, [x, _axes()], {"noop_with_empty_axes": 1}),
    ):
        assert_both_as_in_onnxruntime(op_type, inputs, opset=opset, tolerance=_ROUNDING, **attributes)


@pytest.mark.parametrize("name", [name for name in _REDUCTIONS if name != "Mean"])
def test_reductions_of_nothing_are_those_of_onnx_runtime(name):
    for inputs in ([np.zeros((2, 0, 3), np.float32), _axes(1)], [np.zeros((2, 0, 3), np.float32), _axes(2)]):
        opset = 13 if name == "Sum" else 18
        assert_both_as_in_onnxruntime(f"Reduce{name}", inputs, opset=opset)


@pytest.mark.parametrize("name", _REDUCTIONS)
def test_reductions_of_a_scalar_are_those_of_onnx_runtime(name):
    assert_both_as_in_onnxruntime(f"Reduce{name}", [np.array(2, np.float32)], opset=11, tolerance=_ROUNDING)


def test_the_mean_of_nothing_is_no_number():
    for way in (in_numpy, in_jit):
        assert_same(
            way("ReduceMean", [np.zeros((2, 0), np.float32), _axes(1)], opset=18), [np.full((2, 1), np.float32(np.nan))]
        )


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_means_of_integers_are_exact_and_cut_towards_zero(dtype):
    large = 2**24 + 1 if dtype == np.int32 else 2**53 + 1
    x = np.array([[large, large], [-1, 0], [-3, -4], [3, 4]], dtype)
    for way in (in_numpy, in_jit):
        (found,) = way("ReduceMean", [x, _axes(1)], opset=18, keepdims=0)
        assert_same([found], [np.array([large, 0, -3, 3], dtype)])


def test_no_sum_of_exponentials_overflows():
    x = np.array([[1000, 999], [-1000, -1001], [-np.inf, -np.inf]], np.float32)
    expected = np.array([1000 + np.log1p(np.exp(-1)), -1000 + np.log1p(np.exp(-1)), -np.inf], np.float32)
    for way in (in_numpy, in_jit):
        assert_same(way("ReduceLogSumExp", [x, _axes(1)], opset=18, keepdims=0), [expected], tolerance=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["Sum", "Mean", "L1", "SumSquare"])
def test_sums_of_16_bit_floats_are_rounded_once(dtype, name):
    """Term by term, 4096 ones would be at most 2048 in float16, 256 in bfloat16."""
    expected = 1 if name == "Mean" else 4096
    for way in (in_numpy, in_jit):
        (found,) = way(f"Reduce{name}", [np.ones(4096, dtype), _axes(0)], opset=18, keepdims=0)
        assert found.dtype == dtype
        assert found == expected


@pytest.mark.parametrize("name", _REDUCTIONS)
@pytest.mark.parametrize("axes", [(1,), (0, -1), ()], ids=str)
def test_the_layout_does_not_change_a_reduction(name, axes):
    x = np.abs(_random(2, 3, 4, 5))
    for opset, others, attributes in ((11, [], {"axes": axes or None}), (18, [_axes(*axes)], {})):
        lowering = find_lowering(f"Reduce{name}", opset=opset)
        assert lowering.channels_last.applies({"keepdims": 1})
        assert not lowering.channels_last.applies({"keepdims": 0})
        expected = lowering.function(jnp.asarray(x), *others, **attributes)
        found = lowering.channels_last.function(jnp.asarray(to_channels_last(x)), *others, **attributes)
        np.testing.assert_allclose(to_onnx(found), expected, rtol=_ROUNDING)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("...ii->...i", [(2, 3, 3)]),
        ("ii", [(3, 3)]),
        ("ij,jk", [(2, 3), (3, 4)]),
        (" i j , j k -> i k ", [(2, 3), (3, 4)]),
        ("bhwc,hkc->bhwk", [(2, 3, 4, 5), (3, 6, 5)]),
        ("...ij,...jk->...ik", [(5, 2, 3), (5, 3, 4)]),
        ("iJ->Ji", [(2, 3)]),
        ("a,b->ab", [(3,), (2,)]),
        ("i->", [(3,)]),
        ("ij,ij,j->i", [(2, 3), (2, 3), (3,)]),
    ],
)
def test_sums_of_products_are_those_of_onnx_runtime(equation, shapes):
    inputs = [_random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    settings = {"data": range(len(inputs)), "tolerance": _ROUNDING, "equation": equation}
    assert_both_as_in_onnxruntime("Einsum", inputs, opset=12, **settings)


def test_ellipses_of_different_ranks_are_broadcast():
    a, b = _random(5, 2, 3), _random(3, 4)
    (found,) = in_jit("Einsum", [a, b], opset=12, data=(0, 1), equation="...ij,...jk->...ik")
    np.testing.assert_allclose(found, a @ b, rtol=_ROUNDING, atol=_ROUNDING)


@pytest.mark.parametrize("shape", [(3, 3), (2, 5, 4, 4), (2, 1, 1)])
def test_determinants_are_those_of_onnx_runtime(shape):
    assert_both_as_in_onnxruntime("Det", [_random(*shape)], opset=11, tolerance=_ROUNDING)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.uint64, np.float64])
@pytest.mark.parametrize(("a", "b"), [((2, 3, 4), (4, 2)), ((4,), (3, 4, 2)), ((4,), (4,))], ids=str)
def test_products_of_any_type_are_those_of_onnx_runtime(dtype, a, b):
    inputs = [_drawn(*a, dtype=dtype), _drawn(*b, dtype=dtype, seed=1)]
    assert_both_as_in_onnxruntime("MatMul", inputs, opset=13, data=(0, 1))


@pytest.mark.parametrize(
    ("opset", "a", "b", "c", "attributes"),
    [
        (13, (2, 3), (4, 3), (4,), {"alpha": 0.5, "beta": 2.0, "transB": 1}),
        (9, (3, 2), (3, 4), (2, 1), {"transA": 1}),
        (7, (2, 3), (3, 4), (), {"beta": 0.5}),
        (11, (0, 3), (3, 4), None, {}),
        (13, (2, 0), (0, 4), (4,), {}),
    ],
)
def test_gemm_is_that_of_onnx_runtime(opset, a, b, c, attributes):
    inputs = [np.asarray(_random(*shape, seed=seed)) for seed, shape in enumerate((a, b, c)) if shape is not None]
    settings = {"data": range(len(inputs)), "tolerance": _ROUNDING}
    assert_both_as_in_onnxruntime("Gemm", inputs, opset=opset, **settings, **attributes)


def test_gemm_of_integers_is_exact():
    a, b, c = _drawn(2, 3, high=2**30), _drawn(3, 4, high=2**30, seed=1), _drawn(4, seed=2)
    settings = {"alpha": 2.0, "beta": -3.0}
    for way, more in ((in_numpy, {}), (in_jit, {"data": (0, 1, 2)})):
        assert_same(way("Gemm", [a, b, c], opset=13, **settings, **more), [2 * (a @ b) - 3 * c])


def test_gemm_scales_no_integers_by_fractions():
    inputs = [_drawn(2, 3), _drawn(3, 4)]
    with pytest.raises(ModelError, match=r"Gemm \(producing 'y0'\).*alpha = 0.5 .* expected whole numbers"):
        by_us(single_node("Gemm", inputs, opset=13, outputs=[np.int64], alpha=0.5), inputs)


@pytest.mark.parametrize("name", _REDUCTIONS)
def test_gradients_go_through_reductions(name):
    """By central differences, in float64."""
    function = find_lowering(f"Reduce{name}", opset=18).function
    with jax.enable_x64(True):
        x, direction = (
            jnp.asarray(np.abs(_random(3, 4, dtype=np.float64)) + 0.1),
            _random(3, 4, dtype=np.float64, seed=1),
        )
        slope = jnp.vdot(jax.grad(lambda x: jnp.sum(function(x, _axes(1))))(x), direction)
        ends = [jnp.sum(function(x + step * direction, _axes(1))) for step in (1e-6, -1e-6)]
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-7)
