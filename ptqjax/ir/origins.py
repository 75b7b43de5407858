"""What the values of a tensor depend on: constants, parameters, sizes of inputs, or inputs' elements.

The one definition of "constant" for all who ask before anything runs. It is the interpreter's: what depends on
constants and sizes alone is computed while tracing, so that no data reach it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from ptqjax.ir.graph import Graph, Node, captured

_SIZES = frozenset({"Shape", "Size"})
_OF_SHAPE_ALONE = frozenset({"EyeLike"})  # its first input tells a shape and a type only
_OF_TYPE_ALONE = {"CastLike": 1}  # an input that tells a type only


class Origin(IntEnum):
    """What decides the values of a tensor; a node's results depend on the most variable of its inputs."""

    CONSTANT = 0
    """Constants of the graph, or nothing at all."""
    PARAMETER = 1
    """Parameters besides."""
    SIZE = 2
    """The sizes of inputs besides, none of their elements."""
    DATA = 3
    """Elements of an input."""


def origins_of(graph: Graph) -> dict[str, Origin]:
    """Returns the origin of each tensor of `graph`, those of its subgraphs left out."""
    return _origins(graph, {})


def _origins(graph: Graph, outer: Mapping[str, Origin]) -> dict[str, Origin]:
    found = dict(outer)
    found |= dict.fromkeys((name for name, _ in graph.constants), Origin.CONSTANT)
    found |= dict.fromkeys(graph.parameters, Origin.PARAMETER)
    found |= dict.fromkeys((spec.name for spec in graph.inputs), Origin.DATA)
    for node in graph.nodes:
        found.update(
            (name, origin) for name, origin in zip(node.outputs, _of_results(node, found), strict=True) if name
        )
    return found


def _of_results(node: Node, known: Mapping[str, Origin]) -> list[Origin]:
    reads = [_read(node, position, name, known) for position, name in enumerate(node.inputs) if name]
    if node.op_type == "If" and not node.domain:
        return [
            max(*reads, *each) for each in zip(*(_of_outputs(branch, known) for branch in node.subgraphs), strict=True)
        ]
    reads += [known[name] for name in captured(node)]
    return [max(reads, default=Origin.CONSTANT)] * len(node.outputs)


def _read(node: Node, position: int, name: str, known: Mapping[str, Origin]) -> Origin:
    """Returns what the node learns from one of its inputs."""
    origin = known[name]
    if node.domain:
        return origin
    if node.op_type in _SIZES:
        return Origin.SIZE if origin >= Origin.SIZE else Origin.CONSTANT
    if node.op_type in _OF_SHAPE_ALONE or _OF_TYPE_ALONE.get(node.op_type) == position:
        return min(origin, Origin.SIZE)
    return origin


def _of_outputs(graph: Graph, outer: Mapping[str, Origin]) -> list[Origin]:
    found = _origins(graph, outer)
    return [found[spec.name] for spec in graph.outputs]
