"""Scales of nothing, chosen for the sake of the bias: of weights that are all zero, and of inputs that only ever are.

A bias is rounded to multiples of s_x s_w. Where weights or inputs have values, those ask for more: one product of two
codes is thousands of such steps. Where either has none, its scale is free, and the bias alone tells what it has to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ptqjax.encodings.biases import BiasSite, grid_behind, has_integer_sums, with_int32
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.ir import Model, Record, Report
from ptqjax.kernels.ranges import SMALLEST_SCALE

OF_A_STEP = 2.0**-6
"""The largest step of a bias, in steps of the layer's output: rounding moves the output by less than a hundredth."""
_OF_THE_BIAS = 2.0**-20  # the same in parts of the largest bias, where the output is not rounded
_LEAST_STEP = 2.0**-100  # of a bias: products of scales stay normal numbers


def resolve_biases(
    model: Model, encodings: Encodings, dead: Iterable[Sequence[str]] = (), kept: Iterable[str] = ()
) -> tuple[Encodings, Report]:
    """Returns encodings in which scales of nothing leave int32 biases their resolution, and a record for each.

    Where all values of a weight, or of its channel with a scale of its own, are zero, or all that a layer was seen to
    read, s_x s_w becomes at most `OF_A_STEP` of the step of the layer's output (2^-20 of its largest bias, where that
    has no grid): the scale of what is nothing is lowered to a power of two. Nothing is raised; what holds values keeps
    its scale. Needs concrete arrays.

    Args:
        model: What the encodings are for.
        encodings: The grids by tensor.
        dead: Activations that were all zero on the data, each with those that share its encoding.
        kept: Tensors whose encodings stay as they are.
    """
    found, records, kept = dict(encodings), [], set(kept)
    sites = [site for site in with_int32(model, found) if has_integer_sums(found, site) and _has_bias(model, site)]
    for tensors in (tensors for tensors in dead if kept.isdisjoint(tensors)):
        reading = [site for site in sites if site.input in tensors]
        if reading:
            old = found[tensors[0]]
            largest = min(_step(model, found, site) / _largest_scale(found, site) for site in reading)
            new = _lowered(old, largest, np.asarray(True))
            found |= dict.fromkeys(tensors, new)
            records.extend(_records(tensors[0], reading, old, new))
    for site in (site for site in sites if site.weight not in kept):
        old = found[site.weight]
        new = _lowered(old, _step(model, found, site) / float(found[site.input].scale), _all_zero(model, site, old))
        found[site.weight] = new
        records.extend(_records(site.weight, [site], old, new))
    return found, tuple(records)


def _has_bias(model: Model, site: BiasSite) -> bool:
    return bool(np.any(np.asarray(model.params[site.bias])))


def _step(model: Model, encodings: Mapping[str, Encoding], site: BiasSite) -> float:
    """Returns the largest step that a layer's bias may have."""
    y = grid_behind(model, encodings, site)
    if y is not None:
        return max(float(y.scale) * OF_A_STEP, _LEAST_STEP)
    return max(float(np.abs(np.asarray(model.params[site.bias])).max()) * _OF_THE_BIAS, _LEAST_STEP)


def _largest_scale(encodings: Mapping[str, Encoding], site: BiasSite) -> float:
    return float(np.max(encodings[site.weight].scale))


def _all_zero(model: Model, site: BiasSite, encoding: Encoding) -> np.ndarray:
    """Returns for each scale of a layer's weight whether all values that it is for are zero."""
    weight = np.asarray(model.params[site.weight])
    axis = site.weight_axis % weight.ndim
    others = tuple(i for i in range(weight.ndim) if encoding.axis is None or i != axis)
    return np.asarray(~weight.any(axis=others))


def _lowered(encoding: Encoding, largest: float, chosen: np.ndarray) -> Encoding:
    """Returns the encoding with the chosen ones of its scales at most at the power of two below `largest`."""
    bound = np.float32(max(2.0 ** np.floor(np.log2(largest)), SMALLEST_SCALE))
    scale = np.asarray(encoding.scale)
    lowered = np.where(np.logical_and(chosen, scale > bound), bound, scale).astype(np.float32)
    return encoding.replace(scale=lowered) if np.any(lowered < scale) else encoding


def _records(tensor: str, layers: Sequence[BiasSite], old: Encoding, new: Encoding) -> list[Record]:
    if new is old:
        return []
    lowered = np.asarray(new.scale) < np.asarray(old.scale)
    return [
        Record(
            transform="resolve_biases",
            done=True,
            what=f"lowered {int(lowered.sum())} of {lowered.size} scales, which are of zeros alone",
            where=(tensor, *(site.bias for site in layers)),
            reason="the bias is rounded to multiples of s_x s_w, which were coarse beside the output's step",
            before={"largest of them": float(np.asarray(old.scale)[lowered].max())},
            after={"largest of them": float(np.asarray(new.scale)[lowered].max())},
        )
    ]
