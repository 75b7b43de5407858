"""Pools over regions of images, each region cut into the same number of bins."""

from __future__ import annotations

from functools import reduce
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ptqjax.kernels.sampling import Neighbour, neighbours


class Spans(NamedTuple):
    """Where regions lie along one axis, in elements."""

    start: Float[Array, " regions"]
    """Where each begins."""
    length: Float[Array, " regions"]
    """How long it is."""
    num_samples: Int[Array, " regions"]
    """How many samples each of its bins takes."""


class _Samples(NamedTuple):
    """Samples along one axis; each array is [samples, regions, bins]."""

    neighbours: tuple[Neighbour, ...]
    """The elements that each is made of; their weights are 0 outside of the image."""
    used: Bool[Array, "..."]
    """Whether the bin has that many samples."""


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
    along_h = _samples(rows, height, bins[0], most_samples[0])
    along_w = _samples(columns, width, bins[1], most_samples[1])
    pixels = x.reshape(-1, x.shape[-1])
    first = images.astype(jnp.int32)[:, None, None] * (height * width)

    def with_sample(result: jax.Array, samples: tuple[_Samples, _Samples]) -> tuple[jax.Array, None]:
        in_rows, in_columns = samples
        found = [
            jnp.take(pixels, first + row.place[:, :, None] * width + column.place[:, None], axis=0, mode="clip")
            * (row.weight[:, :, None] * column.weight[:, None])[..., None].astype(x.dtype)
            for row, column in product(in_rows.neighbours, in_columns.neighbours)
        ]
        used = (in_rows.used[:, :, None] & in_columns.used[:, None])[..., None]
        return jnp.where(used, combine(result, reduce(combine, found)), result), None

    combine = jnp.maximum if largest else jnp.add
    start = jnp.full((len(images), *bins, x.shape[-1]), -jnp.inf if largest else 0, x.dtype)
    pairs = np.indices(most_samples).reshape(2, -1)
    of_pairs = tuple(
        jax.tree.map(lambda each, which=which: each[which], along)
        for along, which in zip((along_h, along_w), pairs, strict=True)
    )
    # One sample after another: many times faster on a CPU than a gather of all of them and one sum.
    result, _ = lax.scan(with_sample, start, of_pairs)
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


def _samples(spans: Spans, size: int, bins: int, most: int) -> _Samples:
    """Returns what the samples of each bin read along one axis."""
    count = jnp.maximum(spans.num_samples, 1)[None, :, None].astype(spans.start.dtype)
    number = jnp.arange(most)[:, None, None]
    step = (spans.length / bins)[None, :, None]
    offset = (jnp.arange(bins)[None, None] + (number + jnp.asarray(0.5, step.dtype)) / count) * step
    positions = spans.start[None, :, None] + offset
    inside = (positions >= -1) & (positions <= size)
    clipped = jnp.clip(positions, 0, size - 1)
    found = neighbours(clipped, size, mode="linear", padding_mode="border", border=(0.0, size - 1.0))
    used = jnp.broadcast_to(number < spans.num_samples[None, :, None], positions.shape)
    return _Samples(tuple(each._replace(weight=jnp.where(inside, each.weight, 0)) for each in found), used)


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
