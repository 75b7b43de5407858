"""Biases: int32 integers whose scale follows from input and weight, and the guard against their overflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ptqjax.config import QuantizationConfig, load_target
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.ir import Model, Node, Record, Report, bias_behind, is_one_per_output, is_private, only_reader
from ptqjax.kernels.namespace import array_namespace

LARGEST_CODE = 2**31 - 2**15
"""Largest integer of a bias: room for the sum that it is added to, and exact in float32."""

_SMALLEST_MULTIPLIER = 2.0**-23.5
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
    output channels (blocks), one of them is in a float format, or the bias has an encoding of its own. Enabled where
    both are.
    """
    x, w = encodings.get(site.input), encodings.get(site.weight)
    if x is None or w is None or site.bias in encodings or x.axis is not None or w.block_size is not None:
        return None
    if x.is_dynamic or x.float_format is not None or w.float_format is not None:
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


def float_bias() -> Encoding:
    """Returns the encoding of a bias that stays in float beside a rounded input and weight: one that is not enabled."""
    end = np.float32(LARGEST_CODE)
    return Encoding(scale=np.float32(1), zero_point=np.float32(0), qmin=-end, qmax=end, enabled=np.asarray(False))


def guard_biases(model: Model, encodings: Encodings, *, fixed_point: bool = False) -> tuple[Encodings, Report]:
    """Returns encodings under which sums and biases fit into int32, and a record for each bound that raised a scale.

    With b the bias, s_x, s_w and s_y the scales of input, weight and output, and z_y the output's zero point, counted
    from its smallest integer, a weight's scale is raised until

    1. |b| / (s_x s_w) <= 2^31 - 2^15, so that the bias is an int32;

    and, with `fixed_point`, for machines that multiply the int32 sum by s_x s_w / s_y in integers and hold the output's
    zero point in the sum (Qualcomm's HTP), where the layer's output is quantized as a whole,

    2. s_x s_w / s_y >= 2^-23.5: their multiplier ends at 2^-24;
    3. |b - z_y s_y| / (s_x s_w) <= 2^31 - 2^15.

    ONNX Runtime multiplies in float32 and adds the zero point behind it; there, 2 and 3 would make weights coarser for
    nothing. Layers without a bias are looked at for 2 and 3 alone; weights in blocks and float formats are left as they
    are. Needs concrete arrays.

    Source: aimet-onnx 2.42, which always applies all three.
    """
    guarded, records = dict(encodings), []
    for site in _weighted_layers(model, guarded) if fixed_point else with_int32(model, guarded):
        if not has_integer_sums(guarded, site):
            continue
        x = guarded[site.input]
        y = grid_behind(model, guarded, site) if fixed_point else None
        for reason, least in _bounds(model, site, x, y):
            old = np.asarray(guarded[site.weight].scale)
            new = np.asarray(np.maximum(old, _in_shape_of(old, least, site).astype(np.float32)))
            if np.any(new > old):
                guarded[site.weight] = guarded[site.weight].replace(scale=new)
                records.append(_raised(site, reason, old, new))
    return guarded, tuple(records)


def sums_in_fixed_point(config: QuantizationConfig) -> bool:
    """Tells whether the guard keeps its bounds 2 and 3: for targets that need them, and where AIMET is followed."""
    return config.compatibility == "aimet" or load_target(config.target).fixed_point


def with_int32(model: Model, encodings: Mapping[str, Encoding]) -> list[BiasSite]:
    """Returns the sites whose biases have no encoding of their own, which would decide in place of their layer's."""
    return [site for site in bias_sites(model) if site.bias not in encodings]


def _weighted_layers(model: Model, encodings: Mapping[str, Encoding]) -> Iterator[BiasSite]:
    """Yields the layers with a weight that is a parameter; without a bias where it cannot be int32."""
    with_bias = {(site.input, site.weight): site for site in with_int32(model, encodings)}
    for node in model.graph.nodes:
        layer = _layer(node)
        if layer is not None and layer.weight in model.params:
            yield with_bias.get((layer.input, layer.weight), layer)


def has_integer_sums(encodings: Mapping[str, Encoding], site: BiasSite) -> bool:
    """Tells whether input and weight of a layer are integers whose products a bias can be added to."""
    x, weight = encodings.get(site.input), encodings.get(site.weight)
    if (
        x is None
        or weight is None
        or x.is_dynamic
        or x.float_format
        or weight.float_format
        or x.axis is not None
        or weight.block_size is not None
    ):
        return False
    return bool(x.enabled) and bool(weight.enabled) and weight.axis in (None, site.weight_axis)


def grid_behind(model: Model, encodings: Mapping[str, Encoding], site: BiasSite) -> Encoding | None:
    """Returns the grid that the layer's sums are rounded to: that of its output, or behind the activation upon it.

    None where it has none, or several scales or floating-point codes.
    """
    name = site.output
    while name not in encodings:
        reader = only_reader(model.graph, name)
        if reader is None or reader.op_type not in ("Relu", "Clip"):
            return None
        name = reader.output
    y = encodings[name]
    return y if y.axis is None and y.float_format is None and bool(y.enabled) else None


def _bounds(model: Model, site: BiasSite, x: Encoding, y: Encoding | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each bound's name and the least scale of the weight that keeps it: scalar, or one an output channel."""
    step = float(x.scale)
    bias = np.asarray(model.params[site.bias], dtype=np.float64) if site.bias else np.zeros(())
    if site.bias:
        yield "|b| / (s_x s_w) would exceed 2^31 - 2^15", _least(bias, step)
    if y is not None:
        smallest = _SMALLEST_MULTIPLIER * float(y.scale) / step
        yield "s_x s_w / s_y would be below 2^-23.5", np.asarray(smallest)
        below_zero = (float(y.zero_point) - float(y.qmin)) * float(y.scale)
        yield "|b - z_y s_y| / (s_x s_w) would exceed 2^31 - 2^15", _least(bias - below_zero, step)


def _least(value: Any, step: float) -> np.ndarray:
    # One part in 2**20 more, so that rounding s_x * s_w to float32 cannot carry the quotient over the limit.
    return np.asarray(np.abs(value) * (1 + 2.0**-20) / (LARGEST_CODE * step))


def _in_shape_of(scale: np.ndarray, least: np.ndarray, site: BiasSite) -> np.ndarray:
    """Returns the largest of `least` for each of the weight's scales."""
    if scale.ndim == 0 or least.ndim == 0:
        return np.asarray(least.max())
    per_channel = least.reshape(-1, least.shape[-1]).max(axis=0)
    return per_channel.reshape(site.repeats, -1).max(axis=0)


def _raised(site: BiasSite, reason: str, old: np.ndarray, new: np.ndarray) -> Record:
    raised = new > old
    return Record(
        transform="guard_biases",
        done=True,
        what=f"raised the weight's scale in {int(raised.sum())} of {old.size} places so that sums fit into int32",
        where=(site.weight, site.bias or site.output),
        reason=reason,
        before={"smallest scale": float(old.min())},
        after={"smallest scale": float(new.min())},
    )


def _site(model: Model, node: Node) -> BiasSite | None:
    layer = _layer(node)
    if layer is None:
        return None
    if node.op_type == "MatMul":
        found = bias_behind(model, node)
        return None if found is None else replace(layer, bias=found[1], output=found[0].output)
    bias = node.inputs[_BIAS_INPUT] if len(node.inputs) > _BIAS_INPUT else ""
    return replace(layer, bias=bias) if bias else None


def _layer(node: Node) -> BiasSite | None:
    """Returns the layer as one without a bias; None where it is none of those that may have one."""
    if node.domain:
        return None
    transposed = node.op_type == "ConvTranspose"
    if node.op_type == "Conv" or transposed:
        weight_axis, axis = int(transposed), 0
    elif node.op_type == "Gemm" and node.attribute("alpha", 1.0) == 1 and node.attribute("beta", 1.0) == 1:
        weight_axis, axis = 0 if node.attribute("transB", 0) else 1, -1
    elif node.op_type == "MatMul":
        weight_axis, axis = -1, -1
    else:
        return None
    return BiasSite(
        bias="",
        input=node.inputs[0],
        weight=node.inputs[1],
        output=node.output,
        weight_axis=weight_axis,
        axis=axis,
        repeats=int(node.attribute("group", 1)) if transposed else 1,
    )


def _has_integers(model: Model, site: BiasSite) -> bool:
    if not is_private(model.graph, site.bias) or site.weight not in model.params:
        return False
    shape = np.shape(model.params[site.bias])
    num_outputs = np.shape(model.params[site.weight])[site.weight_axis] * site.repeats
    return len(shape) > 0 and shape[-1] == num_outputs and is_one_per_output(shape, num_outputs)
