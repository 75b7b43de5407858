"""Encodings whose ranges are kept within given ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ptqjax.config import near_names
from ptqjax.encodings.encoding import Encoding, Encodings, concrete
from ptqjax.errors import ConfigError


def clamp_ranges(encodings: Encodings, ranges: Mapping[str, tuple[float, float]]) -> Encodings:
    """Returns the encodings, the ranges of the named tensors cut to (lowest, highest) given in the tensor's unit.

    A range that lies within the given one stays; others end where that ends, 0 stays on the grid, and where 0 was in
    the middle it stays there. Tensors that share an encoding (tied ones) have to be named each.

    Args:
        encodings: The grids by tensor, of integers.
        ranges: By tensor, the lowest and the highest number that the grid is to reach; 0 lies between them.

    Raises:
        ConfigError: A tensor has no encoding or one of a floating format, or its range is not finite, does not hold 0
            or is empty.
    """
    return encodings | {name: _clamped(name, encodings, ends) for name, ends in ranges.items()}


def _clamped(name: str, encodings: Encodings, ends: tuple[float, float]) -> Encoding:
    if name not in encodings:
        raise ConfigError(f"'{name}' has no encoding to be clamped{near_names(name, encodings)}")
    encoding = concrete(encodings[name])
    if encoding.float_format is not None:
        raise ConfigError(f"'{name}' is in {encoding.float_format}, which has no range to clamp; expected integers")
    low, high = map(float, ends)
    if not (np.isfinite(low) and np.isfinite(high) and low <= 0 <= high and low < high):
        raise ConfigError(f"'{name}': the range ({low:g}, {high:g}) is none; expected finite ends around 0")
    scale, zero, qmin, qmax = (
        np.float64(getattr(encoding, field)) for field in ("scale", "zero_point", "qmin", "qmax")
    )
    below, above = np.maximum((qmin - zero) * scale, low), np.minimum((qmax - zero) * scale, high)
    if np.all(zero == np.round((qmin + qmax) / 2)):  # 0 in the middle
        reach = np.maximum(abs(below), abs(above))
        return encoding.replace(
            scale=np.float32(np.minimum(scale, reach / min(abs(qmin - zero).max(), (qmax - zero).max())))
        )
    step = np.minimum(scale, np.maximum(above - below, np.finfo(np.float32).tiny) / (qmax - qmin))
    point = np.where(step < scale, np.clip(np.round(qmin - below / step), qmin, qmax), zero)
    return encoding.replace(scale=np.float32(step), zero_point=np.float32(point))
