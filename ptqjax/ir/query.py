"""Questions about a graph that transforms and placement ask: who reads, who writes, is it alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptqjax.ir.graph import Graph, Model, Node

_QUANTIZED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}


def first_quantized_node(graph: Graph) -> Node | None:
    """Returns the first node that only a quantized model has; None for a float model."""
    return next(
        (node for node in graph.nodes if node.op_type in _QUANTIZED or node.op_type.startswith("QLinear")), None
    )


def only_reader(graph: Graph, tensor: str) -> Node | None:
    """Returns the node that alone reads `tensor`, once; None where there are others or it is a graph output."""
    return graph.readers[tensor][0] if graph.num_readers(tensor) == 1 and tensor not in graph.output_names else None


def is_private(graph: Graph, tensor: str) -> bool:
    """Tells whether `tensor` is a parameter that one place reads, so that it may be changed for that place alone."""
    return tensor in graph.parameters and graph.num_readers(tensor) == 1


def value_of(model: Model, tensor: str) -> Any | None:
    """Returns the value of a parameter or constant; None where `tensor` is neither (or is the absent input "")."""
    if tensor in model.params:
        return model.params[tensor]
    return model.graph.constant_values.get(tensor)


def scalar_of(model: Model, tensor: str) -> float | None:
    """Returns the value of a constant or parameter of one element as a float; None for anything else."""
    value = value_of(model, tensor)
    return float(np.asarray(value).reshape(())) if value is not None and np.size(value) == 1 else None


def fresh_name(graph: Graph, wanted: str) -> str:
    """Returns `wanted`, or that with a number behind it where the graph uses it already."""
    taken = {spec.name for spec in graph.inputs} | set(graph.producers) | set(graph.constant_values)
    taken |= set(graph.parameters)
    if wanted not in taken:
        return wanted
    return next(name for i in range(1, len(taken) + 2) if (name := f"{wanted}_{i}") not in taken)
