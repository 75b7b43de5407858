"""What ONNX Runtime would compute more coarsely than the file says, or not at all, written so that it does.

Four of its rewrites (1.32, on by default) stand in the way:

- It rounds the weight of a Conv, ConvTranspose or Gemm to int8, one scale for all, where the weight is a constant in
  float and the input dequantized. One layer with a float16 weight and 16-bit activations is off by up to 366 steps
  (measured). It rounds a bias in float to int32 with the scale s_x s_w, where fp8 operands make that scale too small
  for large biases. A Clip without bounds behind the input's DequantizeLinear keeps it from both.
- It multiplies by 4- and 8-bit weights that an axis 0 or 1 is dequantized along, not in integers, as MatMulNBits, which
  rounds activations to 8 bits (up to 206 steps of 16 bits, measured). Counted from the end, the axis escapes it; behind
  a Transpose, a Clip without bounds.
- It makes MatMulIntegerToFloat of a MatMul of 8-bit operands whose result stays in float, and QLinearConv of a Conv
  without a bias, and then fails on the scales of blocks. A Clip without bounds keeps it from that, too.
- It drops a Relu before a QuantizeLinear to fp8, as if the type had no negative numbers, and fails on a Clip there. Max
  and Min take their place.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ptqjax.ir import Model, Node, Record, Report, fresh_name, only_reader, rebuild

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BIAS = 2  # the input
_MATRIX = 2  # axes
_BYTES = ("int8", "uint8")
_FP8 = ("float8_e4m3fn", "float8_e5m2")
_FEW_BITS = (*_BYTES, "int4", "uint4")


def keep_precision(model: Model) -> tuple[Model, Report]:
    """Returns the QDQ `model` with its function, written so that ONNX Runtime computes it, and a report.

    Arrays must be concrete. One record for each change.
    """
    report: list[Record] = []
    for node in model.graph.nodes:
        found = None if node.domain else _written_otherwise(model, node)
        if found is not None:
            model, what = found
            report.append(_record(node, what))
    return model, tuple(report)


def without_empty_clips(model: Model) -> Model:
    """Returns the model without the Clips without bounds that `keep_precision` put in.

    They stand behind a DequantizeLinear, or a Transpose of what it writes.
    """
    producers = model.graph.producers
    gone = {
        node.output: node.inputs[0]
        for node in model.graph.nodes
        if node.op_type == "Clip" and _has_no_bounds(node) and node.output not in model.graph.output_names
        if (before := producers.get(node.inputs[0])) is not None
        if before.op_type == "DequantizeLinear" or _transposes_codes(model, before)
    }
    nodes = [
        replace(node, inputs=tuple(gone.get(name, name) for name in node.inputs))
        for node in model.graph.nodes
        if node.output not in gone
    ]
    return rebuild(model, nodes=nodes) if gone else model


def _transposes_codes(model: Model, node: Node) -> bool:
    return node.op_type == "Transpose" and _type_of_codes(model, node.inputs[0]) is not None


def _has_no_bounds(clip: Node) -> bool:
    """Tells whether a Clip says nothing: without inputs but one, and without attributes but their defaults."""
    largest = float(np.finfo(np.float32).max)
    ends = [value for _, value in clip.attributes]
    return not any(clip.inputs[1:]) and all(isinstance(end, float) and abs(end) >= largest for end in ends)


def _written_otherwise(model: Model, node: Node) -> tuple[Model, str] | None:
    """Returns the model in which the runtime leaves the node's function as it is, and what changed, or None."""
    if node.op_type in ("Relu", "Clip") and _is_quantized_to_fp8(model, node):
        return _with_max_and_min(model, node), f"Max and Min in place of {node.op_type}"
    if node.op_type not in _PRODUCTS:
        return None
    if _would_be_rounded(model, node):
        return _with_clip(model, node, 0), "a Clip without bounds keeps weight and bias in float"
    if _would_be_refused(model, node):
        first_is_weight = _type_of_codes(model, node.inputs[0], block_size=True) is not None
        return _with_clip(model, node, int(first_is_weight)), "a Clip without bounds keeps the product in float"
    return _with_wide_activations(model, node) if _would_round_activations(model, node) else None


def _with_wide_activations(model: Model, node: Node) -> tuple[Model, str] | None:
    if model.graph.producers[node.inputs[1]].op_type == "Transpose":
        return _with_clip(model, node, 1), "a Clip without bounds keeps the product in float"
    changed = _with_axis_from_the_end(model, node)
    return None if changed is None else (changed, "the axis of the weight's scales counts from the end")


def _would_be_rounded(model: Model, node: Node) -> bool:
    bias = node.inputs[_BIAS] if len(node.inputs) > _BIAS else ""
    if node.op_type == "MatMul":  # with an Add behind it, it becomes a Gemm first
        reader = only_reader(model.graph, node.output)
        if reader is None or reader.op_type != "Add":
            return False
        bias = next((name for name in reader.inputs if name != node.output), "")
    types = [_type_of_codes(model, name) for name in node.inputs[:_BIAS]]
    if types[0] is None:
        return False
    has_fp8 = any(each in _FP8 for each in types)
    return _is_float_constant(model, node.inputs[1]) or (has_fp8 and _is_float_constant(model, bias))


def _is_quantized_to_fp8(model: Model, node: Node) -> bool:
    readers = model.graph.readers.get(node.output, ())
    return any(reader.op_type == "QuantizeLinear" and _type_of_zero(model, reader) in _FP8 for reader in readers)


def _with_max_and_min(model: Model, node: Node) -> Model:
    """Returns the model with Max and Min for a Relu or Clip, whose bounds are inputs in every opset that has fp8."""
    params, steps = dict(model.params), list(zip(("Max", "Min"), node.inputs[1:], strict=False))
    if node.op_type == "Relu":
        steps = [("Max", fresh_name(model.graph, f"{node.output}_zero"))]
        params[steps[0][1]] = np.zeros((), np.float32)
    steps = [(op_type, bound) for op_type, bound in steps if bound] or [("Max", "")]
    between = [fresh_name(model.graph, f"{node.output}_bounded")] * (len(steps) - 1)
    names = [node.inputs[0], *between, node.output]
    nodes = [
        Node(op_type=op_type, inputs=(names[i], bound) if bound else (names[i],), outputs=(names[i + 1],))
        for i, (op_type, bound) in enumerate(steps)
    ]
    return rebuild(model, nodes=[*(each for each in model.graph.nodes if each is not node), *nodes], params=params)


def _would_be_refused(model: Model, node: Node) -> bool:
    reader = only_reader(model.graph, node.output)
    in_float = reader is None or reader.op_type != "QuantizeLinear"
    if not (node.op_type == "MatMul" and in_float) and not (node.op_type == "Conv" and len(node.inputs) == _BIAS):
        return False
    has_blocks = any(_type_of_codes(model, name, block_size=True) for name in node.inputs)
    return has_blocks and all(_type_of_codes(model, name) in _BYTES for name in node.inputs)


def _is_float_constant(model: Model, tensor: str) -> bool:
    """Tells whether a tensor follows from a float parameter alone, through what is computed when a file is loaded."""
    while tensor not in model.params:
        node = model.graph.producers.get(tensor) if tensor else None
        if node is None or node.op_type not in ("Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"):
            return False
        tensor = node.inputs[0]
    return np.dtype(model.params[tensor].dtype).name in ("float32", "float16", "bfloat16")


def _would_round_activations(model: Model, node: Node) -> bool:
    if node.op_type not in ("Gemm", "MatMul"):
        return False
    dequantizer = _weight(model, node)
    if dequantizer is None or np.ndim(model.params[dequantizer.inputs[0]]) != _MATRIX:
        return False
    if dequantizer.attribute("axis") is None or np.ndim(model.params[dequantizer.inputs[1]]) == 0:
        return False
    weight = _type_of_codes(model, dequantizer.output)
    in_integers = weight in _BYTES and _type_of_codes(model, node.inputs[0]) in _BYTES
    return weight in _FEW_BITS and not in_integers


def _weight(model: Model, node: Node) -> Node | None:
    """Returns what dequantizes the weight, a parameter that only this node reads, perhaps through a Transpose."""
    producers = model.graph.producers
    found = producers.get(node.inputs[1])
    if found is not None and found.op_type == "Transpose" and only_reader(model.graph, found.output) is not None:
        found = producers.get(found.inputs[0])
    if found is None or found.op_type != "DequantizeLinear" or only_reader(model.graph, found.output) is None:
        return None
    return found if found.inputs[0] in model.params else None


def _type_of_codes(model: Model, tensor: str, *, block_size: bool = False) -> str | None:
    """Returns the type that `tensor` is dequantized from, if asked only where in blocks; None where it is not."""
    node = model.graph.producers.get(tensor)
    if node is None or node.op_type != "DequantizeLinear" or (block_size and not node.attribute("block_size")):
        return None
    return _type_of_zero(model, node)


def _type_of_zero(model: Model, node: Node) -> str:
    zero_point = model.params.get(node.inputs[2]) if len(node.inputs) > 2 else None  # noqa: PLR2004 - the third
    return "unknown" if zero_point is None else np.dtype(zero_point.dtype).name


def _with_clip(model: Model, node: Node, index: int) -> Model:
    """Returns the model with a Clip that changes nothing on an input of the node."""
    clipped = fresh_name(model.graph, f"{node.inputs[index]}_unbounded")
    clip = Node(op_type="Clip", inputs=(node.inputs[index],), outputs=(clipped,))
    reader = replace(node, inputs=(*node.inputs[:index], clipped, *node.inputs[index + 1 :]))
    return rebuild(model, nodes=[*(reader if each is node else each for each in model.graph.nodes), clip])


def _with_axis_from_the_end(model: Model, node: Node) -> Model | None:
    """Returns the model with the weight's axis counted from the end; None where it is, or there is none."""
    dequantizer = _weight(model, node)
    if dequantizer is None:
        return None
    axis = dequantizer.attribute("axis") % _MATRIX - _MATRIX
    changed = replace(dequantizer, attributes=tuple(sorted({**dict(dequantizer.attributes), "axis": axis}.items())))
    if changed == dequantizer:
        return None
    return rebuild(model, nodes=[changed if each is dequantizer else each for each in model.graph.nodes])


def _record(node: Node, what: str) -> Record:
    return Record(
        transform="keep_precision",
        done=True,
        what=what,
        where=(node.output,),
        reason="ONNX Runtime would round an operand to 8 bits, leave the node out, or refuse it",
    )
