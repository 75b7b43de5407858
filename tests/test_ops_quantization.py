"""QuantizeLinear and DequantizeLinear of narrow types, blocks and powers of two; DynamicQuantizeLinear."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import ptqjax
from ptqjax.ops import find_lowering
from ptqjax.ops.element_types import element_type
from tests.single_node import assert_as_in_onnxruntime, by_us, feeds_of, single_node

_NARROW = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float4_e2m1fn", "int2", "uint2"]
_NARROW += ["int4", "uint4"]
_SPREADS = {"tensor": ((), 1, 0), "axis": ((4,), 1, 0), "last": ((6,), -1, 0), "blocks": ((3, 2, 6), 1, 2)}


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _kind(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def _by_reference(proto, inputs):
    return ReferenceEvaluator(proto).run(None, feeds_of(inputs))[0]


def _assert_same(found, expected):
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("spread", _SPREADS)
@pytest.mark.parametrize("name", _NARROW)
def test_narrow_types_are_quantized_as_onnx_defines(name, spread):
    shape, axis, block_size = _SPREADS[spread]
    x = 20 * _random(3, 4, 6)
    scale = np.random.default_rng(1).uniform(0.5, 2, shape).astype(np.float32)
    zero_point = np.zeros(shape, _kind(name))
    settings = {"opset": 25, "axis": axis, "block_size": block_size}
    quantize = single_node("QuantizeLinear", [x, scale, zero_point], outputs=(_kind(name),), **settings)
    expected = _by_reference(quantize, [x, scale, zero_point])
    _assert_same(by_us(quantize, [x, scale, zero_point])[0], expected)
    dequantize = single_node("DequantizeLinear", [expected, scale, zero_point], **settings)
    back = by_us(dequantize, [expected, scale, zero_point])[0]
    _assert_same(back, _by_reference(dequantize, [expected, scale, zero_point]))


@pytest.mark.parametrize("name", [name for name in _NARROW if "int" in name])
def test_the_zero_point_is_a_number_of_the_grid(name):
    info = ml_dtypes.iinfo(_kind(name))
    x, scale, zero_point = 4 * _random(50), np.float32(0.5), np.asarray(1, _kind(name))
    quantize = find_lowering("QuantizeLinear", opset=25).function
    codes = np.asarray(quantize(jnp.asarray(x), scale, zero_point))
    expected = np.clip(np.rint(x / scale) + 1, int(info.min), int(info.max))
    np.testing.assert_array_equal(codes.astype(np.int32), expected)
    real = find_lowering("DequantizeLinear", opset=25).function(jnp.asarray(codes), scale, zero_point)
    np.testing.assert_array_equal(real, (expected - 1) * scale)


@pytest.mark.parametrize("saturate", [0, 1])
def test_saturation_decides_what_is_beyond_the_range_of_eight_bits(saturate):
    x, scale = np.array([1e4, -1e4, 3], np.float32), np.float32(0.5)
    quantize = find_lowering("QuantizeLinear", opset=19).function
    found = quantize(jnp.asarray(x), scale, np.zeros((), ml_dtypes.float8_e4m3fn), saturate=saturate)
    expected = [448, -448, 6] if saturate else [np.nan, np.nan, 6]
    np.testing.assert_array_equal(np.asarray(found).astype(np.float32), expected)


@pytest.mark.parametrize("number", [2, 3, 21, 23, 17])
def test_the_type_is_asked_for_where_no_zero_point_names_it(number):
    found = find_lowering("QuantizeLinear", opset=23).function(jnp.ones(3), np.float32(1), output_dtype=number)
    assert found.dtype == element_type(number)


@pytest.mark.parametrize("name", ["float4_e2m1fn", "float8_e4m3fn", "int4"])
def test_blocks_with_scales_that_are_powers_of_two(name):
    """The microscaling formats: 2 rows of 8 numbers, a scale for each 4."""
    x = 8 * _random(2, 8)
    exponents = np.array([[-3, 0], [2, 1]])
    scale = np.exp2(exponents).astype(ml_dtypes.float8_e8m0fnu)
    settings = {"axis": 1, "block_size": 4}
    number = next(number for number in range(17, 27) if element_type(number) == _kind(name))
    quantize = find_lowering("QuantizeLinear", opset=24).function
    codes = jax.jit(lambda x, s: quantize(x, s, output_dtype=number, **settings))(x, scale)
    steps = np.repeat(np.exp2(exponents), 4, axis=1).astype(np.float32)
    limits = ml_dtypes.iinfo(_kind(name)) if "int" in name else ml_dtypes.finfo(_kind(name))
    wanted = np.clip(np.rint(x / steps) if "int" in name else x / steps, float(limits.min), float(limits.max))
    expected = wanted.astype(_kind(name)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(codes).astype(np.float32), expected)
    dequantize = find_lowering("DequantizeLinear", opset=24).function
    real = jax.jit(lambda c, s: dequantize(c, s, output_dtype=1, **settings))(codes, scale)
    assert real.dtype == np.float32
    np.testing.assert_array_equal(real, expected * steps)


@pytest.mark.parametrize("number", [1, 10, 16])
def test_the_result_has_the_type_that_is_asked_for(number):
    x, scale = np.arange(-3, 4, dtype=np.int8), np.float16(0.3)
    found = find_lowering("DequantizeLinear", opset=23).function(jnp.asarray(x), scale, output_dtype=number)
    expected = (x.astype(np.float32) * np.float32(scale)).astype(element_type(number))  # rounded once
    _assert_same(np.asarray(found), expected)


def test_the_division_has_the_precision_that_is_asked_for():
    x, scale = np.array([1.0, 2049.0], np.float32), np.float32(1)
    quantize = find_lowering("QuantizeLinear", opset=23).function
    found = quantize(jnp.asarray(x), scale, np.zeros((), np.uint16), precision=10)
    np.testing.assert_array_equal(found, [1, 2048])  # float16 holds no odd numbers there


def test_half_precision_reaches_all_of_sixteen_bits():
    x, scale = np.array([1.0, -1.0], np.float16), np.float16(1 / 16)
    quantized = find_lowering("QuantizeLinear", opset=21).function(jnp.asarray(x), scale, np.asarray(40000, np.uint16))
    np.testing.assert_array_equal(quantized, [40016, 39984])
    real = find_lowering("DequantizeLinear", opset=21).function(quantized, scale, np.asarray(40000, np.uint16))
    np.testing.assert_array_equal(real, x)


@pytest.mark.parametrize("x", [_random(3, 5), np.abs(_random(4)), -np.abs(_random(2, 2)), np.float32([2.5])])
def test_dynamic_quantization_is_that_of_onnx_runtime(x):
    outputs = (np.uint8, np.float32, np.uint8)
    assert_as_in_onnxruntime("DynamicQuantizeLinear", [x], atol=0, opset=11, outputs=outputs)


@pytest.mark.parametrize("shape", [(3,), (0,)])
def test_dynamic_quantization_of_zeros_has_scale_one(shape):
    x = np.zeros(shape, np.float32)
    y, scale, zero_point = find_lowering("DynamicQuantizeLinear", opset=11).function(x)
    np.testing.assert_array_equal(y, x)
    assert (scale, zero_point) == (1, 0)
    assert (y.dtype, scale.dtype, zero_point.dtype) == (np.uint8, np.float32, np.uint8)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize("axis", [0, -1])
def test_the_runtimes_own_spelling_is_the_same(dtype, axis):
    x = _random(3, 4)
    scale = np.random.default_rng(1).uniform(0.01, 0.03, x.shape[axis]).astype(np.float32)
    zero_point = np.random.default_rng(2).integers(0, 9, x.shape[axis]).astype(dtype)
    settings = {"atol": 0, "domain": "com.microsoft", "opset": 1, "axis": axis}
    assert_as_in_onnxruntime("QuantizeLinear", [x, scale, zero_point], outputs=(dtype,), **settings)
    codes = (100 * np.abs(x)).astype(dtype)
    assert_as_in_onnxruntime("DequantizeLinear", [codes, scale, zero_point], **settings)


@pytest.mark.parametrize("name", _NARROW)
def test_narrow_weights_of_a_file_take_part(name):
    """y = x dequantize(w): the weight is an initializer, as exporters write it."""
    w = _random(5, 3).astype(_kind(name)) if "float" in name else np.arange(15).reshape(5, 3).astype(_kind(name))
    x, scale = _random(2, 5), np.array([0.5, 0.25, 2], np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["real"], axis=1),
        helper.make_node("MatMul", ["x", "real"], ["y"]),
    ]
    infos = [helper.make_tensor_value_info(each, onnx.TensorProto.FLOAT, None) for each in ("x", "y")]
    constants = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(scale, "scale")]
    graph = helper.make_graph(nodes, "narrow", infos[:1], infos[1:], constants)
    model = ptqjax.read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 28)]))
    found = ptqjax.apply(model.graph, model.params, {"x": x})["y"]
    np.testing.assert_allclose(found, x @ (w.astype(np.float32) * scale), rtol=1e-5, atol=1e-5)
