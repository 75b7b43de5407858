"""What several nodes compute alike is computed once.

A runtime merges equal nodes of a float model by itself. In QDQ form it does not: each node's operands are dequantized
for it alone, so that none looks like another.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ptqjax.ir import Model, Node, Record, Report, captured, rebuild

_DRAWS = frozenset({"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike"}) | frozenset(
    {"RandomUniform", "RandomUniformLike"}
)
"""Operators that give something else each time."""
_MOST_ELEMENTS = 4096  # of parameters that are compared: scales, bounds


def merge_equal_nodes(model: Model) -> tuple[Model, Report]:
    """Returns the model in which nodes that compute the same from the same are one, and a record for each that is gone.

    Nodes are equal in operator, attributes and inputs, where small parameters and constants of the same numbers are the
    same. What reads parameters alone stays: ONNX Runtime refuses a weight that integer layers share. So do nodes with
    subgraphs, what subgraphs read, and graph outputs. Arrays must be concrete.
    """
    kept = {name for node in model.graph.nodes for name in captured(node)} | set(model.graph.output_names)
    alike = _alike_parameters(model)
    first: dict[Hashable, Node] = {}
    renamed: dict[str, str] = {}
    report: list[Record] = []
    nodes: list[Node] = []
    for each in model.graph.nodes:
        node = replace(each, inputs=tuple(renamed.get(name, name) for name in each.inputs))
        key = _key(model, node, alike)
        earlier = None if key is None else first.setdefault(key, node)
        if earlier is None or earlier is node or kept.intersection(node.outputs):
            nodes.append(node)
            continue
        renamed |= dict(zip(node.outputs, earlier.outputs, strict=True))
        report.append(_record(node, earlier))
    return (rebuild(model, nodes=nodes), tuple(report)) if report else (model, ())


def _key(model: Model, node: Node, alike: Mapping[str, str]) -> Hashable | None:
    """Returns what equal nodes have in common; None where a node is to stay."""
    if node.op_type in _DRAWS or node.subgraphs or all(name in model.params or not name for name in node.inputs):
        return None
    inputs = tuple(alike.get(name, name) for name in node.inputs)
    return node.domain, node.op_type, inputs, node.attributes, tuple(bool(name) for name in node.outputs)


def _alike_parameters(model: Model) -> dict[str, str]:
    """Returns for small parameters and constants the first one with the same numbers."""
    first: dict[Hashable, str] = {}
    small = {name: np.asarray(value) for name, value in model.params.items() if np.size(value) <= _MOST_ELEMENTS}
    found = {name: first.setdefault(_content(value), name) for name, value in sorted(small.items())}
    return found | {name: first.setdefault(value, name) for name, value in model.graph.constants}


def _content(value: Any) -> Hashable:
    return value.dtype.name, value.shape, value.tobytes()


def _record(node: Node, earlier: Node) -> Record:
    return Record(
        transform="merge_equal_nodes",
        done=True,
        what=f"{node.op_type} computed once",
        where=(node.output, earlier.output),
        reason=f"it equals the one of '{earlier.output}'",
    )
