"""Pools over regions of images, each region cut into the same number of bins."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ptqjax.kernels.sampling import Neighbour, neighbours


class Spans(NamedTuple):
    """Where regions lie along one axis, in elements."""

    start: Float[Array, " regions"]
    """Where each begins."""
    length: Float[Array, " regions"]
    """How long it is."""
    num_samples: Int[Array, " regions"]
    """How many samples each of its bins takes."""


def align_regions(
    x: Float[Array, "n h w c"],
    images: Int[Array, " regions"],
    rows: Spans,
    columns: Spans,
    *,
    bins: tuple[int, int],
    most_samples: tuple[int, int],
    largest: bool,
) -> Float[Array, "regions bins_h bins_w c"]:
    """Returns the mean of linearly interpolated samples in each bin of each region.

    Args:
        x: The images, channels last.
        images: In which image each region lies.
        rows: The regions along the height.
        columns: The regions along the width.
        bins: How many bins a region has along each axis.
        most_samples: The largest `num_samples` of rows and of columns.
        largest: Take the largest weighted neighbour of any sample instead of the mean: what ONNX and its runtimes
            mean by "max".
    """
    height, width = x.shape[1:3]
    along_h, inside_h, used_h = _samples(rows, height, bins[0], most_samples[0])
    along_w, inside_w, used_w = _samples(columns, width, bins[1], most_samples[1])
    pixels = x.reshape(-1, x.shape[-1])
    inside = _grid(inside_h, inside_w)
    used = _grid(used_h, used_w).reshape(len(images), bins[0], most_samples[0], bins[1], most_samples[1], 1)
    result = None
    for (row, weight_h), (column, weight_w) in product(along_h, along_w):
        places = images[:, None, None].astype(jnp.int32) * (height * width) + row[:, :, None] * width + column[:, None]
        weight = weight_h[:, :, None] * weight_w[:, None] * inside
        found = jnp.take(pixels, places, axis=0, mode="clip") * weight[..., None].astype(x.dtype)
        found = found.reshape(*used.shape[:-1], x.shape[-1])
        if largest:
            best = jnp.max(jnp.where(used, found, -jnp.inf), axis=(2, 4))
            result = best if result is None else jnp.maximum(result, best)
        else:
            total = jnp.sum(jnp.where(used, found, 0), axis=(2, 4))
            result = total if result is None else result + total
    assert result is not None  # noqa: S101 (there are four neighbours)
    num = jnp.maximum(rows.num_samples, 0) * jnp.maximum(columns.num_samples, 0)
    if largest:
        return jnp.where((num > 0)[:, None, None, None], result, 0)
    return result / jnp.maximum(num, 1)[:, None, None, None].astype(x.dtype)


def max_of_regions(
    x: Float[Array, "n c h w"], images: Int[Array, " regions"], corners: Int[Array, "regions 4"], bins: tuple[int, int]
) -> Float[Array, "regions c bins_h bins_w"]:
    """Returns the largest element in each bin of each region; 0 in a bin that lies outside.

    `corners` are x1, y1, x2, y2, the last elements included. Bins are as long as fits and overlap where that is no
    integer.
    """

    def of_region(region: tuple[jax.Array, jax.Array]) -> jax.Array:
        image, (x1, y1, x2, y2) = region
        rows, columns = _in_bins(y1, y2, x.shape[2], bins[0]), _in_bins(x1, x2, x.shape[3], bins[1])
        plane = x[image]
        by_columns = jnp.max(jnp.where(columns[:, None, None], plane[None], -jnp.inf), axis=-1)  # [bins_w, c, h]
        largest = jnp.max(jnp.where(rows[:, None, None], by_columns[None], -jnp.inf), axis=-1)  # [bins_h, bins_w, c]
        filled = _grid(jnp.any(rows, axis=1)[None], jnp.any(columns, axis=1)[None])[0, ..., None]
        return jnp.moveaxis(jnp.where(filled, largest, 0), -1, 0)

    return lax.map(of_region, (images, corners))


def _samples(spans: Spans, size: int, bins: int, most: int) -> tuple[list[Neighbour], jax.Array, jax.Array]:
    """Returns the neighbours of each sample [regions, bins * most], whether it is inside, and whether it is one."""
    count = jnp.maximum(spans.num_samples, 1)[:, None, None].astype(spans.start.dtype)
    number = jnp.arange(most)[None, None]
    step = (spans.length / bins)[:, None, None]
    offset = (jnp.arange(bins)[None, :, None] + (number + jnp.asarray(0.5, step.dtype)) / count) * step
    positions = (spans.start[:, None, None] + offset).reshape(len(spans.start), -1)
    inside = (positions >= -1) & (positions <= size)
    used = jnp.broadcast_to(number < spans.num_samples[:, None, None], (len(spans.start), bins, most))
    clipped = jnp.clip(positions, 0, size - 1)
    found = neighbours(clipped, size, mode="linear", padding_mode="border", border=(0.0, size - 1.0))
    return found, inside, used.reshape(positions.shape)


def _in_bins(first: jax.Array, last: jax.Array, size: int, bins: int) -> jax.Array:
    """Returns whether each element lies in each bin, [bins, size]."""
    step = jnp.maximum(last - first + 1, 1).astype(jnp.float32) / bins
    number = jnp.arange(bins, dtype=jnp.float32)
    begins = jnp.floor(number * step).astype(jnp.int32) + first
    ends = jnp.ceil((number + 1) * step).astype(jnp.int32) + first
    places = jnp.arange(size)[None]
    return (places >= begins[:, None]) & (places < ends[:, None])


def _grid(rows: jax.Array, columns: jax.Array) -> jax.Array:
    return rows[:, :, None] & columns[:, None]
