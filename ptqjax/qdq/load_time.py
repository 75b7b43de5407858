"""Weights that a runtime dequantizes once, when it loads a file, and not in each run."""

from __future__ import annotations

import numpy as np

from ptqjax.ir import Model, Node, Record, Report, fresh_name, rebuild

_FLOAT = 1  # the number of float32 as an element type in ONNX
_READERS = frozenset(["GRU", "Gather", "If", "LSTM", "Loop", "RNN", "Scan"])  # compute in float whatever stands before
_PRODUCTS = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])


def dequantize_at_load(model: Model, *, with_products: bool = False) -> tuple[Model, Report]:
    """Returns the QDQ `model` with Cast and Mul in place of DequantizeLinear in front of floats, and a report.

    ONNX Runtime computes DequantizeLinear of a parameter in each run, since it might become part of an integer kernel;
    in front of an LSTM it never does. A Cast and a Mul of constants are computed when the file is loaded, to the same
    bits: q s. Reading such a file gives DequantizeLinear again (`onnx_io`). Left alone are zero points other than 0,
    and blocks. Arrays must be concrete. One record for each such DequantizeLinear.

    Args:
        model: The QDQ model.
        with_products: Whether weights of products that read floats are dequantized so, too: files are as small, and
            kernels those of the float model.
    """
    nodes: list[Node] = []
    params, report = dict(model.params), []
    for node in model.graph.nodes:
        if not _is_for_floats(model, node, with_products=with_products):
            nodes.append(node)
            continue
        reason = _objection(model, node)
        report.append(_record(node, reason))
        if reason:
            nodes.append(node)
            continue
        codes, scale = node.inputs[:2]
        steps = fresh_name(model.graph, f"{node.output}_steps")
        nodes.append(Node(op_type="Cast", inputs=(codes,), outputs=(steps,), attributes=(("to", _FLOAT),)))
        nodes.append(Node(op_type="Mul", inputs=(steps, scale), outputs=node.outputs))
        params[scale] = _spread(np.asarray(params[scale]), np.ndim(params[codes]), node.attribute("axis", 1))
    return rebuild(model, nodes=nodes, params=params), tuple(report)


def _is_for_floats(model: Model, node: Node, *, with_products: bool) -> bool:
    if node.op_type != "DequantizeLinear" or not all(name in model.params for name in node.inputs):
        return False
    readers = model.graph.readers.get(node.output, ())
    is_read_so = all(
        reader.op_type in _READERS or (with_products and _multiplies_floats(model, reader)) for reader in readers
    )
    return bool(readers) and is_read_so and node.output not in model.graph.output_names


def _multiplies_floats(model: Model, node: Node) -> bool:
    """Tells whether a product reads an activation that nothing dequantizes."""
    before = model.graph.producers.get(node.inputs[0])
    return node.op_type in _PRODUCTS and (before is None or before.op_type != "DequantizeLinear")


def _objection(model: Model, node: Node) -> str:
    scale, *zero_points = node.inputs[1:]
    if node.attribute("block_size"):
        return "a scale for each block"
    if any(np.any(np.asarray(model.params[name])) for name in zero_points):
        return "zero points other than 0"
    return "" if model.graph.num_readers(scale) == 1 else "the scale is read elsewhere as well"


def _spread(scale: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """Returns scales in a shape that broadcasts against their tensor."""
    if scale.ndim == 0:
        return scale
    shape = [1] * rank
    shape[axis] = scale.size
    return scale.reshape(shape)


def _record(node: Node, reason: str) -> Record:
    return Record(
        transform="dequantize_at_load",
        done=not reason,
        what=f"dequantized {'in each run' if reason else 'when the file is loaded'}",
        where=(node.output,),
        reason=reason,
    )
