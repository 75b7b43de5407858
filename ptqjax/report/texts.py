"""How figures and records are said, on the terminal and on the page alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ptqjax.report.markup import figure

_Record = TypeVar("_Record")
METRICS = {
    "float_sqnr_db": ("in float: SQNR, dB", 1.0, "{:.0f}"),
    "top1": ("top-1, %", 100.0, "{:.1f}"),
    "token_accuracy": ("tokens named right, %", 100.0, "{:.1f}"),
    "perplexity": ("perplexity", 1.0, "{:.3f}"),
    "kl": ("KL to float", 1.0, "{:.4f}"),
    "agreement": ("agreement with float, %", 100.0, "{:.1f}"),
    "sqnr_db": ("SQNR, dB", 1.0, "{:.1f}"),
    "worst_sqnr_db": ("SQNR of the worst output, dB", 1.0, "{:.1f}"),
}
"""Metric -> (heading, factor, format), of those that have a heading of their own."""
_UNTOLD = {"cross_entropy"}  # perplexity tells the same


def metric_headings(stages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the metrics that the stages have, in the order of columns, with their headings.

    Of several outputs the worst stands for all: one figure over outputs of unlike units says what the largest is worth.
    """
    present = dict.fromkeys(name for stage in stages for name in stage["metrics"])
    hidden = _UNTOLD | ({"sqnr_db"} if "worst_sqnr_db" in present else set())
    ordered = [*(name for name in METRICS if name in present), *(name for name in present if name not in METRICS)]
    return {name: metric_heading(name) for name in ordered if name not in hidden}


def metric_heading(name: str) -> str:
    """Returns what a metric is called in tables: one of a user's own, or of one output, by its name."""
    return METRICS[name][0] if name in METRICS else name


def output_rows(stages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns a row for each output, or part of one, with its SQNR after the last stage; the worst comes first.

    No rows where there is but one: the table of stages has its figure.
    """
    measured = [stage["outputs"] for stage in stages if stage.get("outputs")]
    order = sorted(measured[-1].items(), key=lambda output: float(output[1])) if measured else []
    return [
        [name, metric_text("sqnr_db", value), "the worst" if i == 0 else ""] for i, (name, value) in enumerate(order)
    ]


def metric_text(name: str, value: float | None) -> str:
    """Returns a figure as the table shows it; an exact copy has infinite SQNR."""
    if value is None:
        return ""
    _, factor, style = METRICS.get(name, ("", 1.0, "{:.4g}"))
    return "exact" if value == float("inf") else style.format(factor * value)


def figure_texts(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Returns a record's figures, one text each: "ratio: 8 → 2", or "channels: 3" where but one side is known."""
    texts = []
    for name in dict.fromkeys((*before, *after)):
        known = [figure(side[name]) for side in (before, after) if name in side]
        texts.append(f"{name}: {' → '.join(known)}")
    return texts


def by_transform(records: Iterable[_Record], name_of: Callable[[_Record], str]) -> dict[str, list[_Record]]:
    """Returns the records of each transform, in the order in which transforms first ran."""
    groups: dict[str, list[_Record]] = {}
    for record in records:
        groups.setdefault(name_of(record), []).append(record)
    return groups
