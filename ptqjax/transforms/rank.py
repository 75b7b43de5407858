"""How many axes a tensor has: as much of shape inference as it takes to know which axis counts channels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ptqjax.ir import Model, Node

_KEEPS_RANK = frozenset({
    "AveragePool", "BatchNormalization", "Cast", "Clip", "DequantizeLinear", "Dropout", "Elu", "Erf",
    "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "LayerNormalization", "LeakyRelu",
    "MaxPool", "Neg", "PRelu", "Pad", "QuantizeLinear", "Relu", "Selu", "Sigmoid", "Slice", "Softmax", "Sqrt", "Tanh",
    "Transpose", "Resize", "Split", "Upsample",
})  # fmt: skip
_WIDEST = frozenset({"Add", "Sub", "Mul", "Div", "Min", "Max", "Sum"})
_ALIKE = frozenset({"Concat"})  # one known input is enough
_DOMAINS = ("", "com.microsoft")  # the runtime has its own QuantizeLinear and DequantizeLinear
_MATRIX = frozenset({"Gemm", "Flatten"})


def ranks_of(model: Model) -> dict[str, int]:
    """Returns the number of axes of each tensor for which it follows from the inputs and the operators; no guesses."""
    ranks = {spec.name: len(spec.shape) for spec in model.graph.inputs if spec.shape is not None}
    ranks |= {name: len(value.shape) for name, value in model.params.items()}
    ranks |= {name: value.ndim for name, value in model.graph.constant_values.items()}
    for node in model.graph.nodes:
        rank = None if node.domain not in _DOMAINS else _rank(model, node, ranks)
        if rank is not None:
            ranks |= dict.fromkeys(
                (name for name in node.outputs[: None if node.op_type == "Split" else 1] if name), rank
            )
    return ranks


def _rank(model: Model, node: Node, ranks: Mapping[str, int]) -> int | None:
    known = [ranks.get(name) for name in node.inputs]
    if node.op_type in _MATRIX:
        return 2
    if node.op_type in {"Conv", "ConvTranspose"}:
        return known[1]
    if node.op_type in _KEEPS_RANK or (node.op_type == "MatMul" and known[1] == 2):  # noqa: PLR2004  a matrix
        return known[0]
    if node.op_type in _ALIKE:
        return next((rank for rank in known if rank is not None), None)
    if node.op_type == "Reshape" or node.op_type.startswith("Reduce"):
        return _reshaped_rank(model, node, known[0])
    return max(known) if node.op_type in _WIDEST and None not in known else None  # pyright: ignore[reportArgumentType]


def _reshaped_rank(model: Model, node: Node, rank: int | None) -> int | None:
    """Returns the rank of a Reshape or reduction; None where shape or axes are computed, or the axes are not stated."""
    second = next(iter(node.inputs[1:]), "")
    stated = model.graph.constant_values.get(second) if second else node.attribute("axes")
    if node.op_type == "Reshape":
        return None if stated is None else int(np.size(stated))
    if rank is None or node.attribute("keepdims", 1):
        return rank
    return rank - int(np.size(stated)) if stated is not None and np.size(stated) else None
