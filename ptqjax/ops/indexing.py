"""Operators that pick elements by their places: Gather and its kin, masks, and what depends on conditions."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.layout import along_axis
from ptqjax.ops.registry import is_static, known, lowers


@lowers("Gather", since=1)
def gather(x: Any, indices: Any, /, *, axis: int = 0) -> Any:
    """Returns the slices of `x` along `axis` at the `indices`, which may count from the end.

    Raises:
        IndexError: An index that is known is outside; one that is not is brought to the nearest place.
    """
    check_indices(indices, x.shape[axis])
    if is_static(x, indices):
        return np.asarray(np.take(x, indices, axis=axis))
    return jnp.take(jnp.asarray(x), from_the_start(indices, x.shape[axis]), axis=axis, mode="clip")


@lowers("GatherElements", since=11)
def gather_elements(x: Any, indices: Any, /, *, axis: int = 0) -> Any:
    """Returns, where the indices are, the element of `x` at the same place but for `axis`, where the index says it.

    Raises:
        IndexError: See `gather`.
    """
    check_indices(indices, x.shape[axis])
    axis %= x.ndim
    sizes = (x.shape[k] if k == axis else size for k, size in enumerate(indices.shape))
    x = x[tuple(slice(size) for size in sizes)]  # the indices may be fewer
    if is_static(x, indices):
        return np.take_along_axis(x, indices.astype(np.int64), axis=axis)
    return jnp.take_along_axis(jnp.asarray(x), from_the_start(indices, x.shape[axis]), axis=axis, mode="clip")


@lowers("GatherND", since=11)
def gather_nd(x: Any, indices: Any, /, *, batch_dims: int = 0) -> Any:
    """Returns the parts of `x` at the places that the rows (last axis) of `indices` are, from axis `batch_dims` on.

    The axes before that are walked together.

    Raises:
        IndexError: See `gather`.
    """
    depth = indices.shape[-1]
    for column, size in enumerate(x.shape[batch_dims : batch_dims + depth]):
        check_indices(indices[..., column], size)
    rank = indices.ndim - 1
    batch = [along_axis(np.arange(size), k, rank) for k, size in enumerate(x.shape[:batch_dims])]
    places = (*batch, *(indices[..., column] for column in range(depth)))
    if is_static(x, indices):
        return np.asarray(x[places])
    return jnp.asarray(x).at[tuple(map(jnp.asarray, places))].get(mode="clip")


@lowers("Compress", since=9)
def compress(x: Any, condition: Any, /, *, axis: int | None = None) -> Any:
    """Returns the slices of `x` along `axis` (its elements where there is none) at which the condition holds."""
    kept = np.flatnonzero(known(condition, "the condition of Compress"))
    if axis is None:
        x, axis = x.reshape(-1), 0
    return gather(x, kept, axis=axis)


@lowers("NonZero", since=9)
def non_zero(x: Any, /) -> np.ndarray:
    """Returns the places of the elements that are not zero, as columns, in their order."""
    return np.ascontiguousarray(np.argwhere(known(x, "the input of NonZero")).T, np.int64)


@lowers("Trilu", since=14)
def trilu(x: Any, k: Any = None, /, *, upper: int = 1) -> Any:
    """Returns the matrices with zeros below the diagonal `k`, or above it where not `upper`; `k` may be data."""
    rows, columns = x.shape[-2:]
    offset = along_axis(np.arange(columns), -1, x.ndim) - along_axis(np.arange(rows), -2, x.ndim)
    diagonal = 0 if k is None else k.reshape(())
    xp = array_namespace(x, k)
    kept = offset >= diagonal if upper else offset <= diagonal
    return xp.where(kept, x, xp.zeros((), x.dtype))


@lowers("ReverseSequence", since=10)
def reverse_sequence(x: Any, lengths: Any, /, *, batch_axis: int = 1, time_axis: int = 0) -> Any:
    """Returns `x` with the first elements along `time_axis` in reverse: as many as the length of each sequence."""
    times = along_axis(np.arange(x.shape[time_axis]), time_axis, x.ndim)
    ends = along_axis(lengths, batch_axis, x.ndim)
    xp = array_namespace(x, lengths)
    places = xp.where(times < ends, ends - 1 - times, times)
    return xp.take_along_axis(xp.asarray(x), places, axis=time_axis)


def from_the_start(indices: Any, size: int) -> Any:
    """Returns the indices with those below 0 counted from the start, not from the end."""
    return array_namespace(indices).where(indices < 0, indices + indices.dtype.type(size), indices)


def check_indices(indices: Any, size: int) -> None:
    """Checks the indices that are known.

    Raises:
        IndexError: One is outside of [-size, size).
    """
    if not isinstance(indices, np.ndarray) or indices.size == 0:
        return
    outside = indices[(indices < -size) | (indices >= size)]
    if outside.size:
        expected = f"{-size} to {size - 1}" if size else "none at all"
        raise IndexError(f"index {outside.flat[0]} is outside of an axis of size {size}; expected {expected}")
