"""Weights that a file dequantizes by Cast and Mul, which are computed when it is loaded, as DequantizeLinear again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ptqjax.ir import Constant, Graph, Node, fresh_name

_FLOAT = 1  # the number of float32 as an element type in ONNX
_PER_AXIS_SINCE = 13  # the opset of DequantizeLinear along an axis
_STORED = "_quantized"  # ends the names of codes in files that `export` wrote
_CODES = ("int4", "uint4", "int8", "uint8", "int16", "uint16")


def with_dequantizers(graph: Graph) -> Graph:
    """Returns the graph with DequantizeLinear for each product of codes that are cast to float32 and their scales.

    Codes are told by the end of their name: a stranger's integers are numbers like others, and become floats. Folded
    like what else is computed from constants, the codes would be lost. Zero points, 0, are given: of int8 without them
    ONNX Runtime's exact sessions make uint8 with a single one, which it then refuses beside scales along an axis.
    """
    nodes = {node.output: node for node in graph.nodes}
    constants = dict(graph.constants)
    for node in graph.nodes:
        found = _codes_and_scale(graph, node)
        if found is None:
            continue
        scale = found[1]
        value = graph.constant_values[scale]
        axis = int(np.argmax(value.shape)) if value.size > 1 else None
        constants[scale] = Constant(value.reshape(() if axis is None else -1))
        zero_point = fresh_name(graph, f"{node.output}_zero_point")
        constants[zero_point] = Constant(np.zeros(constants[scale].value.shape, graph.constant_values[found[0]].dtype))
        attributes = () if axis is None else (("axis", axis),)
        nodes[node.output] = Node(
            op_type="DequantizeLinear",
            inputs=(*found, zero_point),
            outputs=node.outputs,
            attributes=attributes,
            name=node.name,
        )
    return replace(graph, nodes=tuple(nodes.values()), constants=tuple(sorted(constants.items())))


def _codes_and_scale(graph: Graph, node: Node) -> tuple[str, str] | None:
    if node.op_type != "Mul" or node.domain or len(node.inputs) != 2:  # noqa: PLR2004 - steps and scale
        return None
    cast, scale = graph.producers.get(node.inputs[0]), node.inputs[1]
    if cast is None or cast.op_type != "Cast" or cast.attribute("to") != _FLOAT or graph.num_readers(scale) > 1:
        return None
    codes, known = cast.inputs[0], graph.constant_values
    if not codes.endswith(_STORED) or codes not in known or scale not in known or known[codes].dtype.name not in _CODES:
        return None
    return (codes, scale) if _is_one_scale_or_one_axis(graph, known[codes], known[scale]) else None


def _is_one_scale_or_one_axis(graph: Graph, codes: np.ndarray, scale: np.ndarray) -> bool:
    if scale.size == 1:
        return True
    runs_along_one = scale.ndim == codes.ndim and scale.size == max(scale.shape)
    return (
        runs_along_one and scale.size == codes.shape[int(np.argmax(scale.shape))] and graph.opset() >= _PER_AXIS_SINCE
    )
