"""Cast, CastLike and the conversion under them: narrow types, both ways to run, and what ONNX's cases leave out."""

import math
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.kernels.conversion import convert, num_bits
from ptqjax.ops import find_lowering
from ptqjax.ops.element_types import element_type
from ptqjax.ops.layout import to_channels_last, to_onnx
from tests.single_node import assert_as_in_onnxruntime

_FLOATS = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float4_e2m1fn", "bfloat16", "float16"]
_EIGHT_BITS = _FLOATS[:4]
_INTEGERS = ["int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16"]


def _kind(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def _all_numbers(name):
    """Every number of the type, NaN and infinities left out, in ascending order."""
    kind = _kind(name)
    codes = np.arange(2 ** num_bits(kind), dtype=np.uint16 if kind.itemsize == 2 else np.uint8)
    numbers = codes.view(kind).astype(np.float32)
    return np.unique(numbers[np.isfinite(numbers)])


def _both(x, dtype, **settings):
    """The conversion while tracing, and under `jit` in 32 bits."""
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        static = np.asarray(convert(x, dtype, **settings))
    traced = np.asarray(jax.jit(lambda x: convert(x, dtype, **settings))(x))
    assert static.dtype == traced.dtype == dtype
    np.testing.assert_array_equal(static.astype(np.float32), traced.astype(np.float32))
    return traced


@pytest.mark.parametrize("name", _FLOATS)
def test_numbers_of_a_type_survive_the_way_through_float32(name):
    numbers = _all_numbers(name)
    np.testing.assert_array_equal(_both(numbers, _kind(name)).astype(np.float32), numbers)


@pytest.mark.parametrize("name", _FLOATS)
def test_rounding_is_to_the_nearest_and_half_to_even(name):
    numbers = _all_numbers(name)
    middles = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)  # exact: few bits
    below, above = numbers[:-1], numbers[1:]
    even = _codes(below, name) % 2 == 0
    np.testing.assert_array_equal(
        _both(middles, _kind(name)).astype(np.float32), np.where(even, below, above), err_msg="ties"
    )
    np.testing.assert_array_equal(_both(np.nextafter(middles, below), _kind(name)).astype(np.float32), below)
    np.testing.assert_array_equal(_both(np.nextafter(middles, above), _kind(name)).astype(np.float32), above)


def _codes(numbers, name):
    kind = _kind(name)
    return numbers.astype(kind).view(np.uint16 if kind.itemsize == 2 else np.uint8).astype(np.int64)


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", _EIGHT_BITS)
def test_beyond_the_range_saturation_decides(name, source):
    largest = float(ml_dtypes.finfo(_kind(name)).max)
    x = np.array([np.inf, -np.inf, np.nan, 3e4 if largest < 1e3 else 6.2e4, largest, 0.0]).astype(_kind(source))
    full = _both(x, _kind(name)).astype(np.float32)
    np.testing.assert_array_equal(full, [largest, -largest, np.nan, largest, largest, 0])
    beyond = np.inf if name == "float8_e5m2" else np.nan
    bare = _both(x, _kind(name), saturate=False).astype(np.float32)
    np.testing.assert_array_equal(bare, [beyond, -beyond, np.nan, beyond, largest, 0])


def test_floats_of_four_bits_always_saturate():
    found = _both(np.array([np.inf, -np.inf, 100, -7, 5], np.float32), _kind("float4_e2m1fn"), saturate=False)
    np.testing.assert_array_equal(found.astype(np.float32), [6, -6, 6, -6, 4])


@pytest.mark.parametrize("saturate", [True, False])
@pytest.mark.parametrize("round_mode", ["up", "down", "nearest"])
def test_powers_of_two_are_rounded_in_value(round_mode, saturate):
    small = np.ldexp(np.float32([1, 1, 1, 1.25, 1.5, 1]), [-149, -128, -127, -127, -127, -126])
    large = np.ldexp(np.float32([1, 1.2, 1.7]), 127)
    x = np.concatenate([small, large, np.float32([1.1, 1.5, 1.9, 2, 3, np.inf, np.nan, 0, -3])])
    expected = [_power_of_two(float(abs(value)), round_mode, saturate) for value in x]
    settings = {"saturate": saturate, "round_mode": round_mode}
    found = _both(x, _kind("float8_e8m0fnu"), **settings)
    np.testing.assert_array_equal(found.astype(np.float32), np.array(expected, np.float32))
    halves = np.array([1, 1.25, 1.5, 3, 2.0**-20], ml_dtypes.bfloat16)
    expected = [_power_of_two(float(value), round_mode, saturate) for value in halves]
    np.testing.assert_array_equal(_both(halves, _kind("float8_e8m0fnu"), **settings).astype(np.float32), expected)


def _power_of_two(x, round_mode, saturate):
    if math.isnan(x):
        return x
    if x < 2.0**-127 or math.isinf(x):
        return (2.0**127 if x > 1 else 2.0**-127) if saturate else math.nan
    exponent = max(math.frexp(x)[1] - 1, -127)
    part = x / 2.0**exponent  # in [1, 2)
    exponent += {"up": part > 1, "down": False, "nearest": part >= 1.5}[round_mode]
    if exponent > 127:
        return 2.0**127 if saturate else math.nan
    return 2.0**exponent


@pytest.mark.parametrize("name", _INTEGERS)
def test_integers_that_do_not_fit_wrap_around(name):
    info = ml_dtypes.iinfo(_kind(name))
    x = np.array([-70000, -300, -129, -9, -3, -1, 0, 1, 2, 5, 9, 200, 40000, 70000], np.int32)
    expected = (x - int(info.min)) % 2**info.bits + int(info.min)
    np.testing.assert_array_equal(_both(x, _kind(name)).astype(np.int32), expected)
    # floats lose their fraction first; those that int32 holds then do the same
    np.testing.assert_array_equal(_both(x + np.sign(x) * np.float32(0.5), _kind(name)).astype(np.int32), expected)


@pytest.mark.parametrize("to", [np.uint8, np.int8, np.int16, np.int32, np.float16, np.bool_])
@pytest.mark.parametrize("source", [np.float32, np.int32, np.int64, np.bool_, np.float16])
def test_casts_are_those_of_onnx_runtime(source, to):
    x = np.array([-3.7, -1.0, -0.2, 0.0, 0.5, 1.0, 2.9, 100.0, 300.0]).astype(source)
    number = next(number for number in range(1, 14) if number != 8 and element_type(number) == to)
    assert_as_in_onnxruntime("Cast", [x], atol=0, opset=13, outputs=(to,), to=number)


@pytest.mark.parametrize("to", [7, 13, 11])
def test_wide_types_are_narrowed_under_jit_without_a_warning(to):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = jax.jit(lambda x: find_lowering("Cast", opset=13).function(x, to=to))(np.ones(2, np.float32))
    assert found.dtype == jax.dtypes.canonicalize_dtype(element_type(to))


def test_cast_passes_the_gradient_between_floats():
    gradient = jax.grad(lambda x: jnp.sum(convert(x, jnp.bfloat16).astype(jnp.float32) * 3))(jnp.ones(2))
    np.testing.assert_array_equal(gradient, [3, 3])


@pytest.mark.parametrize("name", ["float6_e2m3fn", "float6_e3m2fn"])
def test_floats_of_six_bits_are_for_constants(name):
    cast = find_lowering("Cast", opset=28).function
    number = 27 if name == "float6_e2m3fn" else 28
    x = np.array([0.5, -1.3, 100], np.float32)
    narrow = cast(x, to=number)
    assert narrow.dtype == _kind(name)
    np.testing.assert_array_equal(cast(narrow, to=1), x.astype(_kind(name)).astype(np.float32))
    with pytest.raises(UnsupportedOperatorError, match=f"JAX has no arrays of {name}"):
        jax.jit(lambda x: cast(x, to=number))(x)


@pytest.mark.parametrize("to", [1, 7, 11])
def test_known_strings_are_read_and_written(to):
    cast = find_lowering("Cast", opset=13).function
    texts = np.array([["3", "-12"], ["1000", "7"]], object)
    with jax.enable_x64(True):
        numbers = np.asarray(cast(texts, to=to))
    assert numbers.dtype == element_type(to)
    np.testing.assert_array_equal(numbers, [[3, -12], [1000, 7]])
    np.testing.assert_array_equal(cast(numbers.astype(np.int64), to=8), texts)


def test_special_numbers_are_read_from_strings():
    found = find_lowering("Cast", opset=13).function(np.array(["+INF", "-inf", "NaN", "1e-5"], object), to=1)
    np.testing.assert_array_equal(found, np.array([np.inf, -np.inf, np.nan, 1e-5], np.float32))


def test_cast_like_looks_at_the_type_alone():
    x, target = np.full((2, 3, 4, 5), 1.5, np.float32), np.zeros((1, 1, 1, 1, 1), ml_dtypes.float8_e5m2)
    lowering = find_lowering("CastLike", opset=19)
    found = lowering.function(jnp.asarray(x), target)
    assert found.dtype == target.dtype
    assert found.shape == x.shape
    last = lowering.channels_last.function(jnp.asarray(to_channels_last(x)), target)
    np.testing.assert_array_equal(np.asarray(to_onnx(last)).astype(np.float32), x)
