"""Weights at which 16-bit kernels saturate: what differs on an x86 without VNNI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ptqjax.ir import Model, Node, rebuild, value_of
from ptqjax.kernels.pair_sums import OPERATORS, paired, saturates

_NAMED = 3  # weights in the warning
_WEIGHT = {  # position among the inputs
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "MatMulIntegerToFloat": 1,
    "MatMulInteger": 1,
    "DynamicQuantizeMatMul": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Saturation:
    """A weight at which kernels that add two products in 16 bits may saturate."""

    weight: str
    """The integer weight."""
    operator: str
    """What reads it."""
    output: str
    """The tensor that this computes."""
    num_pairs: int
    """How many pairs of products are added: all, for one position of the output."""
    num_saturating: int
    """How many of these exceed 16 bits for some integers of the input."""

    @property
    def fraction(self) -> float:
        """The fraction of pairs that may saturate."""
        return self.num_saturating / self.num_pairs


def saturating_weights(fused: Model) -> tuple[Saturation, ...]:
    """Returns the weights at which x86 kernels without VNNI may saturate, in the order of the graph.

    Those kernels (instruction VPMADDUBSW) add two products uint8 x int8 that are neighbours in their order of terms,
    and saturate at [-2**15, 2**15 - 1]. With inputs from 0 to 255, a pair can exceed it where its positive weights come
    to more than 128, or its negative ones to less than -128. `in_order_of_terms` says which are neighbours. Depthwise
    kernels add in 32 bits, those of uint8 x uint8 widen first. int8 inputs are made uint8 by the runtime.

    Args:
        fused: A model with integer operators, as `fuse_quantized` returns it, with concrete weights.
    """
    found = (_saturation(fused, node) for node in fused.graph.nodes if node.op_type in _WEIGHT)
    return tuple(each for each in found if each is not None)


def warn_of_saturation(weights: Sequence[Saturation]) -> list[str]:
    """Returns a warning that says where x86 kernels without VNNI may saturate, if they may anywhere."""
    if not weights:
        return []
    return [saturation_text([f"{each.weight}: {100 * each.fraction:.1f} % of its pairs" for each in weights])]


def saturation_text(weights: Sequence[str]) -> str:
    """Returns what to say of weights, each named in its own way; "" where there are none."""
    if not weights:
        return ""
    named = ", ".join(weights[:_NAMED]) + (f", and {len(weights) - _NAMED} more" if len(weights) > _NAMED else "")
    return (
        f"on an x86 without VNNI, ONNX Runtime's default kernels may saturate at {len(weights)} weights ({named}); "
        "there, open sessions with the entry session.x64quantprecision=1, or quantize for the target ort-cpu"
    )


def without_vnni(fused: Model) -> Model:
    """Returns the model with the operators whose sums may saturate replaced by such as do: what x86 without VNNI gives.

    They are of the domain `OPERATORS`, which `apply` knows.

    Args:
        fused: As for `saturating_weights`.
    """
    outputs = {each.output for each in saturating_weights(fused) if each.operator in _EMULATED}
    nodes = [replace(node, domain=OPERATORS) if node.output in outputs else node for node in fused.graph.nodes]
    if not outputs:
        return fused
    graph = replace(fused.graph, opsets=tuple(sorted({**dict(fused.graph.opsets), OPERATORS: 1}.items())))
    return rebuild(fused.replace(graph=graph), nodes=nodes)


_EMULATED = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat")


def is_depthwise(weight_shape: tuple[int, ...], group: int) -> bool:
    """Tells whether a Conv has one input and one output channel a group: such kernels add in 32 bits."""
    return weight_shape[1] == 1 and weight_shape[0] == group


def in_order_of_terms(weight: np.ndarray, op_type: str, *, is_turned: bool = False) -> np.ndarray:
    """Returns the weights of each sum in the order in which they are added, [sums, terms]; neighbours are paired.

    A convolution's terms have their channels last: the input channels of the first place of the kernel come first.
    A product's are in the order of its sum.

    Args:
        weight: [o, c / group, *kernel] of a convolution, [..., k, m] of a product.
        op_type: "Conv" or "QLinearConv", or the operator of a product.
        is_turned: Whether a product's weight is [m, k] (transB).
    """
    if op_type in {"Conv", "QLinearConv"}:
        return np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    by_sum = weight if is_turned else np.swapaxes(weight, -1, -2)
    return by_sum.reshape(-1, by_sum.shape[-1])


def in_order_of_weight(
    terms: np.ndarray, shape: tuple[int, ...], op_type: str, *, is_turned: bool = False
) -> np.ndarray:
    """Returns what `in_order_of_terms` was given, a weight of `shape`."""
    if op_type in {"Conv", "QLinearConv"}:
        return np.moveaxis(terms.reshape(shape[0], *shape[2:], shape[1]), -1, 1)
    return terms.reshape(shape) if is_turned else np.swapaxes(terms.reshape(*shape[:-2], shape[-1], shape[-2]), -1, -2)


def _saturation(fused: Model, node: Node) -> Saturation | None:
    name = node.inputs[_WEIGHT[node.op_type]]
    weight = value_of(fused, name)
    if weight is None or weight.dtype != np.int8:
        return None
    if node.op_type == "QLinearConv" and is_depthwise(weight.shape, int(node.attribute("group", 1))):
        return None
    terms = in_order_of_terms(np.asarray(weight), node.op_type, is_turned=bool(node.attribute("transB", 0)))
    found = saturates(paired(terms.astype(np.int32)))
    num_saturating = int(np.count_nonzero(found))
    if not num_saturating:
        return None
    return Saturation(
        weight=name,
        operator=node.op_type,
        output=node.output,
        num_pairs=found.size,
        num_saturating=num_saturating,
    )
