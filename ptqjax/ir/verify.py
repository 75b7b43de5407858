"""The invariants of a model, checked after reading and after every rewrite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ptqjax.errors import ModelError
from ptqjax.ir.graph import Graph, Model, Node, captured, place_of


def verify(model: Model) -> Model:
    """Returns `model` unchanged, if it keeps the invariants.

    They are: every tensor is written once; every tensor read exists and comes from an earlier node; every graph output
    exists; `graph.parameters` and `params` name the same tensors.

    Raises:
        ModelError: One of them is broken; the message names the node and the tensor.
    """
    _verify_names(model.graph)
    _verify_order(model.graph)
    if set(model.graph.parameters) != set(model.params):
        surplus = sorted(set(model.params) - set(model.graph.parameters))
        missing = sorted(set(model.graph.parameters) - set(model.params))
        raise ModelError(f"the graph and its parameters disagree: missing {missing}, surplus {surplus}")
    return model


def require_one_producer(nodes: Iterable[Node]) -> None:
    """Checks that no two nodes produce one tensor.

    Raises:
        ModelError: Two do; the message names both.
    """
    producers: dict[str, Node] = {}
    for node in nodes:
        for output in filter(None, node.outputs):
            before = producers.setdefault(output, node)
            if before is not node or node.outputs.count(output) > 1:
                raise ModelError(
                    f"tensor '{output}' is produced 2 times, by {place_of(before)} and by {place_of(node)}; expected "
                    "one producer: rename one of the two results, and what reads it"
                )


def _verify_names(graph: Graph) -> None:
    written = Counter(
        [spec.name for spec in graph.inputs]
        + [name for name, _ in graph.constants]
        + list(graph.parameters)
        + [output for node in graph.nodes for output in node.outputs if output]
    )
    twice = [name for name, count in written.items() if count > 1]
    if twice:
        raise ModelError(
            f"tensor '{twice[0]}' is produced {written[twice[0]]} times; every tensor must have one producer"
        )
    absent = [spec.name for spec in graph.outputs if spec.name not in written]
    if absent:
        raise ModelError(f"graph output '{absent[0]}' is produced by no node, input or initializer")


def _verify_order(graph: Graph) -> None:
    known = {spec.name for spec in graph.inputs} | set(graph.constant_values) | set(graph.parameters)
    for node in graph.nodes:
        for name in (*node.inputs, *captured(node)):
            if name and name not in known:
                later = "is produced by a later node" if name in graph.producers else "is produced by nothing"
                raise ModelError(
                    f"{place_of(node)} reads tensor '{name}', which {later}; the graph is dangling or cyclic"
                )
        known.update(output for output in node.outputs if output)
