"""What a graph computes from constants alone, computed when it is read.

ONNX's own evaluator computes it, in NumPy. How large a result can become is bounded first: a file from a stranger may
ask for any size in a few bytes. Where that is too much, or the evaluator fails, the node stays. Nodes that quantize
stay as well, so that a quantized file keeps its form, and so does what draws random numbers.
"""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ptqjax.ir import Constant, Graph, Node, TensorSpec, captured
from ptqjax.onnx_io.element_types import as_cast, element_types
from ptqjax.onnx_io.identities import with_subgraphs
from ptqjax.onnx_io.protos import node_proto
from ptqjax.onnx_io.result_size import is_bounded, largest_result
from ptqjax.onnx_io.schema import schema

_FREE = 2**22  # bytes that a result may have whatever it is made of
_GROWTH = 2  # and how often larger than what it is made of it may be beyond
_WORK = 2**28  # bytes that all nodes together may read and write
_WORK_FACTOR = 16  # or this many times what the graph's tensors take


@dataclass(kw_only=True, slots=True)
class _Budget:
    """What folding may still cost."""

    left: int
    """Bytes to read and write."""


def folded(graph: Graph, num_bytes: int | None = None) -> Graph:
    """Returns the graph with constants in place of the nodes, here and in subgraphs, that compute from constants alone.

    Shapes of inputs that are declared without symbols count as constants. Nodes come sorted, and leave so. What is
    spent is bounded by the size of the tensors, or by `num_bytes`, where these share memory.
    """
    size = _num_bytes(graph)
    budget = _Budget(left=_WORK + _WORK_FACTOR * (size if num_bytes is None else min(size, num_bytes)))
    return _folded(graph, ChainMap(), ChainMap(), budget)


def _num_bytes(graph: Graph) -> int:
    own = sum(value.nbytes for value in graph.constant_values.values())
    return own + sum(_num_bytes(inner) for node in graph.nodes for inner in node.subgraphs)


def _folded(
    graph: Graph, outer: ChainMap[str, np.ndarray], outer_shaped: ChainMap[str, np.ndarray], budget: _Budget
) -> Graph:
    """Returns the graph with nodes folded.

    Args:
        graph: One of the model's graphs.
        outer: The constants of the graphs around it.
        outer_shaped: The inputs of these of which the shape is known: arrays whose elements say nothing.
        budget: What may still be spent; is spent.
    """
    own = dict(graph.constant_values)
    values, shaped = outer.new_child(own), outer_shaped.new_child(_with_known_shape(graph))
    types = element_types(graph)
    kept: list[Node] = []
    for each in graph.nodes:
        node = as_cast(each, types) if each.inputs and each.inputs[0] in values else each
        inner = with_subgraphs(node, lambda body: _folded(body, values, shaped, budget))
        results = _results(inner, graph.opset(), values, shaped, budget)
        if results is None:
            kept.append(inner)
        else:
            own.update((name, result) for name, result in zip(node.outputs, results, strict=False) if name)
    old = dict(graph.constants)
    read = {name for node in kept for name in (*node.inputs, *captured(node))} | graph.output_names
    constants = {name: old.get(name) or Constant(value) for name, value in own.items() if name in read}
    outputs = tuple(_typed(spec, own.get(spec.name)) for spec in graph.outputs)
    return replace(graph, nodes=tuple(kept), constants=tuple(sorted(constants.items())), outputs=outputs)


def _typed(spec: TensorSpec, value: np.ndarray | None) -> TensorSpec:
    """Returns an output that declares no type with that of its constant: no node is left to infer it from."""
    if value is None or spec.kind != "unknown":
        return spec
    return TensorSpec(name=spec.name, dtype=value.dtype, shape=value.shape)


def _with_known_shape(graph: Graph) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for spec in graph.inputs:
        sizes = [size for size in spec.shape or () if isinstance(size, int)]
        if spec.kind == "tensor" and spec.shape is not None and len(sizes) == len(spec.shape):
            try:
                found[spec.name] = np.broadcast_to(np.zeros((), spec.dtype), sizes)
            except ValueError:  # larger than any array
                continue
    return found


def _results(
    node: Node,
    opset: int,
    values: MutableMapping[str, np.ndarray],
    shaped: MutableMapping[str, np.ndarray],
    budget: _Budget,
) -> Sequence[np.ndarray] | None:
    """Returns what a node computes, if it does so from constants, within the budget; else None."""
    if node.domain or not is_bounded(node.op_type) or node.attribute("broadcast", 0):
        return None  # before opset 7 an axis said how shapes meet; the evaluator does not know it
    is_shape = node.op_type in {"Shape", "Size"}
    known = ChainMap(values, shaped) if is_shape else values
    if not node.inputs or any(name and name not in known for name in node.inputs):
        return None
    inputs = [known[name] if name else None for name in node.inputs]
    num_read = 0 if is_shape else sum(value.nbytes for value in inputs if value is not None)
    size = largest_result(node, inputs)
    if size is None or size > max(_FREE, _GROWTH * num_read) or size + num_read > budget.left:
        return None
    budget.left -= size + num_read
    results = _evaluated(node, opset, inputs)
    if results is None or len(results) < len(node.outputs) or not _are_of_type(results, node, opset, inputs):
        return None
    return [_frozen(result, num_read) for result in results]


def _evaluated(node: Node, opset: int, inputs: list[np.ndarray | None]) -> Sequence[np.ndarray] | None:
    """Returns what ONNX's evaluator makes of a node; None where it fails."""
    from onnx.reference.ops import load_op  # noqa: PLC0415 (slow to import, and few models need it)

    settings = {"opsets": {"": opset}, "new_ops": None, "log": lambda *_: None, "verbose": 0, "evaluator_cls": None}
    proto = node_proto(node, opset)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = load_op("", node.op_type, opset)(proto, settings).run(*inputs)
    except Exception:  # noqa: BLE001 (whatever it does not understand stays a node)
        return None
    arrays = [np.asarray(result) for result in results if isinstance(result, np.ndarray | np.generic)]
    return arrays if len(arrays) == len(results) else None


def _are_of_type(results: Sequence[np.ndarray], node: Node, opset: int, inputs: Sequence[np.ndarray | None]) -> bool:
    """Tells whether results have the element types of the inputs to which the schema ties them: NumPy widens sums."""
    found = schema(node.op_type, opset, node.domain)
    if found is None:
        return False
    types = {form.type_str: value.dtype for form, value in zip(found.inputs, inputs, strict=False) if value is not None}
    return all(
        types.get(form.type_str, result.dtype) == result.dtype
        for form, result in zip(found.outputs, results, strict=False)
    )


def _frozen(result: np.ndarray, num_read: int) -> np.ndarray:
    """Returns a result, read-only; a copy where it is a small part of what it was computed from."""
    array = result.copy() if 2 * result.nbytes < num_read and result.base is not None else result.view()
    array.flags.writeable = False
    return array
