"""What every group's rounding does to the outputs, measured one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import DataError
from ptqjax.experiments.effects import Effects, Labels, floating_outputs
from ptqjax.experiments.engine import Variant, evaluate_variants, switched
from ptqjax.experiments.tied_tensors import Group
from ptqjax.ir import Model
from ptqjax.metrics import Metric, Seen
from ptqjax.metrics.classes import predicted
from ptqjax.metrics.records import added
from ptqjax.metrics.sums import Energies, energies, mean_ratio
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
    solved: Mapping[str, Any] | None = None,
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
        solved: Parameters, by name, that are rounded from these values in place of the model's own.

    Raises:
        DataError: The batches do not fit the model, there are none, or not as many labels as samples.
        ModelError: An output is not finite, or none holds floating numbers.
    """
    named = [frozenset(group.tensors) for group in groups]

    def variant(name: str, is_on: Callable[[str], bool]) -> Variant:
        values = {tensor: value for tensor, value in (solved or {}).items() if is_on(tensor)}
        params = {**model.params, **values} if values else None
        return Variant(name=name, encodings=switched(encodings, is_on), params=params)

    variants = [
        variant(group.name, lambda name, of=of: (name in of) == is_alone)
        for group, of in zip(groups, named, strict=True)
    ]
    metrics = [_noise(), *([] if labels is None else [_loss()]), *([] if metric is None else [metric])]
    values = evaluate_variants(
        model,
        [variant("all the others", lambda _: not is_alone), *variants],
        batches,
        metrics=metrics,
        labels=None if isinstance(labels, str) else labels,
        follow=follow,
    ).values
    sign = 1 if is_alone else -1
    found = {name: sign * np.array([value[name] - values[0][name] for value in values[1:]]) for name in values[0]}
    change = None if metric is None else found[metric.name]
    return Effects(noise=found["noise"], loss=found.get("loss"), change=change)


def _noise() -> Metric:
    """Returns the metric: mean over the floating outputs of sum (y - y_q)^2 / sum y^2."""

    def update(state: Energies, seen: Seen) -> Energies:
        return added(state, energies(floating_outputs(seen.wanted), floating_outputs(seen.found)))

    return Metric(name="noise", init=dict, update=update, finish=mean_ratio, higher_is_better=False)


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
