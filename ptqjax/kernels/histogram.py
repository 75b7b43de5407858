"""Histograms of many tensors at once that grow with their data: integer counts, bounded memory, any order.

The bins of a tensor have the width 2^e and 0 is an edge in the middle. Where new values lie outside, e grows and
neighbouring bins are merged, which gives the counts that the wider bins would have had from the beginning:
floor(floor(x / 2^e) / 2^d) = floor(x / 2^(e + d)). So the result depends on neither order nor grouping of the data.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ptqjax.pytrees import PyTreeNode

NUM_BINS = 4096
"""Bins of a histogram. A tensor without negative values uses a quarter of them or more: at least four bins to a step of
an 8-bit grid over the whole range."""

_LOWEST_EXPONENT = -126  # of the normal float32 numbers
_SIGNIFICAND_BITS = 23
_EXPONENT_BIAS = 127


class Histogram(PyTreeNode):
    """Counts of t tensors; bin i of tensor j holds what lies in [(i - b/2) 2^e, (i + 1 - b/2) 2^e), e = exponent[j]."""

    counts: Any
    """Number of values in each bin, int32, shape [t, b]."""
    exponent: Any
    """Binary logarithm of the bins' width, int32, shape [t]."""


def empty_histogram(num_tensors: int, num_bins: int = NUM_BINS) -> Histogram:
    """Returns histograms without a value, with the narrowest bins, on NumPy."""
    return Histogram(
        counts=np.zeros((num_tensors, num_bins), dtype=np.int32),
        exponent=np.full((num_tensors,), _LOWEST_EXPONENT, dtype=np.int32),
    )


def add_values(
    histogram: Histogram,
    values: Float[Array, "t k"],
    counted: Bool[Array, "t k"],
    largest: Float[Array, " t"],
) -> Histogram:
    """Returns the histograms with the values that are `counted`; none of them exceeds `largest` in magnitude."""
    num_bins = histogram.counts.shape[1]
    needed = _exponent_holding(largest) - (num_bins.bit_length() - 2)
    grown = widen(histogram, jnp.maximum(histogram.exponent, needed))
    steps = values * power_of_two(-grown.exponent)[:, None]
    # A negative value whose quotient is flushed to zero belongs below 0, as it does when it comes before wider bins.
    floors = jnp.where((values < 0) & (steps >= 0), -1.0, jnp.floor(steps)).astype(jnp.int32)
    bins = jnp.clip(floors + num_bins // 2, 0, num_bins - 1)
    return grown.replace(counts=_scatter_add(grown.counts, bins, counted.astype(jnp.int32)))


def histogram_of(matrix: np.ndarray, num_bins: int = NUM_BINS) -> Histogram:
    """Returns the histograms of the rows of a matrix in hand, on NumPy: what `add_values` makes of all of it.

    But for subnormal numbers, which JAX takes for 0 on a CPU; rows of zeros have wider bins.
    """
    largest = np.abs(matrix).max(axis=1).astype(np.float32)
    exponent = np.maximum(np.frexp(largest)[1] - (num_bins.bit_length() - 2), _LOWEST_EXPONENT)
    steps = np.ldexp(matrix, -exponent[:, None])
    bins = np.where((matrix < 0) & (steps >= 0), -1, np.floor(steps)).astype(np.int64) + num_bins // 2
    flat = np.clip(bins, 0, num_bins - 1) + np.arange(len(matrix))[:, None] * num_bins
    counts = np.bincount(flat.ravel(), minlength=len(matrix) * num_bins).reshape(len(matrix), num_bins)
    return Histogram(counts=counts.astype(np.int32), exponent=exponent.astype(np.int32))


def merge_histograms(first: Histogram, second: Histogram) -> Histogram:
    """Returns the histograms of both sets of data together."""
    exponent = jnp.maximum(first.exponent, second.exponent)
    first, second = widen(first, exponent), widen(second, exponent)
    return Histogram(counts=first.counts + second.counts, exponent=exponent)


def widen(histogram: Histogram, exponent: Int[Array, " t"]) -> Histogram:
    """Returns the histograms with bins merged to the width 2^exponent, which is not below the present one."""
    half = histogram.counts.shape[1] // 2
    doublings = jnp.minimum(exponent - histogram.exponent, 31)[:, None]
    bins = ((jnp.arange(2 * half, dtype=jnp.int32)[None, :] - half) >> doublings) + half
    counts = _scatter_add(jnp.zeros_like(histogram.counts), bins, histogram.counts)
    return Histogram(counts=counts, exponent=exponent)


def power_of_two(exponent: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns 2^exponent, exactly; exponents beyond the normal float32 numbers are clipped."""
    biased = jnp.clip(exponent, _LOWEST_EXPONENT, _EXPONENT_BIAS) + _EXPONENT_BIAS
    return jax.lax.bitcast_convert_type(biased.astype(jnp.int32) << _SIGNIFICAND_BITS, jnp.float32)


def _exponent_holding(magnitude: Float[Array, " t"]) -> Int[Array, " t"]:
    """Returns the smallest p with magnitude < 2^p (not below that of the normal numbers)."""
    biased = jax.lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32) >> _SIGNIFICAND_BITS
    return (biased & (2 * _EXPONENT_BIAS + 1)) - (_EXPONENT_BIAS - 1)


def _scatter_add(
    counts: Int[Array, "t b"], bins: Int[Array, "t k"], increments: Int[Array | np.ndarray, "t k"]
) -> Int[Array, "t b"]:
    rows = jnp.arange(counts.shape[0], dtype=jnp.int32)[:, None]
    return counts.at[rows, bins].add(increments)
