"""BatchNormalization: with given statistics, or in training with those of the batch."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from ptqjax.ops.layout import along_axis, with_rank
from ptqjax.ops.registry import lowers, lowers_channels_last

_INFERENCE = 1  # before opset 14, a node with more outputs than this trains


@lowers("BatchNormalization", since=7)
def batch_normalization_7(
    x: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    /,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    num_node_outputs: int = 1,
) -> Any:
    """Returns `batch_normalization_9`; with spatial=0 the statistics are of each element, not of each channel."""
    if spatial:
        return batch_normalization_9(
            x, gamma, beta, mean, variance, epsilon=epsilon, momentum=momentum, num_node_outputs=num_node_outputs
        )
    is_training = num_node_outputs > _INFERENCE
    statistics = (jnp.mean(x, axis=0), jnp.var(x, axis=0)) if is_training else (mean, variance)
    scale, shift = (with_rank(value, x.ndim) for value in _affine(gamma, beta, *statistics, epsilon))
    y = (x * scale + shift).astype(x.dtype)
    return (y, *_running(mean, variance, statistics, momentum), *statistics) if is_training else (y,)


@lowers("BatchNormalization", since=9)
def batch_normalization_9(
    x: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    /,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    num_node_outputs: int = 1,
) -> Any:
    """Returns `batch_normalization`, which trains where more outputs are wanted, and then the batch's statistics."""
    return _normalized(
        x,
        (gamma, beta, mean, variance),
        axis=min(1, x.ndim - 1),
        epsilon=epsilon,
        momentum=momentum,
        is_training=num_node_outputs > _INFERENCE,
    )


@lowers("BatchNormalization", since=14)
def batch_normalization(
    x: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    /,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Any:
    """Returns (x - mean) / sqrt(variance + epsilon) * gamma + beta, per channel of axis 1.

    In training the statistics are those of the batch (the variance without Bessel's correction); the running ones
    follow as momentum running + (1 - momentum) batch.
    """
    return _normalized(
        x,
        (gamma, beta, mean, variance),
        axis=min(1, x.ndim - 1),
        epsilon=epsilon,
        momentum=momentum,
        is_training=bool(training_mode),
    )[:3]


@lowers_channels_last("BatchNormalization", since=7, applies=lambda attributes: attributes.get("spatial", 1) != 0)
@lowers_channels_last("BatchNormalization", since=9)
def batch_normalization_9_channels_last(
    x: Any, /, *operands: Any, epsilon: float = 1e-5, momentum: float = 0.9, num_node_outputs: int = 1, **_: int
) -> Any:
    """Returns `batch_normalization_9` of a channels-last value; statistics per element stay in ONNX's layout."""
    is_training = num_node_outputs > _INFERENCE
    return _normalized(x, operands, axis=-1, epsilon=epsilon, momentum=momentum, is_training=is_training)


@lowers_channels_last("BatchNormalization", since=14)
def batch_normalization_channels_last(
    x: Any, /, *operands: Any, epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0
) -> Any:
    """Returns `batch_normalization` of a channels-last value."""
    is_training = bool(training_mode)
    return _normalized(x, operands, axis=-1, epsilon=epsilon, momentum=momentum, is_training=is_training)[:3]


def _normalized(
    x: Any, operands: tuple[Any, ...], *, axis: int, epsilon: float, momentum: float, is_training: bool
) -> tuple[Any, ...]:
    """Returns the result, and in training the running statistics and those of the batch; channels are along `axis`."""
    gamma, beta, mean, variance = operands
    statistics = _statistics(x, mean, variance, axis=axis) if is_training else (mean, variance)
    scale, shift = (along_axis(value, axis, x.ndim) for value in _affine(gamma, beta, *statistics, epsilon))
    y = (x * scale + shift).astype(x.dtype)
    return (y, *_running(mean, variance, statistics, momentum), *statistics) if is_training else (y,)


def _statistics(x: Any, mean: Any, variance: Any, *, axis: int) -> tuple[Any, Any]:
    others = tuple(other for other in range(x.ndim) if other != axis % x.ndim)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.mean(wide, axis=others).astype(mean.dtype), jnp.var(wide, axis=others).astype(variance.dtype)


def _affine(gamma: Any, beta: Any, mean: Any, variance: Any, epsilon: float) -> tuple[Any, Any]:
    scale = gamma * lax.rsqrt(variance + jnp.asarray(epsilon, variance.dtype))
    return scale, beta - mean * scale


def _running(mean: Any, variance: Any, statistics: tuple[Any, Any], momentum: float) -> tuple[Any, Any]:
    mean, variance, new_mean, new_variance = map(jnp.asarray, (mean, variance, *statistics))  # bfloat16 stays so
    return mean * momentum + new_mean * (1 - momentum), variance * momentum + new_variance * (1 - momentum)
