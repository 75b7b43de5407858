"""Products that ONNX Runtime would compute more coarsely than the file says, or not at all, written so that it does.

Three of its rewrites (1.32, on by default) stand in the way:

- It rounds the weight of a Conv, ConvTranspose or Gemm to int8, one scale for all, where the weight is a constant in
  float and the input dequantized. One layer with a float16 weight and 16-bit activations is off by up to 366 steps
  (measured). A Clip without bounds behind the input's DequantizeLinear keeps it from that.
- It multiplies by 4- and 8-bit weights that an axis 0 or 1 is dequantized along, not in integers, as MatMulNBits, which
  rounds activations to 8 bits (up to 206 steps of 16 bits, measured). Counted from the end, the axis escapes it.
- It makes MatMulIntegerToFloat of a MatMul of 8-bit operands whose result stays in float, and then fails on the scales
  of blocks. A Clip without bounds keeps it from that, too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ptqjax.ir import Model, Node, Record, Report, fresh_name, only_reader, rebuild

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MATRIX = 2  # axes
_BYTES = ("int8", "uint8")
_FEW_BITS = (*_BYTES, "int4", "uint4")


def keep_precision(model: Model) -> tuple[Model, Report]:
    """Returns the QDQ `model` with its function, written so that ONNX Runtime computes it, and a report.

    Where a weight in few bits lies behind a Transpose, its codes are transposed instead. Arrays must be concrete. One
    record for each change.
    """
    report: list[Record] = []
    for node in model.graph.nodes:
        if node.op_type not in _PRODUCTS or node.domain:
            continue
        if _would_be_rounded(model, node):
            model = _with_clip(model, node, 0)
            report.append(_record(node, "a Clip without bounds keeps the weight in float"))
        elif _would_be_refused(model, node):
            model = _with_clip(model, node, int(_type_of_codes(model, node.inputs[0], block_size=True) is not None))
            report.append(_record(node, "a Clip without bounds keeps the product in float"))
        elif _would_round_activations(model, node):
            found = _with_axis_from_the_end(model, node)
            if found is not None:
                model = found
                report.append(_record(node, "the axis of the weight's scales counts from the end"))
    return model, tuple(report)


def _would_be_rounded(model: Model, node: Node) -> bool:
    if node.op_type == "MatMul":  # with an Add behind it, it becomes a Gemm first
        reader = only_reader(model.graph, node.output)
        if reader is None or reader.op_type != "Add":
            return False
    return _type_of_codes(model, node.inputs[0]) is not None and _is_float_constant(model, node.inputs[1])


def _would_be_refused(model: Model, node: Node) -> bool:
    if node.op_type != "MatMul":
        return False
    reader = only_reader(model.graph, node.output)
    if reader is not None and reader.op_type == "QuantizeLinear":
        return False
    has_blocks = any(_type_of_codes(model, name, block_size=True) for name in node.inputs)
    return has_blocks and all(_type_of_codes(model, name) in _BYTES for name in node.inputs)


def _is_float_constant(model: Model, tensor: str) -> bool:
    """Tells whether a tensor follows from float parameters alone, through what is computed when a file is loaded."""
    while tensor not in model.params:
        node = model.graph.producers.get(tensor)
        if node is None or node.op_type not in ("Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"):
            return False
        tensor = node.inputs[0]
    return np.dtype(model.params[tensor].dtype).name in ("float32", "float16", "bfloat16")


def _would_round_activations(model: Model, node: Node) -> bool:
    if node.op_type not in ("Gemm", "MatMul"):
        return False
    dequantizer, _ = _weight(model, node)
    if dequantizer is None or np.ndim(model.params[dequantizer.inputs[0]]) != _MATRIX:
        return False
    weight = _type_of_codes(model, dequantizer.output)
    in_integers = weight in _BYTES and _type_of_codes(model, node.inputs[0]) in _BYTES
    return weight in _FEW_BITS and not in_integers


def _weight(model: Model, node: Node) -> tuple[Node | None, Node | None]:
    """Returns what dequantizes the weight, a parameter that only this node reads, and a Transpose between them."""
    producers, transpose = model.graph.producers, None
    found = producers.get(node.inputs[1])
    if found is not None and found.op_type == "Transpose" and only_reader(model.graph, found.output) is not None:
        transpose, found = found, producers.get(found.inputs[0])
    if found is None or found.op_type != "DequantizeLinear" or only_reader(model.graph, found.output) is None:
        return None, None
    return (found, transpose) if found.inputs[0] in model.params else (None, None)


def _type_of_codes(model: Model, tensor: str, *, block_size: bool = False) -> str | None:
    """Returns the type that `tensor` is dequantized from, if asked only where in blocks; None where it is not."""
    node = model.graph.producers.get(tensor)
    if node is None or node.op_type != "DequantizeLinear" or (block_size and not node.attribute("block_size")):
        return None
    zero_point = model.params.get(node.inputs[2]) if len(node.inputs) > 2 else None  # noqa: PLR2004 - the third
    return "unknown" if zero_point is None else np.dtype(zero_point.dtype).name


def _with_clip(model: Model, node: Node, index: int) -> Model:
    """Returns the model with a Clip that changes nothing on an input of the node."""
    clipped = fresh_name(model.graph, f"{node.inputs[index]}_{node.output}")
    clip = Node(op_type="Clip", inputs=(node.inputs[index],), outputs=(clipped,))
    reader = replace(node, inputs=(*node.inputs[:index], clipped, *node.inputs[index + 1 :]))
    return rebuild(model, nodes=[*(reader if each is node else each for each in model.graph.nodes), clip])


def _with_axis_from_the_end(model: Model, node: Node) -> Model | None:
    """Returns the model with the weight's axis counted from the end; None where it is, or there is none."""
    dequantizer, transpose = _weight(model, node)
    if dequantizer is None or dequantizer.attribute("axis") is None or _is_along_no_axis(model, dequantizer):
        return None
    axis = dequantizer.attribute("axis") % _MATRIX
    nodes = [each for each in model.graph.nodes if each is not transpose]
    params, output = dict(model.params), dequantizer.output
    if transpose is not None:
        axis, output = 1 - axis, transpose.output
        params |= {name: np.asarray(params[name]).T for name in dequantizer.inputs}
    attributes = tuple(sorted({**dict(dequantizer.attributes), "axis": axis - _MATRIX}.items()))
    changed = replace(dequantizer, attributes=attributes, outputs=(output,))
    if changed == dequantizer:
        return None
    return rebuild(model, nodes=[changed if each is dequantizer else each for each in nodes], params=params)


def _is_along_no_axis(model: Model, dequantizer: Node) -> bool:
    return np.ndim(model.params[dequantizer.inputs[1]]) == 0


def _record(node: Node, what: str) -> Record:
    return Record(
        transform="keep_precision",
        done=True,
        what=what,
        where=(node.output,),
        reason="ONNX Runtime would round an operand of the product to 8 bits, or refuse the product",
    )
