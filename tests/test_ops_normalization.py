"""Normalizations and losses: old versions, layouts, training, and what ONNX's cases leave out."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ptqjax.ops import find_lowering
from ptqjax.ops.layout import to_channels_last, to_onnx
from tests.single_node import assert_as_in_onnxruntime, by_us, single_node

_ROUNDING = 4e-6  # of float32 means of values around 1


def _normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


_X = _normal(3, 4, 5, 2)
_STATISTICS = [_normal(4), _normal(4, seed=1), _normal(4, seed=2), np.abs(_normal(4, seed=3))]


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
def test_batch_norm_is_the_runtimes(opset):
    assert_as_in_onnxruntime("BatchNormalization", [_X, *_STATISTICS], atol=_ROUNDING, opset=opset, epsilon=0.5)


def _trained(opset):
    """Result, running mean and running variance of a node that trains."""
    settings = {"training_mode": 1} if opset >= 14 else {}
    outputs = (np.float32,) * (3 if opset >= 14 else 5)
    operands = [_X, *_STATISTICS]
    proto = single_node("BatchNormalization", operands, opset=opset, outputs=outputs, momentum=0.7, **settings)
    return by_us(proto, operands)


@pytest.mark.parametrize("opset", [7, 9, 14])
def test_batch_norm_in_training_uses_and_follows_the_batch(opset):
    y, running_mean, running_variance, *batch = _trained(opset)
    wide = _X.astype(np.float64)
    mean, variance = wide.mean((0, 2, 3)), wide.var((0, 2, 3))
    gamma, beta, old_mean, old_variance = (value.astype(np.float64) for value in _STATISTICS)
    scale = (gamma / np.sqrt(variance + 1e-5))[:, None, None]
    expected = (wide - mean[:, None, None]) * scale + beta[:, None, None]
    np.testing.assert_allclose(y, expected, atol=_ROUNDING)
    np.testing.assert_allclose(running_mean, 0.7 * old_mean + 0.3 * mean, atol=_ROUNDING)
    np.testing.assert_allclose(running_variance, 0.7 * old_variance + 0.3 * variance, atol=_ROUNDING)
    for found, value in zip(batch, (mean, variance), strict=False):
        np.testing.assert_allclose(found, value, atol=_ROUNDING)


def test_statistics_of_each_element_are_used_as_such():
    operands = [_X, *(_normal(4, 5, 2, seed=seed) for seed in range(3)), np.abs(_normal(4, 5, 2, seed=4))]
    y = by_us(single_node("BatchNormalization", operands, opset=7, spatial=0, epsilon=0.5), operands)[0]
    gamma, beta, mean, variance = operands[1:]
    np.testing.assert_allclose(y, (_X - mean) / np.sqrt(variance + 0.5) * gamma + beta, atol=_ROUNDING)


def _groups(opset):
    size = 2 if opset < 21 else 4
    return [_X, _normal(size), _normal(size, seed=1)]


@pytest.mark.parametrize("opset", [18, 21])
def test_group_norm_is_the_runtimes(opset):
    assert_as_in_onnxruntime(
        "GroupNormalization", _groups(opset), atol=_ROUNDING, opset=opset, num_groups=2, epsilon=0.5
    )


@pytest.mark.parametrize(
    ("op_type", "opset", "operands", "attributes"),
    [
        ("GroupNormalization", 21, _groups(21), {"num_groups": 2}),
        ("InstanceNormalization", 6, [_X, *_STATISTICS[:2]], {}),
        ("BatchNormalization", 7, [_X, *_STATISTICS], {}),
        ("BatchNormalization", 9, [_X, *_STATISTICS], {}),
        ("BatchNormalization", 14, [_X, *_STATISTICS], {"training_mode": 1}),
    ],
)
def test_the_layout_does_not_change_the_meaning(op_type, opset, operands, attributes):
    lowering = find_lowering(op_type, opset=opset)
    expected = lowering.function(*operands, **attributes)
    found = lowering.channels_last.function(to_channels_last(operands[0]), *operands[1:], **attributes)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(to_onnx(one) if one.ndim == 4 else one, other, atol=_ROUNDING)


@pytest.mark.parametrize("op_type", ["LayerNormalization", "RMSNormalization"])
def test_a_mean_of_large_values_in_half_precision_does_not_overflow(op_type):
    x = (_normal(2, 64) * 300).astype(np.float16)  # their squares are beyond what float16 holds
    operands = [x, np.ones(64, np.float16)]
    y = by_us(single_node(op_type, operands, opset=23, outputs=(np.float16,)), operands)[0]
    assert y.dtype == np.float16
    wide = x.astype(np.float64) - (x.mean(dtype=np.float64, axis=1, keepdims=True) if op_type[0] == "L" else 0)
    expected = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True))
    np.testing.assert_allclose(y, expected, atol=2e-3)  # half a unit of values up to 4


@pytest.mark.parametrize("p", [1, 2])
def test_a_vector_of_zeros_has_no_direction_and_a_finite_gradient(p):
    x = np.concatenate([np.zeros((1, 3), np.float32), _normal(1, 3)])
    lowering = find_lowering("LpNormalization", opset=22).function
    y = np.asarray(lowering(x, p=p))
    np.testing.assert_array_equal(y[0], 0)
    np.testing.assert_allclose(np.linalg.norm(y[1], ord=p), 1, rtol=1e-6)
    assert np.isfinite(jax.grad(lambda value: jnp.sum(lowering(value, p=p)))(jnp.asarray(x))).all()


@pytest.mark.parametrize("opset", [12, 13])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_the_runtimes(opset, reduction, weighted):
    labels = np.random.default_rng(0).integers(0, 4, size=(3, 5, 2))
    operands = [_X, labels, np.abs(_normal(4)) if weighted else None]
    assert_as_in_onnxruntime(
        "SoftmaxCrossEntropyLoss", operands, atol=_ROUNDING, opset=opset, reduction=reduction, ignore_index=2
    )


def test_the_gradient_of_cross_entropy_is_the_softmax_less_the_label():
    scores, labels = _normal(6, 4), np.array([0, 3, 2, 2, 1, 0])
    lowering = find_lowering("SoftmaxCrossEntropyLoss", opset=13).function
    gradient = jax.grad(lambda x: lowering(x, labels)[0])(jnp.asarray(scores))
    expected = (jax.nn.softmax(scores, axis=1) - np.eye(4)[labels]) / len(labels)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_running_statistics_of_static_bfloat16_are_bfloat16():
    """NumPy's product of bfloat16 with a Python float is float32."""
    x, vector = _normal(2, 3, 4).astype(ml_dtypes.bfloat16), np.ones(3, ml_dtypes.bfloat16)
    lowering = find_lowering("BatchNormalization", opset=15).function
    with jax.ensure_compile_time_eval():
        results = lowering(x, vector, vector, vector, vector, training_mode=1)
    assert [result.dtype for result in results] == [ml_dtypes.bfloat16] * 3


def test_group_normalization_of_no_samples_is_empty():
    lowering, vector = find_lowering("GroupNormalization", opset=21), jnp.ones(4)
    assert lowering.function(jnp.ones((0, 4, 5)), vector, vector, num_groups=2).shape == (0, 4, 5)
    assert lowering.channels_last.function(jnp.ones((0, 5, 4)), vector, vector, num_groups=2).shape == (0, 5, 4)
