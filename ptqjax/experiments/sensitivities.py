"""How much each group of quantizers disturbs the outputs: estimated in one pass, or measured one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ptqjax.config import near_names
from ptqjax.config.checks import check_choice
from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import ConfigError, ModelError
from ptqjax.experiments.effects import Effects, checked_labels_of
from ptqjax.experiments.exact import measure_effects
from ptqjax.experiments.metrics import Metric
from ptqjax.experiments.one_pass import estimate_effects
from ptqjax.experiments.tied_tensors import Group, Kind, groups_of
from ptqjax.ir import Model
from ptqjax.progress import Follow
from ptqjax.qdq.insert import check_tensors

METHODS = ("one-pass", "on-only", "one-pass-off", "off-only")
"""How sensitivities are found; `sensitivity` says what they mean."""
FIGURES = ("noise", "loss")
"""What groups can be ranked by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """What rounding one group does to the outputs."""

    name: str
    """The group's name, that of its first tensor."""
    kind: Kind
    """Whether it is a weight, or what flows."""
    tensors: tuple[str, ...]
    """The tensors that are rounded on its encoding."""
    noise: float
    """Noise power in the outputs over the outputs' power: what the group alone brings ("one-pass", "on-only"), or what
    goes where it alone is put back into float ("one-pass-off", "off-only"), which may be negative."""
    loss: float | None
    """Mean rise of cross-entropy, in nats: that the group alone brings, or that goes without it; None without labels.
    """
    method: str
    """How it was found, one of `METHODS`."""
    change: float | None = None
    """Change of the metric that was asked for: with the group's rounding less without it; None without a metric."""

    @property
    def sqnr_db(self) -> float:
        """-10 log10 of the noise: the outputs' signal-to-noise ratio in dB; infinite without noise, or below 0."""
        return float(-10 * np.log10(self.noise)) if self.noise > 0 else float("inf")


def sensitivity(
    model: Model,
    batches: Iterable[Mapping[str, Any]],
    encodings: Encodings,
    *,
    method: str = "one-pass",
    groups: Sequence[Group] | None = None,
    labels: np.ndarray | str | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    follow: Follow | None = None,
) -> tuple[Sensitivity, ...]:
    """Returns what rounding each group of tied tensors does to the outputs, in the order of the groups.

    Two questions, each with an estimate and an exact answer. What does a group do alone, all others in float?
    "one-pass" estimates it with one pass forward and back (see `one_pass.estimate_effects`), "on-only" measures it with
    one simulated run for each group. What would be gained if it alone were left in float, all others rounded?
    "one-pass-off" and "off-only". The first says where noise comes from; noise of several groups about adds. The second
    is what a change is worth, and needs many samples: it is the small difference of two noisy outputs.

    Args:
        model: The float model, after its transforms.
        batches: Inputs by name, samples along the first axis. Tensors whose first axis counts samples are followed
            sample by sample, all others batch by batch, which is noisier. Where a model has a fixed batch size, any
            first axis of that length is assumed to count samples.
        encodings: The grids, concrete. What is not enabled brings nothing.
        method: One of `METHODS`.
        groups: What is asked for; None: all, as `groups_of` finds them.
        labels: For the loss: the index of the class of each sample, in the order of the batches, or "predicted": the
            class that the float model names. The first floating output is taken as logits.
        metric: A figure of your own, see `Metric`; its change is measured by the methods "on-only" and "off-only".
        seed: Of the random signs of "one-pass".
        follow: Shows how far the pass over the batches is.

    Raises:
        ConfigError: The method or labels are unknown, a metric is asked for of a method that estimates, there is an
            encoding or group for what the model has not, or two groups have a tensor in common.
        DataError: The batches do not fit the model, there are none, or not as many labels as samples.
        ModelError: No output holds floating numbers, or one is not finite.
    """
    check_choice("method", method, METHODS)
    check_tensors(model.graph, encodings)
    groups = groups_of(model, encodings) if groups is None else tuple(groups)
    _check_groups(groups, encodings)
    if not groups:
        return ()
    given = {"labels": checked_labels_of(labels), "follow": follow, **_checked_metric(metric, method)}
    effects = _way(method, seed)(model, batches, encodings, groups, **given)
    return _as_records(groups, effects, method)


def _checked_metric(metric: Metric | None, method: str) -> dict[str, Metric]:
    if metric is None:
        return {}
    if method.startswith("one-pass"):
        raise ConfigError(
            f"metric={metric.name!r} cannot be estimated by method={method!r}; measure it with 'on-only' or 'off-only'"
        )
    return {"metric": metric}


def ranking(sensitivities: Iterable[Sensitivity], *, by: str = "noise") -> tuple[Sensitivity, ...]:
    """Returns the sensitivities from the largest to the smallest; what is equal stays in its order.

    Raises:
        ConfigError: `by` is none of `FIGURES`, or the loss, which was not followed.
    """
    check_choice("by", by, FIGURES)
    found = tuple(sensitivities)
    if any(getattr(each, by) is None for each in found):
        raise ConfigError(f"by={by!r}: sensitivities have no loss; expected some: call sensitivity with labels")
    return tuple(sorted(found, key=lambda each: -getattr(each, by)))


def _way(method: str, seed: int) -> Callable[..., Effects]:
    is_alone = not method.endswith("off") and method != "off-only"
    if method.startswith("one-pass"):
        return partial(estimate_effects, is_alone=is_alone, seed=seed)
    return partial(measure_effects, is_alone=is_alone)


def _as_records(groups: Sequence[Group], effects: Effects, method: str) -> tuple[Sensitivity, ...]:
    losses, changes = (
        [None] * len(groups) if each is None else [float(value) for value in each]
        for each in (effects.loss, effects.change)
    )
    if not np.all(np.isfinite(effects.noise)):
        at = groups[int(np.argmin(np.isfinite(effects.noise)))].name
        raise ModelError(f"the effect of '{at}' is not finite; expected outputs that are, and not 0 everywhere")
    return tuple(
        Sensitivity(
            name=group.name,
            kind=group.kind,
            tensors=group.tensors,
            noise=float(noise),
            loss=loss,
            method=method,
            change=change,
        )
        for group, noise, loss, change in zip(groups, effects.noise, losses, changes, strict=True)
    )


def _check_groups(groups: Sequence[Group], encodings: Encodings) -> None:
    held: dict[str, int] = {}
    for number, group in enumerate(groups):
        for name in group.tensors:
            if name not in encodings:
                raise ConfigError(
                    f"group '{group.name}': its tensor '{name}' has no encoding; expected groups of these encodings, "
                    f"as groups_of finds them{near_names(name, encodings)}"
                )
            if held.setdefault(name, number) != number:
                raise ConfigError(
                    f"groups {held[name]} and {number} ('{groups[held[name]].name}', '{group.name}') both have the "
                    f"tensor '{name}'; expected each tensor in one group: call sensitivity for each of them"
                )
