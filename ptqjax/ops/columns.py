"""Col2Im: overlapping blocks put back where they were in an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ptqjax.kernels.windows import output_sizes
from ptqjax.ops.registry import lowers, static_integers


@lowers("Col2Im", since=18)
def col2im(
    x: Any,
    image_shape: Any,
    block_shape: Any,
    /,
    *,
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Any:
    """Returns the images [n, c, *image_shape] whose blocks are the columns of `x` [n, c * block, blocks].

    Where blocks overlap their elements are added; what lies in the padding is dropped.
    """
    sizes = static_integers(image_shape, "the image_shape of Col2Im")
    block = static_integers(block_shape, "the block_shape of Col2Im")
    rank, n = len(sizes), x.shape[0]
    dilations, strides, pads = dilations or (1,) * rank, strides or (1,) * rank, pads or (0,) * 2 * rank
    padding = tuple(zip(pads[:rank], pads[rank:], strict=True))
    counts = output_sizes(sizes, kernel=block, strides=strides, dilations=dilations, padding=padding)
    y = jnp.asarray(x).reshape(n, x.shape[1] // math.prod(block), *block, *counts)
    for axis in reversed(range(rank)):  # one after another: the number of sums is that of taps along each, not of all
        y = _folded(
            y,
            2 + axis,
            2 + axis + (axis + 1),
            size=sizes[axis],
            start=-pads[axis],
            step=strides[axis],
            dilation=dilations[axis],
        )
    return y


def _folded(x: Any, taps: int, blocks: int, *, size: int, start: int, step: int, dilation: int) -> Any:
    """Returns `x` without the axis `taps`, whose elements are added at their places along `blocks`, now of `size`."""
    along = blocks - 1  # without the axis of taps
    extent = (x.shape[blocks] - 1) * step + 1
    zero = np.zeros((), x.dtype)
    parts = []
    for tap in range(x.shape[taps]):
        part = lax.index_in_dim(x, tap, axis=taps, keepdims=False)
        low = start + tap * dilation
        config = [(low, size - low - extent, step - 1) if axis == along else (0, 0, 0) for axis in range(part.ndim)]
        parts.append(lax.pad(part, zero, config))
    return reduce(jnp.add, parts)
