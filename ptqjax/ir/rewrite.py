"""How a model becomes another: new nodes and arrays in, a verified model without dead parts out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ptqjax.errors import ModelError
from ptqjax.ir.graph import Constant, Graph, Model, Node, Statistics, captured, place_of
from ptqjax.ir.verify import require_one_producer, verify


def rebuild(
    model: Model,
    *,
    nodes: Iterable[Node] | None = None,
    params: Mapping[str, Any] | None = None,
    constants: Mapping[str, Constant] | None = None,
    statistics: Mapping[str, Statistics] | None = None,
) -> Model:
    """Returns `model` with the given parts in place of its own: sorted, stripped of what nothing reads, verified.

    Args:
        model: The model that the other parts come from.
        nodes: All nodes, in any order; nodes that no graph output needs are dropped.
        params: All parameters by name (may hold dead ones, which are dropped).
        constants: All constants by name (likewise).
        statistics: All statistics by tensor (likewise).

    Raises:
        ModelError: The result breaks an invariant, or its nodes form a cycle.
    """
    graph = model.graph
    params = dict(model.params if params is None else params)
    constants = dict(graph.constants if constants is None else constants)
    statistics = dict(model.statistics if statistics is None else statistics)
    live = _needed(sort_topologically(graph.nodes if nodes is None else nodes), graph.output_names)
    read = {name for node in live for name in (*node.inputs, *captured(node))} | graph.output_names
    written = {output for node in live for output in node.outputs} | {spec.name for spec in graph.inputs}
    kept_params = {name: value for name, value in params.items() if name in read}
    new_graph = Graph(
        name=graph.name,
        inputs=graph.inputs,
        outputs=graph.outputs,
        nodes=live,
        constants=tuple(sorted((name, value) for name, value in constants.items() if name in read)),
        parameters=tuple(sorted(kept_params)),
        opsets=graph.opsets,
        ir_version=graph.ir_version,
        metadata=graph.metadata,
    )
    kept_statistics = {name: value for name, value in statistics.items() if name in written}
    return verify(Model(graph=new_graph, params=kept_params, statistics=kept_statistics))


def sort_topologically(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """Returns the nodes with each after the producers of what it reads; otherwise in the given order.

    Raises:
        ModelError: The nodes form a cycle, or two produce one tensor; the message names one of them.
    """
    nodes = tuple(nodes)
    require_one_producer(nodes)
    producer = {output: node for node in nodes for output in node.outputs if output}
    state: dict[int, bool] = {}  # node -> done; present and False while its inputs are being visited
    ordered: list[Node] = []
    for root in nodes:
        stack = [(root, False)]
        while stack:
            node, inputs_done = stack.pop()
            if inputs_done:
                state[id(node)] = True
                ordered.append(node)
                continue
            if id(node) in state:
                if not state[id(node)]:
                    raise ModelError(
                        f"{place_of(node)} reads, through other nodes, what it produces: the graph is cyclic"
                    )
                continue
            state[id(node)] = False
            stack.append((node, True))
            for name in reversed((*node.inputs, *captured(node))):
                before = producer.get(name)
                if before is not None and not state.get(id(before), False):
                    stack.append((before, False))
    return tuple(ordered)


def _needed(nodes: tuple[Node, ...], outputs: frozenset[str]) -> tuple[Node, ...]:
    wanted = set(outputs)
    kept: list[Node] = []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            kept.append(node)
            wanted.update((*node.inputs, *captured(node)))
    return tuple(reversed(kept))
