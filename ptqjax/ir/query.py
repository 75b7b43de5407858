"""Questions about a graph that transforms and placement ask: who reads, who writes, is it alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ptqjax.ir.graph import Graph, Model, Node

_QUANTIZED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}
_QUANTIZED_BY_MICROSOFT = {  # of the domain com.microsoft, besides the above and QLinear*
    "ConvTransposeWithDynamicQuantizeLinear",
    "DequantizeBFP",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "GatherBlockQuantized",
    "MatMulBnb4",
    "MatMulFpQ4",
    "MatMulInteger16",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "MulInteger",
    "QAttention",
    "QEmbedLayerNormalization",
    "QGemm",
    "QMoE",
    "QOrderedAttention",
    "QOrderedGelu",
    "QOrderedLayerNormalization",
    "QOrderedLongformerAttention",
    "QOrderedMatMul",
    "QuantizeBFP",
    "QuantizeWithOrder",
    "DequantizeWithOrder",
    "ReduceSumInteger",
}


def first_quantized_node(graph: Graph) -> Node | None:
    """Returns the first node, subgraphs included, that only a quantized model has; None for a float model."""
    return next((node for node in all_nodes(graph) if _is_quantized(node)), None)


def all_nodes(graph: Graph) -> Iterator[Node]:
    """Yields the nodes in order, each before those of its subgraphs."""
    for node in graph.nodes:
        yield node
        for inner in node.subgraphs:
            yield from all_nodes(inner)


def _is_quantized(node: Node) -> bool:
    if node.op_type in _QUANTIZED or node.op_type.startswith("QLinear"):
        return True
    return node.domain == "com.microsoft" and node.op_type in _QUANTIZED_BY_MICROSOFT


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


def bias_behind(model: Model, product: Node) -> tuple[Node, str] | None:
    """Returns the Add behind a MatMul and the bias that it adds; None where there is none.

    The Add alone reads the product; the bias is a parameter that gives each column of the weight, itself a parameter
    of rank 2 or more, one number, or all of them the same one.
    """
    weight = np.shape(model.params.get(product.inputs[1], 0.0))
    add = only_reader(model.graph, product.output)
    if len(weight) < 2 or add is None or add.op_type != "Add" or add.domain:  # noqa: PLR2004  a vector has no columns
        return None
    bias = next((name for name in add.inputs if name != product.output), "")
    if bias not in model.params or not is_one_per_output(np.shape(model.params[bias]), weight[-1]):
        return None
    return add, bias


def is_one_per_output(shape: tuple[int, ...], num_outputs: int) -> bool:
    """Tells whether a bias of this shape gives each output, along its last axis, one number, or all the same one."""
    return all(size == 1 for size in shape[:-1]) and (not shape or shape[-1] in {1, num_outputs})


def fresh_name(graph: Graph, wanted: str) -> str:
    """Returns `wanted`, or that with a number behind it where the graph uses it already."""
    taken = {spec.name for spec in graph.inputs} | set(graph.producers) | set(graph.constant_values)
    taken |= set(graph.parameters)
    if wanted not in taken:
        return wanted
    return next(name for i in range(1, len(taken) + 2) if (name := f"{wanted}_{i}") not in taken)
