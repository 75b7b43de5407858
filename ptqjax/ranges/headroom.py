"""Headroom: ranges of activations wider than what calibration data reached, for data to come."""

from __future__ import annotations

import numpy as np

from ptqjax.config import QuantizationConfig
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.ir import Model
from ptqjax.placement.place import ACTIVATION, place_as_found
from ptqjax.transforms.bounds import channel_bounds
from ptqjax.transforms.linear import linear_layers


def widened(model: Model, encodings: Encodings, factor: float, config: QuantizationConfig) -> Encodings:
    """Returns the encodings with the ranges of activations `factor` times as wide, but no wider than is provable.

    Where operators bound a tensor (a Clip, bounds per channel), what lies beyond never occurs. The zero point stays.
    Tensors that share an encoding share the new one; ranges that are known beforehand stay.

    Args:
        model: The model that the encodings belong to.
        encodings: Concrete encodings, as `calibrate` returns them for `config`.
        factor: 1 or more.
        config: The settings that they were made with.
    """
    if factor == 1.0:
        return encodings
    bounds = channel_bounds(model, linear_layers(model))
    plan = place_as_found(model, config, encodings)
    found = (site for site in plan.sites if site.kind == ACTIVATION and not site.is_dynamic)
    sites = [site for site in found if site.fixed_range is None]
    roots = {site.root for site in sites if site.root in encodings}
    wide = {root: _widened(encodings[root], factor, bounds.get(root)) for root in roots if root not in model.params}
    return encodings | {site.tensor: wide[site.root] for site in sites if site.root in wide}


def _widened(encoding: Encoding, factor: float, bounds: tuple[np.ndarray, np.ndarray] | None) -> Encoding:
    scale, zero = np.float64(encoding.scale), np.float64(encoding.zero_point)
    below, above = (zero - np.float64(encoding.qmin)) * scale, (np.float64(encoding.qmax) - zero) * scale
    needed = factor
    if bounds is not None:
        reach = [(max(-float(bounds[0].min()), 0.0), below), (max(float(bounds[1].max()), 0.0), above)]
        needed = max((most / has for most, has in reach if has > 0), default=factor)
    return encoding.replace(scale=np.float32(scale * max(1.0, min(factor, needed))))
