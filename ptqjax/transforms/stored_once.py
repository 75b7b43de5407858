"""A table that a layer multiplies by as well is stored once, although each has a parameter of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ptqjax.ir import Model, Node, Record, Report, rebuild

_MATRIX = 2  # axes


def store_once(model: Model) -> tuple[Model, Report]:
    """Returns the QDQ `model` in which parameters with the numbers of a table are that table, and a report.

    A table is a parameter that Gather takes rows of, dequantized or not; its scales are one as well, where they are
    gathered. Of a parameter that is a table transposed, a Transpose is left, which a runtime computes when it loads the
    file. Arrays must be concrete. One record for each parameter that is gone.
    """
    renamed: dict[str, str] = {}
    made: list[Node] = []
    report: list[Record] = []
    tables = list(dict.fromkeys(_tables(model)))
    for name in sorted(model.params):
        table = next((each for each in tables if each != name and _is_as(model, each, name)), None)
        if table is None or table in renamed:
            continue
        if _is_equal(model.params[table], model.params[name]):
            renamed[name] = table
        else:
            made.append(Node(op_type="Transpose", inputs=(table,), outputs=(name,), attributes=(("perm", (1, 0)),)))
        report.append(_record(table, name))
    if not report:
        return model, ()
    nodes = [replace(node, inputs=tuple(renamed.get(each, each) for each in node.inputs)) for node in model.graph.nodes]
    written = {node.output for node in made}
    params = {name: value for name, value in model.params.items() if name not in written}
    return rebuild(model, nodes=[*made, *nodes], params=params), tuple(report)


def _tables(model: Model) -> Iterator[str]:
    for node in model.graph.nodes:
        if node.op_type != "Gather" or node.domain:
            continue
        producer = model.graph.producers.get(node.inputs[0])
        is_dequantized = producer is not None and producer.op_type == "DequantizeLinear"
        table = producer.inputs[0] if producer is not None and is_dequantized else node.inputs[0]
        if table in model.params:
            yield table


def _is_as(model: Model, table: str, name: str) -> bool:
    one, other = model.params[table], model.params[name]
    return one.dtype == other.dtype and (_is_equal(one, other) or _is_transposed(one, other))


def _is_equal(one: Any, other: Any) -> bool:
    return np.shape(one) == np.shape(other) and np.array_equal(one, other)


def _is_transposed(one: Any, other: Any) -> bool:
    is_matrix = np.ndim(one) == np.ndim(other) == _MATRIX and np.dtype(one.dtype).kind != "f"
    return is_matrix and np.shape(one) == np.shape(other)[::-1] and np.array_equal(np.transpose(one), other)


def _record(table: str, name: str) -> Record:
    return Record(
        transform="store_once", done=True, what="stored once", where=(name, table), reason=f"the numbers of '{table}'"
    )
