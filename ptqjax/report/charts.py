"""Pictures of what was measured, as inline SVG text: histograms on their grids, noise along the depth, shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

_WIDTH, _HEIGHT, _BASE = 320, 118, 96  # of a histogram; its bars stand on the base
_HALF_A_LABEL = 22
_MOST_STEPS = 64  # of a grid that are drawn one by one
_DEEP, _TALL = 960, 300  # of the picture along the depth
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 30
_MOST_MARKS = 400  # tensors with a mark each, which tells its name
_MOST_TICKS = 6


def histogram_plot(histogram: Mapping[str, Any], *, label: str) -> str:
    """Returns a histogram with logarithmic counts, the grid's ends as lines and what lies outside them shaded.

    Where the grid has few steps, each of them has a tick.
    """
    low, high, grid = histogram["low"], histogram["high"], histogram["grid"]

    def x_of(value: float) -> float:
        return _WIDTH * (value - low) / (high - low)

    marks = "".join(_outside(x_of(max(low, min(high, end))), is_low=is_low) for end, is_low in _ends(grid))
    lines = "".join(
        f'<line class="edge" x1="{x_of(end):.1f}" x2="{x_of(end):.1f}" y1="4" y2="{_BASE}"/>'
        for end, _ in _ends(grid)
        if low <= end <= high
    )
    steps = _steps(grid, low, high)
    ticks = "".join(f"M{x_of(step):.1f} {_BASE}v4" for step in steps)
    return (
        f'<svg class="plot histogram" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{marks}"
        f'<path class="bars" d="{_bars(histogram["counts"])}"/>{lines}'
        + (f'<path class="steps" d="{ticks}"/>' if ticks else "")
        + f'<line class="zero" x1="0" x2="{_WIDTH}" y1="{_BASE}" y2="{_BASE}"/>'
        f"{_labels(low, high, (grid['low'], grid['high']), x_of)}</svg>"
    )


def depth_plot(names: Sequence[str], total: Sequence[float], own: Sequence[float], *, label: str) -> str:
    """Returns SQNR along the depth: a line for what was rounded so far, a mark for what each tensor adds itself.

    What is infinite, or lies far above the line (tensors that lie on their grid already), has no mark.
    """
    high = _ceiling(total, own)
    low = 5.0 * math.floor(min((y for y in total if math.isfinite(y)), default=0.0) / 5 - 1)

    def place(index: int, value: float) -> tuple[float, float]:
        x = _LEFT + (index + 0.5) / max(len(names), 1) * (_DEEP - _LEFT - _RIGHT)
        return x, _TOP + (high - max(low, value)) / (high - low) * (_TALL - _TOP - _BOTTOM)

    points = [(i, *place(i, value)) for i, value in enumerate(total) if value <= high]
    marks = [(i, *place(i, value)) for i, value in enumerate(own) if value <= high]
    path = "".join(f"{'L' if k else 'M'}{x:.1f} {y:.1f}" for k, (_, x, y) in enumerate(points))
    return (
        f'<svg class="plot depth" viewBox="0 0 {_DEEP} {_TALL}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{_decibel_axis(low, high)}"
        f"{_marks(marks, names, own, kind='own')}"
        f'<path class="total" d="{path}"/>{_marks(points, names, total, kind="total")}'
        f'<text class="tick" x="{_LEFT}" y="{_TALL - 8}">input</text>'
        f'<text class="tick" text-anchor="end" x="{_DEEP - _RIGHT}" y="{_TALL - 8}">output</text></svg>'
    )


def share_bar(share: float, *, largest: float, kind: str) -> str:
    """Returns a bar whose length is `share`, the longest one being `largest`."""
    width = 160 * share / largest if largest > 0 else 0.0
    return (
        '<svg class="share" viewBox="0 0 160 12" aria-hidden="true">'
        f'<rect class="{escape(kind)}" x="0" y="2" width="{max(width, 0.8):.1f}" height="8" rx="1.5"/></svg>'
    )


def _ends(grid: Mapping[str, Any]) -> tuple[tuple[float, bool], tuple[float, bool]]:
    return (grid["low"], True), (grid["high"], False)


def _outside(x: float, *, is_low: bool) -> str:
    start, width = (0.0, x) if is_low else (x, _WIDTH - x)
    return f'<rect class="outside" x="{start:.1f}" y="4" width="{width:.1f}" height="{_BASE - 4}"/>' if width else ""


def _bars(counts: Sequence[int]) -> str:
    """Returns the bars as one outline; the smallest count that is not 0 is still visible."""
    values = np.log1p(np.asarray(counts, np.float64))
    most = values.max(initial=0.0) or 1.0
    width = _WIDTH / max(len(counts), 1)
    parts = []
    for i, value in enumerate(values):
        if value > 0:
            height = 2 + value / most * (_BASE - 14)
            parts.append(f"M{i * width:.1f} {_BASE}v{-height:.1f}h{width:.1f}v{height:.1f}z")
    return "".join(parts)


def _steps(grid: Mapping[str, Any], low: float, high: float) -> list[float]:
    step = grid["step"]
    if not step:
        return []
    ends = (grid["low"], grid["high"])
    first, last = max(ends[0], low), min(ends[1], high)
    start = ends[0] + step * math.ceil((first - ends[0]) / step - 1e-6)
    count = math.floor((last - start) / step + 1e-6) + 1
    return [start + i * step for i in range(count)] if 0 < count <= _MOST_STEPS else []


def _labels(low: float, high: float, ends: Sequence[float], x_of: Callable[[float], float]) -> str:
    """Returns the numbers below the picture: the ends of the grid that are in it, and its own ends, where they fit."""
    placed: list[tuple[float, float]] = []
    for value in (*ends, low, high, 0.0):
        x = min(max(x_of(value), _HALF_A_LABEL), _WIDTH - _HALF_A_LABEL)
        if low <= value <= high and all(abs(x - other) >= 2 * _HALF_A_LABEL for other, _ in placed):
            placed.append((x, value))
    return "".join(
        f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{_HEIGHT - 4}">{value:.3g}</text>'
        for x, value in sorted(placed)
    )


def _ceiling(total: Sequence[float], own: Sequence[float]) -> float:
    """Returns the upper end of the axis, in whole fives: above the line, and above most of the marks."""
    top = max((y for y in total if math.isfinite(y)), default=10.0)
    near = [y for y in own if y <= top + 10]
    return max(5.0 * math.ceil(max([top, *near]) / 5), 5.0)


def _decibel_axis(low: float, high: float) -> str:
    step = 5 * max(1, math.ceil((high - low) / 5 / _MOST_TICKS))
    lines = []
    for value in np.arange(step * math.ceil(low / step), high + 0.1, step):
        y = _TOP + (high - value) / (high - low) * (_TALL - _TOP - _BOTTOM)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_DEEP - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{value:.0f} dB</text>')
    return "".join(lines)


def _marks(
    points: Sequence[tuple[int, float, float]], names: Sequence[str], values: Sequence[float], *, kind: str
) -> str:
    if len(names) > _MOST_MARKS:
        return f'<path class="{kind} many" d="{"".join(f"M{x:.1f} {y:.1f}h0.1" for _, x, y in points)}"/>'
    return "".join(
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(names[i])}: {values[i]:.1f} dB'
        f"</title></circle>"
        for i, x, y in points
    )
