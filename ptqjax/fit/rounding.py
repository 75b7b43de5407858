"""Rounding that is solved: each layer's integers are chosen for its output, behind layers that are rounded already.

The network is gone through once, stretch by stretch, in float and quantized side by side: a layer's moments are taken
of what it reads in both, its weights are solved for, and the quantized network goes on with them. What later stretches
read is kept, so that the time is that of two forward passes; statistics are those of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptqjax.data.regroup import first_samples
from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import DataError
from ptqjax.fit.bias_correction import with_biases
from ptqjax.fit.layer_moments import moments_of_halves
from ptqjax.fit.layer_problem import Problem
from ptqjax.fit.walking import Walk, layers_in, layers_to_round
from ptqjax.ir import Graph, Model, Record, Report
from ptqjax.kernels.gram import Moments
from ptqjax.lowering import Stretch, stretches
from ptqjax.placement.tensors import check_not_quantized
from ptqjax.qdq.insert import check_tensors
from ptqjax.transforms.linear import Linear

RIDGES = (0.1, 1.0, 10.0)
"""What is tried as ridge, over the mean diagonal of a layer's moments: held-back samples decide, layer by layer."""
_NAME = "solve_rounding"


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
    check_not_quantized(model)
    check_tensors(model.graph, encodings)
    settings = settings or Solving()
    model = with_biases(model, encodings) if settings.corrects else model
    layers, left_alone = layers_to_round(model, encodings, settings.kept)
    data = first_samples(model.graph, batches, settings.samples)
    walk = Walk.through(model, encodings, data, layers, _layer_by_layer)
    params = dict(walk.rounded)
    records = [_record(layer, "rounded to nearest", done=False, reason=reason) for layer, reason in left_alone]
    for stretch in walk.parts:
        records += [solve_layer(walk, layer, params, settings) for layer in layers_in(stretch, layers)]
        walk.advance(stretch, params)
    solved = (name for layer in layers.values() for name in (layer.weight, layer.bias) if name)
    return model.replace(params={**model.params, **{name: params[name] for name in solved}}), tuple(records)


def _layer_by_layer(graph: Graph, layers: Mapping[str, Linear], crossing: Collection[str]) -> tuple[Stretch, ...]:
    return stretches(graph, list(layers), crossing)


def solve_layer(walk: Walk, layer: Linear, params: dict[str, Any], settings: Solving) -> Record:
    """Puts the weight and the bias of a layer that the walk has come to into `params`; returns what it gained.

    Raises:
        DataError: What it reads is not finite, or its squares are not.
    """
    weight = np.asarray(walk.model.params[layer.weight])
    first, second = _moments(walk, layer, weight.shape[2:] if layer.kernel_rank else (), settings.seed)
    problem = Problem.of(layer, weight, walk.encodings[layer.weight])
    nearest = problem.nearest()
    errors = {0.0: problem.error(nearest, second.means())}
    errors |= {ridge: problem.error(problem.solve(first.means(), ridge), second.means()) for ridge in RIDGES}
    ridge = min(errors, key=errors.__getitem__)  # of equal ones the first
    both = first.plus(second).means()
    solved = problem.weight_of(problem.solve(both, ridge) if ridge else nearest).astype(weight.dtype)
    params[layer.weight] = solved if settings.moved is None else settings.moved(layer.weight, solved)
    codes = problem.codes(params[layer.weight])
    if settings.corrects and layer.bias and layer.node.attribute("beta", 1.0) == 1:
        bias = np.asarray(walk.model.params[layer.bias])
        params[layer.bias] = _shifted(bias, problem.shift(codes, both))
    signal = problem.signal(second.means())
    return _solved_record(
        layer, ridge, {name: _decibels(errors[key], signal) for name, key in (("nearest", 0.0), ("solved", ridge))}
    )


def _shifted(bias: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Returns the bias with one number for each output added; one number for all becomes one for each."""
    wide = bias.astype(np.float64)
    return (wide + (shift.reshape(bias.shape) if bias.size == shift.size else shift)).astype(bias.dtype)


def _moments(walk: Walk, layer: Linear, kernel: tuple[int, ...], seed: int) -> tuple[Moments, Moments]:
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
    return first, second if second.count else first


def _decibels(error: float, signal: float) -> float:
    """Returns the noise below the signal, in dB; no number is infinite, and so is none."""
    smallest = np.finfo(float).tiny
    return float(10 * np.log10(max(signal, smallest) / max(error, smallest)))


def _solved_record(layer: Linear, ridge: float, after: Mapping[str, float]) -> Record:
    what = f"weights solved for, with a ridge of {ridge:g}" if ridge else "weights rounded to nearest"
    reason = "" if ridge else "no ridge gave less error on samples held back"
    return _record(layer, what, done=bool(ridge), reason=reason, before=after["nearest"], after=after["solved"])


def _record(
    layer: Linear, what: str, *, done: bool, reason: str, before: float | None = None, after: float | None = None
) -> Record:
    figure = "SQNR of the layer's output, dB"
    return Record(
        transform=_NAME,
        done=done,
        what=what,
        where=(layer.output, layer.weight),
        reason=reason,
        before={} if before is None else {figure: before},
        after={} if after is None else {figure: after},
    )
