"""What every group's rounding does to the outputs, measured one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import DataError
from ptqjax.evaluation import energy, predicted
from ptqjax.experiments.effects import Effects, Labels, floating_outputs
from ptqjax.experiments.engine import Variant, evaluate_variants, switched
from ptqjax.experiments.metrics import Metric, Seen
from ptqjax.experiments.tied_tensors import Group
from ptqjax.ir import Model
from ptqjax.progress import Follow


def measure_effects(
    model: Model,
    batches: Iterable[Mapping[str, Any]],
    encodings: Encodings,
    groups: Sequence[Group],
    *,
    is_alone: bool,
    labels: Labels = None,
    metric: Metric | None = None,
    follow: Follow | None = None,
) -> Effects:
    """Returns exactly what each group does to the outputs of these samples; a run of the simulated model for each.

    Alone: the noise and the loss where it alone is rounded, less those of the float model. Beside the others: those
    where all is rounded, less those where all but the group is.

    Args:
        model: The float model.
        batches: Inputs by name. Gone through once.
        encodings: The grids; what is not enabled stays in float.
        groups: What is switched. The other encodings are off, where `is_alone`, else on.
        is_alone: Whether each group is rounded alone, or all are but the group.
        labels: Which task's loss is measured.
        metric: What else is measured, and told as a change: with the group's rounding less without it.
        follow: Shows how far the pass is.

    Raises:
        DataError: The batches do not fit the model, there are none, or not as many labels as samples.
        ModelError: An output is not finite, or none holds floating numbers.
    """
    named = [frozenset(group.tensors) for group in groups]
    variants = [
        Variant(name=group.name, encodings=switched(encodings, lambda name, of=of: (name in of) == is_alone))
        for group, of in zip(groups, named, strict=True)
    ]
    base = switched(encodings, lambda _: not is_alone)
    metrics = [_noise(), *([] if labels is None else [_loss()]), *([] if metric is None else [metric])]
    values = evaluate_variants(
        model,
        [Variant(name="all the others", encodings=base), *variants],
        batches,
        metrics=metrics,
        labels=None if isinstance(labels, str) else labels,
        follow=follow,
    ).values
    sign = 1 if is_alone else -1
    found = {name: sign * np.array([value[name] - values[0][name] for value in values[1:]]) for name in values[0]}
    change = None if metric is None else found[metric.name]
    return Effects(noise=found["noise"], loss=found.get("loss"), change=change)


_Energies: TypeAlias = Mapping[str, tuple[float, float]]
"""By output: the sum of squares of errors, and that of the reference."""


def _noise() -> Metric:
    """Returns the metric: mean over the floating outputs of sum (y - y_q)^2 / sum y^2."""

    def update(state: _Energies, seen: Seen) -> _Energies:
        found, wanted = floating_outputs(seen.found), floating_outputs(seen.wanted)
        each = {name: (energy({name: y}, found), energy({name: y})) for name, y in wanted.items()}
        before = {name: state.get(name, (0.0, 0.0)) for name in each}
        return {name: (before[name][0] + noise, before[name][1] + power) for name, (noise, power) in each.items()}

    return Metric(name="noise", init=dict, update=update, finish=_mean_ratio, higher_is_better=False)


def _mean_ratio(state: _Energies) -> float:
    """Returns the mean over outputs, of which one of zeros alone has no noise to tell; NaN where all are."""
    ratios = [noise / power for noise, power in state.values() if power]
    return sum(ratios) / len(state) if ratios else np.nan


def _loss() -> Metric:
    """Returns the metric: mean cross-entropy of the first output with the labels, or with the reference's own class."""

    def update(state: tuple[float, int], seen: Seen) -> tuple[float, int]:
        name = next(iter(floating_outputs(seen.wanted)))
        logits = np.asarray(seen.found[name], np.float64).reshape(len(seen.found[name]), -1)
        classes = predicted(seen.wanted[name]) if seen.labels is None else seen.labels
        if len(classes) < len(logits):
            raise DataError("there are fewer labels than samples; expected one for each sample")
        losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(logits)), classes]
        return state[0] + float(losses.sum()), state[1] + len(logits)

    return Metric(
        name="loss",
        init=lambda: (0.0, 0),
        update=update,
        finish=lambda state: state[0] / state[1],
        higher_is_better=False,
    )
