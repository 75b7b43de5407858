"""Pools over windows of channels-last values, [n, *spatial, c]."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from ptqjax.kernels.windows import Padding, output_sizes


def max_pool(
    x: Shaped[Array, "n *spatial c"],
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilations: Sequence[int],
    ceil_mode: bool,
) -> Shaped[Array, "n *out c"]:
    """Returns the largest element of each window; padding is never the largest."""
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    padding = _ending_with_the_last_window(x.shape[1:-1], kernel, strides, padding, dilations, ceil_mode=ceil_mode)
    return lax.reduce_window(
        x,
        np.asarray(lowest, x.dtype),
        lax.max,
        window_dimensions=(1, *kernel, 1),
        window_strides=(1, *strides, 1),
        padding=((0, 0), *padding, (0, 0)),
        window_dilation=(1, *dilations, 1),
    )


def average_pool(
    x: Shaped[Array, "n *spatial c"],
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilations: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
) -> Shaped[Array, "n *out c"]:
    """Returns the mean of each window over its elements inside `x`, or over the declared padding as well.

    What `ceil_mode` adds behind the declared padding is never counted.
    """
    sizes = x.shape[1:-1]
    full = _ending_with_the_last_window(sizes, kernel, strides, padding, dilations, ceil_mode=ceil_mode)
    window = {
        "window_dimensions": (1, *kernel, 1),
        "window_strides": (1, *strides, 1),
        "window_dilation": (1, *dilations, 1),
    }
    total = lax.reduce_window(x, np.zeros((), x.dtype), lax.add, padding=((0, 0), *full, (0, 0)), **window)
    return total / jnp.asarray(
        _num_counted(sizes, kernel, strides, padding, full, dilations, count_include_pad), x.dtype
    )


def _num_counted(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    full: Padding,
    dilations: Sequence[int],
    count_include_pad: bool,  # noqa: FBT001
) -> np.ndarray:
    """Returns how many elements each window's mean is over, [1, *out, 1]; the axes are independent."""
    counted = np.ones((1,) * (len(sizes) + 2), np.int64)
    for axis, (size, taps, stride, (low, high), (_, end), dilation) in enumerate(
        zip(sizes, kernel, strides, padding, full, dilations, strict=True)
    ):
        first, last = (-low, size + high) if count_include_pad else (0, size)
        starts = np.arange(-low, size + end - (taps - 1) * dilation, stride)
        positions = starts[:, None] + dilation * np.arange(taps)
        along = ((positions >= first) & (positions < last)).sum(1)
        shape = [1] * counted.ndim
        shape[axis + 1] = len(along)
        counted = counted * along.reshape(shape)
    return counted


def _ending_with_the_last_window(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilations: Sequence[int],
    *,
    ceil_mode: bool,
) -> Padding:
    counts = output_sizes(
        sizes, kernel=kernel, strides=strides, dilations=dilations, padding=padding, ceil_mode=ceil_mode
    )
    ends = []
    for size, taps, stride, (low, _), dilation, count in zip(
        sizes, kernel, strides, padding, dilations, counts, strict=True
    ):
        ends.append((low, (count - 1) * stride + (taps - 1) * dilation + 1 - low - size))
    return tuple(ends)
