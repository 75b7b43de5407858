"""Operators of com.microsoft against ONNX Runtime's CPU kernels, computed node by node as written."""

import numpy as np
import pytest

from tests.single_node import assert_as_in_onnxruntime

_ROUNDING = 4e-6  # of float32 sums of values around 1, and of the runtime's polynomials for exp and erf


def _normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def _integers(dtype, *shape, seed=0):
    info = np.iinfo(dtype)
    return np.random.default_rng([seed, *shape]).integers(info.min, info.max + 1, size=shape).astype(dtype)


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
    operands = [_integers(np.uint8, 3, 5), _integers(dtype, 5, 4), np.float32([0.1]).reshape(())]
    operands += [np.linspace(0.05, 0.2, size).astype(np.float32), np.array(7, np.uint8)]
    operands += [np.arange(size).astype(dtype), _normal(4)]
    _compare("MatMulIntegerToFloat", operands, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_dynamic_quantize_matmul_is_the_runtimes(dtype):
    operands = [_normal(3, 5), _integers(dtype, 5, 4), np.float32([0.1]), np.array([3], dtype), _normal(4)]
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
