"""Cross-layer equalization in arrays: how to scale a channel between the layer that makes it and the one that reads it.

Dividing a channel by s > 0 in the first layer and multiplying its weights by s in the second keeps the function. Scales
are logarithms throughout, so that a learned objective can differentiate through them.

Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019), section 4.1,
equations 9 to 11. We differ: a channel may not outgrow the others' activations (`limit`), see `log_scales`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from ptqjax.kernels.grouped import (
    Inputs,
    Outputs,
    View,
    input_ranges,
    output_ranges,
    respond_to_constant,
    scale_inputs,
    scale_outputs,
)
from ptqjax.kernels.namespace import array_namespace

Channels = Float[Array | np.ndarray, " c"]
Magnitudes = Float[Array | np.ndarray, "t c"]
Mask = Bool[Array | np.ndarray, " c"]
TapRanges = Float[Array | np.ndarray, "g o i"]
Scalar = Float[Array | np.ndarray | np.floating, ""]  # a sum in NumPy is no array
NextView = Float[Array | np.ndarray, "h p j m"]  # the view of the layer that reads the channels: a shape of its own
NextBias = Float[Array | np.ndarray, " q"]

FARTHEST = 12 * float(np.log(2.0))
"""How far a log scale may lie from the median of its set, and the mean of a set from 0: chosen, not measured.

Beyond, 8 bits tell channels no better apart, and far larger factors cost EfficientNet-Lite0 its accuracy.
"""


def tap_ranges(view: View) -> TapRanges:
    """Returns the largest absolute weight over the taps: all that scaling of channels needs to know of a weight."""
    xp = array_namespace(view)
    magnitudes = xp.abs(view)
    return magnitudes[..., 0] if view.shape[3] == 1 else magnitudes.max(axis=3)


def ranges_of_outputs(ranges: TapRanges, log_input_scale: Inputs | None) -> Outputs:
    """Returns the weight range of each output channel once the inputs' columns are multiplied by their scales."""
    xp = array_namespace(ranges, log_input_scale)
    if log_input_scale is not None:
        ranges = ranges * xp.exp(log_input_scale).astype(ranges.dtype).reshape(ranges.shape[0], 1, -1)
    return ranges.max(axis=2).reshape(-1)


def ranges_of_inputs(ranges: TapRanges, log_output_scale: Outputs | None) -> Inputs:
    """Returns the weight range of each input channel once the outputs' rows are divided by their scales."""
    xp = array_namespace(ranges, log_output_scale)
    if log_output_scale is not None:
        ranges = ranges * xp.exp(-log_output_scale).astype(ranges.dtype).reshape(ranges.shape[0], -1, 1)
    return ranges.max(axis=1).reshape(-1)


def log_scales(
    r1: Channels, r2: Channels, magnitude: Channels | Magnitudes | None = None, *, limit: float = 2.0
) -> Channels:
    """Returns log s per channel: s = max(sqrt(r1 / r2), A / T), with T = limit * median of A / sqrt(r1 / r2).

    The first term alone makes the weight ranges r1 / s and r2 s equal. It blows up the activations of a channel with
    small weights and a large bias, and one quantizer must hold all channels; so none may exceed T, which is `limit`
    times the median over the channels that live. Where several tensors hold the channels, each has a T of its own, and
    the largest A / T counts. A factor common to all channels of r1 or r2 comes out as a factor of s, and dead channels
    get the mean of the others. No log s lies farther than `FARTHEST` from their median. Scales are not rounded to
    powers of two: rounding would cost balance, and gain nothing but exact float weights.

    Args:
        r1: Weight range of the channel in the layer that produces it.
        r2: Weight range of the channel in the layer that reads it.
        magnitude: A, the largest magnitude of the channel's activation, or a row of them for each tensor that holds
            the channels; None to look at the weights alone.
        limit: How far above the median a channel's activation may reach.
    """
    xp = array_namespace(r1, r2, magnitude)
    is_live = (r1 > 0) & (r2 > 0)
    balanced = xp.where(is_live, _log(r1) - _log(r2), 0.0) / 2
    if magnitude is None:
        return _filled(balanced, is_live)
    sizes = magnitude.reshape(-1, len(r1))
    is_counted = is_live[None] & (sizes > 0)
    has_any = is_counted.any(axis=1, keepdims=True)
    at_limits = _log(sizes) - (np.log(limit) + _medians(_log(sizes) - balanced[None], is_counted))
    at_limit = xp.where((sizes > 0) & has_any, at_limits, -xp.inf).max(axis=0)
    # A channel of constant value has r1 = 0: nothing is to be balanced, its activation alone decides.
    is_known = (at_limit > -xp.inf) & (r2 > 0)
    at_limit = xp.where(is_known, at_limit, 0.0)
    is_held = is_known & (r1 == 0)
    limited = xp.where(is_held, at_limit, xp.where(is_known & is_live, xp.maximum(balanced, at_limit), balanced))
    return _filled(limited, is_live | is_held)


def level(r1: Channels, r2: Channels, log_scale: Channels) -> Scalar:
    """Returns the mean of log(r1 / r2) over the channels that live, after scaling: how far one factor is missing."""
    xp = array_namespace(r1, r2, log_scale)
    is_live = (r1 > 0) & (r2 > 0)
    total = xp.where(is_live, _log(r1) - _log(r2) - 2 * log_scale, 0.0).sum()
    return total / xp.maximum(is_live.sum(), 1)


def common_factors(
    levels: Float[Array | np.ndarray, " n"], neighbours: Shaped[np.ndarray, "n n"]
) -> Float[Array | np.ndarray, " n"]:
    """Returns the log factor of each interface, one for all its channels, after which every `level` is zero.

    A factor g of one interface multiplies r2 before it and r1 behind it: 2 g_k - sum of g over neighbours = level_k.
    Solved at once; channel by channel it would diffuse along the chain, slowly.

    Args:
        levels: The level of each interface.
        neighbours: Which interfaces share a layer (booleans), or with which weight one's factor counts for another.
    """
    xp = array_namespace(levels)
    return xp.linalg.solve(2 * np.eye(len(neighbours), dtype=levels.dtype) - neighbours.astype(levels.dtype), levels)


def imbalance(r1: Channels, r2: Channels, log_scale: Channels) -> Scalar:
    """Returns the largest |log(r1 / r2)| over the channels that live, after scaling: 0 where all ranges are equal."""
    xp = array_namespace(r1, r2, log_scale)
    is_live = (r1 > 0) & (r2 > 0)
    return xp.abs(xp.where(is_live, _log(r1) - _log(r2) - 2 * log_scale, 0.0)).max(initial=0.0)


def constant_channels(low: Channels, high: Channels, *, tolerance: float = 1e-6) -> Mask:
    """Tells which channels are a single value: their bounds agree, up to `tolerance` of their magnitude."""
    xp = array_namespace(low, high)
    return high - low <= tolerance * xp.maximum(xp.abs(low), xp.abs(high))


def remove_channels(
    first: tuple[View, Channels], second: tuple[NextView, NextBias], value: Channels, removed: Mask
) -> tuple[tuple[View, Channels], tuple[NextView, NextBias]]:
    """Returns (weight view, bias) of both layers without the channels: what they held moves into the second's bias.

    Args:
        first: Weight view and bias of the layer that produces the channels.
        second: Those of the layer that reads them; exact where it does not pad, or `value` is zero.
        value: What each channel holds everywhere.
        removed: Which channels go; their weights and biases become zero in both layers.
    """
    xp = array_namespace(first[0], second[0], value)
    kept = xp.where(removed, 0.0, 1.0)
    moved = respond_to_constant(second[0], xp.where(removed, value, 0.0))
    return (
        (scale_outputs(first[0], kept), xp.where(removed, 0.0, first[1])),
        (scale_inputs(second[0], kept), second[1] + moved),
    )


def pin_channels(first: tuple[View, Channels], value: Channels, pinned: Mask) -> tuple[View, Channels]:
    """Returns (weight view, bias) of a layer in which the pinned channels are `value` by their bias alone."""
    xp = array_namespace(first[0], value)
    return scale_outputs(first[0], xp.where(pinned, 0.0, 1.0)), xp.where(pinned, value, first[1])


def unused_channels(first: View, second: NextView) -> Mask:
    """Tells which channels the second layer multiplies by zero although the first layer computes them."""
    return (input_ranges(second) == 0) & (output_ranges(first) > 0)


def _filled(values: Channels, is_known: Mask) -> Channels:
    """Returns the values within bounds; where there is none their mean: a dead channel goes along with the others."""
    xp = array_namespace(values)
    middle = _medians(values[None], is_known[None])[0, 0]
    values = xp.clip(values, middle - FARTHEST, middle + FARTHEST)
    mean = xp.where(is_known, values, 0.0).sum() / xp.maximum(is_known.sum(), 1)
    return xp.where(is_known, values, mean)


def _medians(values: Magnitudes, is_counted: Bool[Array | np.ndarray, "t c"]) -> Float[Array | np.ndarray, "t 1"]:
    """Returns the median of the values of each row that count; 0 where none does."""
    xp = array_namespace(values, is_counted)
    if xp is np:
        rows = [row[mask] for row, mask in zip(values, is_counted, strict=True)]
        return np.array([[np.median(row) if row.size else 0.0] for row in rows])
    has_any = is_counted.any(axis=1, keepdims=True)
    return xp.nanmedian(xp.where(is_counted, values, xp.where(has_any, xp.nan, 0.0)), axis=1, keepdims=True)


def _log(values: Float[Array | np.ndarray, "*shape"]) -> Float[Array | np.ndarray, "*shape"]:
    """Returns the logarithm where there is one, and 0 elsewhere (with a gradient of 0, not nan)."""
    xp = array_namespace(values)
    return xp.log(xp.where(values > 0, values, 1.0))
