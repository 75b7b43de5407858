"""The way through a network, part by part, in float and quantized side by side: what a part reads, each has in both.

What later parts read is kept, so that the time is that of two forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.data.regroup import Batch
from ptqjax.encodings.encoding import Encodings, concrete, fake_quantize
from ptqjax.ir import Graph, Model
from ptqjax.lowering import Stretch, Value, compiled, interpret_in_layout
from ptqjax.placement.tensors import floating_tensors
from ptqjax.simulation import fake_quantization, round_parameters
from ptqjax.transforms.linear import Linear, linear_layers, why_not_rewritable

_MOST_BYTES = 2**32  # of what crosses from part to part, for all samples together

Cut: TypeAlias = Callable[[Graph, Mapping[str, Linear], Collection[str]], tuple[Stretch, ...]]
"""Returns a graph in parts: of the graph, its layers by the tensor that their node writes, and what may cross."""


class Pair(NamedTuple):
    """A tensor in both networks."""

    quantized: Value
    """The tensor as it is behind parts that are rounded."""
    exact: Value
    """The tensor as it is in float."""


@dataclass(frozen=True, kw_only=True)
class Walk:
    """The model on the way from its inputs to its outputs, for each batch."""

    model: Model
    """The float model."""
    encodings: Encodings
    """The encodings of weights and activations."""
    activations: Encodings
    """The encodings of activations."""
    rounded: Mapping[str, Any]
    """All parameters on their grids, rounded to nearest."""
    layers: Mapping[str, Linear]
    """The layers to round, by the tensor that their node writes."""
    parts: tuple[Stretch, ...]
    """The way, as far as there are layers."""
    states: list[dict[str, Pair]]
    """What has been computed and is still read, by batch."""

    @staticmethod
    def through(
        model: Model, encodings: Encodings, data: Iterable[Batch], layers: Mapping[str, Linear], cut: Cut
    ) -> Walk:
        """Returns the walk at its beginning, with as many of its batches as can be held, at least one."""
        rounded, activations = round_parameters(model, encodings, biases=False)
        parts = cut(model.graph, layers, floating_tensors(model))
        last = max((index for index, part in enumerate(parts) if layers_in(part, layers)), default=-1)
        walk = Walk(
            model=model,
            encodings=encodings,
            activations=activations,
            rounded=rounded.params,
            layers=layers,
            parts=parts[: last + 1],
            states=[_inputs(batch, activations) for batch in data],
        )
        return _fitting(walk)

    def advance(self, part: Stretch, params: Mapping[str, Any]) -> None:
        """Runs a part in both networks, and forgets what is not read any more."""
        read = self.read_behind(part)
        for state in self.states:
            both = (values_of(part, run_part(*each)) for each in self.arguments(part, params, state))
            _go_on(state, part, both, read)

    def read_behind(self, part: Stretch) -> set[str]:
        """Returns what later parts read."""
        later = {name for other in self.parts[self.parts.index(part) + 1 :] for name in other.inputs}
        return later | self.model.graph.output_names

    def arguments(
        self, part: Stretch, params: Mapping[str, Any], state: Mapping[str, Pair]
    ) -> Iterator[tuple[Any, ...]]:
        """Yields what `run_part` takes to compute a part: in the quantized network, and in float."""
        names = part.names
        own = [name for name in self.model.graph.parameters if name in names]
        grids = self.grids(part)
        off = {name: encoding.replace(enabled=np.asarray(False)) for name, encoding in grids.items()}
        for which, (values, encodings) in enumerate(((params, grids), (self.model.params, off))):
            inputs = {name: state[name][which] for name in part.inputs}
            yield (
                part.graph,
                {names[name]: values[name] for name in own},
                {names[name]: encoding for name, encoding in encodings.items()},
                *by_layout({names[name]: value for name, value in inputs.items()}),
            )

    def grids(self, part: Stretch) -> Encodings:
        """Returns the encodings of the activations that a part computes."""
        return {name: e for name, e in self.activations.items() if name in part.names and name not in part.inputs}


def layers_in(part: Stretch, layers: Mapping[str, Linear]) -> list[Linear]:
    """Returns the layers of a part, in their order."""
    written = {name for node in part.graph.nodes for name in node.outputs}
    return [layer for name, layer in layers.items() if part.names.get(name) in written]


def by_layout(values: Mapping[str, Value]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of those with their channels last, and of the others."""
    last = {name: value.array for name, value in values.items() if value.channels_last}
    return last, {name: value.array for name, value in values.items() if not value.channels_last}


def with_layouts(last: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Value]:
    """Returns the values that `by_layout` took apart."""
    values = {name: Value(array, channels_last=True) for name, array in last.items()}
    return values | {name: Value(array) for name, array in plain.items()}


def values_of(part: Stretch, found: tuple[Mapping[str, Any], Mapping[str, Any]]) -> list[Value]:
    """Returns a part's outputs, in their order, of what `run_part` found."""
    values = with_layouts(*found)
    return [values[part.names[name]] for name in part.outputs]


def _go_on(state: dict[str, Pair], part: Stretch, both: Iterable[list[Value]], read: Collection[str]) -> None:
    """Adds what a part gave in both networks, and takes out what is not read any more."""
    pairs = (Pair(*pair) for pair in zip(*both, strict=True))
    state |= dict(zip(part.outputs, pairs, strict=True))
    for name in [name for name in state if name not in read]:
        del state[name]


def _outputs(
    graph: Graph, params: Mapping[str, Any], encodings: Encodings, last: Mapping[str, Any], plain: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    intercept = fake_quantization(Model(graph=graph, params=dict(params)), encodings)
    return by_layout(interpret_in_layout(graph, params, with_layouts(last, plain), intercept=intercept))


run_part = compiled(_outputs, is_brief=True)
"""(graph, params, encodings, last, plain) -> the outputs of a part, those with their channels last and the others."""


def _inputs(batch: Batch, activations: Encodings) -> dict[str, Pair]:
    """Returns a batch as both networks read it."""
    rounded = {
        name: fake_quantize(np.asarray(array), concrete(activations[name])) if name in activations else array
        for name, array in batch.items()
    }
    return {name: Pair(Value(jnp.asarray(rounded[name])), Value(jnp.asarray(batch[name]))) for name in batch}


def _fitting(walk: Walk) -> Walk:
    """Returns the walk with as many of its batches as can be held, at least one."""
    if not walk.states:
        return walk
    state = dict(walk.states[0])
    most = _num_bytes(state)
    for part in walk.parts:
        found = [
            jax.eval_shape(partial(_outputs, part.graph), *each[1:])
            for each in walk.arguments(part, walk.rounded, state)
        ]
        _go_on(state, part, [values_of(part, each) for each in found], walk.read_behind(part))
        most = max(most, _num_bytes(state))
    return replace(walk, states=walk.states[: max(1, _MOST_BYTES // max(most, 1))])


def _num_bytes(state: Mapping[str, Pair]) -> int:
    return sum(value.array.size * value.array.dtype.itemsize for pair in state.values() for value in pair)


def layers_to_round(
    model: Model, encodings: Encodings, kept: Collection[str]
) -> tuple[dict[str, Linear], list[tuple[Linear, str]]]:
    """Returns the layers whose integers may be chosen, by the tensor that their node writes, and why others not.

    Args:
        model: The float model.
        encodings: Of its weights.
        kept: Weights whose integers stay those next to them.
    """
    found: dict[str, Linear] = {}
    left_alone = []
    for layer in linear_layers(model).values():
        if layer.weight not in encodings:
            continue
        given = "its encoding was given, or that of its table" if layer.weight in kept else ""
        reason = given or _obstacle(model, layer, encodings)
        if reason:
            left_alone.append((layer, reason))
        else:
            found[layer.node.output] = layer
    return found, left_alone


def _obstacle(model: Model, layer: Linear, encodings: Encodings) -> str:
    """Returns why a layer's weights are rounded to nearest, or nothing."""
    encoding = encodings[layer.weight]
    if not np.all(np.asarray(encoding.enabled)):
        return "its weight stays in float"
    if encoding.float_format is not None:
        return f"its weight has the type {encoding.float_format}, whose codes are not evenly spaced"
    return why_not_rewritable(model.graph, layer)
