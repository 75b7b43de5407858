"""Operators that compare elements along an axis: TopK, ArgMax, ArgMin, Unique."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.registry import known, lowers, static_integers


@lowers("TopK", since=1)
def top_k_1(x: Any, /, *, k: int, axis: int = -1) -> tuple[Any, Any]:
    """Returns the k largest elements along `axis`, in order, and their places; equal ones keep theirs."""
    return _top(x, k, axis)


@lowers("TopK", since=10)
def top_k_10(x: Any, k: Any, /, *, axis: int = -1) -> tuple[Any, Any]:
    """Returns `top_k_1`; `k` is an input."""
    return _top(x, _number(k), axis)


@lowers("TopK", since=11)
def top_k(x: Any, k: Any, /, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Any, Any]:  # noqa: A002 (ONNX's name)
    """Returns `top_k_10`, or the k smallest, smallest first, where not `largest`."""
    del sorted  # where it is 0 any order will do
    if largest:
        return _top(x, _number(k), axis)
    return _top(x, _number(k), axis, keys=-x if jnp.issubdtype(x.dtype, jnp.floating) else ~x)  # neither overflows


@lowers("ArgMax", since=1)
def arg_max_1(x: Any, /, *, axis: int = 0, keepdims: int = 1) -> Any:
    """Returns the place of the largest element along `axis`; of the first, where several are."""
    return _place_of_extreme("argmax", x, axis, keepdims, select_last_index=0)


@lowers("ArgMax", since=12)
def arg_max(x: Any, /, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Any:
    """Returns `arg_max_1`, or the place of the last where `select_last_index`."""
    return _place_of_extreme("argmax", x, axis, keepdims, select_last_index=select_last_index)


@lowers("ArgMin", since=1)
def arg_min_1(x: Any, /, *, axis: int = 0, keepdims: int = 1) -> Any:
    """Returns the place of the smallest element along `axis`; of the first, where several are."""
    return _place_of_extreme("argmin", x, axis, keepdims, select_last_index=0)


@lowers("ArgMin", since=12)
def arg_min(x: Any, /, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Any:
    """Returns `arg_min_1`, or the place of the last where `select_last_index`."""
    return _place_of_extreme("argmin", x, axis, keepdims, select_last_index=select_last_index)


@lowers("Unique", since=11)
def unique(x: Any, /, *, axis: int | None = None, sorted: int = 1) -> tuple[np.ndarray, ...]:  # noqa: A002 (ONNX's name)
    """Returns the different elements (slices along `axis`), where each is first, which one each is, and their counts.

    They are in ascending order, or where not `sorted` in the order of their first places.
    """
    values, first, inverse, counts = np.unique(
        known(x, "the input of Unique"), return_index=True, return_inverse=True, return_counts=True, axis=axis
    )
    order = np.arange(first.size) if sorted else np.argsort(first)
    rank = np.argsort(order)  # the new place of each
    indices = (first[order], rank[inverse.ravel()], counts[order])
    return np.take(values, order, axis=axis or 0), *(each.astype(np.int64) for each in indices)


def _number(k: Any) -> int:
    (number,) = static_integers(k, "the k of TopK")
    return number


def _top(x: Any, k: int, axis: int, *, keys: Any = None) -> tuple[Any, Any]:
    x = jnp.asarray(x)
    keys = x if keys is None else jnp.asarray(keys)
    keys = jnp.where(keys == 0, jnp.zeros((), keys.dtype), keys)  # -0.0 and 0.0 are equal, and kept in order
    places = lax.top_k(jnp.moveaxis(keys, axis, -1), k)[1]
    places = jnp.moveaxis(places, -1, axis)
    return jnp.take_along_axis(x, places, axis=axis, mode="clip"), places.astype(_index_type())


def _place_of_extreme(name: str, x: Any, axis: int, keepdims: int, *, select_last_index: int) -> Any:
    xp = array_namespace(x)
    places = getattr(xp, name)(xp.flip(x, axis) if select_last_index else x, axis=axis, keepdims=bool(keepdims))
    places = places.astype(np.int64 if xp is np else _index_type())
    return x.shape[axis] - 1 - places if select_last_index else places


def _index_type() -> np.dtype:
    """Returns int64, or what JAX makes of it where 64-bit types are off."""
    return jax.dtypes.canonicalize_dtype(np.int64)
