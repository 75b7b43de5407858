"""The search for the range with the least error, over all tensors or channels at once, in one program.

A candidate shrinks both ends of the observed range by a fraction each. Its error is what a grid on the shrunken range
does to the data: sum of count * (x - rounded x)^2, times `SATURATION_WEIGHT` where x lies beyond the grid. First a
lattice of fractions is tried, then a finer one around the best of each range.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ptqjax.kernels import grid
from ptqjax.kernels.ranges import GridKind, grid_of_range

SATURATION_WEIGHT = 3.0
"""How much an error from clipping weighs against one from rounding (the field's tf_enhanced scheme has the same)."""

_ROW_LENGTH = (
    64  # a channel has 9 to some thousand weights; the rest of its last row is zeros, which round to themselves
)
_SYMMETRIC_STEP = 1 / 40
_ASYMMETRIC_STEP = 1 / 14


class Rows(flax.struct.PyTreeNode):
    """Data of many ranges, cut into rows of equal length; each range has its own unit."""

    values: Any
    """Shape [n, l], in units of the row's range."""
    counts: Any
    """How often each value occurs, of the shape of `values`; None where each occurs once."""
    ranges: Any
    """The range that a row belongs to, shape [n], sorted."""
    lowest: Any
    """Smallest value of each range, in its unit, shape [r]."""
    highest: Any
    """Largest value of each range, in its unit, shape [r]."""


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
        counts=None,
        ranges=_filled(ranges.astype(np.int32), num_rows, num_ranges - 1),
        lowest=_filled(np.ldexp(lowest, -exponents), num_ranges, 0),
        highest=_filled(np.ldexp(highest, -exponents), num_ranges, 0),
    )


def search_fractions(rows: Rows, kind: GridKind, *, both_ends: bool) -> Float[Array, "r 2"]:
    """Returns the fractions of the lowest and the highest value that give each range the least error.

    Args:
        rows: The data.
        kind: The grids, one or as many as there are ranges.
        both_ends: Whether the ends shrink independently (for asymmetric grids) or together. Static under `jit`.

    Returns:
        Fractions in (0, 1], of which the first, 1, wins ties.
    """
    offsets, is_fine = _candidates(both_ends=both_ends)
    start = jnp.ones((rows.lowest.shape[0], 2), dtype=jnp.float32)

    def try_one(carry: tuple[Any, Any, Any], candidate: tuple[Any, Any]) -> tuple[tuple[Any, Any, Any], None]:
        least, best, centre = carry
        offset, begins_fine = candidate
        centre = jnp.where(begins_fine, best, centre)
        tried = jnp.clip(centre + offset[None, :], 1e-3, 1.0)
        scale, zero_point = grid_of_range(rows.lowest * tried[:, 0], rows.highest * tried[:, 1], kind)
        error = total_error(rows, scale, zero_point, kind)
        is_better = error < least
        best = jnp.where(is_better[:, None], tried, best)
        return (jnp.where(is_better, error, least), best, centre), None

    nothing = jnp.full(start.shape[:1], jnp.inf, dtype=jnp.float32)
    (_, best, _), _ = jax.lax.scan(try_one, (nothing, start, start), (offsets, is_fine))
    return best


search_fractions_jitted = partial(jax.jit, static_argnames="both_ends")(search_fractions)
"""`search_fractions`, compiled."""


def total_error(rows: Rows, scale: Float[Array, " r"], zero_point: Float[Array, " r"], kind: GridKind) -> Any:
    """Returns the weighted squared error of each range on its grid, in squares of its unit."""
    spread = [
        jnp.broadcast_to(v, rows.lowest.shape)[rows.ranges][:, None] for v in (scale, zero_point, kind.qmin, kind.qmax)
    ]
    row_scale, row_zero, row_qmin, row_qmax = spread
    wanted = jnp.round(rows.values / row_scale) + row_zero
    codes = jnp.clip(wanted, row_qmin, row_qmax)
    error = jnp.square(rows.values - grid.dequantize(codes, row_scale, row_zero))
    error = error * jnp.where(wanted == codes, 1.0, SATURATION_WEIGHT)
    error = error if rows.counts is None else error * rows.counts
    return jax.ops.segment_sum(error.sum(axis=1), rows.ranges, rows.lowest.shape[0], indices_are_sorted=True)


def _candidates(*, both_ends: bool) -> tuple[Float[Array, "c 2"], Bool[Array, " c"]]:
    """Returns offsets of the fractions, coarse ones from 1 and then fine ones from the best; and where these begin."""
    step = _ASYMMETRIC_STEP if both_ends else _SYMMETRIC_STEP
    coarse = np.arange(0, 0.9 * step - 1, -step)
    fine = np.arange(4, -5, -1) * (step / 5) if both_ends else np.arange(7, -8, -1) * (step / 8)
    first, second = (_lattice(part, both_ends=both_ends) for part in (coarse, fine))
    begins_fine = np.arange(len(first) + len(second)) == len(first)
    return jnp.asarray(np.concatenate([first, second]), dtype=jnp.float32), jnp.asarray(begins_fine)


def _lattice(fractions: np.ndarray, *, both_ends: bool) -> np.ndarray:
    if not both_ends:
        return np.stack([fractions, fractions], axis=1)
    low, high = np.meshgrid(fractions, fractions, indexing="ij")
    return np.stack([low.ravel(), high.ravel()], axis=1)


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
