"""How many axes a tensor has: as much of shape inference as it takes to know which axis counts channels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ptqjax.ir import Model, Node

_KEEPS_RANK = frozenset({
    "Abs", "AveragePool", "BatchNormalization", "Cast", "Clip", "Cos", "DequantizeLinear", "Dropout", "Elu", "Erf",
    "Exp", "Gelu", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "LayerNormalization",
    "LeakyRelu", "Log", "MaxPool", "Neg", "PRelu", "Pad", "QuantizeLinear", "RMSNormalization", "Reciprocal", "Relu",
    "Resize", "Selu", "Sigmoid", "SimplifiedLayerNormalization", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Tanh",
    "Tile", "Transpose", "Upsample",
})  # fmt: skip
_WIDEST = frozenset({"Add", "Div", "MatMul", "Max", "Min", "Mul", "Pow", "Sub", "Sum", "Where"})
_ALIKE = frozenset({"Concat"})  # one known input is enough
_DOMAINS = ("", "com.microsoft")  # the runtime has its own QuantizeLinear and DequantizeLinear
_MOVES = frozenset({"ConstantOfShape", "Expand", "Gather", "Reshape", "Squeeze", "Unsqueeze"})
_FIXED = {"Flatten": 2, "Gemm": 2, "Range": 1, "Shape": 1}


def ranks_of(model: Model) -> dict[str, int]:
    """Returns the number of axes of each tensor for which it follows from the inputs and the operators; no guesses."""
    ranks = {spec.name: len(spec.shape) for spec in model.graph.inputs if spec.shape is not None}
    ranks |= {name: len(value.shape) for name, value in model.params.items()}
    ranks |= {name: value.ndim for name, value in model.graph.constant_values.items()}
    lengths = {name: value.size for name, value in model.graph.constant_values.items() if value.ndim <= 1}
    for node in model.graph.nodes:
        lengths |= _length(model, node, ranks, lengths)
        rank = None if node.domain not in _DOMAINS else _rank(model, node, ranks, lengths)
        if rank is not None:
            ranks |= dict.fromkeys(
                (name for name in node.outputs[: None if node.op_type == "Split" else 1] if name), rank
            )
    return ranks


def _length(model: Model, node: Node, ranks: Mapping[str, int], lengths: Mapping[str, int]) -> dict[str, int]:
    """Returns how many numbers a row of sizes has, by its name; empty where the node computes no such row."""
    read = [lengths.get(name) for name in node.inputs]
    found: int | None = None
    if node.op_type == "Shape" and not node.attribute("start", 0) and node.attribute("end") is None:
        found = ranks.get(node.inputs[0])
    elif node.op_type == "Concat" and None not in read:
        found = sum(count for count in read if count is not None)
    elif node.op_type in {"Cast", "Identity", "Unsqueeze"}:  # a number becomes a row of one
        found = read[0]
    elif node.op_type == "Gather" and read[0] is not None:
        indices = model.graph.constant_values.get(node.inputs[1])
        found = indices.size if indices is not None and indices.ndim <= 1 else None
    return {} if found is None or node.domain else {node.output: found}


def _rank(model: Model, node: Node, ranks: Mapping[str, int], lengths: Mapping[str, int]) -> int | None:
    known = [ranks.get(name) for name in node.inputs]
    if node.op_type in _FIXED:
        return _FIXED[node.op_type]
    if node.op_type in {"Conv", "ConvTranspose"}:
        return known[1]
    if node.op_type in _KEEPS_RANK or (node.op_type == "MatMul" and known[1] == 2):  # noqa: PLR2004  a matrix
        return known[0]
    if node.op_type in _ALIKE:
        return next((rank for rank in known if rank is not None), None)
    if node.op_type in _MOVES or node.op_type.startswith("Reduce"):
        return _moved_rank(model, node, known, lengths)
    return max(rank for rank in known if rank is not None) if node.op_type in _WIDEST and None not in known else None


def _moved_rank(model: Model, node: Node, known: list[int | None], lengths: Mapping[str, int]) -> int | None:
    """Returns the rank of what moves values to other axes, or sums over some; None where it does not follow."""
    if node.op_type == "Gather":
        return None if known[0] is None or known[1] is None else known[0] + known[1] - 1
    if node.op_type in {"ConstantOfShape", "Expand"}:
        return lengths.get(node.inputs[-1])
    if node.op_type in {"Squeeze", "Unsqueeze"}:
        return _squeezed_rank(model, node, known[0])
    return _reshaped_rank(model, node, known[0], lengths)


def _reshaped_rank(model: Model, node: Node, rank: int | None, lengths: Mapping[str, int]) -> int | None:
    """Returns the rank of a Reshape or reduction; None where axes are computed or not stated, or nothing is known."""
    second = next(iter(node.inputs[1:]), "")
    stated = model.graph.constant_values.get(second) if second else node.attribute("axes")
    if node.op_type == "Reshape":
        return lengths.get(second) if stated is None else int(np.size(stated))
    if rank is None or node.attribute("keepdims", 1):
        return rank
    return rank - int(np.size(stated)) if stated is not None and np.size(stated) else None


def _squeezed_rank(model: Model, node: Node, rank: int | None) -> int | None:
    """Returns the rank of a Squeeze or Unsqueeze; None where its axes are computed or not stated."""
    stated = model.graph.constant_values.get(node.inputs[1]) if len(node.inputs) > 1 else node.attribute("axes")
    if rank is None or stated is None:
        return None
    return rank + int(np.size(stated)) * (1 if node.op_type == "Unsqueeze" else -1)
