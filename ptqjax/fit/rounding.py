"""Rounding that is solved: each layer's integers are chosen for its output, behind layers that are rounded already.

The network is gone through once, stretch by stretch, in float and quantized side by side: a layer's moments are taken
of what it reads in both, its weights are solved for, and the quantized network goes on with them. What later stretches
read is kept, so that the time is that of two forward passes; statistics are those of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ptqjax.data.regroup import first_samples
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.errors import DataError
from ptqjax.fit.bias_correction import with_biases
from ptqjax.fit.layer_moments import moments_of_halves
from ptqjax.fit.layer_solution import Halves, Solution, solution_of
from ptqjax.fit.walking import Walk, layers_in, layers_to_round
from ptqjax.fit.weight_scales import SHRINKS
from ptqjax.ir import Graph, Model, Record, Report
from ptqjax.lowering import Stretch, stretches
from ptqjax.placement.tensors import check_not_quantized
from ptqjax.qdq.insert import check_tensors
from ptqjax.transforms.linear import Linear

RIDGES = (0.1, 1.0, 10.0)
"""What is tried as ridge, over the mean diagonal of a layer's moments: held-back samples decide, layer by layer."""
_NAME = "solve_rounding"
_FIGURE = "SQNR of the layer's output, dB"
_FINE = 6  # bits from which the whole range is a grid fine enough: layers gain 0.2 dB there, and 0.9 at 4 bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Solving:
    """How roundings are solved for."""

    seed: int = 0
    """The seed of the choice of outputs that are looked at."""
    samples: int = 128
    """How many samples are looked at, at most; fewer where what crosses between layers is large."""
    corrects: bool = True
    """Whether biases take the mean error of their layers; layers without one get one."""
    kept: frozenset[str] = frozenset()
    """Weights whose integers stay those next to them."""
    moved: Callable[[str, np.ndarray], np.ndarray] | None = None
    """Returns a weight, by its name and as it was solved, with integers that the target's kernels can take."""
    ridges: tuple[float, ...] = RIDGES
    """What is tried as ridge; none: integers stay next to the weights, and biases and scales are what is solved for."""
    is_sequential: bool = True
    """Whether each layer sees what the layers and roundings before it leave, or the float network's own values: then
    what a layer loses is its own doing."""
    given: frozenset[str] = frozenset()
    """Weights whose scales `solve_weights` leaves as they are given."""
    shrinks: tuple[float, ...] = SHRINKS
    """By what `solve_weights` may multiply scales of weights of fewer than 6 bits; none: they are the given ones."""


class Solved(NamedTuple):
    """A model whose weights are on their grids."""

    model: Model
    """The model."""
    encodings: Encodings
    """Its encodings, with the scales that were chosen."""
    report: Report
    """A record for each layer."""


def solve_rounding(
    model: Model, encodings: Encodings, batches: Iterable[Mapping[str, Any]], settings: Solving | None = None
) -> tuple[Model, Report]:
    """Returns the model with each layer's weights on their grids, rounded for the least error of the layer's output.

    Rounding the result to nearest changes nothing: `simulate` and `export` take it with the same encodings. Layer by
    layer in the order of the graph, each sees what the layers before it, rounded, and the roundings of activations
    leave, and its bias takes the mean error. Solved for on even samples, with several ridges, and judged on odd ones;
    where none is better than rounding to nearest, that stays.

    Args:
        model: The float model that `encodings` belong to.
        encodings: Of weights and activations, concrete.
        batches: Arrays by input name; samples along the first axis.
        settings: How; None for the defaults.

    Returns:
        The model, and a record per layer: its output's noise on the samples that judge, rounded to nearest and as it is
        now, in dB below the signal, and the ridge.

    Raises:
        DataError: There is no batch, or one does not fit the model; or what a layer reads becomes NaN or infinite, or
            is so large that its square does.
        ConfigError: An encoding is for a tensor that the model has not.
        ModelError: The model is quantized already.

    Source:
        Frantar et al., "GPTQ", ICLR 2023, on inputs of the quantized network and towards outputs of the float one.
    """
    settings = replace(settings or Solving(), shrinks=())
    model, _, report = solve_weights(model, encodings, batches, settings)
    return model, report


def solve_weights(
    model: Model, encodings: Encodings, batches: Iterable[Mapping[str, Any]], settings: Solving | None = None
) -> Solved:
    """Returns what `solve_rounding` does, with scales chosen as well, where a weight has fewer than 6 bits.

    Each output of a layer takes the given scales, or these shrunk, whichever leaves less error at it on the odd samples
    with roundings that are solved for anew; blocks also what is best for each by itself. So no width is worse there
    than the given scales. Arguments and errors are those of `solve_rounding`.

    Returns:
        The model, the encodings that it is rounded by, and a record per layer as `solve_rounding` has it.
    """
    check_not_quantized(model)
    check_tensors(model.graph, encodings)
    settings = settings or Solving()
    model = with_biases(model, encodings) if settings.corrects else model
    layers, left_alone = layers_to_round(model, encodings, settings.kept)
    data = first_samples(model.graph, batches, settings.samples)
    walk = Walk.through(model, encodings if settings.is_sequential else {}, data, layers, _layer_by_layer)
    params, chosen = dict(walk.rounded), dict(encodings)
    records = [_record(layer, "rounded to nearest", done=False, reason=reason) for layer, reason in left_alone]
    for stretch in walk.parts:
        for layer in layers_in(stretch, layers):
            chosen[layer.weight], record = solve_layer(walk, layer, chosen[layer.weight], params, settings)
            records.append(record)
        walk.advance(stretch, params if settings.is_sequential else model.params)
    solved = (name for layer in layers.values() for name in (layer.weight, layer.bias) if name)
    model = model.replace(params={**model.params, **{name: params[name] for name in solved}})
    return Solved(model, chosen, tuple(records))


def _layer_by_layer(graph: Graph, layers: Mapping[str, Linear], crossing: Collection[str]) -> tuple[Stretch, ...]:
    return stretches(graph, list(layers), crossing)


def solve_layer(
    walk: Walk, layer: Linear, encoding: Encoding, params: dict[str, Any], settings: Solving
) -> tuple[Encoding, Record]:
    """Puts the weight and the bias of a layer that the walk has come to into `params`.

    Returns:
        The weight's encoding, with the scales that were chosen, and what solving gained.

    Raises:
        DataError: What the layer reads is not finite, or its squares are not.
    """
    weight = np.asarray(walk.model.params[layer.weight])
    halves = _moments(walk, layer, weight.shape[2:] if layer.kernel_rank else (), settings.seed)
    is_open = encoding.num_bits < _FINE and layer.weight not in settings.given
    shrinks = settings.shrinks if is_open else ()
    solution = solution_of(layer, weight, encoding, halves, ridges=settings.ridges, shrinks=shrinks)
    problem = solution.problem
    solved = problem.weight_of(solution.codes).astype(weight.dtype)
    params[layer.weight] = solved if settings.moved is None else settings.moved(layer.weight, solved)
    if settings.corrects and layer.bias and layer.node.attribute("beta", 1.0) == 1:
        bias = np.asarray(walk.model.params[layer.bias])
        both = halves.first.plus(halves.second).means()
        params[layer.bias] = _shifted(bias, problem.shift(problem.codes(params[layer.weight]), both))
    return solution.encoding, _solved_record(layer, solution)


def _shifted(bias: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Returns the bias with one number for each output added; one number for all becomes one for each."""
    wide = bias.astype(np.float64)
    return (wide + (shift.reshape(bias.shape) if bias.size == shift.size else shift)).astype(bias.dtype)


def _moments(walk: Walk, layer: Linear, kernel: tuple[int, ...], seed: int) -> Halves:
    """Returns those of the samples to solve on, and of those that judge; of a single sample the same.

    Raises:
        DataError: They are not finite.
    """
    first, second = moments_of_halves(layer, kernel, [state[layer.input] for state in walk.states], seed)
    if not all(np.isfinite(each).all() for half in (first, second) for each in half):
        raise DataError(
            f"what {layer.node.op_type} (producing '{layer.node.output}') reads, '{layer.input}', is NaN or infinite, "
            "or its squares are; check the model in float on these batches"
        )
    return Halves(first, second if second.count else first)


def _decibels(error: float, signal: float) -> float:
    """Returns the noise below the signal, in dB; no number is infinite, and so is none."""
    smallest = np.finfo(float).tiny
    return float(10 * np.log10(max(signal, smallest) / max(error, smallest)))


def _solved_record(layer: Linear, solution: Solution) -> Record:
    ridge, num_shrunk = solution.ridge, solution.num_shrunk
    what = f"weights solved for, with a ridge of {ridge:g}" if ridge else "weights rounded to nearest"
    what += f", {num_shrunk} of {np.size(solution.encoding.scale)} scales shrunk" if num_shrunk else ""
    reasons = [] if ridge else ["no ridge gave less error on samples held back"]
    if solution.num_rows < solution.num_unknowns:
        reasons.append(
            f"{solution.num_rows} outputs were looked at for {solution.num_unknowns} unknowns: what they do not tell, "
            "the ridge leaves as it was"
        )
    names = {"nearest": _FIGURE, "whole": f"{_FIGURE}, scales as given", "error": _FIGURE}
    found = {key: _decibels(getattr(solution, key), solution.signal) for key in names}
    after = {names[key]: found[key] for key in (("whole", "error") if num_shrunk else ("error",))}
    before = {_FIGURE: found["nearest"]}
    return _record(layer, what, done=bool(ridge or num_shrunk), reason="; ".join(reasons), before=before, after=after)


def _record(
    layer: Linear,
    what: str,
    *,
    done: bool,
    reason: str,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
) -> Record:
    return Record(
        transform=_NAME,
        done=done,
        what=what,
        where=(layer.output, layer.weight),
        reason=reason,
        before=before or {},
        after=after or {},
    )
