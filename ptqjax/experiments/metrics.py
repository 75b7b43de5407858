"""What outputs are measured by: records of pure functions, fed batch by batch, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptqjax.agreement import decibels
from ptqjax.config import near_names
from ptqjax.errors import ConfigError
from ptqjax.evaluation import energy, predicted

Outputs = Mapping[str, np.ndarray]
"""A model's outputs on a batch, by name, in the order of the graph."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a metric is told of one batch."""

    found: Outputs
    """The outputs of the model that is measured."""
    wanted: Outputs
    """The outputs of the reference."""
    labels: np.ndarray | None
    """The index of the class of each sample; None without labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A figure of merit over all batches: `finish` of `update` after `update`, from `init` on."""

    name: str
    """What it is called in tables."""
    init: Callable[[], Any]
    """Returns the state before the first batch."""
    update: Callable[[Any, Seen], Any]
    """Returns the state after one more batch."""
    finish: Callable[[Any], float]
    """Returns the figure."""
    higher_is_better: bool = True
    """Which way is good."""
    needs_labels: bool = False
    """Whether it is of labels."""


def sqnr_db() -> Metric:
    """Returns the metric 10 log10(sum y^2 / sum (y - y_q)^2) over all outputs, y the reference's, in dB."""

    def update(state: tuple[float, float], seen: Seen) -> tuple[float, float]:
        return state[0] + energy(seen.wanted), state[1] + energy(seen.wanted, seen.found)

    return Metric(name="sqnr_db", init=lambda: (0.0, 0.0), update=update, finish=lambda state: decibels(*state))


def agreement() -> Metric:
    """Returns the metric: fraction of samples whose largest element of the first output is the reference's."""

    def update(state: tuple[int, int], seen: Seen) -> tuple[int, int]:
        name = next(iter(seen.wanted))
        return _counted(state, predicted(seen.found[name]) == predicted(seen.wanted[name]))

    return Metric(name="agreement", init=lambda: (0, 0), update=update, finish=_fraction)


def top1() -> Metric:
    """Returns the metric: fraction of samples whose largest element of the first output is the labelled class."""

    def update(state: tuple[int, int], seen: Seen) -> tuple[int, int]:
        return _counted(state, predicted(seen.found[next(iter(seen.wanted))]) == seen.labels)

    return Metric(name="top1", init=lambda: (0, 0), update=update, finish=_fraction, needs_labels=True)


METRICS: Mapping[str, Callable[[], Metric]] = {"sqnr_db": sqnr_db, "agreement": agreement, "top1": top1}
"""The metrics that have names."""


def find_metrics(metrics: Sequence[str | Metric], *, has_labels: bool) -> tuple[Metric, ...]:
    """Returns the metrics, each given by its name or as a record.

    Raises:
        ConfigError: A name is unknown, two are called alike, or one is of labels and there are none.
    """
    if isinstance(metrics, str):
        raise ConfigError(f"metrics={metrics!r} is a text; expected a sequence of names, as in ({metrics!r},)")
    found = tuple(metric if isinstance(metric, Metric) else _by_name(metric) for metric in metrics)
    names = [metric.name for metric in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"metrics: {names.count(twice)} are called {twice!r}; give each a name of its own")
    unlabelled = next((metric.name for metric in found if metric.needs_labels and not has_labels), None)
    if unlabelled is not None:
        raise ConfigError(f"metrics: {unlabelled!r} is of labels, and there are none; give labels, or leave it out")
    return found


def _by_name(name: str) -> Metric:
    if name not in METRICS:
        raise ConfigError(
            f"metrics: {name!r} is unknown; expected {', '.join(METRICS)}, or a Metric{near_names(name, METRICS)}"
        )
    return METRICS[name]()


def _counted(state: tuple[int, int], hits: np.ndarray) -> tuple[int, int]:
    return state[0] + int(np.count_nonzero(hits)), state[1] + len(hits)


def _fraction(state: tuple[int, int]) -> float:
    return state[0] / state[1]
