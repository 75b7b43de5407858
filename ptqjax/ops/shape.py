"""Operators that look at the shape of a tensor or give it another, and repeat elements to fill it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.layout import with_rank
from ptqjax.ops.registry import lowers, static_integers


@lowers("Shape", since=1)
def shape(x: Any, /, *, start: int = 0, end: int | None = None) -> np.ndarray:
    """Returns the sizes of `x` from axis `start` up to `end`, known while tracing."""
    return np.asarray(x.shape[start:end], np.int64)


@lowers("Size", since=1)
def size(x: Any, /) -> np.ndarray:
    """Returns the number of elements of `x`, known while tracing."""
    return np.asarray(math.prod(x.shape), np.int64)


@lowers("Flatten", since=1)
def flatten(x: Any, /, *, axis: int = 1) -> Any:
    """Returns `x` as a matrix: the axes before `axis` make the rows."""
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@lowers("Reshape", since=5)
def reshape(x: Any, sizes: Any, /, *, allowzero: int = 0) -> Any:
    """Returns `x` in another shape: -1 is what remains, 0 (unless `allowzero`) is the size that `x` has there."""
    wanted = static_integers(sizes, "the shape of Reshape")
    copied = {} if allowzero else {axis: x.shape[axis] for axis, size in enumerate(wanted) if size == 0}
    if -1 in wanted:  # sizes that are copied say nothing about what remains, even where they are 0
        given = math.prod(size for axis, size in enumerate(wanted) if axis not in copied and size != -1)
        rest = math.prod(size for axis, size in enumerate(x.shape) if axis not in copied)
        copied[wanted.index(-1)] = rest // given
    return x.reshape(tuple(copied.get(axis, size) for axis, size in enumerate(wanted)))


@lowers("Transpose", since=1)
def transpose(x: Any, /, *, perm: Sequence[int] | None = None) -> Any:
    """Returns `x` with its axes in the order `perm`; reversed where there is none."""
    return array_namespace(x).transpose(x, perm)


@lowers("Squeeze", since=1)
def squeeze_1(x: Any, /, *, axes: Sequence[int] | None = None) -> Any:
    """Returns `x` without the given axes of size 1; without all of them where none is given."""
    return array_namespace(x).squeeze(x, tuple(axes) if axes else None)


@lowers("Squeeze", since=13)
def squeeze(x: Any, axes: Any = None, /) -> Any:
    """Returns `squeeze_1`; the axes are an input."""
    return squeeze_1(x, axes=None if axes is None else static_integers(axes, "the axes of Squeeze"))


@lowers("Unsqueeze", since=1)
def unsqueeze_1(x: Any, /, *, axes: Sequence[int]) -> Any:
    """Returns `x` with axes of size 1, at the given places of the result."""
    return array_namespace(x).expand_dims(x, tuple(axes))


@lowers("Unsqueeze", since=13)
def unsqueeze(x: Any, axes: Any, /) -> Any:
    """Returns `unsqueeze_1`; the axes are an input."""
    return unsqueeze_1(x, axes=static_integers(axes, "the axes of Unsqueeze"))


@lowers("Expand", since=8)
def expand(x: Any, sizes: Any, /) -> Any:
    """Returns `x` broadcast with the shape `sizes`; a size of 1 there leaves that of `x`."""
    wanted = np.broadcast_shapes(x.shape, static_integers(sizes, "the shape of Expand"))
    return array_namespace(x).broadcast_to(with_rank(x, len(wanted)), wanted)


@lowers("Tile", since=6)
def tile(x: Any, repeats: Any, /) -> Any:
    """Returns `x` repeated along each axis."""
    return array_namespace(x).tile(x, static_integers(repeats, "the repeats of Tile"))
