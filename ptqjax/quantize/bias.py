"""Biases: int32 integers whose scale follows from input and weight, and the guard against their overflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ptqjax.ir import Model, Node, Record, Report, bias_behind, is_one_per_output, is_private
from ptqjax.kernels.namespace import array_namespace
from ptqjax.quantize.encodings import Encoding, Encodings

LARGEST_CODE = 2**31 - 2**15
"""Largest integer of a bias: room for the sum that it is added to, and exact in float32."""

_BIAS_INPUT = 2  # of Conv, ConvTranspose and Gemm


@dataclass(frozen=True, kw_only=True, slots=True)
class BiasSite:
    """A bias that is added to a sum of products of quantized inputs and weights."""

    bias: str
    """The parameter."""
    input: str
    """The tensor that is multiplied with the weight."""
    weight: str
    """The weight, a parameter."""
    output: str
    """The tensor that the bias is added to and that the layer produces."""
    weight_axis: int
    """Axis of the weight that is the output channel, where the weight has a scale per channel."""
    axis: int
    """Axis of the bias that is the output channel."""
    repeats: int = 1
    """How often the weight's scales repeat along the bias (groups of a ConvTranspose)."""


def bias_sites(model: Model) -> tuple[BiasSite, ...]:
    """Returns the biases that can be int32 integers, in the order of the nodes; of the arrays only shapes matter.

    They are the third input of Conv, ConvTranspose and Gemm (alpha and beta 1), and the parameter in MatMul + Add; each
    a parameter that nothing else reads, with one number for each output channel, beside a weight that is a parameter.
    """
    sites = (_site(model, node) for node in model.graph.nodes)
    return tuple(site for site in sites if site is not None and _has_integers(model, site))


def bias_encoding(encodings: Mapping[str, Encoding], site: BiasSite) -> Encoding | None:
    """Returns the int32 encoding of a bias: scale = scale of the input * scale of the weight, zero point 0.

    None, which leaves the bias in float, where input or weight has no encoding, the weight's scales do not follow its
    output channels (blocks), or the bias has an encoding of its own. Enabled where both are.
    """
    x, w = encodings.get(site.input), encodings.get(site.weight)
    if x is None or w is None or site.bias in encodings or x.axis is not None or w.block_size is not None:
        return None
    if w.axis is not None and w.axis != site.weight_axis:
        return None
    xp = array_namespace(x.scale, w.scale)
    scale = x.scale * w.scale
    if w.axis is not None and site.repeats > 1:
        scale = xp.tile(scale, site.repeats)
    return Encoding(
        scale=scale,
        zero_point=xp.zeros_like(scale),
        qmin=xp.asarray(-LARGEST_CODE, dtype=np.float32),
        qmax=xp.asarray(LARGEST_CODE, dtype=np.float32),
        enabled=xp.logical_and(x.enabled, w.enabled),
        axis=None if w.axis is None else site.axis,
    )


def guard_biases(model: Model, encodings: Encodings) -> tuple[Encodings, Report]:
    """Returns encodings under which every bias fits into int32, and a record for each weight whose scale was raised.

    Where |b| / (s_x s_w) exceeds `LARGEST_CODE`, s_w is raised to |b| / (s_x `LARGEST_CODE`). Needs concrete arrays.

    Source: aimet-onnx 2.42, the first of its conditions; the others concern hardware that ONNX Runtime's CPU kernels
        do not stand for.
    """
    guarded, records = dict(encodings), []
    for site in bias_sites(model):
        encoding = bias_encoding(guarded, site)
        if encoding is None:
            continue
        weight = guarded[site.weight]
        old = np.asarray(weight.scale)
        new = _raised_scale(model, guarded[site.input], weight, site)
        if np.any(new > old):
            guarded[site.weight] = weight.replace(scale=new)
            records.append(_raised(site, old, new))
    return guarded, tuple(records)


def _raised_scale(model: Model, x: Encoding, weight: Encoding, site: BiasSite) -> np.ndarray:
    magnitude = np.abs(np.asarray(model.params[site.bias], dtype=np.float64))
    per_channel = magnitude.reshape(-1, magnitude.shape[-1] if magnitude.ndim else 1).max(axis=0)
    # One part in 2**20 more, so that rounding s_x * s_w to float32 cannot carry the quotient over the limit.
    least = per_channel * (1 + 2.0**-20) / (LARGEST_CODE * np.asarray(x.scale, dtype=np.float64))
    old = np.asarray(weight.scale)
    least = least.max() if old.ndim == 0 else least.reshape(site.repeats, -1).max(axis=0)
    return np.asarray(np.maximum(old, least.astype(np.float32)))


def _raised(site: BiasSite, old: np.ndarray, new: np.ndarray) -> Record:
    raised = new > old
    return Record(
        transform="guard_biases",
        done=True,
        what=f"raised the weight's scale in {int(raised.sum())} of {old.size} places so that the bias fits into int32",
        where=(site.weight, site.bias),
        reason="|b| / (s_x s_w) would exceed 2^31 - 2^15",
        before={"smallest scale": float(old.min())},
        after={"smallest scale": float(new.min())},
    )


def _site(model: Model, node: Node) -> BiasSite | None:
    if node.domain:
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        transposed = node.op_type == "ConvTranspose"
        groups = int(node.attribute("group", 1)) if transposed else 1
        return _with_third_input(node, weight_axis=int(transposed), axis=0, repeats=groups)
    if node.op_type == "Gemm" and node.attribute("alpha", 1.0) == 1 and node.attribute("beta", 1.0) == 1:
        return _with_third_input(node, weight_axis=0 if node.attribute("transB", 0) else 1, axis=-1)
    return _of_matmul(model, node) if node.op_type == "MatMul" else None


def _with_third_input(node: Node, *, weight_axis: int, axis: int, repeats: int = 1) -> BiasSite | None:
    if len(node.inputs) <= _BIAS_INPUT or not node.inputs[_BIAS_INPUT]:
        return None
    x, weight, bias = node.inputs
    return BiasSite(
        bias=bias, input=x, weight=weight, output=node.output, weight_axis=weight_axis, axis=axis, repeats=repeats
    )


def _of_matmul(model: Model, node: Node) -> BiasSite | None:
    found = bias_behind(model, node)
    if found is None:
        return None
    add, bias = found
    x, weight = node.inputs
    return BiasSite(bias=bias, input=x, weight=weight, output=add.output, weight_axis=-1, axis=-1)


def _has_integers(model: Model, site: BiasSite) -> bool:
    if not is_private(model.graph, site.bias) or site.weight not in model.params:
        return False
    shape = np.shape(model.params[site.bias])
    num_outputs = np.shape(model.params[site.weight])[site.weight_axis] * site.repeats
    return len(shape) > 0 and shape[-1] == num_outputs and is_one_per_output(shape, num_outputs)
