"""Scales in closed form: weight ranges equal on both sides of every tied set, limited by what activations reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ptqjax.ir import Model
from ptqjax.kernels.equalization import (
    FARTHEST,
    common_factors,
    imbalance,
    level,
    log_scales,
    ranges_of_inputs,
    ranges_of_outputs,
    tap_ranges,
)
from ptqjax.kernels.grouped import largest_by_number
from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.precision import is_traced
from ptqjax.transforms.linear import weight_view
from ptqjax.transforms.ties import Ties

_STEP = 1.4  # over-relaxation: a chain of 27 layers takes half the sweeps that it takes at 1 (measured)
_CONVERGED = 3e-4  # largest change of a log scale in the last sweep: ranges equal to 0.1 %, an 8-bit step is 0.8 %
_SWEEPS = 100
_ROUNDS = 20
_SHORTEST = 0.3  # of steps: where these lower nothing, ranges are as alike as they become
_SETTLED = 1e-3  # largest change that a set asks for once its level is right
_LARGE = 2**14
_LEVELS = 8  # rounds of common factors: one is enough where each set has one producer and one consumer
_BALANCED = 4e-3  # changes below this are what convergence and the rounding of weights left to an earlier run


_Part = tuple[np.ndarray, Any, Any]  # places in a set (others lie outside), ranges there, the layer's largest one


@dataclass(frozen=True, kw_only=True)
class Balance:
    """The weight ranges around each tied set."""

    ties: Ties
    """The sets."""
    ranges: Mapping[str, Any]
    """Largest weight over the taps, [groups, outputs, inputs], of each layer, by the tensor that it produces; an axis
    whose scales are all fixed is reduced to one."""

    def around(self, log_scales: Any, index: int) -> tuple[Any, Any]:
        """Returns the weight range per scale of a set before and behind it, as if its own scales were one.

        Before it is the largest row among the layers that produce the channel, behind it the largest column among those
        that read it. Several layers on a side count by how much of their own tensor's range a channel takes, since each
        has a quantizer of its own; the level is that of `level`.
        """
        found, sides = self.ties.sets[index], self._sides(log_scales, index)
        r1, r2 = (_gathered(parts, len(found.scales)) for parts in sides)
        if len(found.producers) <= 1 and len(found.consumers) <= 1:
            return r1, r2
        shares = [[(places, _shares(each, whole)) for places, each, whole in parts] for parts in sides]
        q1, q2 = (_gathered([(*part, None) for part in parts], len(found.scales)) for parts in shares)
        xp, own = array_namespace(r1, r2), self.own(log_scales, index)
        return q1 * xp.exp(_level_of(sides, own) - level(q1, q2, own)), q2

    def level(self, log_scales: Any, index: int) -> Any:
        """Returns how far a factor common to a set is missing: by how much the logarithms of ranges differ in the mean.

        Each layer of a side counts alike, and so by a sum, not by the largest: a common factor moves it by as much as
        `neighbours` says, whichever layer is the largest.
        """
        return _level_of(self._sides(log_scales, index), self.own(log_scales, index))

    def _sides(self, log_scales: Any, index: int) -> tuple[list[_Part], list[_Part]]:
        """Returns the places in a set, the ranges and the largest scaled range of each layer before and behind it."""
        found = self.ties.sets[index]
        offset = int(self.position[found.scales[0]])
        xp = array_namespace(log_scales, *self.ranges.values())
        sides: tuple[list[_Part], list[_Part]] = [], []
        kinds = ((found.producers, "outputs", "inputs", -1.0), (found.consumers, "inputs", "outputs", 1.0))
        for parts, (names, side, other, sign) in zip(sides, kinds, strict=True):
            for output in names:
                tied, of = self.ties.layers[output], ranges_of_outputs if side == "outputs" else ranges_of_inputs
                ranges = of(self.ranges[output], self._of(log_scales, getattr(tied, other)))
                numbers = getattr(tied, side)
                whole = (ranges * xp.exp(sign * log_scales[numbers])).max()
                parts.append((self.position[numbers] - offset, ranges, whole))
        return sides

    def own(self, log_scales: Any, index: int) -> Any:
        """Returns the log scales of one set."""
        return log_scales[self.ties.sets[index].scales]

    @cached_property
    def position(self) -> np.ndarray:
        """The place of each scale when the sets stand one behind the other; -1 for those of no set."""
        found = np.full(self.ties.num_scales, -1)
        members = [each.scales for each in self.ties.sets]
        if members:
            found[np.concatenate(members)] = np.arange(sum(map(len, members)))
        return found

    @cached_property
    def neighbours(self) -> np.ndarray:
        """How much of a set's ranges another set's common factor moves, [sets, sets]."""
        count = len(self.ties.sets)
        owner = np.full(self.ties.num_scales, -1)
        for index, found in enumerate(self.ties.sets):
            owner[found.scales] = index
        matrix = np.zeros((count, count))
        for index, found in enumerate(self.ties.sets):
            for names, side in ((found.producers, "inputs"), (found.consumers, "outputs")):
                for _, tied in self._layers(names):
                    owners = owner[getattr(tied, side)]
                    shares = np.bincount(owners[owners >= 0], minlength=count) / len(owners)
                    matrix[index] += shares / len(names)
        return matrix

    def _layers(self, names: Sequence[str]) -> list[tuple[str, Any]]:
        return [(name, self.ties.layers[name]) for name in names]

    @staticmethod
    def _of(log_scales: Any, numbers: np.ndarray) -> Any | None:
        return log_scales[numbers] if numbers.any() else None


def weight_balance(model: Model, ties: Ties) -> Balance:
    """Returns the weight ranges of the layers around the tied sets of `model`."""
    concerned = {name for found in ties.sets for name in (*found.producers, *found.consumers)}
    ranges: dict[str, Any] = {}
    for output in concerned:
        tied = ties.layers[output]
        found = tap_ranges(weight_view(model, tied.layer))
        found = found if tied.inputs.any() else found.max(axis=2, keepdims=True)
        found = found if tied.outputs.any() else found.max(axis=1, keepdims=True)
        # Each sweep reads all of a large matrix: in float32 it takes half the time, and ranges are equal to 1e-6 still.
        ranges[output] = found.astype(np.float32) if isinstance(found, np.ndarray) and found.size > _LARGE else found
    return Balance(ties=ties, ranges=ranges)


def balanced(balance: Balance, sizes: Sequence[Any | None], limit: float) -> Any:
    """Returns log scales [num_scales] at which no tied set asks for another, see `kernels.equalization.log_scales`.

    One set after the other, sweep after sweep, each step a little longer than it asks for. All that depends on a
    factor common to a whole set are its neighbours' common factors: these are found at once in the end. What is lowered
    is `asked_for`; a round that does not lower it is undone, and made again with shorter steps. Common
    factors, and the scales of a set beside each other, are bounded by `FARTHEST`.

    Args:
        balance: The weight ranges.
        sizes: For each set the magnitudes of its channels' activations; None to look at the weights alone.
        limit: How far above the median a channel's activation may reach.
    """
    xp = array_namespace(*balance.ranges.values(), *sizes)
    best = xp.zeros(balance.ties.num_scales, dtype=np.float64 if xp is np else _dtype(balance))
    least, step = asked_for(balance, sizes, limit, best), _STEP
    for _ in range(_ROUNDS):  # where sets meet in a layer (Concat), common factors move what each channel asks for
        scales = _levelled(balance, _swept(balance, sizes, limit, best, step))
        asked = asked_for(balance, sizes, limit, scales)
        if is_traced(asked):
            return scales
        if asked < least:
            best, least = scales, asked
        else:
            step /= 2
        if least < _SETTLED or step < _SHORTEST:
            break
    return best


def asked_for(balance: Balance, sizes: Sequence[Any | None], limit: float, scales: Any) -> Any:
    """Returns the largest change of a log scale that a set asks for beside its others: 0 where all is balanced."""
    steps = [
        abs(_asked(balance, sizes, limit, scales, index) - balance.own(scales, index)).max()
        for index in range(len(sizes))
    ]
    return array_namespace(*steps).stack(steps).max() if steps else 0.0


def _swept(balance: Balance, sizes: Sequence[Any | None], limit: float, scales: Any, step: float) -> Any:
    """Returns the scales after sweeps over all sets, until none moves; the mean of each stays."""
    sets = balance.ties.sets
    near = (balance.neighbours + balance.neighbours.T > 0) | np.eye(len(sets), dtype=bool)
    changes = np.full(len(sets), np.inf)
    for sweep in range(_SWEEPS):
        for index, found in enumerate(sets):
            if np.all(changes[near[index]] < _CONVERGED):
                continue  # nothing around it has moved
            old = balance.own(scales, index)
            asked = _asked(balance, sizes, limit, scales, index)
            new = old + (min(step, 1.0) if sweep == 0 else step) * (asked - old)
            changes[index] = np.inf if sweep == 0 or is_traced(asked) else float(abs(asked - old).max())
            scales = _placed(scales, found.scales, new)
        if np.max(changes, initial=0.0) < _CONVERGED:
            break
    return scales


def _asked(balance: Balance, sizes: Sequence[Any | None], limit: float, scales: Any, index: int) -> Any:
    """Returns the log scales that a set asks for, with the mean that it has."""
    asked = log_scales(*balance.around(scales, index), sizes[index], limit=limit)
    return asked - asked.mean() + balance.own(scales, index).mean()


def _levelled(balance: Balance, scales: Any) -> Any:
    """Returns the scales with a factor common to each set, so that both sides have the same level.

    Where sets meet in a layer, `neighbours` tells the effect of a factor roughly: what makes levels worse is left.
    """
    sets = balance.ties.sets
    if not sets:
        return scales
    xp, best, least = array_namespace(scales), scales, np.inf
    for _ in range(_LEVELS):
        levels = xp.stack([balance.level(scales, index) for index in range(len(sets))])
        if not is_traced(levels):
            off = float(abs(levels).max())
            if off >= least:
                return best
            best, least = scales, off
            if off < _CONVERGED:
                return best
        factors = common_factors(levels, balance.neighbours)
        means = xp.stack([balance.own(scales, index).mean() for index in range(len(sets))])
        # No common factor leaves the bounds: a part of the way to the solution lowers levels by as large a part.
        room = (FARTHEST - xp.sign(factors) * means) / xp.maximum(abs(factors), np.finfo(np.float32).tiny)
        factors = factors * xp.clip(room.min(), 0.0, 1.0)
        for found, factor in zip(sets, factors, strict=True):
            scales = _placed(scales, found.scales, scales[found.scales] + factor)
    return scales if is_traced(scales) else best


def is_balanced(balance: Balance, sizes: Sequence[Any | None], limit: float) -> bool:
    """Tells whether no set asks for other scales than it has: so it is after an earlier run."""
    scales = np.zeros(balance.ties.num_scales)
    for index, size in enumerate(sizes):
        r1, r2 = balance.around(scales, index)
        asked = log_scales(r1, r2, size, limit=limit)
        is_plain = len(balance.ties.sets[index].producers) == 1 == len(balance.ties.sets[index].consumers)
        # The level of a set with several layers on a side is a matter of looks, which no quantizer sees.
        off = abs(level(r1, r2, asked * 0)) if is_plain else 0.0
        if is_traced(asked) or max(abs(asked - asked.mean()).max(), off) > _BALANCED:
            return False
    return True


def imbalances(balance: Balance, scales: Any, index: int) -> tuple[Any, Any]:
    """Returns the largest |log(r1 / r2)| of a set before and after all scaling."""
    r1, r2 = balance.around(scales * 0, index)
    before = imbalance(r1, r2, r1 * 0)
    return before, imbalance(*balance.around(scales, index), balance.own(scales, index))


def _dtype(balance: Balance) -> Any:
    return next((found.dtype for found in balance.ranges.values()), np.dtype(np.float64))


def _placed(scales: Any, numbers: np.ndarray, values: Any) -> Any:
    if isinstance(scales, np.ndarray) and isinstance(values, np.ndarray):
        scales = scales.copy()
        scales[numbers] = values
        return scales
    xp = array_namespace(scales, values)
    return xp.asarray(scales).at[numbers].set(values)


def _gathered(parts: Sequence[_Part], size: int) -> Any:
    """Returns the largest range of each scale of a set over the layers on one side; 0 where there is none."""
    found = None
    for places, ranges, _ in parts:
        own = largest_by_number(ranges, places, size)
        found = own if found is None else array_namespace(found, own).maximum(found, own)
    return np.zeros(size) if found is None else found


def _shares(ranges: Any, whole: Any) -> Any:
    return ranges / array_namespace(ranges, whole).where(whole > 0, whole, 1.0)


def _level_of(sides: tuple[Sequence[_Part], Sequence[_Part]], own: Any) -> Any:
    """Returns the mean over layers and live channels of log ranges before a set less that behind it, after scaling."""
    r1, r2 = (_gathered(parts, len(own)) for parts in sides)
    is_live, total = (r1 > 0) & (r2 > 0), 0.0
    for parts, sign in zip(sides, (1.0, -1.0), strict=True):
        means = [_mean_log(part, is_live, sign * own) for part in parts]
        total = total + sign * sum(means) / max(len(means), 1)
    return total


def _mean_log(part: _Part, is_live: Any, less: Any) -> Any:
    """Returns the mean of log ranges, each less what is said of its place, over the places that live; 0 for none."""
    places, ranges, _ = part
    xp, own = array_namespace(part[1], less), np.flatnonzero((places >= 0) & (places < len(less)))
    ranges, places = ranges[own], places[own]
    counts = is_live[places] & (ranges > 0)
    logs = xp.where(counts, xp.log(xp.where(counts, ranges, 1.0)) - less[places], 0.0)
    return logs.sum() / xp.maximum(counts.sum(), 1)
