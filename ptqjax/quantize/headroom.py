"""Headroom: ranges of activations wider than what calibration data reached, for data to come."""

from __future__ import annotations

import numpy as np

from ptqjax.ir import Model
from ptqjax.quantize.encodings import Encoding, Encodings
from ptqjax.transforms.bounds import channel_bounds
from ptqjax.transforms.linear import linear_layers


def widened(model: Model, encodings: Encodings, factor: float) -> Encodings:
    """Returns the encodings with the ranges of activations `factor` times as wide, but no wider than is provable.

    Where operators bound a tensor (a Clip, bounds per channel), what lies beyond never occurs. The zero point stays.

    Args:
        model: The model that the encodings belong to.
        encodings: Concrete encodings.
        factor: 1 or more.
    """
    if factor == 1.0:
        return encodings
    bounds = channel_bounds(model, linear_layers(model))
    return {
        name: encoding if name in model.params else _widened(encoding, factor, bounds.get(name))
        for name, encoding in encodings.items()
    }


def _widened(encoding: Encoding, factor: float, bounds: tuple[np.ndarray, np.ndarray] | None) -> Encoding:
    if encoding.axis is not None:
        return encoding
    scale, zero = np.float64(encoding.scale), np.float64(encoding.zero_point)
    below, above = (zero - np.float64(encoding.qmin)) * scale, (np.float64(encoding.qmax) - zero) * scale
    needed = factor
    if bounds is not None:
        reach = [(max(-float(bounds[0].min()), 0.0), below), (max(float(bounds[1].max()), 0.0), above)]
        needed = max((most / has for most, has in reach if has > 0), default=factor)
    return encoding.replace(scale=np.float32(scale * max(1.0, min(factor, needed))))
