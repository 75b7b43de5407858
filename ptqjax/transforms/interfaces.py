"""Finds the interfaces of a graph: tensors whose channels may be scaled or shifted between two linear layers.

An interface is all that lies between a layer that produces channels (rows of its weight) and the one layer that reads
them (columns of its weight). Pairs of layers, depthwise triples and longer chains are interfaces in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ptqjax.ir import Model, Node, only_reader, place_of
from ptqjax.transforms.activations import is_activation
from ptqjax.transforms.linear import Linear, why_not_rewritable


@dataclass(frozen=True, kw_only=True, slots=True)
class Interface:
    """Channels between two linear layers, which nothing else reads."""

    producer: Linear
    """The layer that produces the channels."""
    activations: tuple[Node, ...]
    """What lies between, in order; none for a linear interface."""
    consumer: Linear
    """The layer that reads the channels."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors between, from the producer's output to the consumer's input."""
        return (self.producer.output, *(node.output for node in self.activations))

    @property
    def num_channels(self) -> int:
        """The number of channels."""
        return self.producer.num_outputs


def find_interfaces(model: Model, layers: Mapping[str, Linear]) -> tuple[tuple[Interface, ...], dict[str, str]]:
    """Returns the interfaces in graph order, and for each layer that produces none the reason."""
    by_node = {id(layer.node): layer for layer in layers.values()}
    found = {layer.output: _interface_behind(model, layer, by_node) for layer in layers.values()}
    interfaces = tuple(value for value in found.values() if isinstance(value, Interface))
    return interfaces, {output: value for output, value in found.items() if isinstance(value, str)}


def _interface_behind(model: Model, producer: Linear, by_node: Mapping[int, Linear]) -> Interface | str:
    tensor = producer.output
    activations: list[Node] = []
    while (reader := only_reader(model.graph, tensor)) is not None and is_activation(
        model, reader, tensor, producer.num_outputs, producer.kernel_rank
    ):
        activations.append(reader)
        tensor = reader.output
    if reader is None:
        is_output = tensor in model.graph.output_names
        return f"'{tensor}' is a graph output" if is_output else f"'{tensor}' is read at several places"
    consumer = by_node.get(id(reader))
    if consumer is None or consumer.input != tensor:
        return f"'{tensor}' is read by {place_of(reader)}, which is no linear layer with a weight of its own"
    if not (producer.channels_at_1 and consumer.channels_at_1):
        return f"the channels of '{tensor}' may not lie along axis 1"
    reason = why_not_rewritable(model.graph, producer) or why_not_rewritable(model.graph, consumer)
    return reason or Interface(producer=producer, activations=tuple(activations), consumer=consumer)
