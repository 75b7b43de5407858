"""Ids that a model is given, held against the tables that it looks them up in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ptqjax.errors import DataError
from ptqjax.ir import Graph, Node, place_of

_KEEP_IDS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def check_ids(graph: Graph, params: Mapping[str, Any], inputs: Mapping[str, Any], place: str) -> None:
    """Checks that ids fit the tables in which they are looked up as they are; others are not looked at.

    Raises:
        DataError: An id is none of a table, where ONNX Runtime ends with an error; JAX would take the nearest row.
    """
    for name, value in inputs.items():
        if np.dtype(value.dtype).kind not in "iu" or not value.size:
            continue
        for node in _look_ups(graph, name):
            if node.inputs[0] in params:
                size = params[node.inputs[0]].shape[node.attribute("axis", 0)]
                _check(np.asarray(value), size, f"{place}: input '{name}'", node)


def _look_ups(graph: Graph, name: str) -> Iterator[Node]:
    """Yields the Gathers that read a tensor, or what it is cast or reshaped to, as ids."""
    for node in graph.readers.get(name, ()):
        if node.op_type == "Gather" and not node.domain and node.inputs[1] == name:
            yield node
        elif node.op_type in _KEEP_IDS and not node.domain and node.inputs[0] == name:
            yield from _look_ups(graph, node.output)


def _check(ids: np.ndarray, size: int, what: str, node: Node) -> None:
    lowest, highest = int(ids.min()), int(ids.max())
    wrong = highest if highest >= size else lowest
    if not -size <= wrong < size:
        raise DataError(
            f"{what} holds the id {wrong}; {place_of(node)} looks it up in '{node.inputs[0]}', which has {size} rows: "
            f"expected {-size} to {size - 1}; check that data and model are of one vocabulary"
        )
