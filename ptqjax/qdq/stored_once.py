"""What several read is stored once, although each has a parameter of its own: tables, recurrent weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ptqjax.ir import Model, Node, Record, Report, rebuild

_MATRIX = 2  # axes
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOVES = frozenset(
    {"Clip", "Concat", "Expand", "Flatten", "Identity", "Max", "Min", "Reshape", "Slice", "Split", "Squeeze"}
    | {"Transpose", "Unsqueeze"}
)
"""What passes on the values of weights, or bounds them, on their way to a product."""


def store_once(model: Model) -> tuple[Model, Report]:
    """Returns the QDQ `model` in which parameters with the numbers of a table are that table, and a report.

    A table is a parameter that Gather takes rows of, dequantized or not, its scales too, where they are gathered; and
    what is dequantized for no product, or cast, as the weights of recurrent operators: branches of an If may share it.
    Weights of two products, moved on the way or not, stay apart, since ONNX Runtime refuses one that integer layers
    share. Of a parameter that is a table transposed, a Transpose is left, which a runtime computes when it loads the
    file.

    Arrays must be concrete. One record for each parameter that is gone.
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
        is_for_floats = node.op_type == "DequantizeLinear" and _is_for_no_product(model, node)
        if (node.op_type in ("Cast", "Gather") or is_for_floats) and node.inputs[0] in model.params:
            yield node.inputs[0]


def _is_for_no_product(model: Model, dequantizer: Node) -> bool:
    is_matrix = np.ndim(model.params.get(dequantizer.inputs[0], 0)) >= _MATRIX
    return is_matrix and not any(_reaches_a_product(model, name) for name in dequantizer.outputs)


def _reaches_a_product(model: Model, tensor: str) -> bool:
    """Tells whether a product reads a tensor, or what is moved of it: a runtime looks through a Transpose as well."""
    seen = {tensor}
    left = [tensor]
    while left:
        for node in model.graph.readers.get(left.pop(), ()):
            if node.op_type in _PRODUCTS:
                return True
            further = [name for name in node.outputs if node.op_type in _MOVES and name not in seen]
            seen.update(further)
            left += further
    return False


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
