"""Rows of a table are taken as integers and dequantized then: not the whole table for each run."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptqjax.ir import Constant, Model, Node, Record, Report, fresh_name, only_reader, rebuild, value_of

_FLOAT = 1  # the number of float32 as an element type in ONNX
_NEGATIVE_AXES_SINCE, _AXES_ARE_INPUTS_SINCE = 11, 13  # opsets of Unsqueeze
_TYPES = tuple(map(np.dtype, (np.int8, np.uint8, np.int16, np.uint16)))
_ZERO_POINT = 2  # the input


def gather_codes(model: Model) -> tuple[Model, Report]:
    """Returns the QDQ `model` with Gather in front of what dequantizes its table, and a report.

    With one scale, DequantizeLinear follows the Gather. With a scale for each row, it is the product of the gathered
    codes, less their zero points, and the gathered scales: (q - z) s, to the bit what DequantizeLinear computes. ONNX
    Runtime would compute DequantizeLinear of the whole table in each run: it is no constant to it.

    Arrays must be concrete. One record for each Gather of what is dequantized from a parameter.
    """
    report = []
    for gather in model.graph.nodes:
        dequantizer = _table_of(model, gather)
        if dequantizer is None:
            continue
        reason = _objection(model, dequantizer, gather)
        report.append(_record(gather, reason))
        if not reason:
            model = _with_gathered_codes(model, dequantizer, gather)
    return model, tuple(report)


def gather_floats(model: Model) -> Model:
    """Returns the model with DequantizeLinear in front of each Gather that `gather_codes` put in front of it."""
    for node in model.graph.nodes:
        model = _with_table(model, node) or model
    return model


def _table_of(model: Model, gather: Node) -> Node | None:
    """Returns what dequantizes the table of a Gather, codes that are a parameter, for this reader alone."""
    found = model.graph.producers.get(gather.inputs[0]) if gather.op_type == "Gather" and not gather.domain else None
    if found is None or found.op_type != "DequantizeLinear" or only_reader(model.graph, found.output) is not gather:
        return None
    return found if all(name in model.params for name in found.inputs) else None


def _objection(model: Model, dequantizer: Node, gather: Node) -> str:
    codes, scale = (np.asarray(model.params[name]) for name in dequantizer.inputs[:2])
    if codes.dtype not in _TYPES:
        return f"ONNX Runtime takes no rows of {codes.dtype}"
    if scale.ndim == 0:
        return ""
    if dequantizer.attribute("block_size") or dequantizer.attribute("axis", 1) % codes.ndim != _axis(gather, codes):
        return "the scales do not run along the rows"
    return "" if model.graph.opset() >= _NEGATIVE_AXES_SINCE else "Unsqueeze has no axes from the end yet"


def _axis(gather: Node, codes: Any) -> int:
    return int(gather.attribute("axis", 0)) % np.ndim(codes)


def _with_gathered_codes(model: Model, dequantizer: Node, gather: Node) -> Model:
    new = _Rows(model, dequantizer, gather)
    codes = new.taken(dequantizer.inputs[0], "codes")
    if np.ndim(model.params[dequantizer.inputs[1]]) == 0:
        nodes = [codes, _after(dequantizer, (codes.output, *dequantizer.inputs[1:]), gather)]
    else:
        nodes = [codes, *new.product(codes.output)]
    kept = [node for node in model.graph.nodes if node is not dequantizer and node is not gather]
    return rebuild(model, nodes=[*kept, *nodes], constants=dict(model.graph.constants) | new.constants)


def _after(dequantizer: Node, inputs: tuple[str, ...], gather: Node) -> Node:
    return Node(op_type="DequantizeLinear", inputs=inputs, outputs=gather.outputs, domain=dequantizer.domain)


class _Rows:
    """Makes the nodes that take rows of a table, and name them after the rows."""

    def __init__(self, model: Model, dequantizer: Node, gather: Node) -> None:
        self.model, self.dequantizer, self.gather = model, dequantizer, gather
        self.constants: dict[str, Constant] = {}

    def name(self, what: str) -> str:
        return fresh_name(self.model.graph, f"{self.gather.output}_{what}")

    def node(self, op_type: str, inputs: tuple[str, ...], what: str, **attributes: Any) -> Node:
        outputs = (self.name(what),) if what else self.gather.outputs
        return Node(op_type=op_type, inputs=inputs, outputs=outputs, attributes=tuple(attributes.items()))

    def taken(self, table: str, what: str, axis: int | None = None) -> Node:
        axis = int(self.gather.attribute("axis", 0)) if axis is None else axis
        return self.node("Gather", (table, self.gather.inputs[1]), what, axis=axis)

    def product(self, codes: str) -> list[Node]:
        """Returns the nodes of (q - z) s."""
        scale, *zero_points = self.dequantizer.inputs[1:]
        nodes = [self.node("Cast", (codes,), "steps", to=_FLOAT)]
        if any(np.any(np.asarray(self.model.params[name])) for name in zero_points):
            nodes += self.spread(zero_points[0], "zero_points")
            nodes.append(self.node("Cast", (nodes[-1].output,), "zero_steps", to=_FLOAT))
            nodes.append(self.node("Sub", (nodes[0].output, nodes[-1].output), "from_zero"))
        steps = nodes[-1].output
        nodes += self.spread(scale, "scales")
        return [*nodes, self.node("Mul", (steps, nodes[-1].output), "")]

    def spread(self, values: str, what: str) -> list[Node]:
        """Returns the nodes that take the values of the rows, one each, in a shape that broadcasts against rows."""
        taken = self.taken(values, what, axis=0)
        rank = np.ndim(self.model.params[self.dequantizer.inputs[0]])
        axis = int(self.gather.attribute("axis", 0)) % rank
        axes = (*range(axis), *range(axis + 1 - rank, 0))
        if not axes:
            return [taken]
        if self.model.graph.opset() < _AXES_ARE_INPUTS_SINCE:
            return [taken, self.node("Unsqueeze", (taken.output,), f"{what}_spread", axes=axes)]
        name = self.name(f"{what}_axes")
        self.constants[name] = Constant(np.asarray(axes, np.int64))
        return [taken, self.node("Unsqueeze", (taken.output, name), f"{what}_spread")]


def _record(gather: Node, reason: str) -> Record:
    return Record(
        transform="gather_codes",
        done=not reason,
        what="rows of a table taken as " + ("floats" if reason else "integers"),
        where=(gather.output,),
        reason=reason,
    )


# The way back


def _with_table(model: Model, node: Node) -> Model | None:
    """Returns the model in which a Gather takes rows of what is dequantized, where `node` ends the other form."""
    found = _rows_with_one_scale(model, node) or _rows_with_scales(model, node)
    if found is None:
        return None
    gather, ends, axis = found
    table = fresh_name(model.graph, f"{node.output}_table")
    attributes = () if axis is None else (("axis", axis),)
    dequantizer = Node(
        op_type="DequantizeLinear", inputs=(gather.inputs[0], *ends), outputs=(table,), attributes=attributes
    )
    again = Node(op_type="Gather", inputs=(table, gather.inputs[1]), outputs=node.outputs, attributes=gather.attributes)
    kept = [each for each in model.graph.nodes if each is not node]
    return rebuild(model, nodes=[*kept, dequantizer, again])


_Found = tuple[Node, tuple[str, ...], int | None]
"""The Gather of codes, what dequantizes its table, and the axis."""


def _rows_with_one_scale(model: Model, node: Node) -> _Found | None:
    gather = _maker(model, node.inputs[0], "Gather") if node.op_type == "DequantizeLinear" else None
    if gather is None or not _is_table(model, gather) or not _has_rank(model, node.inputs[1], 0):
        return None
    return gather, node.inputs[1:], None


def _rows_with_scales(model: Model, node: Node) -> _Found | None:
    if node.op_type != "Mul" or node.domain:
        return None
    difference = _maker(model, node.inputs[0], "Sub")
    cast = _maker(model, node.inputs[0] if difference is None else difference.inputs[0], "Cast")
    gather = _maker(model, cast.inputs[0], "Gather") if cast is not None else None
    scale = _spread_from(model, node.inputs[1])
    if gather is None or scale is None or not _is_table(model, gather):
        return None
    zero_point = () if difference is None else (_spread_from(model, difference.inputs[1]),)
    ends = (scale, *(name for name in zero_point if name is not None))
    is_whole = len(ends) == 1 + len(zero_point)
    return (gather, ends, _axis(gather, value_of(model, gather.inputs[0]))) if is_whole else None


def _spread_from(model: Model, tensor: str) -> str | None:
    """Returns the parameter of one axis whose values were taken, spread, and made floats; None where it is none."""
    for operator in ("Cast", "Unsqueeze"):
        node = _maker(model, tensor, operator)
        tensor = tensor if node is None else node.inputs[0]
    gather = _maker(model, tensor, "Gather")
    return gather.inputs[0] if gather is not None and _has_rank(model, gather.inputs[0], 1) else None


def _has_rank(model: Model, tensor: str, rank: int) -> bool:
    value = value_of(model, tensor)
    return value is not None and np.ndim(value) == rank


def _is_table(model: Model, gather: Node) -> bool:
    codes = value_of(model, gather.inputs[0])
    return codes is not None and np.dtype(codes.dtype) in _TYPES


def _maker(model: Model, tensor: str, op_type: str) -> Node | None:
    """Returns the node of this type that makes a tensor for one reader."""
    node = model.graph.producers.get(tensor)
    is_it = node is not None and node.op_type == op_type and not node.domain
    return node if is_it and only_reader(model.graph, tensor) is not None else None
