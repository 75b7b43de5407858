"""Which tensors of a graph are parameters: floats that take part in arithmetic, and the weights of a quantized file.

What shapes depend on stays in the graph, however far away: the factor by which a size is multiplied before it reaches
a Resize decides a shape as much as the size itself.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np

from ptqjax.ir import Constant, Graph, Node
from ptqjax.onnx_io.identities import with_subgraphs

_FLOATS = {np.dtype(kind) for kind in ("float16", "float32", "float64", ml_dtypes.bfloat16)}

# Inputs that decide shapes, or which way the computation goes.
_SHAPE_INPUTS = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "DFT": (1, 2),
    "Dropout": (1, 2),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "If": (0,),
    "Loop": (0, 1),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "NonMaxSuppression": (2, 3, 4),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "SequenceAt": (1,),
    "SequenceErase": (1,),
    "SequenceInsert": (2,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "SplitToSequence": (1,),
    "Squeeze": (1,),
    "Tile": (1, 2),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
_SHAPES = {"Shape", "Size"}  # their results depend on no element

# Integer inputs that hold quantized weights and their zero points: parameters, not constants of the graph.
_WEIGHT_INPUTS = {("DequantizeLinear", 0), ("DequantizeLinear", 2), ("QuantizeLinear", 2)}


def with_parameters(graph: Graph) -> tuple[Graph, dict[str, np.ndarray]]:
    """Returns the graph without the constants that are parameters, and these by name.

    Parameters of subgraphs become ones of the model, which the subgraph captures; those that a subgraph returns as they
    are stay its constants.
    """
    deciding = _deciding_shapes(graph)
    weights = {
        node.inputs[index]
        for node in nodes_throughout(graph)
        for index in range(len(node.inputs))
        if (node.op_type, index) in _WEIGHT_INPUTS
    }
    lifted: dict[str, np.ndarray] = {}
    graph = _without_own(graph, lifted, Counter(_defined(graph)), deciding, ChainMap())
    params = {
        name: value.value for name, value in graph.constants if name in weights or _is_parameter(name, value, deciding)
    }
    constants = tuple((name, value) for name, value in graph.constants if name not in params)
    params = dict(sorted((params | lifted).items()))
    return replace(graph, constants=constants, parameters=tuple(params)), params


def nodes_throughout(graph: Graph) -> Iterator[Node]:
    """Yields all nodes, those of subgraphs before the node that holds them: what is written before what reads it."""
    for node in graph.nodes:
        for inner in node.subgraphs:
            yield from nodes_throughout(inner)
        yield node


def _is_parameter(name: str, value: Constant, deciding: set[str]) -> bool:
    return value.value.dtype in _FLOATS and name not in deciding


def _deciding_shapes(graph: Graph) -> set[str]:
    """Returns the tensors that shapes depend on and that are known without data."""
    nodes = tuple(nodes_throughout(graph))
    known = {name for inner in _graphs(graph) for name, _ in inner.constants}
    static: set[int] = set()
    for index, node in enumerate(nodes):
        inputs = [name for name in node.inputs if name]
        if node.op_type in _SHAPES or (inputs and not node.subgraphs and known.issuperset(inputs)):
            static.add(index)
            known.update(name for name in node.outputs if name)
    wanted: set[str] = set()
    for index in reversed(range(len(nodes))):
        node = nodes[index]
        positions = _shape_inputs(node)
        wanted.update(name for i, name in enumerate(node.inputs) if i in positions)
        if index in static and node.op_type not in _SHAPES and wanted.intersection(node.outputs):
            wanted.update(node.inputs)
    return wanted & known


def _shape_inputs(node: Node) -> tuple[int, ...]:
    if node.domain:
        return ()
    return (1,) if node.op_type.startswith("Reduce") else _SHAPE_INPUTS.get(node.op_type, ())


def _graphs(graph: Graph) -> Iterator[Graph]:
    yield graph
    for node in graph.nodes:
        for inner in node.subgraphs:
            yield from _graphs(inner)


def _defined(graph: Graph) -> Iterator[str]:
    """Yields every name that a graph, or one within it, gives to a tensor."""
    for inner in _graphs(graph):
        yield from (spec.name for spec in inner.inputs)
        yield from (name for name, _ in inner.constants)
        yield from (name for node in inner.nodes for name in node.outputs if name)


def _without_own(
    graph: Graph, lifted: dict[str, np.ndarray], taken: Counter[str], deciding: set[str], outer: ChainMap[str, str]
) -> Graph:
    """Returns the graph with the parameters of its subgraphs captured; they are added to `lifted`."""

    def body(inner: Graph) -> Graph:
        names: dict[str, str] = {}
        returned = inner.output_names
        for name, value in inner.constants:
            if _is_parameter(name, value, deciding) and name not in returned:
                names[name] = _fresh(name, taken)
                lifted[names[name]] = value.value
        kept = tuple((name, value) for name, value in inner.constants if name not in names)
        visible = outer.new_child(names)
        outputs = tuple(replace(spec, name=visible.get(spec.name, spec.name)) for spec in inner.outputs)
        return _without_own(replace(inner, constants=kept, outputs=outputs), lifted, taken, deciding, visible)

    nodes = tuple(with_subgraphs(node, body) for node in graph.nodes)
    return replace(graph, nodes=tuple(_reading(node, outer) for node in nodes) if any(outer.maps) else nodes)


def _reading(node: Node, names: Mapping[str, str]) -> Node:
    return replace(node, inputs=tuple(names.get(name, name) for name in node.inputs))


def _fresh(name: str, taken: Counter[str]) -> str:
    """Returns `name` where one tensor has it, else another that none has."""
    fresh, number = name, 0
    while taken[fresh] > (number == 0):
        number = 2 * number + 1  # doubled, as a file can hold many names in a row that are taken
        fresh = f"{name}_{number}"
    taken[fresh] += 1
    return fresh
