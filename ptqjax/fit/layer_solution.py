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
from ptqjax.fit.layer_problem import Problem, Weights
from ptqjax.fit.weight_scales import owners, picked, shrunk
from ptqjax.kernels.gram import Moments
from ptqjax.transforms.linear import Linear


class Halves(NamedTuple):
    """Moments of a layer over two halves of the samples."""

    first: Moments
    """Of those that are solved on."""
    second: Moments
    """Of those that judge."""


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


def solve_layer(
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
    tried += [(ridge, problem.row_errors(problem.solve(first, ridge), second)) for ridge in ridges]
    ridge, errors = min(tried, key=lambda each: each[1].sum())  # of equal ones the first
    whole, nearest = float(errors.sum()), float(tried[0][1].sum())
    chosen = _with_scales(layer, weight, encoding, halves, ridge=ridge, shrinks=shrinks, errors=errors)
    num_shrunk = int(np.count_nonzero(np.asarray(chosen.scale) != np.asarray(encoding.scale)))
    error = whole
    if num_shrunk:
        problem = Problem.of(layer, weight, chosen)
        error = float(problem.row_errors(problem.rounded(first, ridge), second).sum())
    if error > whole:  # low-power blocks whose products were rounded, for all rows together
        problem, chosen, num_shrunk, error = Problem.of(layer, weight, encoding), encoding, 0, whole
    return Solution(
        problem=problem,
        encoding=chosen,
        codes=problem.rounded(halves.first.plus(halves.second).means(), ridge),
        ridge=ridge,
        num_shrunk=num_shrunk,
        nearest=nearest,
        whole=whole,
        error=error,
        signal=problem.signal(second),
        num_rows=int(halves.first.count + halves.second.count),
        num_unknowns=problem.weights.shape[2],
    )


def _with_scales(
    layer: Linear,
    weight: np.ndarray,
    encoding: Encoding,
    halves: Halves,
    *,
    ridge: float,
    shrinks: Sequence[float],
    errors: np.ndarray,
) -> Encoding:
    """Returns the encoding with the scales that give each row the least error, integers solved for anew."""
    first, second = (half.means() for half in halves)
    candidates = list(shrunk(encoding, shrinks)) if shrinks else []
    if not candidates:
        return encoding
    if encoding.block_size is not None:
        candidates.append(_by_block(layer, weight, [encoding, *candidates], first))
    problems = [Problem.of(layer, weight, each) for each in candidates]
    found = [errors, *(each.row_errors(each.rounded(first, ridge), second) for each in problems)]
    return picked([encoding, *candidates], owners(encoding, weight.shape, problems[0].view).choice(np.stack(found)))


def _by_block(layer: Linear, weight: np.ndarray, candidates: Sequence[Encoding], found: Moments) -> Encoding:
    """Returns the encoding in which each block has the scale that is best for it alone, integers next to the weights.

    Source:
        Sequential MSE of aimet-onnx 2.42 for blocks, which leaves out what blocks do to each other; by the moments.
    """
    problems = [Problem.of(layer, weight, each) for each in candidates]
    cells = owners(candidates[0], weight.shape, problems[0].view).cells
    errors = np.stack([each.errors_by_cell(each.nearest(), found, cells) for each in problems])
    return picked(candidates, errors.argmin(axis=0).reshape(np.shape(candidates[0].scale)))
