"""Laws of short floating-point formats: rounding as ml_dtypes and ONNX Runtime have it, scales, gradients, files."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from ptqjax.errors import ConfigError
from ptqjax.kernels.float_formats import array_type, largest_number, round_to_format
from ptqjax.kernels.grid import FLOAT_FORMATS
from ptqjax.kernels.ranges import scale_of_float_range
from ptqjax.quantize import make_encoding
from ptqjax.quantize.encodings import dequantize, fake_quantize, integers, quantize, storage_dtype

EIGHT_BITS, SIXTEEN_BITS = FLOAT_FORMATS[:2], FLOAT_FORMATS[2:]
ELEMENT = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def numbers(name):
    """All finite numbers of a format."""
    dtype = array_type(name)
    codes = np.arange(2 ** (8 * dtype.itemsize), dtype=f"uint{8 * dtype.itemsize}").view(dtype)
    with np.errstate(invalid="ignore"):
        wide = codes.astype(np.float32)
    return np.unique(wide[np.isfinite(wide)])


def hard_cases(name):
    """All bfloat16 numbers; each number of the format; each tie and both its neighbours in float32; the overflow."""
    own, (bfloats,) = numbers(name), (numbers("bfloat16"),)
    wide = own.astype(np.float64)
    ties = ((wide[1:] + wide[:-1]) / 2).astype(np.float32)
    beyond = np.float32(min(wide[-1] + (wide[-1] - wide[-2]) / 2, np.finfo(np.float32).max))
    ties = np.concatenate([ties, [beyond, -beyond]]).astype(np.float32)
    around = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    ends = np.asarray([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    return np.concatenate([bfloats, own, ties, *around, ends])


def cast(x, name):
    """What ml_dtypes makes of it; formats of 8 bits saturate, as ONNX has it by default."""
    x = np.clip(x, -largest_number(name), largest_number(name)) if name in EIGHT_BITS else x
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(array_type(name)).astype(np.float32)


def assert_same_bits(found, expected):
    """Signs of zero count; NaN is NaN."""
    found = np.asarray(found)
    assert found.dtype == np.float32
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    assert same.all(), (found[~same][:5], expected[~same][:5])


@pytest.mark.parametrize("name", FLOAT_FORMATS)
@pytest.mark.parametrize("where", ["numpy", "jax", "jit"])
def test_rounding_is_that_of_ml_dtypes(name, where):
    """XLA may leave out a conversion there and back, or go to float8 by way of float16, and round twice."""
    x = hard_cases(name)
    run = {
        "numpy": lambda: round_to_format(x, name),
        "jax": lambda: round_to_format(jnp.asarray(x), name),
        "jit": lambda: jax.jit(lambda v: round_to_format(v, name))(x),
    }[where]
    assert_same_bits(run(), cast(x, name))


def run_in_onnx_runtime(nodes, initializers, x, opset):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("scale", [1.0, 0.3, 7e-3, 2.0**-5])
def test_eight_bits_are_what_onnx_runtime_makes_of_them(name, scale):
    x = hard_cases(name)
    x = x[np.isfinite(x)] * np.float32(scale)
    x = x[np.abs(x) >= np.finfo(np.float32).tiny]  # XLA flushes subnormals to 0; they become 0 in any case
    ends = [
        numpy_helper.from_array(np.float32(scale), "s"),
        numpy_helper.from_array(np.zeros((), array_type(name)), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    expected = run_in_onnx_runtime(nodes, ends, x, 19)
    encoding = make_encoding(np.float32(scale), np.float32(0), dtype=name)
    np.testing.assert_array_equal(fake_quantize(x, encoding), expected)
    np.testing.assert_array_equal(jax.jit(fake_quantize)(x, encoding), expected)


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_sixteen_bits_are_what_onnx_runtime_makes_of_them(name):
    x = hard_cases(name)
    nodes = [
        helper.make_node("Cast", ["x"], ["q"], to=ELEMENT[name]),
        helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT),
    ]
    encoding = make_encoding(np.float32(1), np.float32(0), dtype=name)
    assert_same_bits(fake_quantize(x, encoding), run_in_onnx_runtime(nodes, [], x, 13))


def test_what_an_encoding_says_of_its_format():
    expected = {"float8_e4m3fn": (8, 448), "float8_e5m2": (8, 57344), "float16": (16, 65504)}
    expected["bfloat16"] = (16, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max))
    for name, (bits, largest) in expected.items():
        encoding = make_encoding(np.float32(1), np.float32(0), dtype=name)
        assert (encoding.dtype, encoding.num_bits, encoding.float_format) == (name, bits, name)
        assert (float(encoding.qmin), float(encoding.qmax)) == (-largest, largest)
        assert storage_dtype(name) == array_type(name)
        codes = integers(np.asarray([0.3, -1.7], np.float32), encoding)
        assert codes.dtype == array_type(name)
        np.testing.assert_array_equal(codes.astype(np.float32), cast(np.asarray([0.3, -1.7], np.float32), name))


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_the_scale_brings_the_largest_value_onto_the_largest_number(name):
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    scale = scale_of_float_range(x.min(), x.max(), name)
    assert float(scale) == pytest.approx(np.abs(x).max() / largest_number(name), rel=1e-6)
    encoding = make_encoding(scale, np.float32(0), dtype=name)
    codes = quantize(x, encoding)
    assert np.abs(codes).max() == largest_number(name)
    # Half a step of the fraction, of the number itself; below the normal numbers, half the smallest step.
    fraction, smallest = {"float8_e4m3fn": (2.0**-4, 2.0**-9), "float8_e5m2": (2.0**-3, 2.0**-16)}[name]
    error = np.abs(dequantize(codes, encoding) - x)
    assert np.all(error <= np.maximum(np.abs(x) * fraction, smallest / 2 * scale) * (1 + 1e-5))
    once = fake_quantize(x, encoding)
    np.testing.assert_array_equal(fake_quantize(once, encoding), once)


@pytest.mark.parametrize("name", FLOAT_FORMATS)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1.0, 1e38, float(np.finfo(np.float32).max)])
def test_scales_of_extreme_ranges_keep_every_code_finite(name, power_of_two, value):
    for low, high in ((-value, 0), (0, value), (-value, value)):
        scale = scale_of_float_range(np.float32(low), np.float32(high), name, power_of_two=power_of_two)
        assert scale.dtype == np.float32
        assert scale >= np.finfo(np.float32).tiny
        assert np.isfinite(np.float32(largest_number(name)) * scale)
        assert scale == 1 or (value > 0 and name in EIGHT_BITS)
        assert not power_of_two or np.frexp(scale)[0] == 0.5
    if name in EIGHT_BITS and value <= 1e38:
        assert largest_number(name) * float(scale) >= value * (1 - 1e-6)


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_gradients_pass_straight_through_below_the_largest_number(name):
    top = np.float32(largest_number(name))
    scale = np.float32(0.5 if name in EIGHT_BITS else 1)
    encoding = make_encoding(scale, np.float32(0), dtype=name)
    inside = np.asarray([0, 0.3, -1.7, 100], np.float32)
    outside = np.asarray([2 * top, -2 * top] if name != "bfloat16" else [np.inf, -np.inf], np.float32)
    slope = jax.grad(lambda v: fake_quantize(v, encoding).sum())
    np.testing.assert_array_equal(slope(jnp.asarray(inside)), np.ones(4))
    _, tangent = jax.jvp(lambda v: fake_quantize(v, encoding), (jnp.asarray(outside),), (jnp.ones(2),))
    np.testing.assert_array_equal(tangent, np.zeros(2))

    def of_scale(s):
        return fake_quantize(jnp.asarray(inside), encoding.replace(scale=s))

    found = jax.jacobian(of_scale)(jnp.asarray(scale))
    expected = quantize(inside, encoding) - inside / scale if name in EIGHT_BITS else np.zeros(4)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_format_has_no_zero_point_and_sixteen_bits_no_scale():
    with pytest.raises(ConfigError, match=r"float8_e5m2.*zero point 0 alone; found \[3"):
        make_encoding(np.float32(1), np.float32(3), dtype="float8_e5m2")
    with pytest.raises(ConfigError, match=r"bfloat16.*is a cast and has the scale 1; found \[2"):
        make_encoding(np.float32(2), np.float32(0), dtype="bfloat16")


def test_disabled_formats_pass_values_and_gradients_through():
    x = jnp.asarray([-9.0, 0.3, 1e6])
    off = make_encoding(np.float32(0.1), np.float32(0), dtype="float8_e4m3fn").replace(enabled=jnp.asarray(False))
    np.testing.assert_array_equal(fake_quantize(x, off), x)
    np.testing.assert_array_equal(jax.grad(lambda v: fake_quantize(v, off).sum())(x), [1, 1, 1])


def test_scales_along_an_axis_and_in_blocks():
    x = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    along = make_encoding(np.asarray([0.1, 0.2, 0.3, 0.4], np.float32), np.float32(0), dtype="float8_e4m3fn", axis=0)
    rows = [fake_quantize(x[i], along.replace(scale=along.scale[i], axis=None)) for i in range(4)]
    np.testing.assert_array_equal(fake_quantize(x, along), np.stack(rows))
    scale = np.full((4, 3), 0.1, np.float32) * np.arange(1, 4, dtype=np.float32)
    blocks = make_encoding(scale, np.float32(0), dtype="float8_e5m2", axis=1, block_size=2)
    parts = zip(np.split(x, 3, axis=1), scale[0], strict=True)
    columns = [fake_quantize(part, make_encoding(s, np.float32(0), dtype="float8_e5m2")) for part, s in parts]
    np.testing.assert_array_equal(fake_quantize(x, blocks), np.concatenate(columns, axis=1))
