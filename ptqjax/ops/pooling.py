"""Pools over windows, and over whole planes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ptqjax.kernels import pooling
from ptqjax.kernels.windows import explicit_padding
from ptqjax.ops.layout import to_channels_last, to_onnx
from ptqjax.ops.registry import lowers, lowers_channels_last


@lowers("MaxPool", since=1)
def max_pool(
    x: Any,
    /,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    storage_order: int = 0,
    strides: Sequence[int] = (),
) -> Any:
    """Returns the largest element of each window of `x` [n, c, *spatial]; the output Indices is not computed."""
    del storage_order  # it speaks of Indices
    settings = {"auto_pad": auto_pad, "ceil_mode": ceil_mode, "dilations": dilations, "pads": pads, "strides": strides}
    window = _window(x.shape[2:], kernel_shape, **settings)
    return to_onnx(pooling.max_pool(to_channels_last(x), **window))


@lowers_channels_last("MaxPool", since=1, starts=True)
def max_pool_channels_last(
    x: Any,
    /,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    storage_order: int = 0,
    strides: Sequence[int] = (),
) -> Any:
    """Returns `max_pool` of a channels-last value."""
    del storage_order
    settings = {"auto_pad": auto_pad, "ceil_mode": ceil_mode, "dilations": dilations, "pads": pads, "strides": strides}
    window = _window(x.shape[1:-1], kernel_shape, **settings)
    return pooling.max_pool(x, **window)


@lowers("AveragePool", since=1)
def average_pool(
    x: Any,
    /,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Any:
    """Returns the mean of each window of `x` [n, c, *spatial]."""
    settings = {"auto_pad": auto_pad, "ceil_mode": ceil_mode, "dilations": dilations, "pads": pads, "strides": strides}
    window = _window(x.shape[2:], kernel_shape, **settings)
    return to_onnx(pooling.average_pool(to_channels_last(x), count_include_pad=bool(count_include_pad), **window))


@lowers_channels_last("AveragePool", since=1, starts=True)
def average_pool_channels_last(
    x: Any,
    /,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Any:
    """Returns `average_pool` of a channels-last value."""
    settings = {"auto_pad": auto_pad, "ceil_mode": ceil_mode, "dilations": dilations, "pads": pads, "strides": strides}
    window = _window(x.shape[1:-1], kernel_shape, **settings)
    return pooling.average_pool(x, count_include_pad=bool(count_include_pad), **window)


@lowers("GlobalAveragePool", since=1)
def global_average_pool(x: Any, /) -> Any:
    """Returns the mean of each channel's plane of `x` [n, c, *spatial], with size-1 axes kept."""
    return jnp.mean(x, axis=tuple(range(2, x.ndim)), keepdims=True)


@lowers_channels_last("GlobalAveragePool", since=1)
def global_average_pool_channels_last(x: Any, /) -> Any:
    """Returns `global_average_pool` of a channels-last value."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), keepdims=True)


def _window(
    sizes: Sequence[int],
    kernel: Sequence[int],
    *,
    auto_pad: str,
    ceil_mode: int,
    dilations: Sequence[int],
    pads: Sequence[int],
    strides: Sequence[int],
) -> dict[str, Any]:
    ones = (1,) * len(sizes)
    window = {"kernel": tuple(kernel), "strides": tuple(strides or ones), "dilations": tuple(dilations or ones)}
    padding = explicit_padding(sizes, pads=pads or (0,) * 2 * len(sizes), auto_pad=auto_pad, **window)
    return {**window, "padding": padding, "ceil_mode": bool(ceil_mode) and auto_pad == "NOTSET"}
