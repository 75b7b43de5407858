"""What one layer's weights become: ridge, scales and integers, chosen on one half of the samples' moments by the other.

A step that measures no better on the half that judges is left out, so that the result is never worse there than the
given scales with integers next to the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ptqjax.encodings.encoding import Encoding
from ptqjax.fit.layer_problem import Prepared, Problem, Weights
from ptqjax.fit.weight_scales import owners, picked, shrunk, whole
from ptqjax.kernels.gram import Moments
from ptqjax.transforms.linear import Linear


class Halves(NamedTuple):
    """Moments of a layer over two halves of the samples."""

    first: Moments
    """Moments of the samples that are solved on."""
    second: Moments
    """Moments of the samples that judge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """A layer's weights on their grid, and how they came about; errors are those on the half that judges."""

    problem: Problem
    """The layer under its scales."""
    encoding: Encoding
    """The encoding with the scales that were chosen."""
    codes: Weights
    """The integers."""
    ridge: float
    """The ridge; 0 where integers stayed next to the weights."""
    num_shrunk: int
    """How many scales are not the given ones."""
    nearest: float
    """The error of the given scales with integers next to the weights."""
    whole: float
    """The error of the given scales with integers that are solved for."""
    error: float
    """The error of the result, its integers solved on the first half alone."""
    signal: float
    """The power of the output in float, on the half that judges."""
    num_rows: int
    """How many outputs were looked at, in both halves."""
    num_unknowns: int
    """How many weights make an output."""


def solution_of(
    layer: Linear,
    weight: np.ndarray,
    encoding: Encoding,
    halves: Halves,
    *,
    ridges: Sequence[float],
    shrinks: Sequence[float] = (),
) -> Solution:
    """Returns a layer's weights as they are best by a ridge and, row by row, by shrunk scales.

    Args:
        layer: The layer.
        weight: Its weight, float.
        encoding: The weight's grid.
        halves: Its moments.
        ridges: Those that are tried, beside integers next to the weights.
        shrinks: By what scales may be multiplied; none: they are the given ones.
    """
    first, second = (half.means() for half in halves)
    problem = Problem.of(layer, weight, encoding)
    tried = [(0.0, problem.row_errors(problem.nearest(), second))]
    tried += [
        (ridge, problem.row_errors(_rounded(problem, _prepared(problem, first, ridge)), second)) for ridge in ridges
    ]
    ridge, errors = min(tried, key=lambda each: each[1].sum())  # of equal ones the first
    whole, nearest = float(errors.sum()), float(tried[0][1].sum())
    search = _Search(
        layer=layer, weight=weight, halves=Halves(first, second), prepared=_prepared(problem, first, ridge)
    )
    chosen, error = search.with_scales(encoding, errors, shrinks) if shrinks else (encoding, whole)
    problem = Problem.of(layer, weight, chosen)
    both = halves.first.plus(halves.second).means()
    return Solution(
        problem=problem,
        encoding=chosen,
        codes=_rounded(problem, _prepared(problem, both, ridge)),
        ridge=ridge,
        num_shrunk=int(np.count_nonzero(np.asarray(chosen.scale) != np.asarray(encoding.scale))),
        nearest=nearest,
        whole=whole,
        error=error,
        signal=problem.signal(second),
        num_rows=int(halves.first.count + halves.second.count),
        num_unknowns=problem.weights.shape[2],
    )


def _prepared(problem: Problem, found: Moments, ridge: float) -> Prepared | None:
    return problem.prepared(found, ridge) if ridge else None


def _rounded(problem: Problem, prepared: Prepared | None) -> Weights:
    """Returns the codes that are solved for; those next to the weights where no ridge is, or float32 is left behind."""
    codes = problem.nearest() if prepared is None else problem.solve_prepared(prepared)
    return codes if np.isfinite(codes).all() else problem.nearest()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """A layer whose scales are looked for."""

    layer: Linear
    weight: np.ndarray
    halves: Halves
    """Means over the samples of each half."""
    prepared: Prepared | None
    """For the ridge and the first half; None where integers stay next to the weights."""

    def problem(self, encoding: Encoding) -> Problem:
        return Problem.of(self.layer, self.weight, encoding)

    def errors(self, encoding: Encoding) -> np.ndarray:
        """Returns the error of each row on the second half, rounded for the first."""
        problem = self.problem(encoding)
        return problem.row_errors(_rounded(problem, self.prepared), self.halves.second)

    def with_scales(self, given: Encoding, errors: np.ndarray, shrinks: Sequence[float]) -> tuple[Encoding, float]:
        """Returns the encoding with the scales that give each row the least error, and the error; `errors`: the given.

        Low-power blocks are products, so that what rows chose may not be what they get: the given ones stay where all
        rows together are worse.
        """
        served = owners(given, self.weight.shape, self.problem(given).view)
        widest = whole(given, self.problem(given).weights, served.cells)
        others = [*shrunk(given, shrinks), *([] if np.array_equal(widest.scale, given.scale) else [widest])]
        others += [self._by_block([given, *others])] if given.block_size is not None and others else []
        if not others:
            return given, float(errors.sum())
        found = np.stack([errors, *map(self.errors, others)])
        chosen = picked([given, *others], served.choice(found))
        error, before = float(self.errors(chosen).sum()), float(errors.sum())
        return (chosen, error) if error < before else (given, before)

    def _by_block(self, candidates: Sequence[Encoding]) -> Encoding:
        """Returns the encoding in which each block has the scale that is best for it alone, rounded to nearest.

        Source:
            Sequential MSE of aimet-onnx 2.42, which leaves out what blocks do to each other; here from the moments.
        """
        problems = [self.problem(each) for each in candidates]
        cells = owners(candidates[0], self.weight.shape, problems[0].view).cells
        errors = np.stack([each.errors_by_cell(each.nearest(), self.halves.first, cells) for each in problems])
        return picked(candidates, errors.argmin(axis=0).reshape(np.shape(candidates[0].scale)))
