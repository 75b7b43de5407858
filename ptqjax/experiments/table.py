"""What a sweep found: a table of records, its Pareto front, and both as CSV, JSON and a picture."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ptqjax.config import QuantizationConfig, near_names
from ptqjax.encoding_files.whole_files import write_whole
from ptqjax.errors import ConfigError
from ptqjax.experiments.engine import Batching

COSTS = ("bit_operations", "model_bytes", "stored_bytes", "mean_weight_bits", "mean_activation_bits")
"""Columns of what a model costs; less is better."""
_TOLD = ("num_quantized", "chosen_by", "program")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _EDGE = 480, 300, 64, 40, 16
_STYLE = "text{font:11px sans-serif;fill:#444}.all{fill:#bbb}.front{fill:#1f5fa8}path{fill:none;stroke:#1f5fa8}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRow:
    """A configuration and what it gave; `row[column]` is a metric, or any other figure."""

    name: str
    """What the configuration is called."""
    config: QuantizationConfig
    """The configuration."""
    metrics: Mapping[str, float]
    """What was measured, by name: dB, or fractions from 0 to 1."""
    bit_operations: float
    """The cost `Costs.bit_operations` of the row."""
    model_bytes: int
    """The cost `Costs.model_bytes` of the row."""
    stored_bytes: int
    """The cost `Costs.stored_bytes` of the row."""
    mean_weight_bits: float
    """The cost `Costs.mean_weight_bits` of the row."""
    mean_activation_bits: float
    """The cost `Costs.mean_activation_bits` of the row."""
    num_quantized: int
    """How many tensors are rounded, biases not counted."""
    chosen_by: str
    """The name of the configuration that scales, headroom and correction were chosen for: its own, unless shared."""
    program: int
    """Which executable ran it, counted from 0 in the run that measured it."""

    def __getitem__(self, column: str) -> Any:
        if column in self.metrics:
            return self.metrics[column]
        known = ("name", *self.metrics, *COSTS, *_TOLD)
        if column not in known:
            raise ConfigError(f"column {column!r} is unknown; expected {', '.join(known)}{near_names(column, known)}")
        return getattr(self, column)

    def as_dict(self) -> dict[str, Any]:
        """Returns the row as plain data, for JSON: its figures, and the fields of its configuration under "config"."""
        figures = {name: self[name] for name in ("name", *self.metrics, *COSTS, *_TOLD)}
        settings = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        settings["rules"] = [{f.name: getattr(rule, f.name) for f in fields(rule)} for rule in self.config.rules]
        return {**figures, "config": settings}


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepTable:
    """The rows of a sweep, in the order of its configurations: a sequence of them."""

    rows: tuple[SweepRow, ...]
    """The rows."""
    higher_is_better: Mapping[str, bool]
    """Whether more is better, for each metric by name."""
    seconds: Mapping[str, float]
    """What this run took, by stage: those of `pipeline.STAGES`, "compile", "evaluate" (and "costs"). Rows that a
    journal had took nothing."""
    batching: tuple[Batching, ...]
    """How the programs ran, see `Evaluated.batching`."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[SweepRow]:
        return iter(self.rows)

    def row(self, name: str) -> SweepRow:
        """Returns the row of a configuration by its name.

        Raises:
            ConfigError: There is none.
        """
        found = {row.name: row for row in self.rows}
        if name not in found:
            raise ConfigError(f"there is no row {name!r}{near_names(name, found)}; expected one of {', '.join(found)}")
        return found[name]

    def pareto(self, metric: str = "sqnr_db", cost: str = "bit_operations") -> tuple[SweepRow, ...]:
        """Returns the rows that no other beats, by rising cost.

        One row beats another that is no better and costs no less, unless the two are equal in both. Where the metric is
        NaN, the row is left out.

        Raises:
            ConfigError: The metric or the cost is unknown.
        """
        if metric not in self.higher_is_better or cost not in COSTS:
            raise ConfigError(
                f"metric={metric!r}, cost={cost!r}: expected a metric of {', '.join(self.higher_is_better)}, and a "
                f"cost of {', '.join(COSTS)}"
            )
        sign = 1 if self.higher_is_better[metric] else -1
        told = [row for row in self.rows if not math.isnan(row[metric])]
        ranked = sorted(told, key=lambda row: (row[cost], -sign * row[metric]))
        front: list[SweepRow] = []
        for row in ranked:
            last = front[-1] if front else None
            is_equal = last is not None and (last[cost], last[metric]) == (row[cost], row[metric])
            if last is None or is_equal or sign * row[metric] > sign * last[metric]:
                front.append(row)
        return tuple(front)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns the table as CSV, a line for each row; also written to `path`, whole or not at all.

        Columns: name, the metrics, the costs, num_quantized, chosen_by, program, then the fields of the configuration,
        rules and the like as JSON.

        Raises:
            OutputError: The file cannot be written.
        """
        text = io.StringIO()
        lines = [_flat(row.as_dict()) for row in self.rows]
        writer = csv.DictWriter(text, list(lines[0]) if lines else ["name"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return _written(text.getvalue(), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns the table as JSON: "seconds" and "rows"; also written to `path`, whole or not at all.

        What is not finite is a text: "Infinity" for the SQNR of equal outputs.

        Raises:
            OutputError: The file cannot be written.
        """
        whole = {"seconds": dict(self.seconds), "rows": [row.as_dict() for row in self.rows]}
        return _written(json.dumps(_finite(whole), indent=1, allow_nan=False) + "\n", path)

    def to_svg(
        self,
        metric: str = "sqnr_db",
        cost: str = "bit_operations",
        path: str | os.PathLike[str] | None = None,
    ) -> str:
        """Returns a picture of all rows, the front among them joined by a line; the axis of the cost is logarithmic.

        Raises:
            ConfigError: The metric or the cost is unknown.
            OutputError: The file cannot be written.
        """
        return _written(_picture(self.rows, self.pareto(metric, cost), metric, cost), path)


def check_columns(metrics: Sequence[str]) -> None:
    """Checks that metrics are not called as other columns are.

    Raises:
        ConfigError: One is.
    """
    taken = {"name", "config", *COSTS, *_TOLD, *(field.name for field in fields(QuantizationConfig))}
    clash = next((name for name in metrics if name in taken), None)
    if clash is not None:
        raise ConfigError(f"metrics: {clash!r} is another column of the table; call the metric differently")


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: _cell(value) for name, value in row["config"].items()}
    return {**{name: value for name, value in row.items() if name != "config"}, **settings}


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, list | tuple) else value


def _finite(value: Any) -> Any:
    """Returns plain data in which numbers that JSON has not are texts."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        write_whole(Path(path), text.encode())
    return text


def _picture(rows: Sequence[SweepRow], front: Sequence[SweepRow], metric: str, cost: str) -> str:
    shown = [row for row in rows if math.isfinite(row[metric]) and row[cost] > 0]
    x_of = _scale([math.log10(row[cost]) for row in shown], _LEFT, _WIDTH - _EDGE)
    y_of = _scale([row[metric] for row in shown], _HEIGHT - _BOTTOM, _EDGE)

    def place(row: SweepRow) -> str:
        return f"{x_of(math.log10(row[cost])):.1f} {y_of(row[metric]):.1f}"

    def dot(row: SweepRow) -> str:
        x, y = place(row).split()
        kind = "front" if row in front else "all"
        told = escape(f"{row.name}: {metric} {row[metric]:.4g}, {cost} {row[cost]:.4g}")
        return f'<circle class="{kind}" cx="{x}" cy="{y}" r="3.5"><title>{told}</title></circle>'

    line = "L".join(place(row) for row in front if row in shown)
    ends = sorted({row[cost] for row in shown})
    values = sorted({row[metric] for row in shown})
    ticks = [f'<text x="{x_of(math.log10(x)):.1f}" y="{_HEIGHT - 22}">{x:.3g}</text>' for x in (*ends[:1], *ends[-1:])]
    ticks += [f'<text x="4" y="{y_of(y) + 4:.1f}">{y:.4g}</text>' for y in (*values[:1], *values[-1:])]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(metric)} against {escape(cost)}"><style>{_STYLE}</style>'
        f'{"".join(ticks)}<text x="{_LEFT}" y="{_HEIGHT - 6}">{escape(metric)} (up) against {escape(cost)}</text>'
        + (f'<path d="M{line}"/>' if line else "")
        + "".join(dot(row) for row in shown)
        + "</svg>\n"
    )


def _scale(values: Sequence[float], start: int, end: int) -> Any:
    """Returns the map of the values' range to start..end."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    spread = high - low if high > low else 1.0
    return lambda value: float(np.interp((value - low) / spread, (0, 1), (start, end)))
