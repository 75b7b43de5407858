"""Products of integers whose grids are found at run time: DynamicQuantizeLinear and MatMulInteger, scaled behind.

ONNX Runtime makes one kernel of them (DynamicQuantizeMatMul), a bias behind included. The total in int32 is exact;
it is multiplied by s_x s_w, which is rounded first, in both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ptqjax.ir import Model, Node, Record, Report, fresh_name, rebuild
from ptqjax.kernels.namespace import array_namespace

_PRODUCTS = ("Gemm", "MatMul")
_FLOAT = 1  # the number of float32 as an element type in ONNX


@dataclass(kw_only=True)
class _Made:
    """What takes the place of products."""

    params: dict[str, Any]
    """All parameters."""
    nodes: list[Node] = field(default_factory=list)
    """The nodes."""


def with_dynamic_products(model: Model) -> tuple[Model, Report]:
    """Returns the QDQ `model` with MatMulInteger for each product of what is quantized at run time, and a report.

    Weights of fewer bits than 8 are held in 8 there; that of a Gemm is stored as MatMul has it, [inputs, outputs]. Its
    bias is added behind. Arrays may be traced. One record for each product.
    """
    producers = model.graph.producers
    found = [node for node in model.graph.nodes if _is_dynamic(model, node)]
    made, report = _Made(params=dict(model.params)), []
    for node in found:
        _make(model, node, producers[node.inputs[0]], producers[node.inputs[1]], made)
        report.append(_record(node))
    kept = [node for node in model.graph.nodes if not any(node is each for each in found)]
    return (rebuild(model, nodes=[*kept, *made.nodes], params=made.params) if found else model), tuple(report)


def _is_dynamic(model: Model, node: Node) -> bool:
    if node.op_type not in _PRODUCTS or node.domain:
        return False
    x, w = (model.graph.producers.get(name) for name in node.inputs[:2])
    if x is None or w is None or not x.op_type == w.op_type == "DequantizeLinear":
        return False
    before = model.graph.producers.get(x.inputs[0])
    return before is not None and before.op_type == "DynamicQuantizeLinear"


def _make(model: Model, node: Node, x: Node, w: Node, made: _Made) -> None:
    """Adds what takes the place of a product: x and w dequantize its operands."""
    names = {what: fresh_name(model.graph, f"{node.output}_{what}") for what in ("total", "total_float", "step")}
    weight, scale, zero_point = w.inputs
    is_turned = bool(node.attribute("transB", 0))
    made.params[weight] = _in_bytes(made.params[weight], is_turned=is_turned)
    made.params[zero_point] = _in_bytes(made.params[zero_point])
    bias = node.inputs[2] if len(node.inputs) > 2 else ""  # noqa: PLR2004 - the third
    product = fresh_name(model.graph, f"{node.output}_product") if bias else node.output
    made.nodes += [
        Node(op_type="MatMulInteger", inputs=(x.inputs[0], weight, x.inputs[2], zero_point), outputs=(names["total"],)),
        Node(op_type="Cast", inputs=(names["total"],), outputs=(names["total_float"],), attributes=(("to", _FLOAT),)),
        Node(op_type="Mul", inputs=(x.inputs[1], scale), outputs=(names["step"],)),
        Node(op_type="Mul", inputs=(names["total_float"], names["step"]), outputs=(product,)),
    ]
    if bias:
        made.nodes.append(Node(op_type="Add", inputs=(product, bias), outputs=(node.output,)))
    else:
        made.nodes[-1] = replace(made.nodes[-1], name=node.name)


def _in_bytes(codes: Any, *, is_turned: bool = False) -> Any:
    """Returns integers of 8 bits or fewer in a type of 8 bits."""
    wide = np.uint8 if np.dtype(codes.dtype).name.startswith("u") else np.int8
    xp = array_namespace(codes)
    codes = xp.asarray(codes).astype(wide)
    return codes.T if is_turned else codes


def _record(node: Node) -> Record:
    return Record(
        transform="dynamic_products",
        done=True,
        what=f"{node.op_type} computed in integers, with grids found at run time",
        where=(node.output,),
    )
