"""Schemes as aimet-onnx 2.42 has them: min-max, sqnr (its tf_enhanced) and percentile:P, weaknesses included.

What is kept of streamed data differs from our own schemes: the first batch of a tensor that is not all zero fixes the
bins of its histogram, three times as wide as that batch; values of later batches outside are dropped, and every batch
weighs the same, however many values it has. So the result depends on the order of the batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.errors import ConfigError
from ptqjax.kernels import aimet
from ptqjax.kernels.ranges import LARGEST_VALUE, SMALLEST_SCALE, GridKind, Symmetry
from ptqjax.pytrees import PyTreeNode
from ptqjax.ranges.observers import EXTREMES, Extremes, Observer, RangeScheme

_Grids = tuple[np.ndarray, np.ndarray]
_ROWS = 256  # histograms of data in hand at once: 3 MB
_SEARCH = "sqnr"
_LEAST_FIXED_RANGE = 0.01


class BatchDensity(PyTreeNode):
    """AIMET's histograms of t tensors."""

    extremes: Extremes
    """The extremes of all values; they serve where a histogram cannot: see `kernels.aimet.is_usable`."""
    first: Extremes
    """The extremes of the first batch that was not all zero: they fix the bins. Zeros before."""
    mass: Any
    """Mean over batches of the probabilities of bins, shape [t, NUM_BINS, 2]: float64 as two words of 32 bits, for
    outside `jax.enable_x64` JAX would narrow it."""
    batches: Any
    """How many are in the mean, shape [t], int32."""


def find_aimet_scheme(name: str) -> RangeScheme:
    """Returns the scheme of this name by AIMET's formulas.

    Args:
        name: "min-max", "sqnr", or "percentile:P" with 50 < P <= 100.

    Raises:
        ConfigError: AIMET has none of this name.
    """
    in_hand = partial(_in_hand, name)
    if name == "min-max":
        return RangeScheme(name=name, observer=EXTREMES, finish=_finish_extremes, in_hand=in_hand)
    percentage = None if name == _SEARCH else _percentage(name)
    finish = partial(_finish_density, percentage)
    return RangeScheme(name=name, observer=BATCH_DENSITY, finish=finish, in_hand=in_hand)


def in_batches(name: str, batches: Sequence[Sequence[np.ndarray]], kind: GridKind) -> _Grids:
    """Returns scale and zero point of each row of several matrices that come in batches.

    Args:
        name: As `find_aimet_scheme` has it.
        batches: For each batch the matrices, in the same order and each with the same number of rows in every batch;
            float32, finite. The numbers of columns may differ.
        kind: Arrays with an element for each row of all matrices, one after the other; or scalars.

    Raises:
        ConfigError: AIMET has no scheme of this name, or scales are to be powers of two.
    """
    percentage = _percentage(name) if name not in ("min-max", _SEARCH) else None
    begin, grids = 0, []
    for matrices in zip(*batches, strict=True):
        for row in range(0, len(matrices[0]), _ROWS):
            part = [matrix[row : row + _ROWS] for matrix in matrices]
            part_kind = jax.tree.map(partial(_elements, begin=begin, count=len(part[0])), kind)
            grids.append(_grid_of_rows(name, percentage, part, part_kind))
            begin += len(part[0])
    scales, zero_points = zip(*grids, strict=True)
    return np.concatenate(scales), np.concatenate(zero_points)


def fixed_grid(lowest: Any, highest: Any, kind: GridKind) -> _Grids:
    """Returns scale and zero point of ranges that are known beforehand, widened to hold 0 and to span 0.01 at least.

    AIMET has an older formula for them: a strictly symmetric grid has lowest / 2^(b-1), as others have, and may end
    above the lowest value; none is unsigned because no value is negative.
    """
    low = np.minimum(np.asarray(lowest, dtype=np.float64), 0)
    high = np.maximum(np.asarray(highest, dtype=np.float64), 0)
    high = np.maximum(high, low + _LEAST_FIXED_RANGE)
    steps = np.asarray(kind.qmax, dtype=np.float64) - np.asarray(kind.qmin, dtype=np.float64)
    low = np.where(np.logical_and(kind.symmetric, steps % 2 == 0), low * steps / (steps + 2), low)
    return _as_integers(*aimet.grid_of_extremes(low, high, kind.replace(unsigned=np.asarray(False))), kind.qmin)


def symmetry_in_use(name: str, symmetric: Symmetry, *, is_all_zero: bool) -> Symmetry:
    """Returns the symmetry of the grid that AIMET returns where `symmetric` is asked for.

    Its search gives all-zero data all codes of the type, also where a strict grid was to leave one out.
    """
    is_strict = isinstance(symmetric, str) and "strict" in symmetric
    return True if name == _SEARCH and is_all_zero and is_strict else symmetric


def _percentage(name: str) -> float:
    scheme, _, digits = name.partition(":")
    try:
        percentage = float(digits)
    except ValueError:
        percentage = 0.0
    if scheme != "percentile" or not 50 < percentage <= 100:  # noqa: PLR2004 - half the values lie above the middle
        raise ConfigError(
            f"ranges={name!r} is not available with compatibility='aimet'; expected 'min-max', 'sqnr' (tf_enhanced) "
            "or 'percentile:P' with 50 < P <= 100"
        )
    return percentage


def _in_hand(name: str, matrices: list[np.ndarray], kind: GridKind) -> _Grids:
    return in_batches(name, [matrices], kind)


def _elements(leaf: Any, *, begin: int, count: int) -> np.ndarray:
    leaf = np.asarray(leaf)
    return np.broadcast_to(leaf, (count,)) if leaf.ndim == 0 else leaf[begin : begin + count]


def _grid_of_rows(name: str, percentage: float | None, batches: Sequence[np.ndarray], kind: GridKind) -> _Grids:
    lowest = np.min([batch.min(axis=1) for batch in batches], axis=0)
    highest = np.max([batch.max(axis=1) for batch in batches], axis=0)
    if name == "min-max":
        return _grid_of_extremes(lowest, highest, kind)
    return _grid_of_density(aimet.density_of(batches), percentage, lowest, highest, kind)


def _grid_of_density(
    density: aimet.Density, percentage: float | None, lowest: np.ndarray, highest: np.ndarray, kind: GridKind
) -> _Grids:
    """Returns the grids; min-max where there are no bins, a grid of [-1, 1] where all data are zero."""
    scale, zero_point = _grid_of_extremes(lowest, highest, kind)
    kind = jax.tree.map(lambda leaf: np.broadcast_to(leaf, lowest.shape), kind)
    usable, is_zero = np.nonzero(aimet.is_usable(density))[0], (lowest == 0) & (highest == 0)
    chosen, part = jax.tree.map(lambda leaf: leaf[usable], kind), density.rows(usable)
    if percentage is None:
        found = aimet.search(part, chosen)
    else:
        found = aimet.grid_of_extremes(*aimet.percentile_range(part, percentage), chosen)
    scale[usable], zero_point[usable] = _as_integers(*found, chosen.qmin)
    is_search = percentage is None
    zeros = aimet.grid_of_zeros(kind, len(lowest), is_search=is_search)
    left_out = (kind.qmax - kind.qmin) % 2 == 0 if is_search else 0
    scale_of_zeros, zero_of_zeros = _as_integers(*zeros, kind.qmin - left_out)
    return np.where(is_zero, scale_of_zeros, scale), np.where(is_zero, zero_of_zeros, zero_point)


def _grid_of_extremes(lowest: Any, highest: Any, kind: GridKind) -> _Grids:
    _check_scales(kind)
    steps = np.asarray(kind.qmax, dtype=np.float64) - np.asarray(kind.qmin, dtype=np.float64)
    limit = LARGEST_VALUE * np.floor(steps / 2) / np.ceil(steps / 2)  # a symmetric grid may have one code more below 0
    low, high = (np.clip(np.asarray(end, dtype=np.float64), -limit, limit) for end in (lowest, highest))
    return _as_integers(*aimet.grid_of_extremes(low, high, kind), kind.qmin)


def _check_scales(kind: GridKind) -> None:
    if np.any(kind.power_of_two):
        raise ConfigError("power_of_two=True is not available with compatibility='aimet', which has no such scales")


def _as_integers(step: np.ndarray, offset: np.ndarray, qmin: Any) -> _Grids:
    return np.maximum(step, SMALLEST_SCALE).astype(np.float32), np.asarray(qmin - offset, dtype=np.float32)


def _init(num_tensors: int) -> BatchDensity:
    return BatchDensity(
        extremes=EXTREMES.init(num_tensors),
        first=Extremes(lowest=np.zeros(num_tensors, np.float32), highest=np.zeros(num_tensors, np.float32)),
        mass=np.zeros((num_tensors, aimet.NUM_BINS, 2), dtype=np.uint32),
        batches=np.zeros((num_tensors,), dtype=np.int32),
    )


def _look(values: Sequence[Any], num_samples: int) -> tuple[Extremes, list[Any]]:
    # All values, since the state alone knows where the bins are. One is added, so that the copy is fused with what
    # computes the value: were the tensor itself a result, what reads it would see other bits than elsewhere.
    return EXTREMES.look(values, num_samples), [jnp.pad(value.reshape(-1), (0, 1)) for value in values]


def _absorb(state: BatchDensity, looked: tuple[Extremes, Sequence[Any]]) -> BatchDensity:
    batch, values = looked
    begins = (state.batches == 0) & ((batch.lowest != 0) | (batch.highest != 0))
    first = jax.tree.map(partial(jnp.where, begins), batch, state.first)
    counts = begins | (state.batches > 0)
    with jax.enable_x64(True):
        width, edge = aimet.layout(first.lowest, first.highest, jnp)
        share = jnp.stack(
            [_share(value, width[i, None], edge[i, None]) for i, value in enumerate(each[:-1] for each in values)]
        )
        mass, seen = jax.lax.bitcast_convert_type(state.mass, jnp.float64), state.batches[:, None].astype(jnp.float64)
        mean = (mass * seen + share) / (seen + 1)
        words = jax.lax.bitcast_convert_type(jnp.where(counts[:, None], mean, mass), jnp.uint32)
    return BatchDensity(
        extremes=EXTREMES.merge(state.extremes, batch),
        first=first,
        mass=words,
        batches=state.batches + counts.astype(jnp.int32),
    )


def _share(value: Any, width: Any, first: Any) -> Any:
    """Returns the probabilities of the bins in one batch of one tensor."""
    index = aimet.bins_of(value.reshape(1, -1).astype(jnp.float32), width, first, jnp)[0]
    is_inside = (index >= 0) & (index < aimet.NUM_BINS)
    cells = jnp.where(is_inside, index, aimet.NUM_BINS).astype(jnp.int32)
    counts = jnp.zeros((aimet.NUM_BINS + 1,), dtype=jnp.int32).at[cells].add(1)[: aimet.NUM_BINS]
    return counts.astype(jnp.float64) / value.size


def _merge(first: BatchDensity, second: BatchDensity) -> BatchDensity:
    """Returns the state after both, where their bins are the same or one has none.

    Raises:
        ConfigError: Their first batches fixed different bins: AIMET defines no mean of such histograms.
    """
    counts = [np.asarray(state.batches) for state in (first, second)]
    same = (np.asarray(first.first.lowest) == np.asarray(second.first.lowest)) & (
        np.asarray(first.first.highest) == np.asarray(second.first.highest)
    )
    differ = np.nonzero(~same & (counts[0] > 0) & (counts[1] > 0))[0]
    if differ.size:
        raise ConfigError(
            f"compatibility='aimet': {differ.size} tensors, the first at {differ[0]}, have histograms with different "
            "bins, which AIMET cannot merge; calibrate on one device, in one stream"
        )
    masses = [_mass(state) for state in (first, second)]
    total = np.maximum(counts[0] + counts[1], 1)
    mean = sum(mass * count[:, None] for mass, count in zip(masses, counts, strict=True)) / total[:, None]
    return BatchDensity(
        extremes=EXTREMES.merge(first.extremes, second.extremes),
        first=jax.tree.map(lambda a, b: np.where(counts[0] > 0, a, b), first.first, second.first),
        mass=np.ascontiguousarray(mean).view(np.uint32).reshape(*mean.shape, 2),
        batches=counts[0] + counts[1],
    )


def _mass(state: BatchDensity) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(state.mass)).view(np.float64)[..., 0]


def _finish_extremes(state: Extremes, kind: GridKind) -> _Grids:
    return _grid_of_extremes(np.asarray(state.lowest), np.asarray(state.highest), kind)


def _finish_density(percentage: float | None, state: BatchDensity, kind: GridKind) -> _Grids:
    with np.errstate(all="ignore"):
        width, first = aimet.layout(np.asarray(state.first.lowest), np.asarray(state.first.highest))
    seen = np.asarray(state.batches) > 0
    density = aimet.Density(width=np.where(seen, width, 0), first=np.where(seen, first, 0), mass=_mass(state))
    lowest, highest = (np.asarray(end) for end in (state.extremes.lowest, state.extremes.highest))
    return _grid_of_density(density, percentage, lowest, highest, kind)


BATCH_DENSITY = Observer(
    name="density of each batch",
    init=_init,
    look=_look,
    absorb=_absorb,
    merge=_merge,
    extremes=lambda state: state.extremes,
    is_ordered=True,
)
"""Keeps AIMET's histograms, of all values; `merge` is for states outside `jit`."""
