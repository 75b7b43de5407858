"""Normalizations."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.ops.layout import along_axis, with_rank
from ptqjax.ops.registry import lowers, lowers_channels_last


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
) -> Any:
    """Returns (x - mean) / sqrt(variance + epsilon) * gamma + beta, per channel of axis 1.

    Raises:
        UnsupportedOperatorError: The statistics are not per channel (`spatial` is 0).
    """
    if not spatial:
        raise UnsupportedOperatorError("BatchNormalization with spatial=0 (statistics per element) has no lowering")
    return batch_normalization(x, gamma, beta, mean, variance, epsilon=epsilon, momentum=momentum)


@lowers("BatchNormalization", since=9)
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
    """Returns `batch_normalization_7` with spatial=1.

    Raises:
        UnsupportedOperatorError: The node is in training mode.
    """
    del momentum
    _refuse_training(training_mode)
    return _normalized(x, *_affine(gamma, beta, mean, variance, epsilon), axis=min(1, x.ndim - 1))


@lowers_channels_last("BatchNormalization", since=9)
def batch_normalization_channels_last(
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
    """Returns `batch_normalization` of a channels-last value."""
    del momentum
    _refuse_training(training_mode)
    return _normalized(x, *_affine(gamma, beta, mean, variance, epsilon), axis=-1)


@lowers("LayerNormalization", since=17)
def layer_normalization(
    x: Any, scale: Any, bias: Any = None, /, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Any, Any, Any]:
    """Returns `x` standardized over all axes from `axis` on, scaled and shifted; then mean and 1 / deviation."""
    del stash_type  # float32 is what it asks for, and what is used
    axes = tuple(range(axis % x.ndim, x.ndim))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(wide, axis=axes, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(jnp.square(wide - mean), axis=axes, keepdims=True) + jnp.asarray(epsilon, wide.dtype))
    y = ((wide - mean) * inverse).astype(x.dtype) * with_rank(scale, x.ndim)
    return y if bias is None else y + with_rank(bias, x.ndim), mean, inverse


def _refuse_training(training_mode: int) -> None:
    if training_mode:
        raise UnsupportedOperatorError(
            "BatchNormalization in training mode has no lowering; export the model for inference"
        )


def _affine(gamma: Any, beta: Any, mean: Any, variance: Any, epsilon: float) -> tuple[Any, Any]:
    scale = gamma * lax.rsqrt(variance + jnp.asarray(epsilon, variance.dtype))
    return scale, beta - mean * scale


def _normalized(x: Any, scale: Any, shift: Any, *, axis: int) -> Any:
    return (x * along_axis(scale, axis, x.ndim) + along_axis(shift, axis, x.ndim)).astype(x.dtype)
