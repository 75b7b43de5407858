"""Inputs that are given a value on reading, and conditions that are known: the branch that they pick stands for the If.

Exporters merge a decoder's first step and those that follow into one file, an If over an input that picks one of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ptqjax.errors import ConfigError
from ptqjax.ir import Constant, Graph, Node
from ptqjax.onnx_io.identities import with_subgraphs


def with_fixed_inputs(graph: Graph, fixed: Mapping[str, Any]) -> Graph:
    """Returns the graph with some of its inputs as constants of these values.

    Raises:
        ConfigError: There is no such input, or the value does not fit it.
    """
    specs = {spec.name: spec for spec in graph.inputs}
    constants = dict(graph.constants)
    for name, value in fixed.items():
        if name not in specs:
            raise ConfigError(f"fixed={{'{name}': ...}}: the model has no such input; it takes {', '.join(specs)}")
        constants[name] = Constant(_fitting(name, value, specs[name].dtype, specs[name].shape))
    inputs = tuple(spec for spec in graph.inputs if spec.name not in fixed)
    return replace(graph, inputs=inputs, constants=tuple(sorted(constants.items())))


def _fitting(name: str, value: Any, dtype: np.dtype, shape: Any) -> np.ndarray:
    sizes = [size if isinstance(size, int) else 1 for size in shape or ()]
    array = np.asarray(value)
    if array.size == 1:
        array = array.reshape(sizes) if int(np.prod(sizes)) == 1 else np.broadcast_to(array.reshape(()), sizes)
    if shape is not None and array.ndim != len(sizes):
        raise ConfigError(f"fixed={{'{name}': ...}}: the value has {array.ndim} axes; expected {len(sizes)}")
    array = array.astype(dtype)
    array.flags.writeable = False
    return array


def without_known_branches(graph: Graph) -> Graph:
    """Returns the graph with the branch in place of each If whose condition is a constant; nodes lose their order."""
    taken = Counter(_names(graph))
    nodes: list[Node] = []
    constants = dict(graph.constants)
    for node in graph.nodes:
        condition = constants.get(node.inputs[0]) if node.op_type == "If" and not node.domain else None
        if condition is None or condition.value.size != 1:
            nodes.append(node)
            continue
        branch = node.attribute("then_branch" if bool(condition.value.item()) else "else_branch")
        inner, own = _inlined(node, branch, taken)
        nodes += inner
        constants |= own
    return replace(graph, nodes=tuple(nodes), constants=tuple(sorted(constants.items())))


def _inlined(node: Node, branch: Graph, taken: Counter[str]) -> tuple[list[Node], dict[str, Constant]]:
    """Returns the nodes and constants of a branch under names that nothing else has, its outputs under the If's."""
    written = [name for inner in branch.nodes for name in inner.outputs if name]
    names: dict[str, str] = {}
    for wanted, spec in zip(node.outputs, branch.outputs, strict=True):
        if wanted and spec.name in written and spec.name not in names:
            names[spec.name] = wanted
    for name in (*written, *(name for name, _ in branch.constants)):
        names.setdefault(name, _fresh(name, taken))
    passed = [
        Node(op_type="Identity", inputs=(names.get(spec.name, spec.name),), outputs=(wanted,))
        for wanted, spec in zip(node.outputs, branch.outputs, strict=True)
        if wanted and names.get(spec.name) != wanted
    ]
    nodes = [renamed(inner, names) for inner in branch.nodes]
    return [*nodes, *passed], {names[name]: value for name, value in branch.constants}


def renamed(node: Node, names: Mapping[str, str]) -> Node:
    """Returns the node with tensors under other names, in its subgraphs as well, where a name means one tensor."""

    def body(graph: Graph) -> Graph:
        outputs = tuple(replace(spec, name=names.get(spec.name, spec.name)) for spec in graph.outputs)
        return replace(graph, nodes=tuple(renamed(inner, names) for inner in graph.nodes), outputs=outputs)

    inner = with_subgraphs(node, body)
    return replace(
        inner,
        inputs=tuple(names.get(name, name) for name in node.inputs),
        outputs=tuple(names.get(name, name) for name in node.outputs),
    )


def _names(graph: Graph) -> list[str]:
    found = [spec.name for spec in graph.inputs] + [name for name, _ in graph.constants]
    return found + [name for node in graph.nodes for name in node.outputs if name]


def _fresh(name: str, taken: Counter[str]) -> str:
    fresh, number = name, 0
    while taken[fresh]:
        number = 2 * number + 1  # doubled, as a file can hold many names in a row that are taken
        fresh = f"{name}_{number}"
    taken[fresh] += 1
    return fresh
