"""Operators of com.microsoft against ONNX Runtime's CPU kernels, computed node by node as written."""

import ml_dtypes
import numpy as np
import pytest

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.ops import find_lowering, registered
from tests.single_node import assert_as_in_onnxruntime

_ROUNDING = 4e-6  # of float32 sums of values around 1, and of the runtime's polynomials for exp and erf


def _normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def _integers(dtype, *shape, seed=0):
    info = np.iinfo(dtype)
    return np.random.default_rng([seed, *shape]).integers(info.min, info.max + 1, size=shape).astype(dtype)


def _narrow(dtype, *shape):
    """Weights; of int8 7 bits, since ONNX Runtime's sums of 8 saturate on CPUs without VNNI."""
    return _integers(dtype, *shape) // np.array(2 if dtype == np.int8 else 1, dtype)


def _compare(op_type, operands, *, atol=_ROUNDING, domain="com.microsoft", opset=1, **model):
    assert_as_in_onnxruntime(op_type, operands, atol=atol, domain=domain, opset=opset, **model)


_X = _normal(2, 3, 8)


@pytest.mark.parametrize(
    ("op_type", "operands", "attributes"),
    [
        ("Gelu", [_X], {}),
        ("BiasGelu", [_X, _normal(8)], {}),
        ("FastGelu", [_X], {}),
        ("FastGelu", [_X, _normal(8)], {}),
        ("QuickGelu", [_X], {}),
        ("QuickGelu", [_X], {"alpha": 0.7}),
    ],
)
def test_activations_are_the_runtimes(op_type, operands, attributes):
    _compare(op_type, operands, **attributes)


@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_norm_before_opset_17_is_the_runtimes(axis):
    operands = [_X, *(_normal(*_X.shape[axis:], seed=seed) for seed in (1, 2))]
    outputs = (np.float32,) * 3
    _compare("LayerNormalization", operands, domain="", opset=14, axis=axis, epsilon=0.5, outputs=outputs)


def test_simplified_layer_norm_is_the_runtimes():
    _compare("SimplifiedLayerNormalization", [_X, _normal(8)], domain="", opset=17, epsilon=0.5, axis=-1, stash_type=1)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_beta", [False, True])
def test_skip_layer_norm_is_the_runtimes_with_the_sum(has_beta, has_bias):
    operands = [_X, _normal(2, 3, 8, seed=1), _normal(8), _normal(8, seed=2) if has_beta else None]
    operands += [_normal(8, seed=3) if has_bias else None]
    _compare("SkipLayerNormalization", operands, epsilon=0.5, outputs=(np.float32, None, None, np.float32))


def test_skip_simplified_layer_norm_is_the_runtimes_with_the_sum():
    operands = [_X, _normal(2, 3, 8, seed=1), _normal(8), _normal(8, seed=3)]
    outputs = (np.float32, None, None, np.float32)
    _compare("SkipSimplifiedLayerNormalization", operands, epsilon=0.5, outputs=outputs)


@pytest.mark.parametrize("flags", [(), ("transA",), ("transB",), ("transBatchA",), ("transBatchB", "transA")], ids=str)
def test_fused_matmul_is_the_runtimes(flags):
    a_shape = {"transA": (2, 5, 3), "transBatchA": (3, 2, 5)}
    b_shape = {"transB": (2, 4, 5), "transBatchB": (5, 2, 4)}
    a = _normal(*next((a_shape[flag] for flag in flags if flag in a_shape), (2, 3, 5)))
    b = _normal(*next((b_shape[flag] for flag in flags if flag in b_shape), (2, 5, 4)), seed=1)
    _compare("FusedMatMul", [a, b], alpha=0.5, **dict.fromkeys(flags, 1))


@pytest.mark.parametrize(
    ("activation", "numbers"), [("Relu", {}), ("LeakyRelu", {"activation_alpha": 0.3}), ("Sigmoid", {}), ("Tanh", {})]
)
def test_fused_gemm_is_the_runtimes(activation, numbers):
    operands = [_normal(3, 5), _normal(4, 5), _normal(4)]
    _compare("FusedGemm", operands, activation=activation, transB=1, alpha=0.5, beta=2.0, **numbers)


@pytest.mark.parametrize("has_summand", [False, True])
@pytest.mark.parametrize(
    ("activation", "params"),
    [
        ("Relu", []),
        ("LeakyRelu", [0.3]),
        ("Clip", [-0.5, 0.5]),
        ("HardSigmoid", [0.3, 0.4]),
        ("Tanh", []),
        ("Sigmoid", []),
    ],
)
def test_fused_conv_is_the_runtimes(activation, params, has_summand):
    operands = [_normal(2, 4, 6, 6), _normal(4, 2, 3, 3), _normal(4), _normal(2, 4, 3, 3) if has_summand else None]
    settings = {"group": 2, "pads": [1, 1, 1, 1], "strides": [2, 2]} | ({"activation_params": params} if params else {})
    _compare("FusedConv", operands, activation=activation, atol=1e-5, **settings)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("per_column", [False, True])
def test_matmul_integer_to_float_is_the_runtimes(dtype, per_column):
    size = 4 if per_column else 1
    weights = _narrow(dtype, 5, 4)
    operands = [_integers(np.uint8, 3, 5), weights, np.float32([0.1]).reshape(())]
    operands += [np.linspace(0.05, 0.2, size).astype(np.float32), np.array(7, np.uint8)]
    operands += [np.arange(size).astype(dtype), _normal(4)]
    _compare("MatMulIntegerToFloat", operands, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_dynamic_quantize_matmul_is_the_runtimes(dtype):
    weights = _narrow(dtype, 5, 4)
    operands = [_normal(3, 5), weights, np.float32([0.1]), np.array([3], dtype), _normal(4)]
    _compare("DynamicQuantizeMatMul", operands, atol=1e-5)


@pytest.mark.parametrize("zero_points", [None, "packed"])
@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_nbits_is_the_runtimes(bits, zero_points):
    k, n, block_size = 40, 6, 16
    num_blocks = 3
    packed = _integers(np.uint8, n, num_blocks, block_size * bits // 8)
    operands = [_normal(2, k), packed, np.abs(_normal(n * num_blocks)) / 10]
    operands += [None if zero_points is None else _integers(np.uint8, n * -(-num_blocks * bits // 8), seed=1)]
    _compare("MatMulNBits", operands, atol=2e-5, K=k, N=n, bits=bits, block_size=block_size)


def _grid(scale, zero, dtype):
    return [np.array(scale, np.float32), np.array(zero, dtype)]


_ALL = {dtype: np.arange(256).astype(np.uint8).view(dtype).reshape(1, 4, 8, 8) for dtype in (np.uint8, np.int8)}


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize(("op_type", "attributes"), [("QLinearLeakyRelu", {"alpha": 0.3}), ("QLinearSigmoid", {})])
def test_tables_of_quantized_functions_are_the_runtimes(op_type, attributes, dtype):
    operands = [_ALL[dtype], *_grid(0.05, 100, dtype), *_grid(0.007, 20, dtype)]
    _compare(op_type, operands, atol=0, outputs=(dtype,), **attributes)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_quantized_concat_is_the_runtimes(dtype):
    operands = [*_grid(0.03, 20, dtype), _ALL[dtype], *_grid(0.05, 100, dtype), _ALL[dtype], *_grid(0.03, 20, dtype)]
    _compare("QLinearConcat", operands, atol=0, outputs=(dtype,), axis=1)


def test_quantized_where_is_the_runtimes():
    condition = np.random.default_rng(0).random((4, 1, 8)) > 0.5
    operands = [condition, _ALL[np.uint8], *_grid(0.05, 100, np.uint8), _ALL[np.uint8][:, :1]]
    operands += [*_grid(0.02, 10, np.uint8), *_grid(0.03, 20, np.uint8)]
    _compare("QLinearWhere", operands, atol=0, outputs=(np.uint8,))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_max_pool_with_channels_last_is_the_runtimes(dtype):
    settings = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    _compare("NhwcMaxPool", [_integers(dtype, 2, 7, 7, 3)], atol=0, outputs=(dtype,), **settings)


def _projected(seed):
    return _normal(2, 5, 4 * 3, seed=seed)


@pytest.mark.parametrize(
    ("mask", "attributes"),
    [
        (None, {}),
        (None, {"unidirectional": 1, "scale": 0.3}),
        (np.array([5, 3], np.int32), {}),
        (np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], np.int32), {"mask_filter_value": -100.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_multi_head_attention_is_the_runtimes(mask, attributes, has_bias):
    operands = [_projected(0), _projected(1), _projected(2), _normal(36) if has_bias else None, mask]
    operands += [_normal(1, 4, 5, 5) if has_bias else None]
    _compare("MultiHeadAttention", operands, num_heads=4, atol=1e-5, **attributes)


def test_multi_head_attention_puts_the_past_in_front():
    past = [_normal(2, 4, 2, 3, seed=seed) for seed in (3, 4)]
    operands = [_projected(0), _projected(1), _projected(2), None, None, None, *past]
    _compare("MultiHeadAttention", operands, num_heads=4, outputs=(np.float32,) * 3, atol=1e-5)


def test_multi_head_attention_takes_heads_that_are_split():
    heads = [_projected(seed).reshape(2, 5, 4, 3).swapaxes(1, 2) for seed in (1, 2)]
    _compare("MultiHeadAttention", [_projected(0), *heads], num_heads=4, atol=1e-5)


def test_packed_queries_keys_and_values_are_the_same_unpacked():
    """The runtime's CPU kernel does not take them."""
    lowering = find_lowering("MultiHeadAttention", opset=1, domain="com.microsoft").function
    q, k, v = (_projected(seed).reshape(2, 5, 4, 3) for seed in range(3))
    expected = lowering(*map(_projected, range(3)), num_heads=4)[0]
    np.testing.assert_allclose(lowering(np.stack([q, k, v], axis=3), num_heads=4)[0], expected, atol=_ROUNDING)
    packed = lowering(_projected(0), np.stack([k, v], axis=3), num_heads=4)[0]
    np.testing.assert_allclose(packed, expected, atol=_ROUNDING)


@pytest.mark.parametrize(
    ("mask", "attributes"),
    [
        (None, {}),
        (None, {"unidirectional": 1, "scale": 0.3}),
        (np.array([5, 3], np.int32), {}),
        (np.array([4, 3, 0, 2], np.int32), {}),  # where the keys end, then where they begin
        (np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], np.int32), {}),
    ],
    ids=str,
)
def test_attention_with_its_projection_is_the_runtimes(mask, attributes):
    operands = [_normal(2, 5, 6), _normal(6, 36), _normal(36), mask]
    outputs = (np.float32,) * 2
    _compare("Attention", operands, num_heads=4, atol=1e-5, outputs=outputs, **attributes)


def test_a_mask_of_another_length_is_refused():
    lowering = find_lowering("Attention", opset=1, domain="com.microsoft").function
    with pytest.raises(UnsupportedOperatorError, match=r"a mask of shape \[3\] has no lowering for 1 sequences"):
        lowering(_normal(1, 5, 6), _normal(6, 36), _normal(36), np.array([5, 0, 5], np.int32), num_heads=4)


@pytest.mark.parametrize("channels_last", [0, 1])
@pytest.mark.parametrize(
    ("op_type", "window"),
    [("QLinearAveragePool", {"kernel_shape": [3, 3], "strides": [2, 2]}), ("QLinearGlobalAveragePool", {})],
)
def test_quantized_pools_are_the_runtimes_in_both_layouts(op_type, window, channels_last):
    x = _integers(np.uint8, 2, 7, 7, 3)
    operands = [
        x if channels_last else x.transpose(0, 3, 1, 2),
        *_grid(0.05, 100, np.uint8),
        *_grid(0.03, 90, np.uint8),
    ]
    _compare(op_type, operands, atol=0, outputs=(np.uint8,), channels_last=channels_last, **window)


def _schemas():
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema  # noqa: PLC0415 (slow)

    return {schema.name: schema for schema in get_all_operator_schema() if schema.domain == "com.microsoft"}


def test_every_lowering_knows_the_attributes_of_the_runtimes_schema():
    schemas = _schemas()
    for domain, op_type in registered():
        if domain == "com.microsoft" and op_type in schemas:
            known = find_lowering(op_type, opset=1, domain=domain).parameters
            assert set(schemas[op_type].attributes) <= known, op_type


def test_quick_gelu_of_static_bfloat16_is_bfloat16():
    """NumPy's product of bfloat16 with a Python float is float32."""
    lowering = find_lowering("QuickGelu", opset=1, domain="com.microsoft").function
    assert lowering(_normal(4).astype(ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("channels", [1, 5])
def test_gemm_of_integers_without_a_grid_for_its_result_gives_floats(channels):
    scale, zero = np.linspace(0.01, 0.05, channels, dtype=np.float32), np.full(channels, 3, np.uint8)
    grid = (scale, zero) if channels > 1 else _grid(0.02, 3, np.uint8)
    bias = np.arange(-2, 3, dtype=np.int32) * 40
    operands = [_integers(np.uint8, 3, 4), *_grid(0.03, 120, np.uint8), _integers(np.uint8, 5, 4), *grid, bias]
    _compare("QGemm", operands, transB=1, alpha=1.5)
