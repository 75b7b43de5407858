"""From a range of real numbers to scale and zero point."""

from __future__ import annotations

from typing import Any

import flax.struct
import numpy as np

from ptqjax.kernels.namespace import array_namespace

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""Smallest step of a grid: below it float32 arithmetic flushes to zero."""
LARGEST_VALUE = float(np.finfo(np.float32).max) * (1 - 2.0**-20)
"""Largest magnitude that a code may stand for; leaves room for rounding errors."""


class GridKind(flax.struct.PyTreeNode):
    """What is known of a grid before its range is: arrays, scalar or one element a range."""

    qmin: Any
    """Smallest integer."""
    qmax: Any
    """Largest integer."""
    symmetric: Any
    """Boolean: the zero point is the middle of the integers, and the range the same on both sides."""


def grid_of_range(lowest: Any, highest: Any, kind: GridKind) -> tuple[Any, Any]:
    """Returns (scale, zero_point), float32, of the grid that spans [lowest, highest], extended to hold 0.

    With n = qmax - qmin: scale = (highest - lowest) / n and zero_point = round(qmin - lowest / scale); symmetric, with
    the middle m = (qmin + qmax + 1) / 2: scale = max(highest, -lowest) / (qmax - m) and zero_point = m, so that the
    smallest integer of a signed type is not used. An empty range (all values 0) gives scale 1. A range below the normal
    float32 numbers gives `SMALLEST_SCALE`; a range near the largest ones is cut so that each code stands for a finite
    number. Computed in float64 on NumPy, in float32 under JAX.
    """
    xp = array_namespace(lowest, highest, kind.qmin, kind.qmax, kind.symmetric)
    wide = np.float64 if xp is np else np.float32
    qmin, qmax = (xp.asarray(limit, dtype=wide) for limit in (kind.qmin, kind.qmax))
    middle = xp.floor((qmin + qmax + 1) / 2)
    steps = qmax - qmin
    limit = LARGEST_VALUE * (steps / (steps + 1))  # rounding the zero point moves an end by half a step
    low = xp.clip(xp.asarray(lowest, dtype=wide), -limit, 0)
    high = xp.clip(xp.asarray(highest, dtype=wide), 0, limit)
    scale = xp.where(kind.symmetric, xp.maximum(high, -low) / (qmax - middle), high / steps - low / steps)
    scale = xp.where(scale > 0, xp.maximum(scale, SMALLEST_SCALE), 1.0).astype(np.float32)
    zero_point = xp.clip(xp.round(qmin - low / scale), qmin, qmax)
    return scale, xp.where(kind.symmetric, middle, zero_point).astype(np.float32)
