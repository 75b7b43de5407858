"""Operators that write elements at given places: Scatter and its kin."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.ops.indexing import check_indices
from ptqjax.ops.layout import along_axis
from ptqjax.ops.registry import is_static, lowers

_UFUNCS = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


@lowers("Scatter", since=9)
@lowers("ScatterElements", since=11)
def scatter_elements_11(x: Any, indices: Any, updates: Any, /, *, axis: int = 0) -> Any:
    """Returns `x` with each update at its own place but for `axis`, where the index says it.

    Where several are written to one place, the last holds.

    Raises:
        IndexError: An index that is known is outside; what an index that is not known writes outside is dropped.
    """
    return scatter_elements(x, indices, updates, axis=axis)


@lowers("ScatterElements", since=16)
def scatter_elements(x: Any, indices: Any, updates: Any, /, *, axis: int = 0, reduction: str = "none") -> Any:
    """Returns `scatter_elements_11`; with a `reduction` the updates are added (or so) to what is there."""
    check_indices(indices, x.shape[axis])
    places = [along_axis(np.arange(size), k, x.ndim) for k, size in enumerate(indices.shape)]
    places[axis] = indices
    return _written(x, tuple(places), updates, reduction)


@lowers("ScatterND", since=11)
def scatter_nd_11(x: Any, indices: Any, updates: Any, /) -> Any:
    """Returns `x` with each update at the place that a row (last axis) of `indices` is; see `scatter_elements_11`."""
    return scatter_nd(x, indices, updates)


@lowers("ScatterND", since=16)
def scatter_nd(x: Any, indices: Any, updates: Any, /, *, reduction: str = "none") -> Any:
    """Returns `scatter_nd_11`; with a `reduction` the updates are added (or so) to what is there."""
    places = tuple(indices[..., column] for column in range(indices.shape[-1]))
    for place, size in zip(places, x.shape, strict=False):
        check_indices(place, size)
    return _written(x, places, updates, reduction)


@lowers("TensorScatter", since=24)
def tensor_scatter(
    cache: Any, update: Any, write_indices: Any = None, /, *, axis: int = -2, mode: str = "linear"
) -> Any:
    """Returns the cache with the update of each sample written along `axis` from its write index on (0 without one).

    In the mode "circular" what reaches the end goes on at the start.
    """
    axis %= cache.ndim
    starts = np.zeros(cache.shape[0], np.int64) if write_indices is None else write_indices
    places: list[Any] = [along_axis(np.arange(size), k, cache.ndim) for k, size in enumerate(update.shape)]
    places[axis] = places[axis] + along_axis(starts, 0, cache.ndim)
    if mode == "circular":
        places[axis] = places[axis] % cache.shape[axis]
    check_indices(places[axis], cache.shape[axis])
    return _written(cache, tuple(places), update, "none")


def _written(x: Any, places: tuple[Any, ...], updates: Any, reduction: str) -> Any:
    if reduction != "none" and reduction not in _UFUNCS:
        raise UnsupportedOperatorError(f"a scattering by '{reduction}' has no lowering; {sorted(_UFUNCS)} have")
    if is_static(x, places, updates):
        return _written_by_numpy(x.copy(), places, updates, reduction)
    at = jnp.asarray(x).at[tuple(map(jnp.asarray, places))]
    write = {"none": at.set, "add": at.add, "mul": at.multiply, "max": at.max, "min": at.min}[reduction]
    return write(jnp.asarray(updates), mode="drop")


def _written_by_numpy(x: np.ndarray, places: tuple[Any, ...], updates: np.ndarray, reduction: str) -> np.ndarray:
    if reduction == "none":
        x[places] = updates
    else:
        _UFUNCS[reduction].at(x, places, updates)
    return x
