"""Raising the operator set version of a model without changing what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ptqjax.ir import Constant, Model, Node, fresh_name
from ptqjax.onnx_io.protos import to_proto
from ptqjax.onnx_io.resizing import is_old_resize, keeps_places, with_new_resize
from ptqjax.onnx_io.schema import schema
from ptqjax.onnx_io.write import inferred


@dataclass(frozen=True, slots=True)
class _Moved:
    """An operator whose attributes became inputs, from the second on."""

    since: int
    """The opset since which they are inputs."""
    attributes: tuple[str, ...]
    """The attributes in the order of the inputs."""


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_MOVED = {f"Reduce{name}": _Moved(18, ("axes",)) for name in _REDUCTIONS} | {
    "ReduceSum": _Moved(13, ("axes",)),
    "Squeeze": _Moved(13, ("axes",)),
    "Unsqueeze": _Moved(13, ("axes",)),
    "Split": _Moved(13, ("split",)),
    "Pad": _Moved(11, ("pads", "value")),
    "Clip": _Moved(11, ("min", "max")),
    "Slice": _Moved(10, ("starts", "ends", "axes")),
    "TopK": _Moved(10, ("k",)),
}
_FLOATS = ("value", "min", "max")  # of the attributes above, those that are numbers of the tensor's own type

# The opset at which an operator means something else by the same attributes and inputs.
_CHANGED = {
    "Scan": 9,
    "Resize": 11,
    "Softmax": 13,
    "LogSoftmax": 13,
    "Hardmax": 13,
    "RoiAlign": 16,
    "GridSample": 20,
    "GroupNormalization": 21,
}
CONVERTED = frozenset({"GridSample", "GroupNormalization", "LogSoftmax", "RoiAlign", "Softmax"})
"""Those that `onnx.version_converter` brings to the newer opset with their meaning kept, as ONNX Runtime computes them:
not so Hardmax, Resize and Upsample."""

_ALONG_AN_AXIS = ("Softmax", "LogSoftmax", "Hardmax")

# Attributes that went, with the value by which they say nothing; None: any, outside training.
_GONE = {("BatchNormalization", "spatial"): 1, ("Dropout", "ratio"): None}

_SPLIT_COUNTS_SINCE = 18


def blocking_node(model: Model, opset: int) -> Node | None:
    """Returns the first node that cannot be brought to `opset` with its meaning kept; None where all can."""
    return next(blocking_nodes(model, opset), None)


def blocking_nodes(model: Model, opset: int) -> Iterator[Node]:
    """Yields the nodes that cannot be brought to `opset` with their meaning kept."""
    old = model.graph.opset()
    nodes = [node for node in model.graph.nodes if not node.domain]
    ranks = _ranks(model) if any(node.op_type in _ALONG_AN_AXIS for node in nodes) else {}
    single = all(np.dtype(value.dtype).kind != "f" or value.dtype == np.float32 for value in model.params.values())
    raised = (node for node in nodes if not is_old_resize(node, old, opset) or not keeps_places(model, node))
    yield from (node for node in raised if not _can_be_raised(node, old, opset, ranks, single=single))


def with_opset(model: Model, opset: int) -> Model:
    """Returns the model at a newer opset, attributes that became inputs converted; `blocking_node` says None of it."""
    old = model.graph.opset()
    for index, node in enumerate(model.graph.nodes):
        if is_old_resize(node, old, opset):
            model = with_new_resize(model, index)
        elif not node.domain:
            model = _with_node(model, index, node, old, opset)
    opsets = dict(model.graph.opsets) | {"": opset}
    return model.replace(graph=replace(model.graph, opsets=tuple(sorted(opsets.items()))))


def _can_be_raised(node: Node, old: int, new: int, ranks: Mapping[str, int], *, single: bool) -> bool:
    before, after = schema(node.op_type, old, ""), schema(node.op_type, new, "")
    if before is None or after is None or after.deprecated:
        return False
    inner = [each for graph in node.subgraphs for each in graph.nodes]
    if not all(_is_the_same(each, old, new) for each in inner):
        return False
    if before.since_version == after.since_version:
        return True
    if old < _CHANGED.get(node.op_type, 0) <= new and not _is_along_the_last(node, ranks):
        return False
    settings, moved = _converted(node, old, new)
    fits = all(name in after.attributes for name, _ in settings)
    fits &= len(node.inputs) + len(moved) <= after.max_input and len(node.outputs) <= after.max_output
    return fits and (single or not any(name in _FLOATS for name in moved))


def _is_the_same(node: Node, old: int, new: int) -> bool:
    """Tells whether a node in a subgraph, which stays as it is, is of the same operator version."""
    before, after = schema(node.op_type, old, node.domain), schema(node.op_type, new, node.domain)
    nested = [each for graph in node.subgraphs for each in graph.nodes]
    same = bool(node.domain) or (before and after and before.since_version == after.since_version)
    return bool(same) and all(_is_the_same(each, old, new) for each in nested)


def _is_along_the_last(node: Node, ranks: Mapping[str, int]) -> bool:
    """Tells whether a Softmax works along the last axis alone: then it means the same before opset 13 and after."""
    if node.op_type not in _ALONG_AN_AXIS:
        return False
    axis = node.attribute("axis", 1)
    return axis == -1 or axis + 1 == ranks.get(node.inputs[0])


def _converted(node: Node, old: int, new: int) -> tuple[tuple[tuple[str, Any], ...], dict[str, Any]]:
    """Returns the attributes that stay, and those that become inputs, in order (absent ones are None)."""
    attributes = {
        name: value
        for name, value in node.attributes
        if (node.op_type, name) not in _GONE or _stays(node.op_type, name, value, new)
    }
    rule = _MOVED.get(node.op_type)
    moved: dict[str, Any] = {}
    if rule is not None and old < rule.since <= new:
        moved = {name: attributes.pop(name, None) for name in rule.attributes}
        while moved and moved[list(moved)[-1]] is None:
            moved.popitem()
    splits = node.op_type == "Split" and old < _SPLIT_COUNTS_SINCE <= new
    if splits and not moved and len(node.inputs) == 1:
        attributes["num_outputs"] = len(node.outputs)
    return tuple(sorted(attributes.items())), moved


def _stays(op_type: str, name: str, value: Any, new: int) -> bool:
    after = schema(op_type, new, "")
    if after is not None and name in after.attributes:
        return True
    says_nothing = _GONE[op_type, name]
    return says_nothing is not None and value != says_nothing


def _with_node(model: Model, index: int, node: Node, old: int, new: int) -> Model:
    attributes, moved = _converted(node, old, new)
    if attributes == node.attributes and not moved:
        return model
    graph, params, inputs = model.graph, dict(model.params), list(node.inputs)
    constants = dict(graph.constants)
    for name, value in moved.items():
        if value is None:
            inputs.append("")
            continue
        inputs.append(fresh_name(replace(graph, constants=tuple(constants.items())), f"{node.output}_{name}"))
        if name in _FLOATS:
            params[inputs[-1]] = np.float32(value)
        else:
            constants[inputs[-1]] = Constant(np.atleast_1d(np.asarray(value, np.int64)))
    nodes = list(graph.nodes)
    nodes[index] = replace(node, inputs=tuple(inputs), attributes=attributes)
    graph = replace(
        graph,
        nodes=tuple(nodes),
        constants=tuple(sorted(constants.items())),
        parameters=tuple(sorted(params)),
    )
    return model.replace(graph=graph, params=params)


def _ranks(model: Model) -> dict[str, int]:
    """Returns how many axes tensors have: as ONNX infers it, or as a Reshape is told so many sizes; Concat keeps it."""
    graph = inferred(to_proto(model)).graph
    infos = (*graph.input, *graph.output, *graph.value_info)
    shapes = {info.name: info.type.tensor_type.shape.dim for info in infos if info.type.tensor_type.HasField("shape")}
    ranks = {name: len(shape) for name, shape in shapes.items()}
    sizes = {name: shape[0].dim_value for name, shape in shapes.items() if len(shape) == 1 and shape[0].dim_value}
    for node in model.graph.nodes:
        told = {"Reshape": sizes, "Concat": ranks}.get(node.op_type, {})
        read = node.inputs[1:] if node.op_type == "Reshape" else node.inputs
        rank = next((told[name] for name in read if name in told), None)
        if rank is not None:
            ranks.setdefault(node.output, rank)
    return ranks
