"""What a file from a stranger may not exceed: it must not make a reader run for ever."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from ptqjax.errors import ModelError

MAX_NODES = 200_000
"""Nodes of a model, those of subgraphs and of functions wherever they are called included."""

MAX_NESTING = 24
"""Subgraphs within subgraphs. Protobuf itself refuses to parse more than 33."""

OLDEST_OPSET, NEWEST_OPSET = 1, 28  # what meant something else before opset 6 has no lowering, and says so


def as_text(value: object) -> str:
    """Returns a name of a file; protobuf hands out those that are no text as bytes.

    Raises:
        ModelError: It is no text.
    """
    if isinstance(value, str):
        return value
    raise ModelError(f"it holds a name that is no UTF-8 text, {value!r}; the file is damaged: export it again")


def subgraphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yields the graphs among a node's attributes."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def nodes_within(nodes: object, depth: int = 0) -> Iterator[onnx.NodeProto]:
    """Yields nodes (a repeated field) and all those in their subgraphs, at any depth.

    Raises:
        ModelError: Subgraphs are nested too deeply.
    """
    if depth > MAX_NESTING:
        raise ModelError(f"its subgraphs are nested more than {MAX_NESTING} deep; no exporter writes such a model")
    for node in nodes:  # pyright: ignore[reportGeneralTypeIssues]
        yield node
        for graph in subgraphs_of(node):
            yield from nodes_within(graph.node, depth + 1)


def check_size(num_nodes: int) -> None:
    """Checks the number of a model's nodes.

    Raises:
        ModelError: There are too many.
    """
    if num_nodes > MAX_NODES:
        raise ModelError(f"it has {num_nodes} nodes, functions counted where they are called; at most {MAX_NODES} fit")


def check_opset(opsets: dict[str, int]) -> None:
    """Checks the version of ONNX's own operator set.

    Raises:
        ModelError: It is older or newer than those that are known here.
    """
    version = opsets.get("")
    if version is not None and not OLDEST_OPSET <= version <= NEWEST_OPSET:
        raise ModelError(
            f"it is of operator set {version}; {OLDEST_OPSET} to {NEWEST_OPSET} can be read: "
            "export it again, or convert it with onnx.version_converter"
        )
