"""What a search for widths works on: the prepared model, its groups, their encodings at each width, measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ptqjax import pipeline
from ptqjax.config import QuantizationConfig
from ptqjax.drafts import drafted
from ptqjax.encodings.biases import guard_biases, sums_in_fixed_point
from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import ConfigError
from ptqjax.experiments.allocation import Cost
from ptqjax.experiments.budgets import cost_functions
from ptqjax.experiments.costs import CostModel, cost_model
from ptqjax.experiments.engine import Variant, evaluate_variants
from ptqjax.experiments.tied_tensors import Group, Kind
from ptqjax.experiments.widths import Widths, adjustable_groups, by_name, picked, with_widths
from ptqjax.fit.bias_correction import correct_each
from ptqjax.ir import Model
from ptqjax.progress import Follow
from ptqjax.ranges.calibrate import calibrate_each
from ptqjax.ranges.headroom import widened

Candidates = Mapping[Kind, tuple[int, ...]]
"""Widths to choose from, by kind of group; of a kind that is not there, nothing is chosen."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judges:
    """The data that decide."""

    batches: Sequence[Mapping[str, Any]]
    """The batches that calibrate and correct biases."""
    judged: Sequence[Mapping[str, Any]]
    """The batches that metrics are measured on."""
    labels: np.ndarray | None
    """The class of each of their samples, where they are known."""
    follow: Follow | None
    """Shows how far passes over the data are."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Study:
    """A model whose groups are to be given widths."""

    model: Model
    """The model as `quantize` prepares it: folded, equalized and scaled."""
    config: QuantizationConfig
    """Its settings, with the way of scaling that was chosen."""
    groups: tuple[Group, ...]
    """What can be given a width."""
    candidates: tuple[np.ndarray, ...]
    """For each group, the widths to choose from, in ascending order."""
    levels: Mapping[int, Encodings]
    """For each width, the encodings of all tensors with all groups at it, or at their own that is next to it."""
    costs: CostModel
    """What the model's costs depend on."""
    functions: Mapping[str, Cost]
    """Costs as functions of the widths of all groups."""
    data: Judges
    """The data."""

    def uniform(self, width: int) -> np.ndarray:
        """Returns for each group the candidate that is next to a width."""
        return np.array([found[np.argmin(abs(found - width))] for found in self.candidates], int)

    def narrowest(self) -> np.ndarray:
        """Returns the smallest width of each group."""
        return np.array([found[0] for found in self.candidates], int)

    def widest(self) -> np.ndarray:
        """Returns the largest width of each group."""
        return np.array([found[-1] for found in self.candidates], int)

    def encodings(self, widths: Widths) -> Encodings:
        """Returns the encodings with each group at its width, before biases are corrected."""
        return self._guarded(self.model, picked(self.groups, widths, self.levels))

    def variants(self, chosen: Sequence[np.ndarray]) -> list[Variant]:
        """Returns the quantized models with these widths, as `quantize` makes them."""
        encodings = [self.encodings(by_name(self.groups, widths)) for widths in chosen]
        models = [self.model] * len(encodings)
        if self.config.correct != "none":
            corrected = correct_each(self.model, encodings, self.data.batches, method=self.config.correct)
            models = [model for model, _ in corrected]
            encodings = [self._guarded(model, each) for model, each in zip(models, encodings, strict=True)]
        return [
            Variant(name=" ".join(map(str, widths)), encodings=each, params=model.params, graph=model.graph)
            for widths, each, model in zip(chosen, encodings, models, strict=True)
        ]

    def measured(self, chosen: Sequence[np.ndarray]) -> list[dict[str, float]]:
        """Returns the metrics of these widths."""
        if not chosen:
            return []
        return self.evaluated(self.variants(chosen))

    def evaluated(self, variants: Sequence[Variant]) -> list[dict[str, float]]:
        """Returns the metrics of some variants of the model."""
        data = self.data
        metrics = ("sqnr_db", "agreement", *(() if data.labels is None else ("top1",)))
        found = evaluate_variants(
            self.model, variants, data.judged, metrics=metrics, labels=data.labels, follow=data.follow
        )
        return list(found.values)

    def _guarded(self, model: Model, encodings: Encodings) -> Encodings:
        return guard_biases(model, encodings, fixed_point=sums_in_fixed_point(self.config))[0]


def study_of(model: Model, config: QuantizationConfig, candidates: Candidates, data: Judges) -> Study:
    """Returns what a search for widths works on.

    Raises:
        ConfigError: Nothing can be given a width, or the target does not take a type.
        DataError: The batches do not fit the model.
    """
    prepared, config, headroom = prepared_as_configured(model, data.batches, config)
    groups = adjustable_groups(prepared, config, tuple(candidates))
    if not groups:
        raise ConfigError(
            f"no tensor of the kinds {', '.join(candidates)} has the configuration's own types, integers, so that "
            "there is no width to choose; drop the rules that set types, or give a budget for other tensors"
        )
    own = tuple(np.array(candidates[group.kind], int) for group in groups)
    configs = _configs(config, groups, own)
    calibrated = zip(configs.items(), calibrate_each(prepared, data.batches, list(configs.values())), strict=True)
    levels = {width: widened(prepared, found, headroom, each) for (width, each), (found, _) in calibrated}
    costs = cost_model(prepared, data.batches[0])
    return Study(
        model=prepared,
        config=config,
        groups=groups,
        candidates=own,
        levels=levels,
        costs=costs,
        functions=cost_functions(costs, groups, levels[max(levels)]),
        data=data,
    )


def prepared_as_configured(
    model: Model, batches: Iterable[Mapping[str, Any]], config: QuantizationConfig
) -> tuple[Model, QuantizationConfig, float]:
    """Returns the model before it is calibrated, the settings with what was chosen on the way, and the headroom."""
    (folded,) = pipeline.folded([drafted(model, config, has_data=True)], batches)
    (draft,) = pipeline.equalized([folded], batches)
    return draft.model, replace(draft.config_as_chosen, headroom=draft.headroom, correct=draft.correct), draft.headroom


def rules_for(study: Study, widths: Widths) -> QuantizationConfig:
    """Returns the configuration with which `quantize` gives these widths.

    Where channels are scaled by learning, models are tried that may lack a tensor; then rules may match nothing.
    """
    optional = study.config.equalize and study.config.scaling in ("auto", "learned")
    return with_widths(study.config, study.groups, widths, optional=optional)


def _configs(
    config: QuantizationConfig, groups: Sequence[Group], candidates: Sequence[np.ndarray]
) -> dict[int, QuantizationConfig]:
    """Returns the settings that give each group a width, or the candidate next to it, by width."""
    found = {}
    for width in sorted({int(width) for widths in candidates for width in widths}):
        nearest = np.array([widths[np.argmin(abs(widths - width))] for widths in candidates], int)
        found[width] = with_widths(config, groups, by_name(groups, nearest))
    return found
