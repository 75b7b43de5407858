"""What outputs are measured by: records of pure functions, fed batch by batch, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from ptqjax.config import near_names
from ptqjax.errors import ConfigError

_T = TypeVar("_T")
Outputs = Mapping[str, np.ndarray]
"""A model's outputs on a batch, by name, in the order of the graph."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a metric is told of one batch."""

    found: Outputs
    """The outputs of the model that is measured."""
    wanted: Outputs
    """The outputs of the reference; empty without one."""
    labels: np.ndarray | None
    """The index of the class of each sample [N], or of each of its positions [N, T] with `IGNORED` where none counts;
    None without labels."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """What both were given, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A figure of merit over all batches: `finish` of `update` after `update`, from `init` on."""

    name: str
    """What it is called in tables."""
    init: Callable[[], Any]
    """Returns the state before the first batch."""
    update: Callable[[Any, Seen], Any]
    """Returns the state after one more batch. Metrics with the same function share its states."""
    finish: Callable[[Any], float]
    """Returns the figure; NaN where nothing was counted."""
    higher_is_better: bool = True
    """Which way is good."""
    needs_labels: bool = False
    """Whether it is of labels."""
    needs_reference: bool = False
    """Whether it compares with a reference."""
    merge: Callable[[Any, Any], Any] | None = None
    """Returns the state of two parts of the data together, the first part's state first; None: parts of a batch that
    several processes hold cannot be measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """The states of some metrics over the batches so far."""

    metrics: tuple[Metric, ...]
    """What is measured."""
    states: tuple[Any, ...]
    """The state of each update function, in the order in which metrics first name it."""

    @staticmethod
    def of(metrics: Sequence[Metric]) -> Tally:
        """Returns the tally before the first batch."""
        return Tally(metrics=tuple(metrics), states=tuple(first.init() for first in _by_update(metrics).values()))

    def plus(self, seen: Seen) -> Tally:
        """Returns the tally with one batch more."""
        updates = _by_update(self.metrics)
        return replace(self, states=tuple(update(s, seen) for update, s in zip(updates, self.states, strict=True)))

    def merged(self, states: Sequence[Any]) -> Tally:
        """Returns the tally with what came of another part of the data: the states of its tally.

        Raises:
            ConfigError: A metric does not tell how states go together.
        """
        pairs = zip(_by_update(self.metrics).values(), self.states, states, strict=True)
        return replace(self, states=tuple(_merge_of(metric)(one, other) for metric, one, other in pairs))

    def by_metric(self) -> list[tuple[Metric, Any]]:
        """Returns each metric and its state."""
        states = dict(zip(_by_update(self.metrics), self.states, strict=True))
        return [(metric, states[metric.update]) for metric in self.metrics]

    def figures(self) -> dict[str, float]:
        """Returns the figure of each metric, by name."""
        return {metric.name: float(metric.finish(state)) for metric, state in self.by_metric()}


def _by_update(metrics: Sequence[Metric]) -> dict[Callable[[Any, Seen], Any], Metric]:
    """Returns the first metric of each update function."""
    return {metric.update: metric for metric in reversed(metrics)}


def _merge_of(metric: Metric) -> Callable[[Any, Any], Any]:
    if metric.merge is None:
        raise ConfigError(
            f"metric {metric.name!r} has no merge, and processes hold parts of a batch; give the record merge=, a "
            "function of two states to that of both parts together"
        )
    return metric.merge


def added(one: Any, other: Any) -> Any:
    """Returns the sum of two states of numbers, tuples of numbers, or such by key: the `merge` of sums."""
    if isinstance(one, Mapping):
        both = {key: added(one[key], other[key]) for key in one if key in other}
        return {**one, **other, **both}
    if isinstance(one, tuple):
        return tuple(added(a, b) for a, b in zip(one, other, strict=True))
    return one + other


def fraction(state: tuple[float | int, int]) -> float:
    """Returns the first number over the second: the `finish` of a mean; NaN where nothing was counted."""
    return state[0] / state[1] if state[1] else float("nan")


def mean_of(
    function: Callable[[Seen], Any],
    *,
    name: str | None = None,
    higher_is_better: bool = True,
    needs_labels: bool = False,
    needs_reference: bool = False,
) -> Metric:
    """Returns the metric that is the mean of all numbers that a function of one's own gives for batches.

    Args:
        function: Takes a `Seen`, returns an array: a number for each sample, or for each of what counts.
        name: What it is called in tables; None: as the function is.
        higher_is_better: Which way is good.
        needs_labels: Whether it reads labels.
        needs_reference: Whether it reads the reference's outputs.
    """

    def update(state: tuple[float, int], seen: Seen) -> tuple[float, int]:
        values = np.asarray(function(seen), np.float64)
        return state[0] + float(values.sum()), state[1] + values.size

    return Metric(
        name=name or getattr(function, "__name__", type(function).__name__),
        init=lambda: (0.0, 0),
        update=update,
        finish=fraction,
        higher_is_better=higher_is_better,
        needs_labels=needs_labels,
        needs_reference=needs_reference,
        merge=added,
    )


def output_named(outputs: Mapping[str, _T], name: str, metric: str) -> _T:
    """Returns what is told of an output that a metric is of.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in outputs:
        raise ConfigError(f"metric '{metric}': the model has no such output{near_names(name, outputs)}")
    return outputs[name]
