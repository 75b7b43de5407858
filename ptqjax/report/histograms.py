"""What met a grid, in as many bars as a picture has, as plain data."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptqjax.encodings.encoding import Encoding, along_axis
from ptqjax.kernels.histogram import Histogram

_MOST_BARS = 80
_FAR = 8.0  # times as far as the values: a grid that reaches farther would leave them no room


def histogram_facts(histogram: Histogram, encoding: Encoding) -> dict[str, Any]:
    """Returns the histogram of one tensor on one grid for all of it: {"unit", "low", "high", "counts", "grid"}.

    "unit" is "value"; "counts" are of equal bars from "low" to "high", which hold all values and, where that is not
    much farther, the grid; "grid" is {"low", "high", "step"}, its ends and the step (None for floating-point codes).

    Args:
        histogram: Counts of shape [bins], as `kernels.histogram` has them, with a single exponent.
        encoding: The grid, of one scale (with more, its ends are those of the widest).
    """
    counts, width = np.asarray(histogram.counts, np.int64), float(2.0 ** int(histogram.exponent))
    half = counts.size // 2
    occupied = np.flatnonzero(counts)
    first, last = (int(occupied[0]), int(occupied[-1]) + 1) if occupied.size else (half, half + 1)
    grid = _grid(encoding)
    low, high = _window((first - half) * width, (last - half) * width, grid)
    edges = (np.arange(counts.size) - half + 0.5) * width
    bars, _ = np.histogram(edges, bins=_num_bars((high - low) / width), range=(low, high), weights=counts)
    return _facts("value", low, high, bars, grid)


def weight_histogram(weight: np.ndarray, encoding: Encoding) -> dict[str, Any]:
    """Returns the histogram of a weight; of its codes before rounding where it has several scales ("unit": "codes")."""
    values = np.asarray(weight, np.float32)
    unit, grid = "value", _grid(encoding)
    if np.ndim(encoding.scale):
        scale, zero = (along_axis(np.asarray(each), encoding, values.shape) for each in _pair(encoding))
        step = None if encoding.float_format else 1.0
        unit, values = "codes", values / scale + zero
        grid = {"low": float(encoding.qmin), "high": float(encoding.qmax), "step": step}
    low, high = _window(float(values.min(initial=0)), float(values.max(initial=0)), grid)
    bars, _ = np.histogram(values, bins=_MOST_BARS, range=(low, high))
    return _facts(unit, low, high, bars, grid)


def _pair(encoding: Encoding) -> tuple[Any, Any]:
    return encoding.scale, encoding.zero_point


def _grid(encoding: Encoding) -> dict[str, float | None]:
    scale, zero = (np.asarray(each, np.float64).ravel() for each in _pair(encoding))
    step = float(scale[0]) if scale.size == 1 and encoding.float_format is None else None
    low, high = ((np.asarray(end, np.float64) - zero) * scale for end in (encoding.qmin, encoding.qmax))
    return {"low": float(low.min()), "high": float(high.max()), "step": step}


def _window(low: float, high: float, grid: dict[str, float | None]) -> tuple[float, float]:
    """Returns the ends of the picture: of the values, and of the grid where it does not reach much farther."""
    ends = [end for end in (grid["low"], grid["high"]) if end is not None]
    reach = _FAR * max(abs(low), abs(high))
    near = [end for end in ends if abs(end) <= reach]
    low, high = min(low, *near, 0.0), max(high, *near, 0.0)
    room = 0.02 * (high - low) or 1.0
    return low - room, high + room


def _num_bars(at_most: float) -> int:
    return int(np.clip(at_most, 1, _MOST_BARS))


def _facts(unit: str, low: float, high: float, bars: np.ndarray, grid: dict[str, float | None]) -> dict[str, Any]:
    counts = np.rint(bars).astype(np.int64).tolist()
    return {"unit": unit, "low": float(low), "high": float(high), "counts": counts, "grid": grid}
