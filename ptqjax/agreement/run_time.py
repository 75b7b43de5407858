"""What is compared where no activation has a grid beforehand, and at which accuracy level the runtime multiplied."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from ptqjax.agreement.runtime import optimized
from ptqjax.ir import Graph, Model, Node


def run_time_tensors(graph: Graph) -> dict[str, str]:
    """Returns what products with integer weights read and give in float, each with what computes it, in graph order.

    They are MatMulNBits, GatherBlockQuantized, MatMulInteger behind DynamicQuantizeLinear (with what scales it), and
    MatMul and Gemm of dequantized weights. Empty where there is none.
    """
    found = {node.output: operator for node in graph.nodes if (operator := _operator(graph, node))}
    if not found:
        return {}
    readers = [node for node in graph.nodes if node.output in found or node.op_type == "DynamicQuantizeLinear"]
    read = {node.inputs[0] for node in readers if node.op_type not in ("GatherBlockQuantized", "Mul")}
    made = {node.output: node.op_type for node in graph.nodes if node.output in read}
    return {node.output: (found | made)[node.output] for node in graph.nodes if node.output in found | made}


def _operator(graph: Graph, node: Node) -> str:
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        return node.op_type
    before = [graph.producers.get(name) for name in node.inputs]
    if node.op_type == "Mul" and any(each is not None and _is_total(graph, each) for each in before):
        return "MatMulInteger"
    is_product = node.op_type in ("Conv", "Gemm", "MatMul")
    return node.op_type if is_product and any(each and each.op_type == "DequantizeLinear" for each in before) else ""


def _is_total(graph: Graph, cast: Node) -> bool:
    before = graph.producers.get(cast.inputs[0]) if cast.op_type == "Cast" else None
    return before is not None and before.op_type == "MatMulInteger"


def levels_of(graph: Graph) -> tuple[int, ...]:
    """Returns the accuracy levels of the MatMulNBits nodes, each once, in ascending order."""
    return tuple(sorted({node.attribute("accuracy_level", 0) for node in graph.nodes if node.op_type == "MatMulNBits"}))


def accuracy_levels(model: Model) -> tuple[int, ...]:
    """Returns the accuracy levels of MatMulNBits in the session that users open, each once, in ascending order.

    ONNX Runtime makes MatMulNBits also of MatMul behind DequantizeLinear of few bits, at level 4 unless its options say
    otherwise. Empty where there is none.

    Raises:
        ModelError: ONNX Runtime does not accept the model.
    """
    has_one = any(operator in ("Gemm", "MatMul", "MatMulNBits") for operator in run_time_tensors(model.graph).values())
    return levels_of(optimized(model, exact=False)) if has_one else ()


def relative_distance(own: Float[np.ndarray, "..."], other: Float[np.ndarray, "..."]) -> float:
    """Returns the largest difference over the largest magnitude of `own`; 0 of nothing."""
    largest = float(np.max(np.abs(own), initial=0))
    return float(np.max(np.abs(own - other), initial=0)) / (largest or 1.0)
