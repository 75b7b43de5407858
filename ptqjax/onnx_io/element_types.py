"""Element types as the operators' schemas tie them, and what they decide: a cast to another tensor's type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx.helper

from ptqjax.ir import Graph, Node
from ptqjax.onnx_io.schema import schema


def element_types(graph: Graph) -> dict[str, np.dtype]:
    """Returns the element types of the tensors of `graph` that follow from its inputs and constants.

    A result has the type of an input where the operator's schema calls both by one name; Cast says its own.
    """
    found = {spec.name: np.dtype(spec.dtype) for spec in graph.inputs if spec.kind == "tensor"}
    found |= {name: value.dtype for name, value in graph.constant_values.items()}
    for node in graph.nodes:
        found |= _of_results(node, graph.opset(node.domain), found)
    return found


def as_cast(node: Node, types: Mapping[str, np.dtype]) -> Node:
    """Returns a CastLike as the Cast that it is, where the type that it casts to is known; other nodes as they are."""
    if node.op_type != "CastLike" or node.domain or node.inputs[1] not in types:
        return node
    to = onnx.helper.np_dtype_to_tensor_dtype(types[node.inputs[1]])
    return replace(node, op_type="Cast", inputs=node.inputs[:1], attributes=(*node.attributes, ("to", int(to))))


def _of_results(node: Node, opset: int, types: Mapping[str, np.dtype]) -> dict[str, np.dtype]:
    if node.op_type == "Cast" and not node.domain:
        return _cast(node)
    found = schema(node.op_type, opset, node.domain)
    if found is None:
        return {}
    ties = {form.type_str: types[name] for form, name in zip(found.inputs, node.inputs, strict=False) if name in types}
    results = zip(found.outputs, node.outputs, strict=False)
    return {name: ties[form.type_str] for form, name in results if name and form.type_str in ties}


def _cast(node: Node) -> dict[str, np.dtype]:
    """Returns the type that a Cast says; a number that is none of ONNX's is told where the Cast is read."""
    to = node.attribute("to")
    if not isinstance(to, int) or to not in onnx.helper.get_all_tensor_dtypes():
        return {}
    return {node.output: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(to))}
