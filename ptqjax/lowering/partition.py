"""A graph in two: what can be compiled, and what comes after a shape that depends on data."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from ptqjax.ir import Graph, Node, TensorSpec, captured


@lru_cache(maxsize=128)  # a graph keys the compilation cache: the same one again
def cut_before(graph: Graph, tensors: frozenset[str]) -> tuple[Graph, Graph]:
    """Returns the graph without what depends on the nodes that write `tensors`, and the rest.

    The outputs of the first are inputs of the second: what the second reads of the first and of the graph's inputs.
    Together they compute the graph's outputs.
    """
    first, second = _divided(graph, tensors)
    written = {name for node in second for name in node.outputs}
    wanted = [name for node in second for name in _read(node) if name and name not in written]
    wanted += [spec.name for spec in graph.outputs if spec.name not in written]
    available = {name for node in first for name in node.outputs} | {spec.name for spec in graph.inputs}
    crossing = tuple(unspecified(name) for name in dict.fromkeys(wanted) if name in available)
    return _with_nodes(graph, first, outputs=crossing), _with_nodes(graph, second, inputs=crossing)


def _divided(graph: Graph, tensors: frozenset[str]) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    dependent: set[str] = set()
    first, second = [], []
    for node in graph.nodes:
        if tensors.intersection(node.outputs) or dependent.intersection(_read(node)):
            dependent.update(filter(None, node.outputs))
            second.append(node)
        else:
            first.append(node)
    return tuple(first), tuple(second)


def _with_nodes(
    graph: Graph,
    nodes: tuple[Node, ...],
    *,
    inputs: tuple[TensorSpec, ...] | None = None,
    outputs: tuple[TensorSpec, ...] | None = None,
) -> Graph:
    outputs = graph.outputs if outputs is None else outputs
    read = {name for node in nodes for name in _read(node)} | {spec.name for spec in outputs}
    return replace(
        graph,
        nodes=nodes,
        inputs=graph.inputs if inputs is None else inputs,
        outputs=outputs,
        parameters=tuple(name for name in graph.parameters if name in read),
    )


def _read(node: Node) -> tuple[str, ...]:
    return (*node.inputs, *captured(node))


def unspecified(name: str) -> TensorSpec:
    """Returns a record of a tensor between the two: only its name is looked at."""
    return TensorSpec(name=name, dtype=np.dtype(np.float32), shape=None)
