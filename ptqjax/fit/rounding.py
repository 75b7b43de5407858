"""Rounding that is solved: each layer's integers are chosen for its output, behind layers that are rounded already.

The network is gone through once, stretch by stretch, in float and quantized side by side: a layer's moments are taken
of what it reads in both, its weights are solved for, and the quantized network goes on with them. What later stretches
read is kept, so that the time is that of two forward passes; statistics are those of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.data.regroup import Batch, first_samples
from ptqjax.encodings.encoding import Encodings, concrete, fake_quantize
from ptqjax.errors import DataError
from ptqjax.fit.bias_correction import with_biases
from ptqjax.fit.layer_moments import moments_of_halves
from ptqjax.fit.layer_problem import Problem
from ptqjax.ir import Graph, Model, Record, Report
from ptqjax.kernels.gram import Moments
from ptqjax.lowering import Stretch, Value, compiled, interpret_in_layout, stretches
from ptqjax.placement.tensors import check_not_quantized, floating_tensors
from ptqjax.qdq.insert import check_tensors
from ptqjax.simulation import fake_quantization, round_parameters
from ptqjax.transforms.linear import Linear, linear_layers, why_not_rewritable

RIDGES = (0.1, 1.0, 10.0)
"""What is tried as ridge, over the mean diagonal of a layer's moments: held-back samples decide, layer by layer."""
_MOST_BYTES = 2**32  # of what crosses from layer to layer, for all samples together
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
    walk = _fitting(_Walk.through(model, encodings, batches, settings))
    params, records = dict(walk.rounded), list(walk.left_alone)
    for stretch in walk.parts:
        layer = walk.layer_of(stretch)
        if layer is not None:
            records.append(_solve(walk, layer, params))
        walk.advance(stretch, params)
    solved = (name for layer in walk.layers.values() for name in (layer.weight, layer.bias) if name)
    return model.replace(params={**model.params, **{name: params[name] for name in solved}}), tuple(records)


class _Pair(NamedTuple):
    """A tensor in both networks."""

    quantized: Value
    exact: Value


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """The model on the way from its inputs to its outputs, for each batch."""

    model: Model
    encodings: Encodings
    activations: Encodings
    """The encodings of activations."""
    rounded: Mapping[str, Any]
    """All parameters on their grids, rounded to nearest."""
    layers: Mapping[str, Linear]
    """The layers to solve, by the tensor that their node writes."""
    left_alone: Report
    parts: tuple[Stretch, ...]
    states: list[dict[str, _Pair]]
    """What has been computed and is still read, by batch."""
    settings: Solving

    @staticmethod
    def through(model: Model, encodings: Encodings, batches: Iterable[Mapping[str, Any]], settings: Solving) -> _Walk:
        """Returns the walk at its beginning."""
        layers, left_alone = _layers(model, encodings, settings.kept)
        rounded, activations = round_parameters(model, encodings, biases=False)
        parts = stretches(model.graph, list(layers), floating_tensors(model))
        data = first_samples(model.graph, batches, settings.samples)
        last = max((index for index, part in enumerate(parts) if _layer_of(part, layers)), default=-1)
        return _Walk(
            model=model,
            encodings=encodings,
            activations=activations,
            rounded=rounded.params,
            layers=layers,
            left_alone=left_alone,
            parts=parts[: last + 1],
            states=[_inputs(batch, activations) for batch in data],
            settings=settings,
        )

    def layer_of(self, stretch: Stretch) -> Linear | None:
        """Returns the layer that a stretch begins with; None where it begins with none."""
        return _layer_of(stretch, self.layers)

    def advance(self, stretch: Stretch, params: Mapping[str, Any]) -> None:
        """Runs a stretch in both networks, and forgets what is not read any more."""
        read = self.read_behind(stretch)
        for state in self.states:
            both = (_values(stretch, _run(*each)) for each in self.arguments(stretch, params, state))
            _go_on(state, stretch, both, read)

    def read_behind(self, stretch: Stretch) -> set[str]:
        """Returns what later stretches read."""
        return {name for part in self.parts[self.parts.index(stretch) + 1 :] for name in part.inputs}

    def arguments(
        self, stretch: Stretch, params: Mapping[str, Any], state: Mapping[str, _Pair]
    ) -> Iterator[tuple[Any, ...]]:
        """Yields what `_run` takes to compute a stretch: in the quantized network, and in float."""
        names = stretch.names
        own = [name for name in self.model.graph.parameters if name in names]
        grids = {name: e for name, e in self.activations.items() if name in names and name not in stretch.inputs}
        off = {name: encoding.replace(enabled=np.asarray(False)) for name, encoding in grids.items()}
        for which, (values, encodings) in enumerate(((params, grids), (self.model.params, off))):
            inputs = {name: state[name][which] for name in stretch.inputs}
            yield (
                stretch.graph,
                {names[name]: values[name] for name in own},
                {names[name]: encoding for name, encoding in encodings.items()},
                {names[name]: value.array for name, value in inputs.items() if value.channels_last},
                {names[name]: value.array for name, value in inputs.items() if not value.channels_last},
            )


def _layer_of(stretch: Stretch, layers: Mapping[str, Linear]) -> Linear | None:
    written = {name for node in stretch.graph.nodes for name in node.outputs}
    return next((layer for name, layer in layers.items() if stretch.names.get(name) in written), None)


def _values(stretch: Stretch, found: tuple[Mapping[str, Any], Mapping[str, Any]]) -> list[Value]:
    last, plain = found
    names = [stretch.names[name] for name in stretch.outputs]
    return [Value(last[name], channels_last=True) if name in last else Value(plain[name]) for name in names]


def _go_on(state: dict[str, _Pair], stretch: Stretch, both: Iterable[list[Value]], read: Collection[str]) -> None:
    """Adds what a stretch gave in both networks, and takes out what is not read any more."""
    pairs = (_Pair(*pair) for pair in zip(*both, strict=True))
    state |= dict(zip(stretch.outputs, pairs, strict=True))
    for name in [name for name in state if name not in read]:
        del state[name]


def _outputs(
    graph: Graph, params: Mapping[str, Any], encodings: Encodings, last: Mapping[str, Any], plain: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the outputs of a stretch, those with their channels last and the others."""
    values = {name: Value(array, channels_last=True) for name, array in last.items()}
    values |= {name: Value(array) for name, array in plain.items()}
    intercept = fake_quantization(Model(graph=graph, params=dict(params)), encodings)
    found = interpret_in_layout(graph, params, values, intercept=intercept)
    last_ones = {name: value.array for name, value in found.items() if value.channels_last}
    return last_ones, {name: value.array for name, value in found.items() if not value.channels_last}


_run = compiled(_outputs, is_brief=True)


def _inputs(batch: Batch, activations: Encodings) -> dict[str, _Pair]:
    """Returns a batch as both networks read it."""
    rounded = {
        name: fake_quantize(np.asarray(array), concrete(activations[name])) if name in activations else array
        for name, array in batch.items()
    }
    return {name: _Pair(Value(jnp.asarray(rounded[name])), Value(jnp.asarray(batch[name]))) for name in batch}


def _fitting(walk: _Walk) -> _Walk:
    """Returns the walk with as many of its batches as can be held, at least one."""
    state = dict(walk.states[0])
    most = _num_bytes(state)
    for stretch in walk.parts:
        found = [
            jax.eval_shape(partial(_outputs, stretch.graph), *each[1:])
            for each in walk.arguments(stretch, walk.rounded, state)
        ]
        _go_on(state, stretch, [_values(stretch, each) for each in found], walk.read_behind(stretch))
        most = max(most, _num_bytes(state))
    return replace(walk, states=walk.states[: max(1, _MOST_BYTES // max(most, 1))])


def _num_bytes(state: Mapping[str, _Pair]) -> int:
    return sum(value.array.size * value.array.dtype.itemsize for pair in state.values() for value in pair)


def _layers(model: Model, encodings: Encodings, kept: Collection[str]) -> tuple[dict[str, Linear], Report]:
    """Returns the layers to solve by the tensor that their node writes, and records of those that are left alone."""
    found: dict[str, Linear] = {}
    left_alone = []
    for layer in linear_layers(model).values():
        if layer.weight not in encodings:
            continue
        reason = (
            "its encoding was given, or is that of a table"
            if layer.weight in kept
            else _obstacle(model, layer, encodings)
        )
        if reason:
            left_alone.append(_record(layer, "rounded to nearest", done=False, reason=reason))
        else:
            found[layer.node.output] = layer
    return found, tuple(left_alone)


def _obstacle(model: Model, layer: Linear, encodings: Encodings) -> str:
    """Returns why a layer's weights are rounded to nearest, or nothing."""
    encoding = encodings[layer.weight]
    if not np.all(np.asarray(encoding.enabled)):
        return "its weight stays in float"
    if encoding.float_format is not None:
        return f"its weight has the type {encoding.float_format}, whose codes are not evenly spaced"
    return why_not_rewritable(model.graph, layer)


def _solve(walk: _Walk, layer: Linear, params: dict[str, Any]) -> Record:
    """Puts the weight and the bias of a layer into `params`."""
    weight = np.asarray(walk.model.params[layer.weight])
    first, second = _moments(walk, layer, weight.shape[2:] if layer.kernel_rank else ())
    problem = Problem.of(layer, weight, walk.encodings[layer.weight])
    nearest = problem.nearest()
    errors = {0.0: problem.error(nearest, second.means())}
    errors |= {ridge: problem.error(problem.solve(first.means(), ridge), second.means()) for ridge in RIDGES}
    ridge = min(errors, key=errors.__getitem__)  # of equal ones the first
    both = first.plus(second).means()
    solved = problem.weight_of(problem.solve(both, ridge) if ridge else nearest).astype(weight.dtype)
    params[layer.weight] = solved if walk.settings.moved is None else walk.settings.moved(layer.weight, solved)
    codes = problem.codes(params[layer.weight])
    if walk.settings.corrects and layer.bias and layer.node.attribute("beta", 1.0) == 1:
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


def _moments(walk: _Walk, layer: Linear, kernel: tuple[int, ...]) -> tuple[Moments, Moments]:
    """Returns those of the samples to solve on, and of those that judge; of a single sample the same.

    Raises:
        DataError: They are not finite.
    """
    first, second = moments_of_halves(layer, kernel, [state[layer.input] for state in walk.states], walk.settings.seed)
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
