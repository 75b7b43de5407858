"""How many axes a tensor has: as much of shape inference as it takes to know which axis counts channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ptqjax.ir import Model, Node

_KEEPS_RANK = frozenset({
    "AveragePool", "BatchNormalization", "Cast", "Clip", "Dropout", "Elu", "GlobalAveragePool", "GlobalMaxPool",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MaxPool", "Neg", "PRelu", "Pad", "Relu", "Selu", "Sigmoid",
    "Softmax", "Tanh", "Transpose",
})  # fmt: skip
_WIDEST = frozenset({"Add", "Sub", "Mul", "Div", "Min", "Max", "Sum"})
_MATRIX = frozenset({"Gemm", "Flatten"})


def ranks_of(model: Model) -> dict[str, int]:
    """Returns the number of axes of each tensor for which it follows from the inputs and the operators; no guesses."""
    ranks = {spec.name: len(spec.shape) for spec in model.graph.inputs if spec.shape is not None}
    ranks |= {name: len(value.shape) for name, value in model.params.items()}
    ranks |= {name: value.ndim for name, value in model.graph.constant_values.items()}
    for node in model.graph.nodes:
        rank = None if node.domain else _rank(node, ranks)
        if rank is not None:
            ranks[node.output] = rank
    return ranks


def _rank(node: Node, ranks: Mapping[str, int]) -> int | None:
    known: Callable[[int], int | None] = lambda index: ranks.get(node.inputs[index])  # noqa: E731
    if node.op_type in _MATRIX:
        return 2
    if node.op_type in {"Conv", "ConvTranspose"}:
        return known(1)
    if node.op_type in _KEEPS_RANK:
        return known(0)
    if node.op_type == "MatMul" and known(1) == 2:  # noqa: PLR2004  a matrix
        return known(0)
    if node.op_type in _WIDEST and all(name in ranks for name in node.inputs):
        return max(ranks[name] for name in node.inputs)
    return None
