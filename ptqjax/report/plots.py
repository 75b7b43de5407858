"""Small pictures as inline SVG text: no library, no script; colours come from the page's style."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 320, 132
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 8, 18
_MOST_TICKS = 5
_MOST_BINS = 272  # one a pixel: more channels than the picture can tell apart share a mark, which spans them
_DEAD = 1e-6  # of the widest channel: what is narrower is no channel any more, and would stretch the axis


def channel_plot(before: Sequence[float], after: Sequence[float], *, label: str) -> str:
    """Returns a plot of per-channel ranges on a logarithmic axis, channels sorted by their range before.

    Dead channels (removed ones, and those below a millionth of the widest) are drawn on the bottom line. A mark is a
    channel; with many, some neighbours, from the narrowest to the widest of them.
    """
    order = np.argsort(np.asarray(before), kind="stable")
    series = {"before": _live(before)[order], "after": _live(after)[order]}
    low, high = _decades(np.concatenate(list(series.values())))
    marks = "".join(_marks(values, low, high, name) for name, values in series.items())
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{_axis(low, high)}{marks}"
        f'<text class="tick" x="{_LEFT}" y="{_HEIGHT - 4}">{len(before)} channels, narrowest to widest before</text>'
        "</svg>"
    )


def range_bar(minimum: float, maximum: float, *, extent: float) -> str:
    """Returns a bar for the range `minimum..maximum` on an axis from -`extent` to `extent`, zero marked."""
    extent = extent or 1.0
    left, right = (60 * (1 + np.clip(value / extent, -1, 1)) for value in (minimum, maximum))
    return (
        '<svg class="bar" viewBox="0 0 120 12" aria-hidden="true">'
        '<line class="grid" x1="0" x2="120" y1="6" y2="6"/>'
        f'<rect class="after" x="{left:.1f}" y="3" width="{max(right - left, 0.8):.1f}" height="6" rx="1.5"/>'
        '<line class="zero" x1="60" x2="60" y1="0" y2="12"/></svg>'
    )


def spread(ranges: Sequence[float]) -> float:
    """Returns the widest channel's range over the narrowest's, dead channels left out; 1 where none is left."""
    live = _live(ranges)
    return float(live.max() / live[live > 0].min()) if np.any(live > 0) else 1.0


def _live(ranges: Sequence[float]) -> np.ndarray:
    values = np.asarray(ranges, np.float64)
    return np.where(values > _DEAD * values.max(initial=0.0), values, 0.0)


def _decades(values: np.ndarray) -> tuple[int, int]:
    live = values[values > 0]
    if not live.size:
        return -1, 0
    low, high = int(np.floor(np.log10(live.min()))), int(np.ceil(np.log10(live.max())))
    return low, max(high, low + 1)


def _height_of(exponent: float, low: int, high: int) -> float:
    return _TOP + (high - exponent) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _axis(low: int, high: int) -> str:
    step = max(1, -(-(high - low) // _MOST_TICKS))
    lines = []
    for exponent in range(low, high + 1, step):
        y = _height_of(float(exponent), low, high)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 5}" y="{y + 3:.1f}">{10.0**exponent:g}</text>')
    return "".join(lines)


def _marks(values: np.ndarray, low: int, high: int, name: str) -> str:
    exponents = np.log10(np.where(values > 0, values, 10.0**low))
    width = max(1, -(-len(values) // _MOST_BINS))
    bins = [exponents[start : start + width] for start in range(0, len(values), width)]
    step = (_WIDTH - _LEFT - _RIGHT) * width / max(len(values), 1)
    lines = []
    for i, neighbours in enumerate(bins):
        top, bottom = (_height_of(float(end), low, high) for end in (neighbours.max(), neighbours.min()))
        lines.append(f"M{_LEFT + (i + 0.5) * step:.1f} {top:.1f}V{bottom:.1f}")
    return f'<path class="{name}" d="{"".join(lines)}"/>'
