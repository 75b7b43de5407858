"""Finds which channels of a graph must share one scale, and which may have one at all.

Each channel of a tensor gets the number of a scale. A linear layer divides its output channels by their scales and
multiplies its input columns by theirs; everything between layers passes the numbers on (an activation, a pool, a
Transpose), joins them (a residual sum needs one scale for what it adds), strings them together (Concat) or fixes them
to one (a Softmax, a graph output, a shared weight). Number 0 is the fixed scale. So pairs, depthwise triples, chains
and residual trunks are one thing: sets of channels that are tied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ptqjax.ir import Model, Node, captured, place_of
from ptqjax.transforms.linear import Linear, linear_layers, why_not_rewritable
from ptqjax.transforms.scale_numbers import FIXED, Channels, Scales
from ptqjax.transforms.sizes import ONE
from ptqjax.transforms.tie_rules import RULES, Marks, read_by


@dataclass(frozen=True, kw_only=True, slots=True)
class TiedLayer:
    """A linear layer and the scales of its channels."""

    layer: Linear
    """The layer."""
    inputs: np.ndarray
    """The number of the scale of each input channel, [inputs]."""
    outputs: np.ndarray
    """The number of the scale of each output channel, [outputs]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limited:
    """An activation with bounds, which are to be divided along with what they bound."""

    node: Node
    """The Clip, Min or Max."""
    scales: np.ndarray
    """The number of the scale of each channel."""
    kernel_rank: int
    """Number of axes behind the channels'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TiedSet:
    """Scales that the outputs of the same layers have: what is scaled together, and reported as one place."""

    scales: np.ndarray
    """Their numbers, sorted."""
    producers: tuple[str, ...]
    """The layers (by the tensor that they produce) whose outputs have these scales."""
    consumers: tuple[str, ...]
    """The layers whose inputs have these scales."""
    tensors: tuple[str, ...]
    """The tensors with these scales, in graph order."""

    @property
    def place(self) -> str:
        """The tensor that the set is known by: the last one."""
        return self.tensors[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ties:
    """All scales of a graph."""

    num_scales: int
    """The number of scales, the fixed one included."""
    channels: Mapping[str, Channels]
    """The channels of each tensor whose channels are known."""
    layers: Mapping[str, TiedLayer]
    """The linear layers by the tensor that they produce, in graph order."""
    sets: tuple[TiedSet, ...]
    """The tied sets in graph order; channels of a set are never fixed."""
    limited: tuple[Limited, ...]
    """Activations with bounds between scaled channels, in graph order."""
    shifts: tuple[tuple[str, int, np.ndarray], ...]
    """Parameters that are added: name, axis from the front of the parameter, and scales along it."""
    reasons: Mapping[str, str]
    """For each layer all of whose output channels are fixed, why."""


def find_ties(model: Model, *, left: Iterable[str] = ()) -> Ties:
    """Returns which channels share scales.

    Args:
        model: The model.
        left: Tensors produced by activations with bounds that are to stay as they are: nothing is scaled there.
    """
    finder = _Finder(model, frozenset(left))
    finder.run()
    return finder.result()


class _Finder:
    """One pass over the nodes."""

    def __init__(self, model: Model, left: frozenset[str]) -> None:
        self.marks = Marks(model, left)
        self.layers = linear_layers(model)
        self.tied: dict[str, tuple[Linear, np.ndarray, np.ndarray]] = {}

    def run(self) -> None:
        products = {id(layer.node): layer for layer in self.layers.values()}
        biases = {id(layer.bias_node) for layer in self.layers.values() if layer.bias_node is not None}
        for node in self.marks.graph.nodes:
            if id(node) in biases:
                continue  # belongs to its product
            for name in captured(node):
                self.marks.fix(name, f"'{name}' is read by a subgraph of {place_of(node)}")
            layer = products.get(id(node))
            if layer is not None:
                self.layer(layer)
                continue
            rule = RULES.get(node.op_type) if not node.domain else None
            found = rule(self.marks, node) if rule else f"{place_of(node)} does not commute with scales per channel"
            if isinstance(found, str):
                for name in node.inputs:
                    self.marks.fix(
                        name, f"'{name}' is read by {place_of(node)}: {found}" if rule else read_by(name, node)
                    )
                continue
            for name, channels in zip(node.outputs, found, strict=False):
                if name and channels is not None:
                    self.marks.channels[name] = channels
        for name in self.marks.graph.output_names:
            self.marks.fix(name, f"'{name}' is a graph output")

    def layer(self, layer: Linear) -> None:
        axis = _channel_axis(layer, self.marks.ranks)
        reason = why_not_rewritable(self.marks.graph, layer)
        if axis is None:
            reason = reason or f"the channels of '{layer.output}' may not lie along one axis"
        inputs = self.inputs_of(layer, axis, reason)
        outputs = self.marks.scales.new(layer.num_outputs)
        if reason:
            self.marks.scales.fix(outputs, reason)
        if axis is not None:
            self.marks.channels[layer.output] = Channels(axis=axis, scales=outputs)
        self.tied[layer.output] = (layer, inputs, outputs)

    def inputs_of(self, layer: Linear, axis: int | None, reason: str) -> np.ndarray:
        """Returns the scales of the layer's inputs; fixes them where the layer cannot follow them."""
        known = self.marks.channels.get(layer.input)
        fixed = np.full(layer.num_inputs, FIXED)
        if known is None:
            return fixed
        count = len(known.scales)
        fits = layer.num_inputs % count == 0 if known.repeats != ONE else layer.num_inputs == count
        if reason or known.axis != axis or not fits:
            self.marks.fix(
                layer.input, reason or f"{place_of(layer.node)} does not read the channels of '{layer.input}'"
            )
            return fixed
        return np.repeat(known.scales, layer.num_inputs // count)

    def result(self) -> Ties:
        final, count = self.marks.scales.compressed()
        channels = {
            name: Channels(axis=found.axis, scales=final[found.scales], repeats=found.repeats)
            for name, found in self.marks.channels.items()
        }
        layers = {
            output: TiedLayer(layer=layer, inputs=final[inputs], outputs=final[outputs])
            for output, (layer, inputs, outputs) in self.tied.items()
        }
        reasons = {
            output: self.marks.scales.reason(outputs)
            for output, (_, _, outputs) in self.tied.items()
            if not final[outputs].any()
        }
        return Ties(
            num_scales=count,
            channels=channels,
            layers=layers,
            sets=_sets(channels, layers, count),
            limited=tuple(
                Limited(node=node, scales=final[scales], kernel_rank=rank)
                for node, scales, rank in self.marks.limited
                if final[scales].any()
            ),
            shifts=tuple(
                (name, axis, final[scales]) for name, axis, scales in self.marks.shifts if final[scales].any()
            ),
            reasons=reasons,
        )


def _sets(channels: Mapping[str, Channels], layers: Mapping[str, TiedLayer], count: int) -> tuple[TiedSet, ...]:
    """Returns the scales grouped by the layers whose outputs have them, in the order of these layers."""
    groups = Scales()
    groups.new(count - 1)
    for tied in layers.values():
        free = np.unique(tied.outputs[tied.outputs != FIXED])
        groups.tie(free[:-1], free[1:])
    is_produced = np.zeros(count, bool)
    for tied in layers.values():
        is_produced[tied.outputs] = True
    root_of = np.array([groups.root(number) if is_produced[number] else FIXED for number in range(count)])
    root_of[FIXED] = FIXED

    def roots(numbers: np.ndarray) -> set[int]:
        return set(np.unique(root_of[numbers]).tolist()) - {FIXED}

    producers = {output: roots(tied.outputs) for output, tied in layers.items()}
    consumers = {output: roots(tied.inputs) for output, tied in layers.items()}
    carriers = {name: roots(found.scales) for name, found in channels.items()}
    order = dict.fromkeys(root for found in producers.values() for root in sorted(found))
    return tuple(
        TiedSet(
            scales=np.flatnonzero(root_of == root),
            producers=tuple(output for output, found in producers.items() if root in found),
            consumers=tuple(output for output, found in consumers.items() if root in found),
            tensors=tuple(name for name, found in carriers.items() if root in found),
        )
        for root in order
    )


def _channel_axis(layer: Linear, ranks: Mapping[str, int]) -> int | None:
    if layer.channels_at_1:
        return 1
    rank = ranks.get(layer.input)
    return rank - 1 if layer.node.op_type == "MatMul" and rank is not None and rank > 1 else None
