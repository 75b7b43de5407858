"""Resampling along one axis: each new element is a weighted sum of old ones, at places known while tracing.

`source_positions` says where in the old axis the new elements lie, `nearest` and `interpolating` turn positions into
`Taps`, `resample` applies these to an array.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

_MOST_GATHERS = 8  # beyond, one product with a matrix is faster than a gather for each tap


class Axis(NamedTuple):
    """An axis before and after, in the terms of ONNX's coordinate transformations."""

    size: int
    """How many elements it has."""
    num: int
    """How many it shall have."""
    scale: float
    """The new length over the old one."""
    length: float
    """size * scale, which need not be an integer."""
    start: float = 0.0
    """Where the region to crop begins, of 1 for the whole axis; only "tf_crop_and_resize" heeds it."""
    end: float = 1.0
    """Where that region ends."""


class Taps(NamedTuple):
    """Which elements of an axis make a new one."""

    indices: Int[np.ndarray, "num taps"]
    """Their places, inside the axis."""
    weights: Float[np.ndarray, "num taps"] | None
    """Their weights; None for a single tap that is taken as it is."""


def _half_pixel(y: Any, axis: Axis) -> Any:
    return (y + 0.5) / axis.scale - 0.5


def _pytorch_half_pixel(y: Any, axis: Axis) -> Any:
    return _half_pixel(y, axis) if axis.length > 1 else np.zeros_like(y)


def _half_pixel_symmetric(y: Any, axis: Axis) -> Any:
    """The centre of the old axis is the centre of the new one, also where its length was not an integer."""
    return _half_pixel(y, axis) + axis.size / 2 * (1 - axis.num / axis.length)


def _align_corners(y: Any, axis: Axis) -> Any:
    if axis.length == 1:
        return np.zeros_like(y)
    return y * (axis.size - 1) / (axis.length - 1)


def _crop(y: Any, axis: Axis) -> Any:
    last = axis.size - 1
    if axis.length <= 1:
        return np.full_like(y, (axis.start + axis.end) / 2 * last)
    step = (axis.end - axis.start) * last
    return axis.start * last + y * step / (axis.length - 1)


_TRANSFORMATIONS: dict[str, Callable[[Any, Axis], Any]] = {
    "half_pixel": _half_pixel,
    "half_pixel_symmetric": _half_pixel_symmetric,
    "pytorch_half_pixel": _pytorch_half_pixel,
    "align_corners": _align_corners,
    "asymmetric": lambda y, axis: y / axis.scale,
    "tf_half_pixel_for_nn": lambda y, axis: (y + 0.5) / axis.scale,
    "tf_crop_and_resize": _crop,
}

_ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}

TRANSFORMATIONS = frozenset(_TRANSFORMATIONS)
"""The names of coordinate transformations, ONNX's."""
ROUNDINGS = frozenset(_ROUNDINGS)
"""The names of the ways to choose between two neighbours, ONNX's."""


def source_positions(axis: Axis, transformation: str, *, dtype: Any = np.float64) -> Float[np.ndarray, " num"]:
    """Returns where in the old axis each new element lies, in elements; computed in `dtype`.

    In float32 a scale that is a rounded fraction (4/3) hits the element that was meant, as it does in runtimes.
    """
    return _TRANSFORMATIONS[transformation](np.arange(axis.num, dtype=dtype), axis)


def nearest(positions: Float[np.ndarray, " num"], size: int, *, rounding: str) -> Taps:
    """Returns the element nearest to each position; `rounding` decides between two."""
    indices = np.clip(_ROUNDINGS[rounding](positions), 0, size - 1).astype(np.int64)
    return Taps(indices[:, None], None)


def linear_kernel(distance: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Returns the weight of an element by its distance, for linear interpolation; 0 from 1 on."""
    return np.maximum(1 - np.abs(distance), 0)


def cubic_kernel(a: float) -> Callable[[Float[np.ndarray, "..."]], Float[np.ndarray, "..."]]:
    """Returns the weight of an element by its distance, for cubic convolution with parameter `a`; 0 from 2 on.

    Source: R. G. Keys, Cubic convolution interpolation for digital image processing, 1981, equation 4.
    """

    def weight(distance: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        d = np.abs(distance)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0))  # noqa: PLR2004 (where the kernel ends)

    return weight


def interpolating(
    positions: Float[np.ndarray, " num"],
    size: int,
    *,
    kernel: Callable[[np.ndarray], np.ndarray],
    support: int,
    shrinking: float = 1.0,
    exclude_outside: bool = False,
) -> Taps:
    """Returns the taps around each position, weighted by `kernel`; those outside the axis are its edge.

    Args:
        positions: Where to interpolate.
        size: The size of the axis.
        kernel: Weights by distance.
        support: From which distance on they are 0.
        shrinking: At most 1: distances are multiplied by it, so that the kernel is wider, and its weights divided by
            their sum (antialiasing).
        exclude_outside: Taps outside the axis count nothing, and the others are divided by their sum.
    """
    reach = int(np.ceil(support / shrinking))
    indices = np.floor(positions).astype(np.int64)[:, None] + np.arange(1 - reach, reach + 1)
    weights = kernel(shrinking * (indices - positions[:, None]))
    if shrinking != 1:
        weights = weights / weights.sum(axis=1, keepdims=True)
    if exclude_outside:
        weights = np.where((indices >= 0) & (indices < size), weights, 0)
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / np.where(total == 0, 1, total)
    return Taps(np.clip(indices, 0, size - 1), weights)


def resample(x: Shaped[Array, "..."], taps: Taps, axis: int) -> Shaped[Array, "..."]:
    """Returns `x` with its `axis` made of the taps' weighted sums; these need a floating `x`."""
    if taps.weights is None:
        return _gathered(x, taps.indices[:, 0], axis)
    weights = taps.weights.astype(x.dtype)
    if weights.shape[1] > _MOST_GATHERS:
        product = jnp.tensordot(x, _matrix(taps, x.shape[axis], x.dtype), ((axis,), (1,)), precision="highest")
        return jnp.moveaxis(product, -1, axis)
    along = tuple(-1 if place == axis else 1 for place in range(x.ndim))
    used = np.flatnonzero(weights.any(axis=0))
    terms = [
        _gathered(x, taps.indices[:, tap], axis) * weights[:, tap].reshape(along)
        for tap in (used if used.size else [0])  # one of weight 0: an empty axis, or one made of elements outside
    ]
    return reduce(jnp.add, terms)


def _gathered(x: jax.Array, indices: np.ndarray, axis: int) -> jax.Array:
    return jnp.take(x, indices, axis=axis, mode="clip")


def _matrix(taps: Taps, size: int, dtype: Any) -> np.ndarray:
    assert taps.weights is not None  # noqa: S101 (the caller asked)
    matrix = np.zeros((len(taps.indices), size))
    np.add.at(matrix, (np.arange(len(taps.indices))[:, None], taps.indices), taps.weights)
    return matrix.astype(dtype)
