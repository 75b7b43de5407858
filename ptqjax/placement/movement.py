"""Operators that only move values about, so that a grid of what they read is a grid of what they write."""

from __future__ import annotations

from ptqjax.config import Target
from ptqjax.ir import Model, Node, scalar_of

_KEEPING = frozenset(
    {
        "DepthToSpace",
        "Dropout",
        "Expand",
        "Flatten",
        "Identity",
        "Pad",
        "Reshape",
        "SpaceToDepth",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)


def keeps_all(node: Node) -> bool:
    """Tells whether an operator that moves values moves all of them, so that the range of its result is its input's."""
    return node.op_type in _KEEPING


def moves_data(model: Model, node: Node, target: Target) -> bool:
    """Tells whether each value of the node's result is one of its first input's, or zero."""
    if node.domain:
        return False
    if node.op_type != "Pad":
        return node.op_type in target.data_movement
    value = node.inputs[2] if len(node.inputs) > 2 else ""  # noqa: PLR2004 - Pad's third input
    is_zero = scalar_of(model, value) == 0 if value else node.attribute("value", 0.0) == 0
    return node.attribute("mode", "constant") != "constant" or is_zero


def moved_tensors(model: Model, target: Target) -> dict[str, tuple[str, ...]]:
    """Returns the tensors whose values are moved elsewhere -> all tensors that hold them then."""
    found: dict[str, tuple[str, ...]] = {}
    for node in reversed(model.graph.nodes):
        if moves_data(model, node, target):
            results = tuple(name for name in node.outputs if name)
            further = tuple(name for result in results for name in found.get(result, ()))
            source = node.inputs[0]
            found[source] = (*found.get(source, ()), *results, *further)
    return found
