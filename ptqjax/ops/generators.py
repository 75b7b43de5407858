"""Operators whose results are made of settings and sizes: constants, ranges, the identity matrix, one-hot vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.element_types import element_type
from ptqjax.ops.layout import along_axis
from ptqjax.ops.registry import known, lowers, static_integers


@lowers("Constant", since=1)
def constant(
    *,
    value: Any = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
    value_string: str | None = None,
    value_strings: Sequence[str] | None = None,
) -> np.ndarray:
    """Returns the one value that is given, known while tracing."""
    if value is not None:
        return np.asarray(value)
    for given, dtype in (
        (value_float, np.float32),
        (value_floats, np.float32),
        (value_int, np.int64),
        (value_ints, np.int64),
        (value_string, np.object_),
        (value_strings, np.object_),
    ):
        if given is not None:
            return np.asarray(given, dtype)
    raise ValueError("it holds no value; expected one attribute that begins with 'value'")


@lowers("ConstantOfShape", since=9)
def constant_of_shape(sizes: Any, /, *, value: Any = None) -> np.ndarray:
    """Returns a tensor of the shape `sizes` in which each element is that of `value`; 0 in float32 without one."""
    element = np.zeros(1, np.float32) if value is None else np.asarray(value)
    # a view of the one element: it takes no memory before it is computed with
    return np.broadcast_to(element.reshape(()), static_integers(sizes, "the shape of ConstantOfShape"))


@lowers("Range", since=11)
def range_11(start: Any, limit: Any, delta: Any, /) -> np.ndarray:
    """Returns start, start + delta, ... below `limit` (above, for a negative delta), in the type of the three.

    Element i is start + i delta, each step rounded to the type; the count is that of exact numbers.

    Raises:
        ValueError: The delta is 0, or there is no end.
    """
    return _steps(*_limits(start, limit, delta))


@lowers("Range", since=27)
def range_27(start: Any, limit: Any, delta: Any, /, *, stash_type: int = 1) -> np.ndarray:
    """Returns `range_11`; 16-bit floats are computed in the type `stash_type` and rounded once."""
    limits = _limits(start, limit, delta)
    dtype = limits[0].dtype
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == np.float16().itemsize:
        limits = [value.astype(element_type(stash_type)) for value in limits]
    return _steps(*limits).astype(dtype)


@lowers("EyeLike", since=9)
def eye_like(x: Any, /, *, dtype: int | None = None, k: int = 0) -> np.ndarray:
    """Returns a matrix of the shape of `x` with ones on the diagonal `k` (above the main one where positive)."""
    rows, columns = x.shape
    return np.eye(rows, columns, k, dtype=x.dtype if dtype is None else element_type(dtype))


@lowers("OneHot", since=9)
def one_hot_9(indices: Any, depth: Any, values: Any, /, *, axis: int = -1) -> Any:
    """Returns values[1] where the position along a new `axis` of size `depth` is the index, values[0] elsewhere.

    An index outside of [0, depth) is nowhere. Floats are cut to integers.
    """
    indices, positions = _indices_and_positions(indices, depth, axis)
    xp = array_namespace(indices, values)
    return xp.where(indices == positions, values[1], values[0])


@lowers("OneHot", since=11)
def one_hot(indices: Any, depth: Any, values: Any, /, *, axis: int = -1) -> Any:
    """Returns `one_hot_9`; indices in [-depth, 0) count from the end."""
    indices, positions = _indices_and_positions(indices, depth, axis)
    xp = array_namespace(indices, values)
    is_hot = (indices == positions) | ((indices < 0) & (indices == positions - positions.size))
    return xp.where(is_hot, values[1], values[0])


def _limits(*limits: Any) -> list[np.ndarray]:
    return [known(limit, "the limits of Range").reshape(()) for limit in limits]


@np.errstate(over="ignore")  # float16 ends at 65504
def _steps(start: np.ndarray, limit: np.ndarray, delta: np.ndarray) -> np.ndarray:
    first, last, step = (value.item() for value in (start, limit, delta))
    if not all(math.isfinite(value) for value in (first, last, step)) or step == 0:
        raise ValueError(f"a Range from {first} to {last} by {step} has no end; expected a step that reaches the limit")
    # Python's integers do not wrap around; floats are differences of numbers that float64 holds
    count = -((first - last) // step) if isinstance(first, int) else math.ceil((last - first) / step)
    return start + np.arange(max(count, 0)).astype(delta.dtype) * delta


def _indices_and_positions(indices: Any, depth: Any, axis: int) -> tuple[Any, np.ndarray]:
    """Returns the indices with a new axis, and 0, 1, ... along it."""
    (size,) = static_integers(depth, "the depth of OneHot")
    rank = indices.ndim + 1
    if jnp.issubdtype(indices.dtype, jnp.floating):
        xp = array_namespace(indices)
        indices = xp.trunc(indices.astype(jnp.promote_types(indices.dtype, np.float32)))  # positions are exact there
    return array_namespace(indices).expand_dims(indices, axis), along_axis(np.arange(size), axis, rank)
