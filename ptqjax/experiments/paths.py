"""Ways from the widest widths to the narrowest: by the noise that is predicted, or by AIMET's phases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ptqjax.experiments.allocation import Allocation, least_noise, least_noise_of_products
from ptqjax.experiments.budgets import COSTS, Limits
from ptqjax.experiments.engine import Variant, evaluate_variants, switched
from ptqjax.experiments.sensitivities import sensitivity
from ptqjax.experiments.study import Study
from ptqjax.experiments.widths import by_name

_STEPS = 64  # of a path that could be cut as finely as one likes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Path:
    """A way from the widest widths to the narrowest."""

    at: Callable[[float], np.ndarray]
    """Returns the widths at a fraction of the way: 0 the widest, 1 the narrowest."""
    steps: int
    """How many steps there are."""
    within: Callable[[Limits], np.ndarray]
    """Returns the best widths that keep limits, which the narrowest keep."""
    predicted: Callable[[np.ndarray], float]
    """Returns the noise power that widths are predicted to cause, over the power of the outputs."""


def by_noise(study: Study, names: Sequence[str]) -> Path:
    """Returns the path with the least predicted noise at every cost.

    Args:
        study: The model and its groups.
        names: The costs that are to fall along the path, each for its own kinds of groups.
    """
    table = [np.empty(len(widths)) for widths in study.candidates]
    for width, encodings in study.levels.items():
        found = sensitivity(
            study.model, study.data.batches, encodings, method="one-pass", groups=study.groups, follow=study.data.follow
        )
        for noise, widths, group in zip(table, study.candidates, found, strict=True):
            noise[widths == width] = group.noise
    return _optimal(study, names, table)


def _optimal(study: Study, names: Sequence[str], table: Sequence[np.ndarray]) -> Path:
    narrowest, widest = study.narrowest(), study.widest()
    ends = {name: (study.functions[name](narrowest), study.functions[name](widest)) for name in names}
    whole = Allocation(widths=study.candidates, noise=tuple(table), cost=lambda _: 0.0)

    def within(limits: Limits) -> np.ndarray:
        chosen = widest
        for name, limit in limits.items():
            chosen = _limited(study, table, name, limit, chosen)
        return chosen

    def at(share: float) -> np.ndarray:
        if share <= 0:
            return widest
        return within({name: high - share * (high - low) for name, (low, high) in ends.items()})

    return Path(at=at, steps=_STEPS, within=within, predicted=whole.predicted)


def _limited(study: Study, table: Sequence[np.ndarray], name: str, limit: float, chosen: np.ndarray) -> np.ndarray:
    """Returns `chosen` with other widths for the groups that a cost depends on: those of least noise in the limit."""
    kinds = [group.kind for group in study.groups]
    part = [index for index, kind in enumerate(kinds) if kind in COSTS[name]]
    cost = study.functions[name]

    def with_part(some: np.ndarray) -> np.ndarray:
        found = chosen.copy()
        found[part] = some
        return found

    problem = Allocation(
        widths=tuple(study.candidates[i] for i in part),
        noise=tuple(table[i] for i in part),
        cost=lambda some: cost(with_part(some)),
    )
    own = [kinds[i] for i in part]
    if len(set(own)) == 1:
        return with_part(least_noise(problem, limit))
    parts = [np.flatnonzero([kind == each for kind in own]).tolist() for each in ("weight", "activation")]
    return with_part(least_noise_of_products(problem, limit, parts))


def by_flips(study: Study, names: Sequence[str]) -> Path:  # noqa: ARG001 - the order does not depend on costs
    """Returns the path of AIMET's phases: groups go to narrower widths in the order of what each gives alone.

    Each group at each width alone is run, all else in float; the pairs are sorted by SQNR, the best first; the path
    takes them one after another, never back to a larger width.

    Source: aimet-onnx 2.42, mixed_precision (phases 1 and 2), with SQNR for the score.
    """
    table = _alone(study)
    pairs = [
        (noise, group, int(width))
        for group, (found, widths) in enumerate(zip(table, study.candidates, strict=True))
        for noise, width in zip(found, widths, strict=True)
    ]
    widest = study.widest()
    order = sorted(pairs, key=lambda pair: (pair[0], -pair[2], pair[1]))
    flips = [(group, width) for _, group, width in order if width < widest[group]]
    whole = Allocation(widths=study.candidates, noise=tuple(table), cost=lambda _: 0.0)

    def after(count: int) -> np.ndarray:
        found = widest.copy()
        for group, width in flips[:count]:
            found[group] = min(found[group], width)
        return found

    def within(limits: Limits) -> np.ndarray:
        for count in range(len(flips)):
            if all(study.functions[name](after(count)) <= limit for name, limit in limits.items()):
                return after(count)
        return after(len(flips))

    return Path(
        at=lambda share: after(round(share * len(flips))), steps=len(flips), within=within, predicted=whole.predicted
    )


def _alone(study: Study) -> list[np.ndarray]:
    """Returns for each group the noise at each of its widths, run with all else in float."""
    variants = []
    for group, candidates in zip(study.groups, study.candidates, strict=True):
        for width in candidates:
            widths = study.uniform(int(width))
            encodings = study.encodings(by_name(study.groups, widths))
            own = frozenset(group.tensors)
            variants.append(Variant(name=f"{group.name} at {width}", encodings=switched(encodings, own.__contains__)))
    found = evaluate_variants(study.model, variants, study.data.judged, metrics=("sqnr_db",), follow=study.data.follow)
    noise = iter(10.0 ** (-values["sqnr_db"] / 10) for values in found.values)
    return [np.array([next(noise) for _ in candidates]) for candidates in study.candidates]
