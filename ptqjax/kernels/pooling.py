"""Pools over windows of channels-last values, [n, *spatial, c]."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from ptqjax.kernels.windows import Padding, output_sizes, pad_spatial, seen_by_tap

_MOST_TAPS = 25  # beyond, the program would grow and compile slowly


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
    fill = np.asarray(lowest, x.dtype)
    return _folded(lax.max, fill, x, kernel=kernel, strides=strides, padding=padding, dilations=dilations)


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
    zero = np.zeros((), x.dtype)
    total = _folded(lax.add, zero, x, kernel=kernel, strides=strides, padding=full, dilations=dilations)
    counted = padding if count_include_pad else ((0, 0),) * len(sizes)
    window = {"kernel": kernel, "strides": strides, "dilations": dilations}
    return total / jnp.asarray(_num_counted(sizes, padding=padding, counted=counted, full=full, **window), x.dtype)


def _folded(
    combine: Callable[[Any, Any], Any],
    initial: np.ndarray,
    x: jax.Array,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilations: Sequence[int],
) -> jax.Array:
    """Returns `combine` over each window: tap by tap, or by XLA's reduction where the taps are many.

    Measured on 2 cores at batch 16, 3x3 stride 2: 113x113x64 2.0 ms against 13.9, 56x56x128 1.0 against 6.9.
    """
    if math.prod(kernel) > _MOST_TAPS:
        return lax.reduce_window(
            x,
            initial,
            combine,
            window_dimensions=(1, *kernel, 1),
            window_strides=(1, *strides, 1),
            padding=((0, 0), *padding, (0, 0)),
            window_dilation=(1, *dilations, 1),
        )
    counts = output_sizes(x.shape[1:-1], kernel=kernel, strides=strides, dilations=dilations, padding=padding)
    # without the barrier XLA would compute what comes before once for each tap
    padded = lax.optimization_barrier(pad_spatial(x, padding, fill=initial))
    return reduce(
        combine,
        (
            seen_by_tap(padded, tap, counts=counts, strides=strides, dilations=dilations)
            for tap in product(*map(range, kernel))
        ),
    )


def _num_counted(
    sizes: Sequence[int],
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    padding: Padding,
    counted: Padding,
    full: Padding,
) -> np.ndarray:
    """Returns how many elements each window's mean is over, [1, *out, 1]; the axes are independent.

    Args:
        sizes: The sizes of the axes.
        kernel: Taps per axis.
        strides: Distance of windows per axis.
        dilations: Distance of taps per axis.
        padding: Where the first window begins, before the axis.
        counted: How far outside the axis an element still counts.
        full: The padding that the windows need.
    """
    product_of_axes = np.ones((1,) * (len(sizes) + 2), np.int64)
    for axis, size in enumerate(sizes):
        taps = dilations[axis] * np.arange(kernel[axis])
        starts = np.arange(-padding[axis][0], size + full[axis][1] - taps[-1], strides[axis])
        positions = starts[:, None] + taps
        inside = (positions >= -counted[axis][0]) & (positions < size + counted[axis][1])
        product_of_axes = product_of_axes * np.expand_dims(
            inside.sum(1), [other for other in range(product_of_axes.ndim) if other != axis + 1]
        )
    return product_of_axes


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
