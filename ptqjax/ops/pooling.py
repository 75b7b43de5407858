"""Pools over windows, over whole planes, and over neighbouring channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax.numpy as jnp

from ptqjax.kernels import pooling
from ptqjax.kernels.windows import explicit_padding
from ptqjax.ops.layout import to_channels_last, to_onnx
from ptqjax.ops.registry import lowers, lowers_channels_last, static_integers


def _in_both_layouts(op_type: str, *, since: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator that registers a function of channels-last values, and returns it for ONNX's layout.

    That too is registered: the function between two changes of layout, with the same attributes.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def in_onnx_layout(x: Any, /, **attributes: Any) -> Any:
            results = function(to_channels_last(jnp.asarray(x)), **attributes)
            return tuple(map(to_onnx, results)) if isinstance(results, tuple) else to_onnx(results)

        lowers(op_type, since=since)(in_onnx_layout)
        lowers_channels_last(op_type, since=since, starts=True)(function)
        return in_onnx_layout

    return register


@_in_both_layouts("MaxPool", since=1)
def max_pool(
    x: Any,
    /,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] = (),
    num_node_outputs: int = 1,
    pads: Sequence[int] = (),
    storage_order: int = 0,
    strides: Sequence[int] = (),
) -> Any:
    """Returns the largest element of each window; also its place in the flattened input where the node asks for it."""
    settings = {"auto_pad": auto_pad, "ceil_mode": ceil_mode, "dilations": dilations, "pads": pads, "strides": strides}
    window = _window(x.shape[1:-1], kernel_shape, **settings)
    if num_node_outputs == 1:
        return pooling.max_pool(x, **window)
    return pooling.max_pool_with_indices(x, column_major=bool(storage_order), **window)


@_in_both_layouts("AveragePool", since=1)
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
    """Returns the mean of each window."""
    settings = {"auto_pad": auto_pad, "ceil_mode": ceil_mode, "dilations": dilations, "pads": pads, "strides": strides}
    window = _window(x.shape[1:-1], kernel_shape, **settings)
    return pooling.average_pool(x, count_include_pad=bool(count_include_pad), **window)


@_in_both_layouts("LpPool", since=2)
def lp_pool(
    x: Any,
    /,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] = (),
    p: int = 2,
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Any:
    """Returns the p-norm of each window."""
    settings = {"auto_pad": auto_pad, "ceil_mode": ceil_mode, "dilations": dilations, "pads": pads, "strides": strides}
    return pooling.lp_pool(x, p=p, **_window(x.shape[1:-1], kernel_shape, **settings))


@lowers("GlobalAveragePool", since=1)
def global_average_pool(x: Any, /) -> Any:
    """Returns the mean of each channel's plane of `x` [n, c, *spatial], with size-1 axes kept."""
    return jnp.mean(x, axis=tuple(range(2, x.ndim)), keepdims=True)


@lowers_channels_last("GlobalAveragePool", since=1)
def global_average_pool_channels_last(x: Any, /) -> Any:
    """Returns `global_average_pool` of a channels-last value."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), keepdims=True)


@lowers("GlobalMaxPool", since=1)
def global_max_pool(x: Any, /) -> Any:
    """Returns the largest element of each channel's plane of `x` [n, c, *spatial], with size-1 axes kept."""
    return jnp.max(x, axis=tuple(range(2, x.ndim)), keepdims=True)


@lowers_channels_last("GlobalMaxPool", since=1)
def global_max_pool_channels_last(x: Any, /) -> Any:
    """Returns `global_max_pool` of a channels-last value."""
    return jnp.max(x, axis=tuple(range(1, x.ndim - 1)), keepdims=True)


@lowers("GlobalLpPool", since=2)
def global_lp_pool(x: Any, /, *, p: int = 2) -> Any:
    """Returns the p-norm of each channel's plane of `x` [n, c, *spatial], with size-1 axes kept."""
    return pooling.root(jnp.sum(jnp.abs(x) ** p, axis=tuple(range(2, x.ndim)), keepdims=True), p)


@lowers_channels_last("GlobalLpPool", since=2)
def global_lp_pool_channels_last(x: Any, /, *, p: int = 2) -> Any:
    """Returns `global_lp_pool` of a channels-last value."""
    return pooling.root(jnp.sum(jnp.abs(x) ** p, axis=tuple(range(1, x.ndim - 1)), keepdims=True), p)


@lowers("LRN", since=1)
def lrn(x: Any, /, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Any:
    """Returns `x` [n, c, *spatial] over a power of the squares of `size` neighbouring channels."""
    return pooling.local_response_norm(jnp.asarray(x), axis=1, size=size, alpha=alpha, beta=beta, bias=bias)


@lowers_channels_last("LRN", since=1)
def lrn_channels_last(x: Any, /, **attributes: Any) -> Any:
    """Returns `lrn` of a channels-last value."""
    return pooling.local_response_norm(x, axis=-1, **attributes)


@lowers("MaxUnpool", since=9)
def max_unpool(
    x: Any,
    indices: Any,
    output_shape: Any = None,
    /,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Any:
    """Returns zeros with the elements of `x` at the `indices`, which count in the flattened input of the MaxPool.

    That input has the smallest shape from which MaxPool makes that of `x`; it is the corner of a larger `output_shape`.
    """
    rank = x.ndim - 2
    strides, pads = strides or (1,) * rank, pads or (0,) * 2 * rank
    inner = [
        (size - 1) * stride - low - high + taps
        for size, stride, low, high, taps in zip(
            x.shape[2:], strides, pads[:rank], pads[rank:], kernel_shape, strict=True
        )
    ]
    shape = (*x.shape[:2], *inner)
    wanted = shape if output_shape is None else static_integers(output_shape, "the output_shape of MaxUnpool")
    flat = jnp.zeros(math.prod(shape), x.dtype).at[indices.reshape(-1)].set(x.reshape(-1))
    return jnp.pad(flat.reshape(shape), [(0, goal - size) for goal, size in zip(wanted, shape, strict=True)])


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
    return {**window, "padding": padding, "ceil_mode": bool(ceil_mode)}
