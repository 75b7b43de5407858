"""Which width for which group: the least predicted noise at a limited cost, as a knapsack with one choice per group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

_UNITS = 1 << 15  # that the room between the cheapest and the dearest choice is cut into: 0.003 % each
_HALVINGS = 60
_SWEEPS = 8

Cost = Callable[[np.ndarray], float]
"""From the width of every group to what all of them cost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """What there is to choose from, for some groups."""

    widths: tuple[Int[np.ndarray, " w"], ...]
    """For each group, the widths to choose from, in ascending order."""
    noise: tuple[Float[np.ndarray, " w"], ...]
    """The noise that the group alone causes at each of them; noise of several groups adds up."""
    cost: Cost
    """What widths cost; never less at a larger width."""

    def narrowest(self) -> Int[np.ndarray, " g"]:
        """Returns the smallest width of each group."""
        return np.array([widths[0] for widths in self.widths], int)

    def widest(self) -> Int[np.ndarray, " g"]:
        """Returns the largest width of each group."""
        return np.array([widths[-1] for widths in self.widths], int)

    def predicted(self, chosen: Int[np.ndarray, " g"]) -> float:
        """Returns the noise of all groups at these widths."""
        columns = zip(self.widths, self.noise, chosen, strict=True)
        return float(sum(noise[np.flatnonzero(widths == width)[0]] for widths, noise, width in columns))


def least_noise(problem: Allocation, limit: float) -> Int[np.ndarray, " g"]:
    """Returns the widths of least predicted noise that cost `limit` at most, for a cost that is a sum over groups.

    Exact up to the rounding of costs to units of 2^-15 of the room between the smallest and the largest cost (upwards,
    so that the limit holds): dynamic programming over groups and costs. A larger limit never predicts more noise. The
    narrowest widths must fit.
    """
    base = problem.narrowest()
    table = [_costs_of(problem.cost, base, group, widths) for group, widths in enumerate(problem.widths)]
    best = [int(np.argmin(noise)) for noise in problem.noise]
    if sum(costs[i] for costs, i in zip(table, best, strict=True)) + problem.cost(base) <= limit:
        return np.array([widths[i] for widths, i in zip(problem.widths, best, strict=True)], int)
    unit = sum(costs[-1] for costs in table) / _UNITS or 1.0
    units = [np.ceil(costs / unit).astype(int) for costs in table]
    chosen = _knapsack(problem.noise, units, int((limit - problem.cost(base)) / unit))
    return np.array([widths[i] for widths, i in zip(problem.widths, chosen, strict=True)], int)


def least_noise_of_products(problem: Allocation, limit: float, parts: Sequence[Sequence[int]]) -> Int[np.ndarray, " g"]:
    """Returns widths of little predicted noise that cost `limit` at most, for a cost of products of two widths.

    Not exact: for a price of a unit of cost, each group takes the width that is best beside the others' until none
    changes; the smallest price that keeps the limit is found by bisection. Then each part, within which costs are a sum
    over groups, is chosen exactly beside the others. The narrowest widths must fit.

    Args:
        problem: What there is to choose from.
        limit: The most that it may cost.
        parts: The groups, by index, in parts.
    """
    chosen = _at_least_price(problem, limit)
    for part in parts:
        here = np.asarray(part, int)
        alone = Allocation(
            widths=tuple(problem.widths[i] for i in part),
            noise=tuple(problem.noise[i] for i in part),
            cost=lambda some, here=here, rest=chosen: problem.cost(_replaced(rest, here, some)),
        )
        found = _replaced(chosen, here, least_noise(alone, limit))
        chosen = found if problem.predicted(found) < problem.predicted(chosen) else chosen
    return chosen


def _costs_of(cost: Cost, base: np.ndarray, group: int, widths: np.ndarray) -> Float[np.ndarray, " w"]:
    """Returns what each width of a group costs more than its width in `base`."""
    return np.array([cost(_replaced(base, group, width)) for width in widths], float) - cost(base)


def _knapsack(noise: Sequence[np.ndarray], units: Sequence[np.ndarray], room: int) -> list[int]:
    """Returns the index of each group's choice, of least noise, of `room` units at most; the first ones cost none.

    best[g, n] = min over w of noise[g, w] + best[g - 1, n - units[g, w]].
    """
    best = np.zeros(max(room, 0) + 1)
    choices = []
    for values, sizes in zip(noise, units, strict=True):
        offers = np.full((len(values), len(best)), np.inf)
        for offer, value, size in zip(offers, values, sizes, strict=True):
            if size < len(best):
                offer[size:] = value + best[: len(best) - size]
        choices.append(offers.argmin(0))
        best = offers.min(0)
    left, chosen = len(best) - 1, []
    for choice, sizes in zip(reversed(choices), reversed(units), strict=True):
        chosen.append(int(choice[left]))
        left -= int(sizes[chosen[-1]])
    return chosen[::-1]


def _at_least_price(problem: Allocation, limit: float) -> Int[np.ndarray, " g"]:
    """Returns the widths for the smallest price that keeps the limit."""
    chosen = _at_price(problem, 0.0)
    if problem.cost(chosen) <= limit:
        return chosen
    chosen, low, high = problem.narrowest(), -60.0, 60.0  # decades
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = _at_price(problem, 10.0**middle)
        if problem.cost(found) <= limit:
            chosen, high = found, middle
        else:
            low = middle
    return chosen


def _at_price(problem: Allocation, price: float) -> Int[np.ndarray, " g"]:
    chosen = problem.widest()
    for _ in range(_SWEEPS):
        before = chosen
        for group, (widths, noise) in enumerate(zip(problem.widths, problem.noise, strict=True)):
            costs = _costs_of(problem.cost, chosen, group, widths)
            chosen = _replaced(chosen, group, widths[np.argmin(noise + price * costs)])
        if np.array_equal(chosen, before):
            break
    return chosen


def _replaced(values: np.ndarray, where: int | np.ndarray, by: np.ndarray | np.integer) -> np.ndarray:
    found = values.copy()
    found[where] = by
    return found
