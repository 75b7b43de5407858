"""ONNX's axes, [n, c, *spatial], against those of channels-last values, [n, *spatial, c]."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from ptqjax.kernels.namespace import array_namespace


def channels_last_axis(axis: int, rank: int) -> int:
    """Returns where ONNX's `axis` (negative counts from the end) of a tensor of `rank` >= 2 lies, channels last."""
    axis %= rank
    return axis if axis == 0 else rank - 1 if axis == 1 else axis - 1


def channels_last_axes(axes: Iterable[int], rank: int) -> tuple[int, ...]:
    """Returns `channels_last_axis` of each of the axes."""
    return tuple(channels_last_axis(axis, rank) for axis in axes)


def to_channels_last(x: Any) -> Any:
    """Returns `x` [n, c, *spatial] as [n, *spatial, c]."""
    return array_namespace(x).moveaxis(x, 1, -1)


def to_onnx(x: Any) -> Any:
    """Returns `x` [n, *spatial, c] as [n, c, *spatial]."""
    if all(size == 1 for size in x.shape[1:-1]):  # after a global pool nothing has to move
        return x.reshape(x.shape[0], x.shape[-1], *x.shape[1:-1])
    return jnp.moveaxis(x, -1, 1)


def with_rank(x: Any, rank: int) -> Any:
    """Returns `x` with axes of size 1 put in front up to `rank`, as broadcasting does."""
    return x if x.ndim >= rank else x.reshape((1,) * (rank - x.ndim) + x.shape)


def along_axis(x: Any, axis: int, rank: int) -> Any:
    """Returns the vector `x` with size-1 axes around it, so that it broadcasts along `axis` of a tensor of `rank`."""
    axis %= rank
    return x.reshape((1,) * axis + (-1,) + (1,) * (rank - axis - 1))
