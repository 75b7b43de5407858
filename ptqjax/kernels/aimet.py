"""AIMET's way from data to grids, to the bit: its histogram, its search (tf_enhanced), its percentile and its min-max.

Everything is over r ranges (tensors or channels) at once, in NumPy, in float32 or float64 where aimet-onnx 2.42 has it.
A grid is (step, offset): the r's real numbers are step * (offset + code), with codes 0 ... qmax - qmin, offset <= 0.

Source: aimet-onnx 2.42's own kernel, asked through its Python binding: the formulas were fitted until thousands of
random cases (2 to 16 bits, all flags, several batches, constants, 1e-44 to 1e30) gave the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptqjax.kernels.ranges import GridKind

NUM_BINS = 1536
"""Bins of a histogram: three times the range of the first batch that is not all zero."""
SMALLEST_STEP = float(np.finfo(np.float32).eps)
"""Smallest step of min-max and percentile; the search has none."""

_LEAST_RANGE = np.float32(0.01)
_SATURATION_WEIGHT = 3
_LARGEST_INDEX = 2.0**31  # of a C int: beyond, a value is in no bin
_SURE = 0.99  # of a saturation cost by exact arithmetic, against one by rounded midpoints
_ROUNDING = 1e-6  # of a sum of squared distances in bins, at most 1535^2 each
_EXACT_BINS = 1e4  # up to this distance from 0, in bins, float32 midpoints are exact to a thousandth of a bin
_ROWS = 256  # ranges searched at once
_BLOCK = 1 << 16  # elements of a temporary array: they stay in a core's cache

_Doubles = NDArray[np.float64]
_Integers = NDArray[np.int64]
_Floats = NDArray[np.floating]  # float32; NumPy's stubs lose it


@dataclass(frozen=True, kw_only=True, slots=True)
class Density:
    """Histograms of r ranges, as probabilities."""

    width: _Doubles
    """The width of a bin, shape [r]; 0 where all data were 0 so far."""
    first: _Doubles
    """Left edge of the first bin, in widths: an integer, shape [r]."""
    mass: _Doubles
    """Shape [r, NUM_BINS]; sums to less than 1 where values lay outside and were dropped."""

    def rows(self, chosen: Any) -> Density:
        """Returns some of the ranges."""
        return Density(width=self.width[chosen], first=self.first[chosen], mass=self.mass[chosen])

    def edges(self, bins: Any) -> _Floats:
        """Returns the left edges of `bins`, shape [r, k]."""
        return ((self.first[:, None] + bins) * self.width[:, None]).astype(np.float32)

    def middles(self, bins: Any) -> _Floats:
        """Returns the middles of `bins`, shape [r, k], rounded as AIMET does."""
        return self.edges(bins) + (self.width.astype(np.float32) / np.float32(2))[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidates:
    """Grids to try, c for each of r ranges; all of shape [r, c]."""

    step: _Floats
    """NaN: no candidate."""
    offset: _Floats
    begin: _Integers
    """The bin that the smallest code is in."""
    end: _Integers
    """The bin that the largest code is in; it counts as off the grid."""


def layout(lowest: Any, highest: Any, xp: Any = np) -> tuple[Any, Any]:
    """Returns width and first edge of the bins for a first batch with these float32 extremes, in float64.

    Under JAX, inside `jax.enable_x64`. A range that overflows, or is lost beside its values, gives width inf or 0.
    """
    lowest, highest = (xp.asarray(limit, dtype=np.float32) for limit in (lowest, highest))
    highest = xp.where(lowest == highest, highest + _LEAST_RANGE, highest)
    middle = (highest + lowest) / np.float32(2)
    left = middle - _thrice(middle - lowest)
    right = middle + _thrice(highest - middle)
    width = (right.astype(np.float64) - left.astype(np.float64)) / NUM_BINS
    return width, xp.floor(left.astype(np.float64) / width)


def _thrice(x: Any) -> Any:
    return (3 * x.astype(np.float64)).astype(np.float32)  # else XLA fuses product and sum, with one rounding for both


def bins_of(values: Any, width: Any, first: Any, xp: Any = np) -> Any:
    """Returns the bin of each float32 value of [r, n], as a float32 integer; below 0 or above the last: in none."""
    position = xp.floor(values * (1 / width).astype(np.float32)[:, None])
    is_index = (position >= -_LARGEST_INDEX) & (position < _LARGEST_INDEX)
    return xp.where(is_index, position, np.float32(-_LARGEST_INDEX)) - first.astype(np.float32)[:, None]


def density_of(batches: Sequence[np.ndarray]) -> Density:
    """Returns the histograms of batches, each [r, n] with an n of its own; every batch weighs the same.

    The first batch of a range that is not all zero fixes its bins; all-zero batches before it count for nothing, values
    of later ones outside the bins are dropped.
    """
    num_ranges = len(batches[0])
    width, first, seen = (np.zeros(num_ranges) for _ in range(3))
    mass = np.zeros((num_ranges, NUM_BINS))
    with np.errstate(all="ignore"):
        for batch in batches:
            begins = (seen == 0) & batch.any(axis=1)
            new_width, new_first = layout(batch.min(axis=1), batch.max(axis=1))
            width, first = np.where(begins, new_width, width), np.where(begins, new_first, first)
            counts = (begins | (seen > 0)).astype(np.float64)
            share = _share(batch, width, first)
            mass = np.where(counts[:, None] > 0, (mass * seen[:, None] + share) / (seen + 1)[:, None], mass)
            seen = seen + counts
    return Density(width=width, first=first, mass=mass)


def _share(batch: np.ndarray, width: _Doubles, first: _Doubles) -> _Doubles:
    index = bins_of(batch, width, first)
    inside = (index >= 0) & (index < NUM_BINS)
    cells = np.nonzero(inside)[0] * NUM_BINS + index[inside].astype(np.int64)
    counts = np.bincount(cells, minlength=len(batch) * NUM_BINS)
    return counts.reshape(len(batch), NUM_BINS) / batch.shape[1]


def is_usable(density: Density) -> NDArray[np.bool_]:
    """Tells which ranges have bins; not all-zero data, nor constants so large that 0.01 is lost beside them.

    AIMET returns negative steps for such constants.
    """
    with np.errstate(all="ignore"):
        ends = density.edges(np.array([0, NUM_BINS]))
    return (density.width > 0) & np.isfinite(ends).all(axis=1)


def observed_range(density: Density) -> tuple[_Floats, _Floats]:
    """Returns the left edges of the lowest and highest bin with mass, and 0 between them; 0.01 apart at least."""
    has_mass = density.mass > 0
    lowest = np.where(has_mass.any(axis=1), has_mass.argmax(axis=1), 0)
    is_last = has_mass[:, :0:-1]
    highest = NUM_BINS - 1 - np.where(is_last.any(axis=1), is_last.argmax(axis=1), 0)
    low = np.minimum(density.edges(lowest[:, None])[:, 0], np.float32(0))
    high = np.maximum(density.edges(highest[:, None])[:, 0], np.float32(0))
    return low, np.maximum(high, low + _LEAST_RANGE)


def percentile_range(density: Density, percentile: float) -> tuple[_Floats, _Floats]:
    """Returns the range without the outermost (100 - percentile) % of the mass at either end; 0 may lie outside.

    Lowest: the left edge of the first bin where the cumulated mass reaches 1 - P/100. Highest: the right edge of the
    last bin where it is below P/100 and whose left edge is below the highest observed; both in float32.
    """
    low, high = observed_range(density)
    if percentile == 100:  # noqa: PLR2004 - the whole
        return low, high
    share = np.float32(percentile) / np.float32(100)
    cumulated = np.cumsum(density.mass, axis=1)
    edges = (density.first[:, None] + np.arange(NUM_BINS)) * density.width[:, None]
    begins = cumulated >= np.float64(np.float32(1) - share)
    ends = ((cumulated < np.float64(share)) & (edges < high[:, None]))[:, ::-1]
    lowest = np.where(begins.any(axis=1), begins.argmax(axis=1), 0)
    highest = NUM_BINS - 1 - np.where(ends.any(axis=1), ends.argmax(axis=1), 0)
    step = density.width.astype(np.float32)
    low = np.take_along_axis(edges, lowest[:, None], axis=1)[:, 0].astype(np.float32)
    high = (np.take_along_axis(edges, highest[:, None], axis=1)[:, 0] + step.astype(np.float64)).astype(np.float32)
    return low, np.where(low == high, high + step, high)


def grid_of_extremes(lowest: Any, highest: Any, kind: GridKind) -> tuple[_Doubles, _Doubles]:
    """Returns the grid of a range, extended to hold 0: (step, offset).

    Symmetric, with p codes above 0 and q below: step = max(highest / p, -lowest / q); for 2 bits that are not strict
    max(highest, -lowest) / 2. Else step = (highest - lowest) / (p + q). `SMALLEST_STEP` at least.
    """
    low = np.minimum(np.asarray(lowest, dtype=np.float64), 0)
    high = np.maximum(np.asarray(highest, dtype=np.float64), 0)
    steps, symmetric = _steps(kind), _is_symmetric(kind, low)
    above, below = np.floor(steps / 2), np.ceil(steps / 2)
    both = np.where(steps == 3, np.maximum(high, -low) / 2, np.maximum(high / above, -low / below))  # noqa: PLR2004 - 2 bits
    step = np.maximum(np.where(symmetric, both, (high - low) / steps), SMALLEST_STEP)
    offset = -np.clip(np.floor(-low / step + 0.5), 0, steps)
    return step, np.where(symmetric, -below, offset)


def grid_of_zeros(kind: GridKind, num_ranges: int, *, is_search: bool) -> tuple[_Doubles, _Doubles]:
    """Returns the grid of all-zero data: it spans [-1, 1]. The search's counts the code that a strict grid leaves out.

    So AIMET's search gives strict all-zero data one code more than other strict data.
    """
    steps = np.broadcast_to(_steps(kind), (num_ranges,))
    steps = _all_steps(steps) if is_search else steps
    return 2 / steps, -np.ceil(steps / 2)


def search(density: Density, kind: GridKind) -> tuple[_Doubles, _Doubles]:
    """Returns the grids with the least cost of ranges that are usable: (step, offset); `kind` has r elements or one.

    cost = sum of mass * (m - m rounded to the grid)^2, m the middle of a bin; of the bins below and above the grid, 3
    times mass * (m - middle of the last bin on the grid)^2. Of equal ones the first candidate wins.
    """
    steps = np.broadcast_to(_steps(kind), density.width.shape).astype(np.float32)
    low, high = observed_range(density)
    symmetric = np.broadcast_to(kind.symmetric, low.shape)
    unsigned = np.broadcast_to(kind.unsigned, low.shape) & (low == 0)
    step, offset = np.zeros(len(low)), np.zeros(len(low))
    with np.errstate(all="ignore"):
        for rows in _alike(symmetric):
            limits = (low[rows], high[rows], steps[rows])
            tried = _symmetric_grids(*limits, unsigned[rows]) if symmetric[rows[0]] else _asymmetric_grids(*limits)
            best = _least_cost(density.rows(rows), *tried, _all_steps(steps[rows]))
            step[rows], offset[rows] = (np.take_along_axis(part, best[:, None], axis=1)[:, 0] for part in tried)
    return step, offset


def _alike(symmetric: NDArray[np.bool_]) -> Iterator[_Integers]:
    """Returns the places of ranges to search at once, all of them symmetric or none."""
    for value in (True, False):
        chosen = np.nonzero(symmetric == value)[0]
        yield from (chosen[begin : begin + _ROWS] for begin in range(0, len(chosen), _ROWS))


def _steps(kind: GridKind) -> _Doubles:
    return np.asarray(kind.qmax, dtype=np.float64) - np.asarray(kind.qmin, dtype=np.float64)


def _all_steps(steps: Any) -> Any:
    """Returns the steps with the one that strict grids leave out."""
    return steps + (steps % 2 == 0)


def _is_symmetric(kind: GridKind, low: Any) -> Any:
    return np.logical_and(kind.symmetric, ~(np.asarray(kind.unsigned) & (low >= 0)))


def _fractions(count: int) -> _Floats:
    """Returns 1 / count and its multiples up to one beyond 1, with float32's rounding errors of repeated addition."""
    fractions = [np.float32(1 / count)]
    while np.float64(fractions[-1]) + 1 / count <= 1 + 1.5 / count:
        fractions.append(np.float32(np.float64(fractions[-1]) + 1 / count))
    return np.array([f for f in fractions if np.float64(f) <= 1 + 1 / count], dtype=np.float32)


def _symmetric_grids(low: _Floats, high: _Floats, steps: _Floats, unsigned: Any) -> tuple[_Floats, _Floats]:
    two = np.float32(2)
    widest = np.where(unsigned, high / steps, two * np.maximum(high, -low) / steps)
    offset = np.where(unsigned, np.float32(0), np.floor(-steps / two))
    step = widest[:, None] * _fractions(100)
    return step, np.broadcast_to(offset[:, None], step.shape)


def _asymmetric_grids(low: _Floats, high: _Floats, steps: _Floats) -> tuple[_Floats, _Floats]:
    """Returns 17 steps at 21 offsets, each cut to the observed range, and that range; step NaN: no candidate."""
    widest, own = _grid_between(low, high, steps)
    low, high = widest * own, widest * (own + steps)
    wide, places = steps.astype(np.float64)[:, None], np.arange(21)
    offset = np.trunc(-wide + wide / 20 * places).astype(np.float32)[:, None, :]
    step = (widest[:, None] * _fractions(16))[:, :, None]
    begin, end = step * offset, step * (offset + steps[:, None, None])
    outer_low, outer_high = low[:, None, None], high[:, None, None]
    is_wider = (begin < outer_low) & (end > outer_high)
    begin, end = np.maximum(begin, outer_low), np.minimum(end, outer_high)
    step, offset = _grid_between(begin, end, steps[:, None, None])
    step = np.where(is_wider | ~(step > 0), np.float32(np.nan), step)
    shape = (len(low), step[0].size)
    return np.c_[step.reshape(shape), widest], np.c_[offset.reshape(shape), own]


def _grid_between(low: _Floats, high: _Floats, steps: _Floats) -> tuple[_Floats, _Floats]:
    step = ((high.astype(np.float64) - low.astype(np.float64)) / steps.astype(np.float64)).astype(np.float32)
    return step, _rounded(low / step)


def _rounded(x: _Floats) -> _Floats:
    """Returns the nearest integers, halves away from 0, as C's `round`; all steps are exact."""
    whole = np.trunc(x)
    return whole + np.trunc((x - whole) * np.float32(2))


def _least_cost(density: Density, step: _Floats, offset: _Floats, steps: _Floats) -> _Integers:
    """Returns which candidate of [r, c] has the least cost; only those whose saturation alone does not rule them out.

    The first one whose cost is known is that with the least estimate: saturation plus step^2 / 12.
    """
    begin, end = (_bin_at(density, step * code) for code in (offset, offset + steps[:, None]))
    candidates = _Candidates(step=step, offset=offset, begin=begin, end=end)
    saturation = _saturation(density, begin, end)
    estimate = saturation + np.square(step.astype(np.float64)) / 12
    likely = (np.arange(len(step)), np.where(np.isnan(estimate), np.inf, estimate).argmin(axis=1))
    cost = np.full(step.shape, np.inf)
    packed = _packed(density)
    cost[likely] = _costs(density, packed, candidates, likely)
    left = ~np.isnan(step) & ~(_SURE * saturation > cost[likely][:, None])
    left[likely] = False
    cost[left] = _costs(density, packed, candidates, np.nonzero(left))
    return np.where(np.isnan(cost), np.inf, cost).argmin(axis=1)


def _bin_at(density: Density, values: _Floats) -> _Integers:
    distance = (values - density.edges(np.zeros(1))).astype(np.float64)
    index = np.floor(distance / density.width[:, None])
    return np.where(np.isnan(index), 0, np.clip(index, 0, NUM_BINS - 1)).astype(np.int64)


def _saturation(density: Density, begin: _Integers, end: _Integers) -> _Doubles:
    """Returns the cost of the bins off each grid; 0 for ranges so far from 0 that rounding matters."""
    bins = np.arange(NUM_BINS)
    moments = [np.cumsum(np.pad(density.mass * bins**power, ((0, 0), (1, 0))), axis=1) for power in range(3)]

    def spread(index: _Integers, *, above: bool) -> _Doubles:
        below = [np.take_along_axis(moment, index, axis=1) for moment in moments]
        zeroth, linear, square = (m[:, -1:] - b if above else b for m, b in zip(moments, below, strict=True))
        return square - 2 * index * linear + np.square(index) * zeroth

    total = np.maximum(spread(begin, above=False) + spread(end, above=True) - _ROUNDING, 0)
    is_exact = (np.abs(density.first) < _EXACT_BINS)[:, None]
    return np.where(is_exact, _SATURATION_WEIGHT * np.square(density.width)[:, None] * total, 0)


def _packed(density: Density) -> tuple[_Integers, _Doubles]:
    """Returns the bins with mass, and their mass, of each range; padded with bins that have none."""
    row, column = np.nonzero(density.mass)
    counts = np.bincount(row, minlength=len(density.mass))
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    bins = np.zeros((len(counts), max(counts.max(initial=0), 1)), dtype=np.int64)
    mass = np.zeros(bins.shape)
    bins[row, place], mass[row, place] = column, density.mass[row, column]
    return bins, mass


def _costs(
    density: Density, packed: tuple[_Integers, _Doubles], candidates: _Candidates, pairs: tuple[Any, ...]
) -> _Doubles:
    """Returns the costs of some (range, candidate) pairs."""
    bins, mass = packed
    middles, lowest, highest = (density.middles(part) for part in (bins, candidates.begin, candidates.end))
    costs = np.empty(len(pairs[0]))
    for part in _blocks(len(costs), bins.shape[1]):
        rows, chosen = pairs[0][part], (pairs[0][part], pairs[1][part])
        m, bin_ = middles[rows], bins[rows]
        step, offset, begin, end, low, high = (
            array[chosen][:, None]
            for array in (candidates.step, candidates.offset, candidates.begin, candidates.end, lowest, highest)
        )
        is_below, is_above = bin_ < begin, bin_ >= end
        rounding = m - step * (_rounded(m / step - offset) + offset)
        error = np.where(is_below, m - low, np.where(is_above, m - high, rounding)).astype(np.float64)
        weight = np.where(is_below | is_above, _SATURATION_WEIGHT * mass[rows], mass[rows])
        costs[part] = np.sum(weight * np.square(error), axis=1)
    return costs


def _blocks(count: int, row_length: int) -> Iterator[slice]:
    size = max(_BLOCK // row_length, 1)
    return (slice(begin, begin + size) for begin in range(0, count, size))
