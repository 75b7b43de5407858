"""Values of images between their elements, at positions that may be computed from data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MODES = {"nearest": (0,), "linear": (0, 1), "cubic": (-1, 0, 1, 2)}
"""Kinds of interpolation, and which elements take part, counted from the one before the position (or nearest to it)."""

_CUBIC_A = -0.75  # of Keys' cubic convolution, as in GridSample


class Neighbour(NamedTuple):
    """One element for each position along an axis."""

    place: Int[Array, "..."]
    """Its place, inside the axis."""
    weight: Float[Array, "..."]
    """Its weight; 0 where it lies outside of the axis and counts as 0."""


def sample(
    x: Float[Array, "n *spatial c"],
    positions: Float[Array, "n *out rank"],
    *,
    mode: str,
    padding_mode: str = "zeros",
    borders: Sequence[tuple[float, float]],
) -> Float[Array, "n *out c"]:
    """Returns channels-last images interpolated at positions, which count elements from 0 along each spatial axis.

    Args:
        x: The images.
        positions: The last axis runs over the spatial axes of `x`, in their order.
        mode: One of `MODES`; "nearest" takes the even one of two.
        padding_mode: What lies outside of the borders: "zeros", "border" (the edge), "reflection" (at the borders).
        borders: Where each axis begins and ends, in the terms of positions.
    """
    sizes = x.shape[1:-1]
    along = [
        neighbours(positions[..., axis], size, mode=mode, padding_mode=padding_mode, border=borders[axis])
        for axis, size in enumerate(sizes)
    ]
    pixels = x.reshape(x.shape[0], math.prod(sizes), x.shape[-1])
    terms = []
    for corner in product(*along):
        flat, weight = corner[0]
        for (place, more), size in zip(corner[1:], sizes[1:], strict=True):
            flat, weight = flat * size + place, weight * more
        found = jax.vmap(lambda image, places: jnp.take(image, places, axis=0, mode="clip"))(pixels, flat)
        terms.append(found * weight[..., None].astype(x.dtype))
    return reduce(jnp.add, terms)


def neighbours(
    positions: Float[Array, "..."], size: int, *, mode: str, padding_mode: str, border: tuple[float, float]
) -> list[Neighbour]:
    """Returns the elements of one axis that make the values at the positions; see `sample`."""
    if mode != "cubic":  # where each element is looked up inside, as in torch and ONNX Runtime
        positions = _inside(positions, size, padding_mode, border)
    base = jnp.round(positions) if mode == "nearest" else jnp.floor(positions)
    found = []
    for offset, weight in zip(MODES[mode], _weights(positions - base, mode), strict=True):
        place = base + offset
        if padding_mode == "zeros":
            counted = jnp.where((place >= 0) & (place <= size - 1), weight, 0)
        else:
            place, counted = _inside(place, size, padding_mode, border), weight
        found.append(Neighbour(jnp.clip(place, 0, size - 1).astype(jnp.int32), counted))
    return found


def _inside(positions: jax.Array, size: int, padding_mode: str, border: tuple[float, float]) -> jax.Array:
    low, high = border
    if padding_mode == "border":
        return jnp.where((positions < low) | (positions > high), jnp.clip(positions, 0, size - 1), positions)
    if padding_mode == "reflection":
        return _reflected(positions, low, high)
    return positions


def _reflected(positions: jax.Array, low: float, high: float) -> jax.Array:
    """Returns the positions mirrored at `low` and `high` until they lie between."""
    span = high - low
    if span == 0:
        return jnp.full_like(positions, low)
    around = jnp.mod(positions - low, 2 * span)
    mirrored = low + jnp.minimum(around, 2 * span - around)
    return jnp.where((positions < low) | (positions > high), mirrored, positions)


def _weights(t: jax.Array, mode: str) -> list[jax.Array]:
    """Returns the weights of `MODES[mode]` for a position `t` behind the element that it counts from."""
    if mode == "nearest":
        return [jnp.ones_like(t)]
    if mode == "linear":
        return [1 - t, t]
    return [_far(1 + t), _near(t), _near(1 - t), _far(2 - t)]


def _near(d: jax.Array) -> jax.Array:
    return ((_CUBIC_A + 2) * d - (_CUBIC_A + 3)) * d * d + 1


def _far(d: jax.Array) -> jax.Array:
    return ((_CUBIC_A * d - 5 * _CUBIC_A) * d + 8 * _CUBIC_A) * d - 4 * _CUBIC_A
