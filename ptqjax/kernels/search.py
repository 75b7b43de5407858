"""The search for the range with the least error, over all tensors or channels at once, in one program.

A candidate shrinks both ends of the observed range by a fraction each. Its error is what a grid on the shrunken range
does to the data: the sum of (x - rounded x)^2, times a weight where x lies beyond the grid. First a lattice of
fractions is tried, then finer ones around the best of each range. Widths, symmetry, the weight and the candidates are
arrays: data of one shape are compiled for once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ptqjax.kernels import grid
from ptqjax.kernels.ranges import GridKind, grid_of_range
from ptqjax.pytrees import PyTreeNode

SATURATION_WEIGHT = 3.0
"""How much an error from clipping weighs against one from rounding in the scheme "sqnr"; the field's tf_enhanced has
the same. With 1 (the scheme "mse") ranges end farther inside, the more so the fewer bits there are."""

_ROW_LENGTH = (
    64  # a channel has 9 to some thousand weights; the rest of its last row is zeros, which round to themselves
)
_SMALLEST_FRACTION = 1e-3
_NARROWEST = 2.0**-10  # of a bin's width: what is left of a bin that an extreme cuts off


class Rows(PyTreeNode):
    """Data of many ranges, cut into rows of equal length; each range has its own unit."""

    values: Any
    """Shape [n, l], in units of the row's range: numbers, or the lower ends of bins."""
    uppers: Any
    """The upper ends of bins, of the shape of `values`; None where these are numbers."""
    counts: Any
    """How many numbers each bin holds, of the shape of `values`; None where these are numbers."""
    ranges: Any
    """The range that a row belongs to, shape [n], sorted."""
    lowest: Any
    """Smallest value of each range, in its unit, shape [r]."""
    highest: Any
    """Largest value of each range, in its unit, shape [r]."""


class Candidates(PyTreeNode):
    """Fractions of the two ends to try, one pair after the other."""

    offsets: Any
    """Shape [c, 2]: what is added to the pair at the centre, at first (1, 1)."""
    begins: Any
    """Boolean, shape [c]: whether the best pair so far is the centre from here on."""
    count: Any
    """How many are tried; the others fill the array up, so that all sets have one shape."""


def rows_of(arrays: list[np.ndarray]) -> Rows:
    """Returns the rows of matrices whose every row [n] is the data of one range; finite data.

    The unit of a range is a power of two near its largest magnitude, so that no square overflows. The numbers of rows
    and ranges are rounded up, for fewer compilations: what is beyond the real ones is zeros.
    """
    pieces = [_pieces(matrix) for matrix in arrays]
    values = np.concatenate([values for values, _ in pieces])
    repeats = np.concatenate([np.full(len(matrix), count) for matrix, (_, count) in zip(arrays, pieces, strict=True)])
    ranges = np.repeat(np.arange(len(repeats)), repeats)
    lowest = np.concatenate([matrix.min(axis=1) for matrix in arrays])
    highest = np.concatenate([matrix.max(axis=1) for matrix in arrays])
    exponents = np.frexp(np.maximum(np.abs(lowest), np.abs(highest)))[1]
    num_rows, num_ranges = _rounded_up(len(values)), _rounded_up(len(repeats))
    return Rows(
        values=_filled(np.ldexp(values, -exponents[ranges][:, None]), num_rows, 0),
        uppers=None,
        counts=None,
        ranges=_filled(ranges.astype(np.int32), num_rows, num_ranges - 1),
        lowest=_filled(np.ldexp(lowest, -exponents), num_ranges, 0),
        highest=_filled(np.ldexp(highest, -exponents), num_ranges, 0),
    )


def rows_of_bins(
    counts: Float[np.ndarray, "t b"], lowest: Float[np.ndarray, " t"], highest: Float[np.ndarray, " t"]
) -> Rows:
    """Returns a row for each histogram, whose bins have the width 1 and 0 in the middle, cut off at the extremes.

    The two bins next to 0 count as empty: they hold zeros, the most frequent value of an activation, which lie on every
    grid and must not seem to be rounded.
    """
    num_tensors, num_bins = counts.shape
    edges = np.arange(num_bins, dtype=np.float32)[None, :] - num_bins // 2
    lowers = np.clip(edges, lowest[:, None], highest[:, None])
    is_zero = (edges == 0) | (edges == -1)
    return Rows(
        values=lowers,
        uppers=np.maximum(np.clip(edges + 1, lowest[:, None], highest[:, None]), lowers + np.float32(_NARROWEST)),
        counts=np.where(is_zero, np.float32(0), counts),
        ranges=np.arange(num_tensors, dtype=np.int32),
        lowest=lowest,
        highest=highest,
    )


@jax.jit
def search_fractions(
    rows: Rows, kind: GridKind, saturation_weight: Float[Array, ""], candidates: Candidates
) -> Float[Array, "r 2"]:
    """Returns the fractions of the lowest and the highest value that give each range the least error.

    The same to the bit on any number of devices that `rows` are spread over; under `jax.set_mesh`, then.

    Args:
        rows: The data.
        kind: The grids, one or as many as there are ranges.
        saturation_weight: How much an error from clipping weighs against one from rounding.
        candidates: What is tried, `BOTH_ENDS` or `TOGETHER`.

    Returns:
        Fractions in (0, 1], of which the first wins ties.
    """
    start = jnp.ones((rows.lowest.shape[0], 2), dtype=jnp.float32)

    def try_one(index: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        least, best, centre = carry
        centre = jnp.where(candidates.begins[index], best, centre)
        tried = jnp.clip(centre + candidates.offsets[index][None, :], _SMALLEST_FRACTION, 1.0)
        scale, zero_point = grid_of_range(rows.lowest * tried[:, 0], rows.highest * tried[:, 1], kind)
        error = total_error(rows, scale, zero_point, kind, saturation_weight)
        is_better = error < least
        return jnp.where(is_better, error, least), jnp.where(is_better[:, None], tried, best), centre

    nothing = jnp.full(start.shape[:1], jnp.inf, dtype=jnp.float32)
    return jax.lax.fori_loop(0, candidates.count, try_one, (nothing, start, start))[1]


def total_error(rows: Rows, scale: Any, zero_point: Any, kind: GridKind, saturation_weight: Any) -> Float[Array, " r"]:
    """Returns the weighted squared error of each range on its grid, in squares of its unit."""
    spread = (
        jnp.broadcast_to(v, rows.lowest.shape)[rows.ranges][:, None] for v in (scale, zero_point, kind.qmin, kind.qmax)
    )
    error = _error_of_numbers if rows.uppers is None else _error_of_bins
    per_row, ranges = _gathered((error(rows, _Grid(*spread), saturation_weight).sum(axis=1), rows.ranges))
    return jax.ops.segment_sum(per_row, ranges, rows.lowest.shape[0], indices_are_sorted=True)


class _Grid(NamedTuple):
    """The grid of each row, shape [n, 1]."""

    scale: Any
    zero_point: Any
    qmin: Any
    qmax: Any


def _error_of_numbers(rows: Rows, to: _Grid, saturation_weight: Any) -> Any:
    wanted = jnp.round(rows.values / to.scale) + to.zero_point
    codes = jnp.clip(wanted, to.qmin, to.qmax)
    error = jnp.square(rows.values - grid.dequantize(codes, to.scale, to.zero_point))
    return error * jnp.where(wanted == codes, 1.0, saturation_weight)


def _error_of_bins(rows: Rows, to: _Grid, saturation_weight: Any) -> Any:
    """Returns the mean error of a number that lies anywhere in the bin, times the count.

    In steps, the integral of (u - round(u))^2 from 0 to y is round(y) / 12 + (y - round(y))^3 / 3. So bins may be wider
    than steps, as they are for 16 bits.
    """
    lower, upper = rows.values / to.scale, rows.uppers / to.scale
    bottom, top = to.qmin - to.zero_point, to.qmax - to.zero_point
    rounded = _integral_of_rounding(jnp.clip(lower, bottom - 0.5, top + 0.5), jnp.clip(upper, bottom - 0.5, top + 0.5))
    above = _integral_of_square(jnp.maximum(lower - top, 0.5), jnp.maximum(upper - top, 0.5))
    below = _integral_of_square(jnp.minimum(lower - bottom, -0.5), jnp.minimum(upper - bottom, -0.5))
    mean = (rounded + saturation_weight * (above + below)) / (upper - lower)
    return mean * jnp.square(to.scale) * rows.counts


def _integral_of_rounding(lower: Any, upper: Any) -> Any:
    nearest = jnp.round(lower), jnp.round(upper)
    return (nearest[1] - nearest[0]) / 12 + _integral_of_square(lower - nearest[0], upper - nearest[1])


def _integral_of_square(lower: Any, upper: Any) -> Any:
    return (upper * upper * upper - lower * lower * lower) / 3


def _gathered(arrays: Any) -> Any:
    """Returns the arrays on every device: a sum of parts would depend on where the parts are."""
    is_alone = jax.sharding.get_abstract_mesh().empty
    return arrays if is_alone else jax.lax.with_sharding_constraint(arrays, PartitionSpec())


def _candidates(levels: list[np.ndarray], length: int) -> Candidates:
    """Returns the offsets of one level after the other."""
    offsets = np.concatenate(levels).astype(np.float32)
    starts = np.cumsum([0, *map(len, levels)])[1:-1]
    return Candidates(
        offsets=_filled(offsets, length, 0),
        begins=np.isin(np.arange(length), starts),
        count=np.int32(len(offsets)),
    )


def _around(step: float, reach: int) -> np.ndarray:
    return np.arange(reach, -reach - 1, -1) * step


def _pairs(fractions: np.ndarray) -> np.ndarray:
    low, high = np.meshgrid(fractions, fractions, indexing="ij")
    return np.stack([low.ravel(), high.ravel()], axis=1)


def _equal(fractions: np.ndarray) -> np.ndarray:
    return np.stack([fractions, fractions], axis=1)


def _pieces(matrix: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns the rows of one matrix, and how many each of its ranges has."""
    num_ranges, size = matrix.shape
    count = -(-size // _ROW_LENGTH)
    filled = np.zeros((num_ranges, count * _ROW_LENGTH), dtype=np.float32)
    filled[:, :size] = matrix
    return filled.reshape(-1, _ROW_LENGTH), count


def _rounded_up(count: int) -> int:
    """Returns the next number of few significant binary digits, at most an eighth more: few sizes, little waste."""
    unit = 1 << max(count.bit_length() - 4, 0)
    return -(-count // unit) * unit


def _filled(array: np.ndarray, length: int, value: int) -> np.ndarray:
    missing = np.full((length - len(array), *array.shape[1:]), value, dtype=array.dtype)
    return np.concatenate([array, missing])


_NUM_CANDIDATES = 320

BOTH_ENDS = _candidates([_pairs(np.arange(14) / -14), _pairs(_around(1 / 70, 4))], _NUM_CANDIDATES)
"""For asymmetric grids: the ends shrink independently, in steps of 1/14 and then of 1/70."""
TOGETHER = _candidates([_equal(np.arange(24) / -24), _equal(_around(1 / 192, 7))], _NUM_CANDIDATES)
"""For symmetric grids: the ends shrink together, in steps of 1/24 and then of 1/192."""
