"""Widths of groups of tensors for a budget, or for a drop of accuracy that is allowed: chosen by noise, verified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ptqjax.config import RUN_TIME, QuantizationConfig
from ptqjax.config.checks import check_choice
from ptqjax.errors import ConfigError
from ptqjax.experiments.budgets import COSTS, Budget, Drop, require_possible
from ptqjax.experiments.engine import Variant
from ptqjax.experiments.front import MixedPrecision, Point
from ptqjax.experiments.paths import Path, by_flips, by_noise
from ptqjax.experiments.study import Candidates, Judges, Study, rules_for, study_of
from ptqjax.experiments.tied_tensors import Kind
from ptqjax.experiments.widths import by_name
from ptqjax.ir import Model
from ptqjax.placement.tensors import check_not_quantized
from ptqjax.progress import Follow

SEARCHES = {"greedy": by_noise, "phases": by_flips}
"""Ways to search, by name."""

_MOST_BITS = 16


def mixed_precision(
    model: Model,
    batches: Iterable[Mapping[str, Any]],
    config: QuantizationConfig | None = None,
    *,
    budget: Budget | Drop,
    widths: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    activation_widths: Sequence[int] = (4, 5, 6, 7, 8),
    search: str = "greedy",
    evaluation: Iterable[Mapping[str, Any]] | None = None,
    labels: np.ndarray | None = None,
    points: int = 5,
    follow: Follow | None = None,
) -> MixedPrecision:
    """Returns the widths by group of tied tensors that are best for a budget, and the front between cheap and good.

    The model is first folded, equalized and scaled as `quantize` would under `config`; its groups are given widths.
    Which: those that the budget is about (`budgets.COSTS`), weights, activations or both; what has another type than
    the configuration's own by a rule or an exception of the target keeps it.

    "greedy": each group's noise at each width, alone, comes from one reverse pass per width (`sensitivity`); noise of
    groups adds up, so that the widths of least noise within a limit are a knapsack, which is solved exactly where costs
    add up (all but bit-operations of weights and activations together). "phases": AIMET's search; each group at each
    width alone is run, the pairs are sorted by what they give, and are taken in that order, as far as the budget asks
    or the drop allows.

    Then all that counts is measured: `points` allocations between the widest and the narrowest, the one for the budget,
    and uniform widths, each calibrated, guarded and with biases corrected as `quantize` does. The best SQNR within the
    budget is chosen (so that no uniform width within it is better on these data), or, by bisection, the cheapest
    allocation whose metric does not fall too far.

    Args:
        model: A float model, as `read` returns it.
        batches: Calibration data.
        config: The settings beside the widths; None for the defaults.
        budget: What the model may cost, or lose.
        widths: Candidates for weights, in bits.
        activation_widths: Candidates for activations, where the budget is about them; empty: they stay as they are.
        search: "greedy" or "phases".
        evaluation: What to measure on; None: the calibration data. Not what is to be reported on: it decides.
        labels: The class of each sample of `evaluation`, or of the calibration data; for "top1".
        points: How many allocations besides are measured, for the front.
        follow: Shows how far passes over the data are.

    Raises:
        ConfigError: The budget is less than the narrowest widths cost, the drop is exceeded at the widest, nothing can
            be given a width, a width is none, or the target does not take a type.
        DataError: The batches do not fit the model.
        ModelError: The model is quantized already.
    """
    check_choice("search", search, tuple(SEARCHES))
    check_not_quantized(model)
    batches = tuple(batches)
    data = Judges(
        batches=batches,
        judged=batches if evaluation is None else tuple(evaluation),
        labels=labels,
        follow=follow,
    )
    config = config or QuantizationConfig()
    candidates = _candidates(budget, widths, activation_widths, config.activations)
    study = study_of(model, config, candidates, data)
    if isinstance(budget, Budget):
        require_possible(study.functions, budget.limits, study.narrowest())
    path = SEARCHES[search](study, tuple(budget.limits) if isinstance(budget, Budget) else (budget.cost,))
    bench = _Bench(study, path)
    bench.measure({f"{search}, {share:.0%} of the way": path.at(share) for share in np.linspace(0, 1, points)})
    bench.measure({f"uniform {width}": study.uniform(width) for width in study.levels})
    chosen = _within(bench, budget) if isinstance(budget, Budget) else _at_drop(bench, budget)
    return MixedPrecision(
        config=rules_for(study, chosen.widths), chosen=chosen, points=tuple(sorted(bench.points.values(), key=_order))
    )


def _candidates(
    budget: Budget | Drop, widths: Sequence[int], activation_widths: Sequence[int], activations: str
) -> Candidates:
    """Returns the widths to choose from, by the kinds that the budget is about: of activations where they have a type.

    Raises:
        ConfigError: A width is none, or there are none.
    """
    names = budget.limits if isinstance(budget, Budget) else (budget.cost,)
    kinds: set[Kind] = {kind for name in names for kind in COSTS[name]}
    if activations in RUN_TIME:
        if (of_them := next((name for name in names if COSTS[name] == ("activation",)), None)) is not None:
            raise ConfigError(
                f"the budget is about {of_them}, and activations={activations!r} have no width to choose; limit the "
                "weights alone, or set activations to an integer type"
            )
        kinds -= {"activation"}
    given: Candidates = {"weight": tuple(widths), "activation": tuple(activation_widths)}
    found: dict[Kind, tuple[int, ...]] = {
        kind: tuple(sorted(set(some))) for kind, some in given.items() if kind in kinds and some
    }
    for width in (width for some in found.values() for width in some):
        if isinstance(width, bool) or not isinstance(width, int) or not 2 <= width <= _MOST_BITS:  # noqa: PLR2004
            raise ConfigError(f"width {width!r}: expected a number of bits from 2 to {_MOST_BITS}")
    if not found:
        raise ConfigError(f"there are no widths to choose from for {' and '.join(sorted(kinds))}s; give some")
    return found


class _Bench:
    """What was measured so far; nothing is measured twice."""

    def __init__(self, study: Study, path: Path) -> None:
        self.study = study
        self.path = path
        self.points: dict[tuple[int, ...], Point] = {}

    def measure(self, named: Mapping[str, np.ndarray]) -> list[Point]:
        """Returns the points with these widths; those that are new get these names."""
        keys = {name: tuple(map(int, widths)) for name, widths in named.items()}
        new = {key: name for name, key in keys.items() if key not in self.points}
        found = self.study.measured([np.array(key) for key in new])
        for (key, name), metrics in zip(new.items(), found, strict=True):
            self.points[key] = self._point(name, np.array(key), metrics)
        return [self.points[key] for key in keys.values()]

    def _point(self, name: str, widths: np.ndarray, metrics: Mapping[str, float]) -> Point:
        study, by_group = self.study, by_name(self.study.groups, widths)
        kinds = [group.kind for group in study.groups]
        return Point(
            name=name,
            is_uniform=len(set(zip(kinds, by_group.values(), strict=True))) == len(set(kinds)),
            widths=by_group,
            costs=study.costs.costs(study.encodings(by_group)),
            predicted_noise=self.path.predicted(widths),
            metrics=metrics,
        )


def _within(bench: _Bench, budget: Budget) -> Point:
    """Returns the point within the budget that measures best."""
    name = ", ".join(f"{name} {limit:.10g}" for name, limit in budget.limits.items())
    bench.measure({name: bench.path.within(budget.limits)})
    fitting = [
        point
        for point in bench.points.values()
        if all(getattr(point.costs, name) <= limit for name, limit in budget.limits.items())
    ]
    return max(fitting, key=lambda point: point.metrics["sqnr_db"])


def _at_drop(bench: _Bench, drop: Drop) -> Point:
    """Returns the cheapest point whose metric falls by no more than `drop` allows, found by bisection.

    Raises:
        ConfigError: Not even the widest widths reach it, or the metric needs labels.
    """
    study, path = bench.study, bench.path
    if drop.metric == "top1" and study.data.labels is None:
        raise ConfigError("drop: metric='top1' needs labels, and there are none; give labels, or take 'agreement'")
    (in_float,) = study.evaluated([Variant(name="float", encodings={})])
    least = in_float[drop.metric] - drop.most
    (widest,) = bench.measure({"widest": path.at(0.0)})
    if widest.metrics[drop.metric] < least:
        raise ConfigError(
            f"drop: {drop.metric} is {widest.metrics[drop.metric]:.4g} with all widths at their widest, and "
            f"{in_float[drop.metric]:.4g} in float; a drop of {drop.most:g} cannot be reached: allow more, or give "
            "wider widths"
        )
    low, high = 0, path.steps + 1
    while high - low > 1:
        middle = (low + high) // 2
        share = middle / path.steps
        (point,) = bench.measure({f"{share:.0%} of the way": path.at(share)})
        low, high = (middle, high) if point.metrics[drop.metric] >= least else (low, middle)
    reached = [point for point in bench.points.values() if point.metrics[drop.metric] >= least]
    return min(reached, key=lambda point: (getattr(point.costs, drop.cost), -point.metrics["sqnr_db"]))


def _order(point: Point) -> tuple[float, float]:
    return point.costs.bit_operations, point.predicted_noise
