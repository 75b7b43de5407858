"""Schemes that choose ranges: records of pure functions over bounded, mergeable state of many tensors at once.

A scheme sees data in two ways: batch after batch (an `Observer`, then `finish`), as activations come; and whole
(`in_hand`), as weights are. Both return the grid of each tensor or channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ptqjax.errors import ConfigError
from ptqjax.kernels.histogram import (
    NUM_BINS,
    Histogram,
    add_values,
    empty_histogram,
    merge_histograms,
    power_of_two,
    representatives,
)
from ptqjax.kernels.ranges import GridKind, grid_of_range
from ptqjax.kernels.search import Rows, rows_of, search_fractions_jitted

SAMPLES = 4096
"""Values of a tensor that the histogram of `SQNR` counts for each sample of a batch; extremes are of all values.

Where fewer are counted than there are, the tail beyond the largest one counted may be clipped unseen."""

_GOLDEN = (math.sqrt(5) - 1) / 2


class Extremes(flax.struct.PyTreeNode):
    """Smallest and largest value of t tensors; inf and -inf before any is seen, NaN after a NaN."""

    lowest: Any
    """Shape [t]."""
    highest: Any
    """Shape [t]."""


class Distribution(flax.struct.PyTreeNode):
    """Extremes of all values of t tensors, and a histogram of a sample of them."""

    extremes: Extremes
    """Of all values."""
    histogram: Histogram
    """Of the same places of each sample of a batch, `SAMPLES` at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observer:
    """A way to look at streamed data, with a state of bounded size.

    Schemes that differ in what they make of the same state share the observer, and with it the compiled program.
    """

    init: Callable[[int], Any]
    """(number of tensors) -> state before any data."""
    update: Callable[[Any, Sequence[Any], int], Any]
    """(state, one array per tensor, samples in this batch) -> state; traces under `jit`."""
    merge: Callable[[Any, Any], Any]
    """(state, state) -> the state after the data of both, in any order."""
    extremes: Callable[[Any], Extremes]
    """(state) -> the extremes of all values so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeScheme:
    """A way to choose grids: what is kept of streamed data, and what is made of it."""

    name: str
    """As `QuantizationConfig.ranges` has it."""
    observer: Observer
    """What is kept of streamed data."""
    finish: Callable[[Any, GridKind], tuple[Any, Any]]
    """(state, grids) -> scale and zero point of each tensor."""
    in_hand: Callable[[list[np.ndarray], GridKind], tuple[np.ndarray, np.ndarray]]
    """(matrices, grids) -> scale and zero point of each row of each matrix; one grid for each row."""


def find_scheme(name: str) -> RangeScheme:
    """Returns the scheme that `QuantizationConfig.ranges` names.

    Raises:
        ConfigError: There is none of this name.
    """
    scheme = next((scheme for scheme in (MIN_MAX, SQNR) if scheme.name == name), None)
    if scheme is None:
        raise ConfigError(f"ranges={name!r} is not yet available; expected one of {MIN_MAX.name}, {SQNR.name}")
    return scheme


def sampled(value: Float[Array, "..."], num_samples: int, limit: int = SAMPLES) -> Float[Array, " k"]:
    """Returns at most `limit` values of each of `num_samples` samples: always the same places, spread over all.

    The places are i * s modulo the sample's size n, with s coprime to n and near n times the golden ratio: evenly
    spread in space and over channels, wherever the channel axis is. A tensor that does not divide into samples is one.
    """
    groups = num_samples if num_samples and value.size % num_samples == 0 else 1
    rows = value.reshape(groups, -1).astype(jnp.float32)
    size, wanted = rows.shape[1], limit * num_samples // groups
    return rows.reshape(-1) if size <= wanted else rows[:, _places(size, wanted)].reshape(-1)


def _places(size: int, wanted: int) -> np.ndarray:
    stride = round(size * _GOLDEN)
    while math.gcd(stride, size) > 1:
        stride += 1
    return np.sort(np.arange(wanted, dtype=np.int64) * stride % size).astype(np.int32)


def _init_extremes(num_tensors: int) -> Extremes:
    nothing = jnp.full((num_tensors,), jnp.inf, dtype=jnp.float32)
    return Extremes(lowest=nothing, highest=-nothing)


def _batch_extremes(values: Sequence[Any]) -> Extremes:
    return Extremes(
        lowest=jnp.stack([value.min().astype(jnp.float32) for value in values]),
        highest=jnp.stack([value.max().astype(jnp.float32) for value in values]),
    )


def _merge_extremes(first: Extremes, second: Extremes) -> Extremes:
    return Extremes(lowest=jnp.minimum(first.lowest, second.lowest), highest=jnp.maximum(first.highest, second.highest))


def _update_extremes(state: Extremes, values: Sequence[Any], num_samples: int) -> Extremes:
    del num_samples  # extremes do not depend on how the values are grouped
    return _merge_extremes(state, _batch_extremes(values))


def _grid_of_extremes(state: Extremes, kind: GridKind) -> tuple[Any, Any]:
    return grid_of_range(np.asarray(state.lowest), np.asarray(state.highest), kind)


def _grid_of_extremes_in_hand(matrices: list[np.ndarray], kind: GridKind) -> tuple[np.ndarray, np.ndarray]:
    return grid_of_range(*_extremes_in_hand(matrices), kind)


def _extremes_in_hand(matrices: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([m.min(axis=1) for m in matrices]), np.concatenate([m.max(axis=1) for m in matrices])


def _init_distribution(num_tensors: int) -> Distribution:
    return Distribution(extremes=_init_extremes(num_tensors), histogram=empty_histogram(num_tensors))


def _update_distribution(state: Distribution, values: Sequence[Any], num_samples: int) -> Distribution:
    batch = _batch_extremes(values)
    chosen = [sampled(value, num_samples) for value in values]
    longest = max(value.shape[0] for value in chosen)
    sizes = np.asarray([value.shape[0] for value in chosen], dtype=np.int32)
    counted = jnp.arange(longest, dtype=jnp.int32)[None, :] < sizes[:, None]
    rows = jnp.stack([jnp.pad(value, (0, longest - value.shape[0])) for value in chosen])
    largest = jnp.maximum(jnp.abs(batch.lowest), jnp.abs(batch.highest))
    return Distribution(
        extremes=_merge_extremes(state.extremes, batch),
        histogram=add_values(state.histogram, rows, counted, largest),
    )


def _merge_distributions(first: Distribution, second: Distribution) -> Distribution:
    return Distribution(
        extremes=_merge_extremes(first.extremes, second.extremes),
        histogram=merge_histograms(first.histogram, second.histogram),
    )


def _best_grid_of_distribution(state: Distribution, kind: GridKind) -> tuple[Any, Any]:
    low, high = jnp.minimum(state.extremes.lowest, 0), jnp.maximum(state.extremes.highest, 0)
    fractions = search_fractions_jitted(_rows_of_histogram(state.histogram, low, high), kind, both_ends=True)
    return grid_of_range(np.asarray(low * fractions[:, 0]), np.asarray(high * fractions[:, 1]), kind)


def _rows_of_histogram(histogram: Histogram, low: Any, high: Any) -> Rows:
    num_tensors = histogram.exponent.shape[0]
    unit = power_of_two(-histogram.exponent)
    return Rows(
        values=jnp.broadcast_to(representatives(NUM_BINS)[None, :], (num_tensors, NUM_BINS)),
        counts=histogram.counts.astype(jnp.float32),
        ranges=jnp.arange(num_tensors, dtype=jnp.int32),
        lowest=low * unit,
        highest=high * unit,
    )


def _best_grid_in_hand(matrices: list[np.ndarray], kind: GridKind) -> tuple[np.ndarray, np.ndarray]:
    low, high = _extremes_in_hand(matrices)
    rows = rows_of(matrices)
    filled = jax.tree.map(lambda limit: _filled(np.broadcast_to(limit, low.shape), len(rows.lowest)), kind)
    both_ends = not np.all(kind.symmetric)
    fractions = np.asarray(search_fractions_jitted(rows, filled, both_ends=both_ends), dtype=np.float64)[: len(low)]
    return grid_of_range(np.minimum(low, 0) * fractions[:, 0], np.maximum(high, 0) * fractions[:, 1], kind)


def _filled(array: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([array, np.repeat(array[-1:], length - len(array), axis=0)])


EXTREMES = Observer(init=_init_extremes, update=_update_extremes, merge=_merge_extremes, extremes=lambda state: state)
"""Keeps the smallest and the largest value."""

DISTRIBUTION = Observer(
    init=_init_distribution,
    update=_update_distribution,
    merge=_merge_distributions,
    extremes=lambda state: state.extremes,
)
"""Keeps the extremes, and counts of a sample of the values."""

MIN_MAX = RangeScheme(name="min-max", observer=EXTREMES, finish=_grid_of_extremes, in_hand=_grid_of_extremes_in_hand)
"""The whole range that was seen."""

SQNR = RangeScheme(name="sqnr", observer=DISTRIBUTION, finish=_best_grid_of_distribution, in_hand=_best_grid_in_hand)
"""The range with the least error of rounding plus three times that of clipping, see `kernels.search`.

Differs from aimet-onnx 2.42's tf_enhanced: nothing is dropped when later batches are wider than the first, every
sample weighs the same, rounding is half to even, an end may stay while the other moves, and weights are not binned.
"""
