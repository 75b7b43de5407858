"""What mixed precision found: the configuration, and the points between cheap and good, as data and as a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ptqjax.config import QuantizationConfig
from ptqjax.config.files import config_to_toml
from ptqjax.experiments.costs import Costs
from ptqjax.publish import write_text

_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 34, 44
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#444}line{stroke:#ddd}.front{fill:none;stroke:#2563a8;stroke-width:1.5}"
    ".mixed{fill:#2563a8}.uniform{fill:none;stroke:#c2501f;stroke-width:1.5}.chosen{fill:none;stroke:#2563a8}"
    ".title{font-weight:600}"
)
_LABELS = {
    "bit_operations": "bit-operations",
    "model_bytes": "bytes",
    "mean_weight_bits": "mean bits of weights",
    "mean_activation_bits": "mean bits of activations",
    "agreement": "agreement with the float model",
    "sqnr_db": "SQNR, dB",
    "top1": "top-1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Widths that were evaluated."""

    name: str
    """What it is: "uniform 6", or the limits that its widths were chosen for."""
    is_uniform: bool
    """Whether all groups of a kind have one width."""
    widths: Mapping[str, int]
    """The number of bits by group, see `Group.name`."""
    costs: Costs
    """What they cost."""
    predicted_noise: float
    """Noise power of the outputs over their own power, as the sum over groups of what each causes alone."""
    metrics: Mapping[str, float]
    """What was measured: "sqnr_db" and "agreement" with the float model, "top1" where there are labels."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the point as plain data, for JSON."""
        return {
            "name": self.name,
            "is_uniform": self.is_uniform,
            **self.costs.as_dict(),
            "predicted_noise": self.predicted_noise,
            **self.metrics,
            "widths": dict(self.widths),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedPrecision:
    """Widths by group that keep a budget, and the front that they were chosen from."""

    config: QuantizationConfig
    """What `ptqjax.quantize` gives these widths with: the caller's, with the way of scaling that was chosen, and rules
    that name tensors."""
    chosen: Point
    """The point that `config` stands for."""
    points: tuple[Point, ...]
    """All that was evaluated, in the order of their bit-operations, and where those are equal of their noise."""

    @property
    def front(self) -> tuple[Point, ...]:
        """The points than which none is both cheaper (bit-operations) and closer to the float model (SQNR)."""
        return pareto(self.points, lambda point: point.costs.bit_operations, lambda point: point.metrics["sqnr_db"])

    def to_json(self, path: str | Path | None = None) -> str:
        """Returns all points and the configuration (as TOML) as JSON, which is also written where a path is given.

        Raises:
            OutputError: The file cannot be written.
        """
        found = {
            "chosen": self.chosen.name,
            "config": config_to_toml(self.config),
            "points": [point.as_dict() for point in self.points],
        }
        return _written(json.dumps(found, indent=1) + "\n", path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """Returns a row for each point as CSV, widths in a column for each group; written where a path is given.

        Raises:
            OutputError: The file cannot be written.
        """
        rows = []
        for point in self.points:
            row = point.as_dict()
            widths = row.pop("widths")
            rows.append(
                row | {"is_chosen": point is self.chosen} | {f"bits of {name}": n for name, n in widths.items()}
            )
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return _written(text.getvalue(), path)

    def to_svg(self, path: str | Path | None = None, *, cost: str = "mean_weight_bits", metric: str = "sqnr_db") -> str:
        """Returns a picture of metric against cost, as a file that stands alone; written where a path is given.

        Dots are mixed widths, joined where none is both cheaper and better; rings are uniform ones; the chosen point
        has a ring around its dot.

        Args:
            path: Where to write it; None: nowhere.
            cost: A field of `Costs`.
            metric: A key of `Point.metrics`.

        Raises:
            OutputError: The file cannot be written.
        """
        return _written(_picture(self, cost, metric), path)


def pareto(
    points: Sequence[Point], cost: Callable[[Point], float], value: Callable[[Point], float]
) -> tuple[Point, ...]:
    """Returns the points than which none costs no more and is worth more, from the cheapest on."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (cost(point), -value(point))):
        if not found or value(point) > value(found[-1]):
            found.append(point)
    return tuple(found)


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text(Path(path), text)
    return text


def _picture(found: MixedPrecision, cost: str, metric: str) -> str:
    def x_of(point: Point) -> float:
        return float(getattr(point.costs, cost))

    def y_of(point: Point) -> float:
        return point.metrics[metric]

    x = _Axis.around([x_of(point) for point in found.points], float(_LEFT), float(_WIDTH - _RIGHT))
    y = _Axis.around([y_of(point) for point in found.points], float(_HEIGHT - _BOTTOM), float(_TOP))
    front = " ".join(f"{x.at(x_of(p)):.1f},{y.at(y_of(p)):.1f}" for p in pareto(found.points, x_of, y_of))
    marks = [_mark(point, x.at(x_of(point)), y.at(y_of(point)), point is found.chosen) for point in found.points]
    title = f"{_LABELS.get(metric, metric)} against {_LABELS.get(cost, cost)}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style>",
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
            f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text>',
            *_grid(x, y),
            f'<polyline class="front" points="{front}"/>',
            *marks,
            f'<text text-anchor="end" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}">dots mixed, rings uniform</text>',
            "</svg>\n",
        ]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    """From numbers to places in the picture."""

    low: float
    high: float
    start: float
    end: float

    @staticmethod
    def around(values: Sequence[float], start: float, end: float) -> _Axis:
        """Returns the axis that shows all finite values, with some room around them."""
        finite = [value for value in values if np.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        room = 0.06 * (high - low) or 0.5
        return _Axis(low=low - room, high=high + room, start=start, end=end)

    def at(self, value: float) -> float:
        """Returns the place of a value, infinite ones at the ends."""
        share = (np.clip(value, self.low, self.high) - self.low) / (self.high - self.low)
        return float(self.start + share * (self.end - self.start))

    def ticks(self) -> list[float]:
        """Returns round numbers along the axis, 4 to 10 of them."""
        step = 10.0 ** np.floor(np.log10((self.high - self.low) / 4))
        step *= next(factor for factor in (5, 2, 1) if (self.high - self.low) / (factor * step) >= 4)  # noqa: PLR2004
        return [float(step * i) for i in range(int(np.ceil(self.low / step)), int(self.high / step) + 1)]


def _grid(x: _Axis, y: _Axis) -> list[str]:
    lines = []
    for value in x.ticks():
        place = f"{x.at(value):.1f}"
        lines.append(f'<line x1="{place}" x2="{place}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        lines.append(f'<text text-anchor="middle" x="{place}" y="{_HEIGHT - _BOTTOM + 16}">{value:.4g}</text>')
    for value in y.ticks():
        place = y.at(value)
        lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        lines.append(f'<text text-anchor="end" x="{_LEFT - 6}" y="{place + 4:.1f}">{value:.4g}</text>')
    return lines


def _mark(point: Point, x: float, y: float, is_chosen: bool) -> str:  # noqa: FBT001 - private, one caller
    shape, radius = ("uniform", 5) if point.is_uniform else ("mixed", 3.5)
    ring = f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="8"/>' if is_chosen else ""
    label = f'<text x="{x + 8:.1f}" y="{y + 16:.1f}">{escape(point.name)}</text>' if point.is_uniform else ""
    title = f"<title>{escape(point.name)}</title>"
    return f'<circle class="{shape}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>{ring}{label}'
