"""Weights at which 16-bit kernels saturate: what differs on an x86 without VNNI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptqjax.ir import Model, Node, value_of

_NAMED = 3  # weights in the warning
_WEIGHT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3, "MatMulIntegerToFloat": 1}  # position among the inputs


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
    to more than 128, or its negative ones to less than -128. A product's terms are in the order of the sum, a
    convolution's with channels last. Depthwise kernels add in 32 bits. int8 inputs are made uint8 by the runtime.

    Args:
        fused: A model with integer operators, as `fuse_quantized` returns it, with concrete weights.
    """
    found = (_saturation(fused, node) for node in fused.graph.nodes if node.op_type in _WEIGHT)
    return tuple(each for each in found if each is not None)


def warn_of_saturation(weights: Sequence[Saturation]) -> list[str]:
    """Returns a warning that says where x86 kernels without VNNI may saturate, if they may anywhere."""
    if not weights:
        return []
    named = ", ".join(f"{each.weight}: {100 * each.fraction:.1f} % of its pairs" for each in weights[:_NAMED])
    shown = named + (f", and {len(weights) - _NAMED} more" if len(weights) > _NAMED else "")
    warning = (
        f"on an x86 without VNNI, ONNX Runtime's default kernels may saturate at {len(weights)} weights ({shown}); "
        "there, open sessions with the entry session.x64quantprecision=1, as ptqjax does"
    )
    return [warning]


def _saturation(fused: Model, node: Node) -> Saturation | None:
    name = node.inputs[_WEIGHT[node.op_type]]
    weight = value_of(fused, name)
    if weight is None or weight.dtype != np.int8:
        return None
    if node.op_type == "QLinearConv" and weight.shape[1] == 1:
        return None
    pairs = _pairs(_terms(np.asarray(weight), node))
    info = np.iinfo(np.int16)
    high = 255 * np.maximum(pairs, 0).sum(-1) > info.max
    low = 255 * np.minimum(pairs, 0).sum(-1) < info.min
    num_saturating = int(np.count_nonzero(high | low))
    if not num_saturating:
        return None
    return Saturation(
        weight=name,
        operator=node.op_type,
        output=node.output,
        num_pairs=high.size,
        num_saturating=num_saturating,
    )


def _terms(weight: np.ndarray, node: Node) -> np.ndarray:
    """Returns the weights of each sum in the order in which they are added, [sums, terms]."""
    if node.op_type == "QLinearConv":
        return np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    by_sum = weight if node.attribute("transB", 0) else np.swapaxes(weight, -1, -2)
    return by_sum.reshape(-1, by_sum.shape[-1])


def _pairs(terms: np.ndarray) -> np.ndarray:
    """Returns the terms in twos, [sums, pairs, 2], in 32 bits; an odd one is paired with zero."""
    padded = np.pad(terms.astype(np.int32), ((0, 0), (0, terms.shape[1] % 2)))
    return padded.reshape(len(terms), -1, 2)
