"""Schemes that choose ranges: what is made of what observers keep, and of data in hand."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import numpy as np

from ptqjax.config import COMPATIBILITIES
from ptqjax.config.checks import check_choice, check_ranges
from ptqjax.kernels.brief import FEW, SOON, brief_options
from ptqjax.kernels.entropy import Magnitudes, least_divergent_threshold
from ptqjax.kernels.exact_sums import means_of
from ptqjax.kernels.histogram import Histogram, histogram_of
from ptqjax.kernels.ranges import GridKind, grid_of_range
from ptqjax.kernels.search import BOTH_ENDS, SATURATION_WEIGHT, TOGETHER, Rows, rows_of, rows_of_bins, search_fractions
from ptqjax.ranges.aimet_schemes import find_aimet_scheme
from ptqjax.ranges.observers import (
    DISTRIBUTION,
    EXTREMES,
    MEAN_EXTREMES,
    Distribution,
    Extremes,
    MeanExtremes,
    RangeScheme,
)

_Grids = tuple[np.ndarray, np.ndarray]
_FEW_IN_BINS = 2**20  # 85 histograms: they are searched no sooner by a program that takes 0.5 s longer to compile
_ROWS_AT_ONCE = 512  # histograms of constants in hand: 8 MB
FEWEST_FOR_ENTROPY = 8192
"""Values that a distribution needs, four a bin on average; with fewer, the scheme "entropy" takes the whole range. What
most weights of a channel have: MobileNetV2's, clipped by it, left 1 dB of 13."""


def find_scheme(name: str, compatibility: str | None = None) -> RangeScheme:
    """Returns the scheme that `QuantizationConfig.ranges` names.

    Args:
        name: "min-max", "moving-average", "sqnr", "percentile:P" with 50 < P <= 100, "mse" or "entropy".
        compatibility: Whose formulas are followed; None: our own; "aimet": those of aimet-onnx 2.42.

    Raises:
        ConfigError: There is none of this name; the message has near ones.
    """
    check_ranges("ranges", name)
    if compatibility is not None:
        check_choice("compatibility", compatibility, COMPATIBILITIES)
        return find_aimet_scheme(name)
    known = {scheme.name: scheme for scheme in (MIN_MAX, MOVING_AVERAGE, SQNR, MSE, ENTROPY)}
    return known[name] if name in known else percentile_scheme(name.partition(":")[2])


def percentile_scheme(percentage: str) -> RangeScheme:
    """Returns the scheme that leaves out 100 - P percent of the values at each end; 100: none.

    The lower end is the smallest value x at which a share of 1 - P / 100 or more of all values is not above x; the
    upper end likewise from above. Streamed, it is the outer edge of x's bin, and never beyond the extremes.

    Args:
        percentage: P in decimal digits, which are taken exactly: "99.9" of a thousand values is one of them.
    """
    share = 1 - Fraction(percentage) / 100
    return RangeScheme(
        name=f"percentile:{percentage}",
        observer=DISTRIBUTION,
        finish=partial(_percentile_of_distribution, share),
        in_hand=partial(_percentile_in_hand, share),
    )


def _grid_of_extremes(state: Extremes, kind: GridKind) -> _Grids:
    return grid_of_range(np.asarray(state.lowest), np.asarray(state.highest), kind)


def _extremes_in_hand(matrices: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([m.min(axis=1) for m in matrices]), np.concatenate([m.max(axis=1) for m in matrices])


def _grid_of_extremes_in_hand(matrices: list[np.ndarray], kind: GridKind) -> _Grids:
    return grid_of_range(*_extremes_in_hand(matrices), kind)


def _grid_of_means(state: MeanExtremes, kind: GridKind) -> _Grids:
    sums, counts = np.asarray(state.sums), np.maximum(np.asarray(state.counts), 1)
    return grid_of_range(means_of(sums[:, 0], counts), means_of(sums[:, 1], counts), kind)


# Search


def _best_of_distribution(saturation_weight: float, state: Distribution, kind: GridKind) -> _Grids:
    low, high = np.minimum(state.extremes.lowest, 0), np.maximum(state.extremes.highest, 0)
    exponent = -np.asarray(state.histogram.exponent)
    counts = np.asarray(state.histogram.counts).astype(np.float32)
    rows = rows_of_bins(counts, np.ldexp(low, exponent), np.ldexp(high, exponent))
    fractions = _searched(rows, jax.tree.map(partial(_spread, len(low)), kind), saturation_weight)
    return grid_of_range(low * fractions[:, 0], high * fractions[:, 1], kind)


def _best_in_hand(saturation_weight: float, matrices: list[np.ndarray], kind: GridKind) -> _Grids:
    low, high = _extremes_in_hand(matrices)
    rows = rows_of(matrices)
    filled = jax.tree.map(lambda leaf: _filled(_spread(len(low), leaf), len(rows.lowest)), kind)
    fractions = _searched(rows, filled, saturation_weight)[: len(low)]
    return grid_of_range(np.minimum(low, 0) * fractions[:, 0], np.maximum(high, 0) * fractions[:, 1], kind)


def _searched(rows: Rows, kind: GridKind, saturation_weight: float) -> np.ndarray:
    """Returns the best fractions in float64; symmetric grids and others try different candidates."""
    weight, symmetric = np.float32(saturation_weight), np.asarray(kind.symmetric)
    search = _search_soon if brief_options(rows, few=FEW if rows.uppers is None else _FEW_IN_BINS) else search_fractions
    found = np.ones((len(symmetric), 2), dtype=np.float64)
    for candidates, chosen in ((TOGETHER, symmetric), (BOTH_ENDS, ~symmetric)):
        if chosen.any():
            found[chosen] = np.asarray(search(rows, kind, weight, candidates))[chosen]
    return found


_search_soon = jax.jit(search_fractions, compiler_options=SOON)


def _spread(length: int, leaf: Any) -> np.ndarray:
    return np.broadcast_to(np.asarray(leaf), (length,))


def _filled(array: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([array, np.repeat(array[-1:], length - len(array), axis=0)])


# Percentiles


def _percentile_of_distribution(share: Fraction, state: Distribution, kind: GridKind) -> _Grids:
    low, high = np.asarray(state.extremes.lowest), np.asarray(state.extremes.highest)
    if share == 0:
        return grid_of_range(low, high, kind)
    counts = np.asarray(state.histogram.counts, dtype=np.int64)
    ranks = np.asarray([_rank(share, int(total)) for total in counts.sum(axis=1)])[:, None]
    first = (counts.cumsum(axis=1) >= ranks).argmax(axis=1)
    last = counts.shape[1] - (counts[:, ::-1].cumsum(axis=1) >= ranks).argmax(axis=1)
    ends = (np.ldexp(edge - counts.shape[1] / 2, np.asarray(state.histogram.exponent)) for edge in (first, last))
    lowest, highest = (np.clip(end, low, high) for end in ends)
    return grid_of_range(lowest, highest, kind)


def _percentile_in_hand(share: Fraction, matrices: list[np.ndarray], kind: GridKind) -> _Grids:
    ends = [_order_statistics(matrix, _rank(share, matrix.shape[1])) for matrix in matrices]
    lowest, highest = (np.concatenate([pair[i] for pair in ends]) for i in (0, 1))
    return grid_of_range(lowest, highest, kind)


def _rank(share: Fraction, count: int) -> int:
    """Returns which value from the end is the first at which `share` of them is reached, from 1."""
    return max(1, math.ceil(share * count))


def _order_statistics(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    ordered = np.partition(matrix, (rank - 1, matrix.shape[1] - rank), axis=1)
    return ordered[:, rank - 1], ordered[:, matrix.shape[1] - rank]


# Entropy


def _entropy_of_distribution(state: Distribution, kind: GridKind) -> _Grids:
    low, high = np.asarray(state.extremes.lowest), np.asarray(state.extremes.highest)
    return grid_of_range(*_clipped(state.histogram, low, high, kind), kind)


def _entropy_in_hand(matrices: list[np.ndarray], kind: GridKind) -> _Grids:
    low, high = _extremes_in_hand(matrices)
    spread = jax.tree.map(partial(_spread, len(low)), kind)
    lows, highs, start = [], [], 0
    for rows in (matrix[at : at + _ROWS_AT_ONCE] for matrix in matrices for at in range(0, len(matrix), _ROWS_AT_ONCE)):
        here = slice(start, start + len(rows))
        start += len(rows)
        if rows.shape[1] < FEWEST_FOR_ENTROPY:
            lows.append(low[here])
            highs.append(high[here])
            continue
        part = jax.tree.map(lambda leaf, here=here: leaf[here], spread)
        clipped = _clipped(histogram_of(rows), low[here], high[here], part)
        lows.append(clipped[0])
        highs.append(clipped[1])
    return grid_of_range(np.concatenate(lows), np.concatenate(highs), kind)


def _clipped(histogram: Histogram, low: np.ndarray, high: np.ndarray, kind: GridKind) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends [max(low, -T), min(high, T)], with T of least divergence."""
    num_tensors = len(low)
    exponent = np.asarray(histogram.exponent)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    magnitudes = Magnitudes(
        counts=_folded(np.asarray(histogram.counts)),
        lowest=np.ldexp(low, -exponent),
        highest=np.ldexp(high, -exponent),
    )
    num_codes = _spread(num_tensors, kind.qmax - kind.qmin + 1)
    one_sided = np.logical_and(_spread(num_tensors, kind.unsigned), low >= 0)
    symmetric = np.logical_and(_spread(num_tensors, kind.symmetric), ~one_sided)
    arguments = (magnitudes, num_codes, symmetric)
    length = 1 << (num_tensors - 1).bit_length()  # few sizes are compiled
    padded = jax.tree.map(lambda leaf: _filled(leaf, length), arguments)
    bins = np.asarray(least_divergent_threshold(*padded))[:num_tensors]
    is_known = np.asarray(histogram.counts).sum(axis=1, dtype=np.int64) >= FEWEST_FOR_ENTROPY
    threshold = np.where(is_known, np.ldexp(bins.astype(np.float64), exponent), np.inf)
    return np.maximum(low, -threshold), np.minimum(high, threshold)


def _folded(counts: np.ndarray) -> np.ndarray:
    """Returns the counts of |x|."""
    half = counts.shape[1] // 2
    return counts[:, half:] + counts[:, half - 1 :: -1]


MIN_MAX = RangeScheme(name="min-max", observer=EXTREMES, finish=_grid_of_extremes, in_hand=_grid_of_extremes_in_hand)
"""The whole range that was seen."""

MOVING_AVERAGE = RangeScheme(
    name="moving-average", observer=MEAN_EXTREMES, finish=_grid_of_means, in_hand=_grid_of_extremes_in_hand
)
"""From the mean of the samples' smallest values to the mean of their largest; constants in hand: the whole range.

Others' moving average is exponential, over batches: what comes last weighs most, and the order of the data and the size
of batches decide. Here every sample weighs the same.
"""

SQNR = RangeScheme(
    name="sqnr",
    observer=DISTRIBUTION,
    finish=partial(_best_of_distribution, SATURATION_WEIGHT),
    in_hand=partial(_best_in_hand, SATURATION_WEIGHT),
)
"""The range with the least error of rounding plus three times that of clipping, see `kernels.search`.

Differs from aimet-onnx 2.42's tf_enhanced: nothing is dropped when later batches are wider than the first, every
sample weighs the same, rounding is half to even, an end may stay while the other moves, and weights are not binned.
"""

MSE = RangeScheme(
    name="mse",
    observer=DISTRIBUTION,
    finish=partial(_best_of_distribution, 1.0),
    in_hand=partial(_best_in_hand, 1.0),
)
"""The range with the least squared error: the search of `SQNR` with errors of clipping weighing as others do."""

ENTROPY = RangeScheme(name="entropy", observer=DISTRIBUTION, finish=_entropy_of_distribution, in_hand=_entropy_in_hand)
"""The range [max(lowest, -T), min(highest, T)] with T of least Kullback-Leibler divergence, see `kernels.entropy`.

Made for many values on 8 bits: nothing is clipped for 16 bits, whose steps are narrower than bins, nor where there are
fewer than `FEWEST_FOR_ENTROPY` values. (TensorRT takes the whole range of weights.)
"""
