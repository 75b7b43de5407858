"""Signal and noise of outputs, summed over batches, and the decibels that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from ptqjax.metrics.records import Metric, Seen, added, output_named

Energies: TypeAlias = Mapping[str, tuple[float, float]]
"""By output: the sum of squares of the reference's elements, and of their differences."""


def decibels(signal: float, noise: float) -> float:
    """Returns 10 log10(signal / noise): infinite without noise, minus infinity without signal."""
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal else float("-inf")


def energy(outputs: Mapping[str, Any], others: Mapping[str, Any] | None = None) -> float:
    """Returns the sum of squares of all outputs, or of their differences from `others`."""
    total = 0.0
    for name, value in outputs.items():
        array = np.asarray(value, np.float64)
        total += float(np.sum((array if others is None else array - np.asarray(others[name], np.float64)) ** 2))
    return total


def energies(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Energies:
    """Returns signal and noise of each output of a batch."""
    return {name: (energy({name: y}), energy({name: y}, found)) for name, y in wanted.items()}


def with_energies(state: Energies, seen: Seen) -> Energies:
    """Returns signal and noise of each output with those of one batch more; nothing without a reference."""
    return added(state, energies(seen.wanted, seen.found))


def decibels_of_all(state: Energies) -> float:
    """Returns the SQNR over all outputs together: of sums over outputs, so that the largest output counts most."""
    return decibels(sum(signal for signal, _ in state.values()), sum(noise for _, noise in state.values()))


def mean_ratio(state: Energies) -> float:
    """Returns the mean over outputs of noise over signal, to which those of zeros alone add nothing; NaN if all are."""
    ratios = [noise / signal for signal, noise in state.values() if signal]
    return sum(ratios) / len(state) if ratios else float("nan")


def decibels_of_mean(state: Energies) -> float:
    """Returns `mean_ratio` in dB below the signal, minus infinity where it is not a number; at most some 3000 dB.

    Unlike `decibels_of_all`, it does not rest on the largest output alone.
    """
    ratio = mean_ratio(state)
    return -np.inf if np.isnan(ratio) else float(-10 * np.log10(max(ratio, np.finfo(float).tiny)))


def sqnr_db(output: str | None = None) -> Metric:
    """Returns the metric 10 log10(sum y^2 / sum (y - y_q)^2), y the reference's, in dB; over all outputs, or of one."""
    name = f"sqnr_db:{output}" if output else "sqnr_db"

    def finish(state: Energies) -> float:
        return decibels_of_all(state) if output is None else decibels(*output_named(state, output, name))

    return Metric(name=name, init=dict, update=with_energies, finish=finish, needs_reference=True, merge=added)
