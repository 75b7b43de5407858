"""The groups of a QDQ model that ONNX Runtime computes in integers, as the integer operators that it puts in place.

A group is an operator between DequantizeLinear and QuantizeLinear nodes. The rules are those of ONNX Runtime's CPU
provider (1.32): all inputs dequantized from 8 bits, one reader, which quantizes to the same type, and between them at
most a Relu or Clip that the quantizer's range implies. Products whose result stays in float are summed in integers as
well, and scaled. Data movement and operators that the runtime computes through
tables give the same integers as they stand, in float, so they are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptqjax.ir import Model, Node, Record, Report, only_reader, rebuild, scalar_of, value_of
from ptqjax.transforms.rank import ranks_of

_MICROSOFT = "com.microsoft"
_MATRIX = 2  # axes
_EIGHT_BITS = (np.dtype(np.int8), np.dtype(np.uint8))

# Operators that become one on integers.
_ELEMENTWISE = {"Add": "QLinearAdd", "Mul": "QLinearMul"}
_UNARY = {
    "AveragePool": "QLinearAveragePool",
    "GlobalAveragePool": "QLinearGlobalAveragePool",
    "Softmax": "QLinearSoftmax",
}
# Operators that become one from integers to float.
_IN_FLOAT = {"Gemm": "QGemm", "MatMul": "MatMulIntegerToFloat"}
_INTEGER = {"Conv": "QLinearConv", "Gemm": "QGemm", "MatMul": "QLinearMatMul"} | _ELEMENTWISE | _UNARY


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """An operator with all that is quantized around it."""

    node: Node
    """The operator."""
    dequantizers: tuple[Node, ...]
    """The producers of its inputs."""
    quantizer: Node
    """The reader of its output, or of the Relu or Clip behind it."""


def fuse_quantized(model: Model) -> tuple[Model, Report]:
    """Returns the QDQ `model` with QLinear operators for the groups that a runtime computes in integers.

    The result denotes what ONNX Runtime computes (the float model denotes it up to roundings). It has no parameters
    that `model` has not; where the zero points of a weight are all zero, the input is left out.

    Returns:
        The model, and a record for each operator that could have been fused: done, or why not.
    """
    replaced: dict[int, Node] = {}
    report: list[Record] = []
    gemms, merged = _gemms(model)
    for found in model.graph.nodes:
        node = gemms.get(found.output, found)
        if node.op_type not in _INTEGER or node.domain or found.output in merged:
            continue
        group = _group(model, node)
        reason = group if isinstance(group, str) else _objection(model, group)
        product = _product_in_float(model, node) if reason else None
        if product is not None:
            replaced[id(model.graph.producers[node.output])] = product
        elif not reason and isinstance(group, _Group):
            replaced[id(group.quantizer)] = _integer_node(model, group)
        report.append(_record(node, "" if product is not None else reason))
    nodes = [replaced.get(id(node), node) for node in model.graph.nodes]
    return rebuild(model, nodes=nodes), tuple(report)


def _gemms(model: Model) -> tuple[dict[str, Node], set[str]]:
    """Returns the Gemm that stands for each MatMul + Add, by the MatMul's result, and the results of these Adds.

    The runtime merges them where both operands are matrices and what is added is quantized to int32.
    """
    graph, ranks = model.graph, ranks_of(model)
    found: dict[str, Node] = {}
    for node in graph.nodes:
        add = only_reader(graph, node.output) if node.op_type == "MatMul" and not node.domain else None
        if add is None or add.op_type != "Add" or any(ranks.get(name) != _MATRIX for name in node.inputs):
            continue
        bias = next((name for name in add.inputs if name != node.output), "")
        producer = graph.producers.get(bias)
        if producer is not None and producer.op_type == "DequantizeLinear" and _is_int32(model, producer):
            found[node.output] = Node(op_type="Gemm", inputs=(*node.inputs, bias), outputs=add.outputs, name=node.name)
    return found, {node.output for node in found.values()}


def _is_int32(model: Model, dequantizer: Node) -> bool:
    return _grid_type(model, dequantizer) == np.dtype(np.int32)


def _record(node: Node, reason: str) -> Record:
    what = "computed in float" if reason else "computed in integers"
    return Record(
        transform="fuse_quantized", done=not reason, what=f"{node.op_type} {what}", where=(node.output,), reason=reason
    )


def _group(model: Model, node: Node) -> _Group | str:
    """Returns the group around `node`, or why there is none."""
    producers = [model.graph.producers.get(name) for name in node.inputs if name]
    dequantizers = [
        producer for producer in producers if producer is not None and producer.op_type == "DequantizeLinear"
    ]
    if len(dequantizers) < len(producers):
        return "an input is not quantized"
    reader = only_reader(model.graph, node.output)
    if reader is not None and reader.op_type in ("Relu", "Clip"):
        quantizer = only_reader(model.graph, reader.output)
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            return f"the output of the {reader.op_type} behind it is not quantized, or read elsewhere"
        if not _is_implied(model, reader, quantizer):
            return f"the range of '{quantizer.output}' does not imply the {reader.op_type} behind it"
        reader = quantizer
    if reader is None or reader.op_type != "QuantizeLinear":
        return "the output is not quantized, or read elsewhere"
    return _Group(node=node, dequantizers=tuple(dequantizers), quantizer=reader)


def _product_in_float(model: Model, node: Node) -> Node | None:
    """Returns a Gemm or MatMul of quantized operands, whose result no quantizer reads, as the product of integers.

    None where it is not one, or its operands do not allow it.
    """
    producers = [model.graph.producers.get(name) for name in node.inputs if name]
    dequantizers = [each for each in producers if each is not None and each.op_type == "DequantizeLinear"]
    readers = model.graph.readers.get(node.output, ())
    if (
        node.op_type not in _IN_FLOAT
        or len(dequantizers) < len(producers)
        or any(reader.op_type == "QuantizeLinear" for reader in readers)
    ):
        return None
    x_type, *other_types = (_grid_type(model, each) for each in dequantizers)
    if x_type not in _EIGHT_BITS or _weight_objection(node.op_type, node.attribute("beta", 1.0), *other_types):
        return None
    if not _has_one_scale(model, dequantizers[0]) or any(each.attribute("block_size") for each in dequantizers):
        return None
    return _node_in_float(model, node, dequantizers)


def _is_implied(model: Model, activation: Node, quantizer: Node) -> bool:
    """Tells whether quantizing clips at least as much as the Relu or Clip before it does."""
    zero_point = _array(model, quantizer, 2)
    scale = _array(model, quantizer, 1)
    if zero_point is None or scale is None or zero_point.size != 1 or zero_point.dtype not in _EIGHT_BITS:
        return False
    info = np.iinfo(zero_point.dtype)
    if activation.op_type == "Relu":
        return int(zero_point.item()) == info.min
    low, high = _bound(model, activation, "min", -np.inf), _bound(model, activation, "max", np.inf)
    if low is None or high is None:
        return False
    step, offset = np.float32(scale.item()), int(zero_point.item())
    smallest, largest = (np.rint(np.float32(bound) / step) + offset for bound in (low, high))
    return bool(smallest <= info.min and largest >= info.max)


def _bound(model: Model, clip: Node, end: str, absent: float) -> float | None:
    """Returns a bound of a Clip; `absent` where it has none; None where it is not a known number.

    Before opset 11, bounds are attributes.
    """
    name = _input(clip, 1 if end == "min" else 2)
    return scalar_of(model, name) if name else clip.attribute(end, absent)


def _objection(model: Model, group: _Group) -> str:
    """Returns why the runtime leaves the group in float, or nothing."""
    if any(node.attribute("block_size") for node in group.dequantizers):
        return "a scale for each block; integers need one for each channel at most"
    y_type = _grid_type(model, group.quantizer)
    x_type, *other_types = (_grid_type(model, node) for node in group.dequantizers)
    op_type = group.node.op_type
    if y_type not in _EIGHT_BITS or x_type != y_type:
        return f"input and output have the types {x_type} and {y_type}; integers need the same 8-bit type"
    num_activations = 2 if op_type in _ELEMENTWISE else 1
    if not all(_has_one_scale(model, node) for node in (*group.dequantizers[:num_activations], group.quantizer)):
        return "an activation has more than one scale"
    if op_type in _UNARY:
        return ""
    if op_type in _ELEMENTWISE:
        return "" if other_types == [y_type] else "the inputs have two types"
    return _weight_objection(op_type, group.node.attribute("beta", 1.0), *other_types)


def _weight_objection(op_type: str, beta: float, weight_type: Any, bias_type: Any = None) -> str:
    if weight_type not in _EIGHT_BITS:
        return f"the weight has the type {weight_type}; integers need 8 bits"
    if bias_type not in (None, np.dtype(np.int32)):
        return f"the bias has the type {bias_type}; integers need int32"
    return f"beta is {beta}, not 1" if op_type == "Gemm" and beta != 1 else ""


def _has_one_scale(model: Model, node: Node) -> bool:
    scale = _array(model, node, 1)
    return scale is not None and scale.size == 1


def _grid_type(model: Model, node: Node) -> np.dtype | None:
    """Returns the integer type that a Q or DQ node writes or reads, told by its zero point or its integer weight."""
    zero_point = _array(model, node, 2)
    if zero_point is None and node.op_type == "DequantizeLinear":
        zero_point = _array(model, node, 0)
    return None if zero_point is None else np.dtype(zero_point.dtype)


def _array(model: Model, node: Node, index: int) -> np.ndarray | None:
    value = value_of(model, _input(node, index))
    return None if value is None else np.asarray(value)


def _integer_node(model: Model, group: _Group) -> Node:
    node, operands = group.node, [_triple(dequantizer) for dequantizer in group.dequantizers]
    end = group.quantizer.inputs[1:3]
    attributes = dict(node.attributes)
    if node.op_type in _UNARY or node.op_type in _ELEMENTWISE:
        inputs = (*(name for operand in operands for name in operand), *end)
    else:
        x, w, *bias = operands
        bias = tuple(tensor for tensor, _, _ in bias)
        weight = _without_zeros(model, w)
        inputs = (*x, *weight, *(bias or ("",)), *end) if node.op_type == "Gemm" else (*x, *weight, *end, *bias)
        attributes.pop("beta", None)
    if node.op_type == "Softmax":
        attributes["opset"] = model.graph.opset()
    return Node(
        op_type=_INTEGER[node.op_type],
        inputs=inputs,
        outputs=group.quantizer.outputs,
        attributes=tuple(sorted(attributes.items())),
        domain="" if node.op_type in ("Conv", "MatMul") else _MICROSOFT,
        name=node.name,
    )


def _node_in_float(model: Model, node: Node, dequantizers: Sequence[Node]) -> Node:
    x, w, *bias = (_triple(dequantizer) for dequantizer in dequantizers)
    weight = _without_zeros(model, w)
    if node.op_type == "Gemm":
        inputs = (*x, *weight, *(tensor for tensor, _, _ in bias))
        attributes = tuple(each for each in node.attributes if each[0] != "beta")
    else:
        inputs, attributes = (x[0], w[0], x[1], w[1], x[2], weight[2]), ()
    return Node(
        op_type=_IN_FLOAT[node.op_type],
        inputs=inputs,
        outputs=(node.output,),
        attributes=attributes,
        domain=_MICROSOFT,
        name=node.name,
    )


def _triple(dequantizer: Node) -> tuple[str, str, str]:
    tensor, scale = dequantizer.inputs[:2]
    return tensor, scale, _input(dequantizer, 2)


def _input(node: Node, index: int) -> str:
    return node.inputs[index] if index < len(node.inputs) else ""


def _without_zeros(model: Model, operand: tuple[str, str, str]) -> tuple[str, str, str]:
    """Returns tensor, scale and zero point of a weight; "" for zero points that are all zero."""
    tensor, scale, zero_point = operand
    value = value_of(model, zero_point)
    return tensor, scale, "" if value is not None and not np.any(np.asarray(value)) else zero_point
