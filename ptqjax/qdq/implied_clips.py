"""Clips that a quantizer implies: behind them, QuantizeLinear saturates at the same integers anyway."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ptqjax.ir import Model, Node, Record, Report, only_reader, rebuild, value_of
from ptqjax.kernels.grid import quantize

_CLIPS = ("Relu", "Clip", "Min", "Max")
_KEEPS_SHAPE = ("QuantizeLinear", "DequantizeLinear", "Relu", "Clip")
_CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1}
_TYPES = tuple(map(np.dtype, (np.uint8, np.int8, np.uint16, np.int16)))


def drop_implied_clips(model: Model) -> tuple[Model, Report]:
    """Returns the QDQ `model` without the clips that change none of its integers, and a report.

    Two kinds of places, exact for every input but NaN:

    - Relu, Clip, and Min or Max with a parameter, read by one QuantizeLinear alone. Rounding is monotone, so
      Q(min(x, b)) = min(Q(x), Q(b)), and that is Q(x) where Q(b) is the largest integer of the type; likewise below.
    - Min of integers with a parameter that is the type's largest everywhere; Max with the smallest.

    What stands between a DequantizeLinear and a QuantizeLinear stays: ONNX Runtime would merge the two grids that then
    follow each other, and round differently. So does a bound that may broadcast.

    Arrays must be concrete. One record for each such clip.
    """
    renamed: dict[str, str] = {}
    dropped: set[str] = set()
    report = []
    for node in model.graph.nodes:
        if node.op_type not in _CLIPS or node.domain:
            continue
        found = _on_integers(model, node) or _before_quantizer(model, node)
        if found is None:
            continue
        value, reason = found
        report.append(_record(node, reason))
        if not reason:
            renamed[node.output] = renamed.get(value, value)
            dropped.add(node.output)
    nodes = [_reading(node, renamed) for node in model.graph.nodes if node.output not in dropped]
    return (rebuild(model, nodes=nodes) if dropped else model), tuple(report)


def _on_integers(model: Model, node: Node) -> tuple[str, str] | None:
    """Returns what a Min or Max of integers bounds, and why it stays, or nothing; None for other nodes."""
    operands = _bounded(model, node)
    if operands is None:
        return None
    value, bound = operands
    codes = np.asarray(model.params[bound])
    if codes.dtype not in _TYPES:
        return None
    info = np.iinfo(codes.dtype)
    if np.any(codes != (info.max if node.op_type == "Min" else info.min)):
        return value, f"a bound lies inside the range of {codes.dtype}"
    return value, _shape_objection(model, node, value, codes)


def _before_quantizer(model: Model, node: Node) -> tuple[str, str] | None:
    """Returns what is clipped before a QuantizeLinear, and why the clip stays, or nothing; None for other nodes."""
    quantizer = only_reader(model.graph, node.output)
    if quantizer is None or quantizer.op_type != "QuantizeLinear" or quantizer.inputs[0] != node.output:
        return None
    if node.op_type in ("Min", "Max"):
        operands = _bounded(model, node)
        if operands is None:
            return None
        value, bound = operands
        limits = np.asarray(model.params[bound])
        low, high = (None, limits) if node.op_type == "Min" else (limits, None)
        objection = _shape_objection(model, node, value, limits)
    else:
        value, objection = node.inputs[0], ""
        low, high = (np.zeros((), np.float32), None) if node.op_type == "Relu" else _limits(model, node)
    producer = model.graph.producers.get(value)
    if producer is not None and producer.op_type == "DequantizeLinear":
        return value, "it keeps two grids apart, which the runtime would merge"
    return value, objection or _range_objection(model, quantizer, low, high)


def _limits(model: Model, clip: Node) -> tuple[Any, Any]:
    """Returns the bounds of a Clip as arrays, None where it has none, NaN where one is computed.

    Before opset 11, bounds are attributes.
    """
    found = []
    for index, end in ((1, "min"), (2, "max")):
        name = clip.inputs[index] if index < len(clip.inputs) else ""
        limit = value_of(model, name) if name else clip.attribute(end)
        is_computed = name != "" and limit is None
        found.append(np.float32(np.nan) if is_computed else None if limit is None else np.asarray(limit))
    return found[0], found[1]


def _range_objection(model: Model, quantizer: Node, low: Any, high: Any) -> str:
    """Returns why the quantizer does not imply the bounds, or nothing."""
    grid = [value_of(model, name) for name in quantizer.inputs[1:]]
    if len(grid) != 2 or any(value is None for value in grid):  # noqa: PLR2004 - scale and zero point
        return "the grid has no zero point, or is computed"
    scale, zero_point = map(np.asarray, grid)
    if scale.size != 1 or zero_point.dtype not in _TYPES:
        return "the grid is not one of 8 or 16 bits for the whole tensor"
    info = np.iinfo(zero_point.dtype)
    for limit, end, side in ((low, info.min, "lower"), (high, info.max, "upper")):
        if limit is None:
            continue
        if np.any(np.isnan(limit)):
            return f"the {side} bound is not a known number"
        steps = np.asarray(limit, np.float32)
        codes = quantize(steps, scale.reshape(()), zero_point.reshape(()).astype(np.float32), info.min, info.max)
        if np.any(codes != end):
            return f"the grid reaches beyond the {side} bound"
    return ""


def _bounded(model: Model, node: Node) -> tuple[str, str] | None:
    """Returns the operand and the parameter of a Min or Max of two; None for anything else."""
    if node.op_type not in ("Min", "Max") or len(node.inputs) != 2:  # noqa: PLR2004 - value and bound
        return None
    bound = next((name for name in node.inputs if name in model.params), None)
    value = next((name for name in node.inputs if name != bound), None)
    return None if bound is None or value is None or value in model.params else (value, bound)


def _shape_objection(model: Model, node: Node, value: str, bound: np.ndarray) -> str:
    """Returns why the result may have another shape than `value`, or nothing."""
    if node.output in model.graph.output_names:
        return "it is an output of the graph"
    shape = _channels_and_rank(model, value)
    if shape is None:
        is_scalar = bound.ndim == 0
        return "" if is_scalar else "the bound may broadcast what it bounds: its shape is not known"
    channels, rank = shape
    padded = (1,) * (rank - bound.ndim) + bound.shape
    expected = (1, channels) + (1,) * (rank - 2)
    fits = len(padded) == rank and all(size in (1, want) for size, want in zip(padded, expected, strict=True))
    return "" if fits else "the bound may broadcast what it bounds"


def _channels_and_rank(model: Model, tensor: str) -> tuple[int, int] | None:
    """Returns the size of axis 1 and the rank of what a layer produced; None where it is not a layer's result."""
    node = model.graph.producers.get(tensor)
    while node is not None and (node.op_type in _KEEPS_SHAPE or _bounded(model, node) is not None):
        operands = _bounded(model, node)
        node = model.graph.producers.get(operands[0] if operands else node.inputs[0])
    if node is None or node.domain or node.op_type not in (*_CHANNEL_AXIS, "Gemm"):
        return None
    weight = _stored_shape(model, node.inputs[1])
    if weight is None:
        return None
    if node.op_type == "Gemm":
        return weight[0 if node.attribute("transB", 0) else 1], 2
    groups = node.attribute("group", 1) if node.op_type == "ConvTranspose" else 1
    return weight[_CHANNEL_AXIS[node.op_type]] * groups, len(weight)


def _stored_shape(model: Model, tensor: str) -> tuple[int, ...] | None:
    producer = model.graph.producers.get(tensor)
    name = producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else tensor
    value = value_of(model, name)
    return None if value is None else np.shape(value)


def _reading(node: Node, renamed: dict[str, str]) -> Node:
    if not any(name in renamed for name in node.inputs):
        return node
    return replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))


def _record(node: Node, reason: str) -> Record:
    return Record(
        transform="drop_implied_clips",
        done=not reason,
        what=f"{node.op_type} left" if reason else f"{node.op_type} dropped",
        where=(node.output,),
        reason=reason or "the grid behind it saturates at the same integers",
    )
