"""Nodes that only give a tensor another name, taken out; nodes in an order in which they can be computed."""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Callable
from dataclasses import replace

from ptqjax.errors import ModelError
from ptqjax.ir import Attribute, Graph, Node, sort_topologically


def without_identities(graph: Graph) -> Graph:
    """Returns the graph with Identity bypassed, here and in subgraphs, save where it gives a graph output its name."""
    return _bypassed(graph, ChainMap())


def sorted_throughout(graph: Graph) -> Graph:
    """Returns the graph with its nodes, and those of its subgraphs, each after the producers of what it reads.

    Raises:
        ModelError: Nodes form a cycle, or a subgraph has a tensor with two producers.
    """
    nodes = tuple(with_subgraphs(node, _sorted_body) for node in graph.nodes)
    return replace(graph, nodes=sort_topologically(nodes))


def with_subgraphs(node: Node, change: Callable[[Graph], Graph]) -> Node:
    """Returns the node with `change` applied to each graph among its attributes."""
    if not node.subgraphs:
        return node
    return replace(node, attributes=tuple((name, _changed(value, change)) for name, value in node.attributes))


def _changed(value: Attribute, change: Callable[[Graph], Graph]) -> Attribute:
    if isinstance(value, Graph):
        return change(value)
    if isinstance(value, tuple) and value and isinstance(value[0], Graph):
        return tuple(change(graph) for graph in value if isinstance(graph, Graph))
    return value


def _sorted_body(graph: Graph) -> Graph:
    written = [spec.name for spec in graph.inputs] + [name for name, _ in graph.constants]
    written += [name for node in graph.nodes for name in node.outputs if name]
    twice = [name for name, count in Counter(written).items() if count > 1]
    if twice:
        raise ModelError(f"tensor '{twice[0]}' is produced more than once in a subgraph; it must have one producer")
    return sorted_throughout(graph)


def _bypassed(graph: Graph, outer: ChainMap[str, str]) -> Graph:
    names = {spec.name for spec in graph.outputs}
    own = {node.output: node.inputs[0] for node in graph.nodes if _is_identity(node) and node.output not in names}
    own_ways = dict(own)  # shortened as they are walked, so that long chains cost nothing
    sources = outer.new_child(own_ways)

    if not any(sources.maps):
        nodes = tuple(with_subgraphs(node, lambda inner: _bypassed(inner, sources)) for node in graph.nodes)
        return replace(graph, nodes=nodes)

    def resolve(name: str) -> str:
        passed: dict[str, None] = {}  # an ordered set
        while name in sources and name not in passed:
            passed[name] = None
            name = sources[name]
        own_ways.update(dict.fromkeys(passed, name))
        return name

    nodes = tuple(
        replace(with_subgraphs(node, lambda inner: _bypassed(inner, sources)), inputs=tuple(map(resolve, node.inputs)))
        for node in graph.nodes
        if node.output not in own
    )
    outputs = tuple(replace(spec, name=resolve(spec.name)) for spec in graph.outputs)
    return replace(graph, nodes=nodes, outputs=outputs)


def _is_identity(node: Node) -> bool:
    return node.op_type == "Identity" and not node.domain and len(node.inputs) == 1 and bool(node.inputs[0])
