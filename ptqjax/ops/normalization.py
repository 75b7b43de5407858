"""Normalizations by statistics of the value itself; those of batches are in `batch_normalization`.

All compute in float32 at least and give back the type that came in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ptqjax.kernels.pooling import root
from ptqjax.ops.element_types import element_type
from ptqjax.ops.layout import along_axis, with_rank
from ptqjax.ops.registry import lowers, lowers_channels_last

_SMALL = 1e-9  # ONNX's, in MeanVarianceNormalization


@lowers("LayerNormalization", since=1)  # ONNX has it since opset 17; before, ONNX Runtime's optimizer writes it so
@lowers("LayerNormalization", since=1, domain="com.microsoft")
def layer_normalization(
    x: Any, scale: Any, bias: Any = None, /, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Any, Any, Any]:
    """Returns `x` standardized over all axes from `axis` on, scaled and shifted; then mean and 1 / deviation."""
    wide = _wide(x, stash_type)
    mean, inverse = _mean_and_inverse(wide, tuple(range(axis % x.ndim, x.ndim)), epsilon)
    y = ((wide - mean) * inverse).astype(x.dtype) * with_rank(scale, x.ndim)
    y = y if bias is None else y + with_rank(bias, x.ndim)
    return y, mean.astype(_stash(stash_type)), inverse.astype(_stash(stash_type))


@lowers("RMSNormalization", since=23)
def rms_normalization(x: Any, scale: Any, /, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Any:
    """Returns x / sqrt(mean(x^2) + epsilon) * scale, with the mean over all axes from `axis` on."""
    return _divided_by_root_mean_square(x, axis, epsilon, stash_type)[0].astype(scale.dtype) * with_rank(scale, x.ndim)


@lowers("SimplifiedLayerNormalization", since=1)
def simplified_layer_normalization(
    x: Any, scale: Any, /, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Any, Any]:
    """Returns `rms_normalization` under the name that ONNX Runtime's optimizer writes, and 1 / root mean square."""
    y, inverse = _divided_by_root_mean_square(x, axis, epsilon, stash_type)
    return y.astype(scale.dtype) * with_rank(scale, x.ndim), inverse.astype(_stash(stash_type))


@lowers("GroupNormalization", since=18)
def group_normalization_18(x: Any, scale: Any, bias: Any, /, *, num_groups: int, epsilon: float = 1e-5) -> Any:
    """Returns `group_normalization` with one scale and one bias per group."""
    size = x.shape[1] // num_groups
    return group_normalization(
        x, jnp.repeat(scale, size), jnp.repeat(bias, size), num_groups=num_groups, epsilon=epsilon
    )


@lowers("GroupNormalization", since=21)
def group_normalization(
    x: Any, scale: Any, bias: Any, /, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Any:
    """Returns each group of channels standardized over its channels and planes, scaled and shifted per channel."""
    groups = x.reshape(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups)
    y = _standardized(groups, (2,), epsilon, stash_type).reshape(x.shape)
    return y * along_axis(scale, 1, x.ndim) + along_axis(bias, 1, x.ndim)


@lowers_channels_last("GroupNormalization", since=21)
def group_normalization_channels_last(
    x: Any, scale: Any, bias: Any, /, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Any:
    """Returns `group_normalization` of a channels-last value."""
    groups = x.reshape(*x.shape[:-1], num_groups, x.shape[-1] // num_groups)
    axes = (*range(1, x.ndim - 1), x.ndim)
    y = _standardized(groups, axes, epsilon, stash_type).reshape(x.shape)
    return y * along_axis(scale, -1, x.ndim) + along_axis(bias, -1, x.ndim)


@lowers("InstanceNormalization", since=6)
def instance_normalization(x: Any, scale: Any, bias: Any, /, *, epsilon: float = 1e-5) -> Any:
    """Returns each plane standardized, scaled and shifted per channel."""
    y = _standardized(x, tuple(range(2, x.ndim)), epsilon)
    return y * along_axis(scale, 1, x.ndim) + along_axis(bias, 1, x.ndim)


@lowers_channels_last("InstanceNormalization", since=6)
def instance_normalization_channels_last(x: Any, scale: Any, bias: Any, /, *, epsilon: float = 1e-5) -> Any:
    """Returns `instance_normalization` of a channels-last value."""
    y = _standardized(x, tuple(range(1, x.ndim - 1)), epsilon)
    return y * along_axis(scale, -1, x.ndim) + along_axis(bias, -1, x.ndim)


@lowers("MeanVarianceNormalization", since=9)
def mean_variance_normalization(x: Any, /, *, axes: Sequence[int] = (0, 2, 3)) -> Any:
    """Returns (x - mean) / (deviation + 1e-9), with both over `axes`."""
    wide = _wide(x)
    centred = wide - jnp.mean(wide, axis=tuple(axes), keepdims=True)
    deviation = root(jnp.mean(jnp.square(centred), axis=tuple(axes), keepdims=True), 2)
    return (centred / (deviation + _SMALL)).astype(x.dtype)


@lowers("LpNormalization", since=1)
def lp_normalization(x: Any, /, *, axis: int = -1, p: int = 2) -> Any:
    """Returns `x` divided by its norm along `axis`: the sum of magnitudes (p = 1) or Euclid's; 0 where that is 0."""
    wide = _wide(x)
    if p == 1:
        norm = jnp.sum(jnp.abs(wide), axis=axis, keepdims=True)
        return jnp.where(norm == 0, 0, wide / jnp.where(norm == 0, 1, norm)).astype(x.dtype)
    square = jnp.sum(jnp.square(wide), axis=axis, keepdims=True)
    return (wide * jnp.where(square == 0, 0, lax.rsqrt(jnp.where(square == 0, 1, square)))).astype(x.dtype)


def _wide(x: Any, stash_type: int = 1) -> Any:
    """Returns `x` in the type to compute in: the one that the node asks for, unless `x` has a wider one."""
    return jnp.asarray(x, jnp.promote_types(x.dtype, _stash(stash_type)))


def _stash(stash_type: int) -> Any:
    return jax.dtypes.canonicalize_dtype(element_type(stash_type))


def _standardized(x: Any, axes: tuple[int, ...], epsilon: float, stash_type: int = 1) -> Any:
    wide = _wide(x, stash_type)
    mean, inverse = _mean_and_inverse(wide, axes, epsilon)
    return ((wide - mean) * inverse).astype(x.dtype)


def _mean_and_inverse(x: Any, axes: tuple[int, ...], epsilon: float) -> tuple[Any, Any]:
    """Returns the mean over `axes`, and 1 / sqrt(variance + epsilon)."""
    mean = jnp.mean(x, axis=axes, keepdims=True)
    return mean, lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=axes, keepdims=True) + jnp.asarray(epsilon, x.dtype))


def _divided_by_root_mean_square(x: Any, axis: int, epsilon: float, stash_type: int) -> tuple[Any, Any]:
    wide = _wide(x, stash_type)
    axes = tuple(range(axis % x.ndim, x.ndim))
    inverse = lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + jnp.asarray(epsilon, wide.dtype))
    return (wide * inverse).astype(x.dtype), inverse
