"""Which groups ONNX Runtime computes in integers: the graphs that it makes, with and without integers exposed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ptqjax.ir import Graph, Node


@dataclass(frozen=True, kw_only=True, slots=True)
class Fusions:
    """The graphs that ONNX Runtime and we make of a model."""

    plain: Graph
    """The runtime's, of the model as it is."""
    exposed: Graph
    """The runtime's, of the model whose outputs are all quantized tensors."""
    foreseen: Graph
    """Ours."""


def is_seen_in_integers(fusions: Fusions, tensor: str, operator: str) -> bool:
    """Tells whether the tensor was exposed from an operator that the model as it is has no fewer of."""
    producer = fusions.exposed.producers.get(tensor)
    while producer is not None and producer.op_type == "Transpose":  # kernels may work channels last
        producer = fusions.exposed.producers.get(producer.inputs[0])
    is_same = producer is not None and _kind(producer) == operator
    return is_same and operators(fusions.plain)[operator] >= operators(fusions.exposed)[operator]


def otherwise_fused(fusions: Fusions, unverified: Sequence[str], *, is_equal: bool = False) -> list[str]:
    """Returns warnings of integer operators that the runtime has in another number than foreseen.

    Args:
        fusions: The graphs.
        unverified: The tensors that the runtime computes otherwise where they are exposed; they are named.
        is_equal: Whether all integers and outputs were equal all the same: then it makes no difference which operators
            compute them, and their number is no warning.
    """
    plain, seen, foreseen = (operators(graph) for graph in (fusions.plain, fusions.exposed, fusions.foreseen))
    warnings = []
    for name in sorted(filter(_is_integer, {*plain, *seen, *foreseen})):
        if plain[name] != seen[name]:
            warnings.append(
                f"exposing the integers changes how many {name} there are: {plain[name]}, {seen[name]} exposed; "
                "the groups where that is so say nothing about the integer kernels"
            )
        if plain[name] != foreseen[name] and not is_equal:
            warnings.append(
                f"ONNX Runtime computes {plain[name]} groups by {name}, and the simulation {foreseen[name]}: there the "
                "two may differ by single steps; `ptqjax evaluate` says what the file is worth in the runtime"
            )
    if unverified:
        named = ", ".join(unverified)
        warnings.append(f"{len(unverified)} tensors were foreseen as integers, and not seen computed so: {named}")
    return warnings


# Operators that the runtime computes through tables, to the same integers as in float: left alone by `fuse_quantized`.
_TABLES = ("QLinearConcat", "QLinearLeakyRelu", "QLinearSigmoid", "QLinearWhere", "QuantizeLinear")


def _is_integer(operator: str) -> bool:
    return operator == "MatMulIntegerToFloat" or (operator.startswith("Q") and operator not in _TABLES)


def operators(graph: Graph) -> Counter[str]:
    """Returns how many nodes of each operator there are; variants for channels last count as the same."""
    return Counter(_kind(node) for node in graph.nodes)


def _kind(node: Node) -> str:
    return node.op_type.removeprefix("Nhwc")
