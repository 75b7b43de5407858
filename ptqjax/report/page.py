"""The facts of a report as one HTML page: style and pictures inside, nothing fetched, no script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from itertools import groupby
from typing import Any

from ptqjax.report.plots import channel_plot, range_bar, spread

_MOST_PLOTS = 9
_METRICS = {  # metric -> (heading, factor, format)
    "float_sqnr_db": ("in float: SQNR, dB", 1.0, "{:.0f}"),
    "top1": ("top-1, %", 100.0, "{:.1f}"),
    "agreement": ("agreement with float, %", 100.0, "{:.1f}"),
    "sqnr_db": ("SQNR, dB", 1.0, "{:.1f}"),
}


def page(report: Mapping[str, Any]) -> str:
    """Returns the page for `facts(...)`; the parts stand in the order in which a reader asks for them."""
    title = f"{report['source'].get('model', 'model')}, quantized"
    style = resources.files("ptqjax.report").joinpath("style.css").read_text()
    body = "".join(
        (_head(report, title), _stages(report), _transforms(report), _plots(report), _grids(report), _origin(report))
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body>\n{body}</body></html>\n"
    )


def metric_headings(stages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the metrics that the stages have, in the order of columns, with their headings."""
    present = {name for stage in stages for name in stage["metrics"]}
    return {name: heading for name, (heading, _, _) in _METRICS.items() if name in present}


def metric_text(name: str, value: float | None) -> str:
    """Returns a figure as the table shows it; an exact copy has infinite SQNR."""
    if value is None:
        return ""
    _, factor, style = _METRICS[name]
    return "exact" if value == float("inf") else style.format(factor * value)


def _head(report: Mapping[str, Any], title: str) -> str:
    settings, stages = report["settings"], report["stages"]
    kinds = [encoding["kind"] for encoding in report["encodings"].values()]
    cards = [(f"{settings['weights']} x {settings['activations']}", f"weights per {settings['granularity']}")]
    last = stages[-1]["metrics"] if stages else {}
    for name in [name for name in metric_headings(stages) if name != "float_sqnr_db"]:
        first = next((stage["metrics"][name] for stage in stages if name in stage["metrics"]), None)
        note = f", from {metric_text(name, first)}" if name == "top1" else ""
        cards.append((metric_text(name, last.get(name)) or "?", f"{_METRICS[name][0]}{note}"))
    cards.append((str(len(kinds)), f"grids: {kinds.count('weight')} weights, {kinds.count('activation')} activations"))
    cells = "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in cards)
    return f'<h1>{escape(title)}</h1>\n<div class="cards">{cells}</div>\n'


def _stages(report: Mapping[str, Any]) -> str:
    stages = report["stages"]
    headings = metric_headings(stages)
    rows = [
        [_code(stage["stage"]), *(metric_text(name, stage["metrics"].get(name)) for name in headings)]
        for stage in stages
    ]
    return _section(
        "Stage by stage: the simulation, on the calibration samples",
        "Each row is the model after one more step, against the float model. “In float” tells whether a transform "
        "kept the function; the other columns what is left of it when quantized. What the exported file is worth, on "
        "samples that took no part, “ptqjax evaluate” tells.",
        _table(["stage", *headings.values()], rows, numbers_from=1, mark_last=True),
    )


def _transforms(report: Mapping[str, Any]) -> str:
    groups = []
    for transform, found in groupby(report["records"], key=lambda record: record["transform"]):
        records = list(found)
        num_done = sum(record["done"] for record in records)
        rows = [_record_row(record) for record in sorted(records, key=lambda record: record["done"])]
        count = f"{num_done} done, {len(records) - num_done} left alone"
        groups.append(
            f'<details><summary>{_code(transform)}<span class="count">{count}</span></summary>'
            f"{_table(['', 'what', 'where', 'why', 'before → after'], rows)}</details>"
        )
    return _section(
        "What each transform did, and what it left alone",
        "One line per place that was looked at; what was left alone comes first, with the reason.",
        "".join(groups) or "<p>No transform ran.</p>",
    )


def _record_row(record: Mapping[str, Any]) -> list[str]:
    mark = '<span class="done">done</span>' if record["done"] else '<span class="alone">left alone</span>'
    names = list(dict.fromkeys((*record["before"], *record["after"])))
    figures = "<br>".join(
        f"{escape(name)}: {_figure(record['before'].get(name))} → {_figure(record['after'].get(name))}"
        for name in names
    )
    where = " ".join(_code(name) for name in record["where"])
    return [mark, escape(record["what"]), where, escape(record["reason"]), f'<span class="figures">{figures}</span>']


def _plots(report: Mapping[str, Any]) -> str:
    ranges = report["weight_ranges"]
    widest = sorted(ranges, key=lambda name: -spread(ranges[name]["before"]))[:_MOST_PLOTS]
    figures = "".join(
        f"<figure><figcaption>{_code(name)}<br>widest ÷ narrowest: {_figure(spread(ranges[name]['before']))} → "
        f"{_figure(spread(ranges[name]['after']))}</figcaption>"
        f"{channel_plot(ranges[name]['before'], ranges[name]['after'], label=f'channel ranges of {name}')}</figure>"
        for name in widest
    )
    shown = f"The {len(widest)} most uneven of {len(ranges)} weights" if len(ranges) > len(widest) else "All weights"
    key = '<span class="key"><i class="before"></i>batch norms folded<i class="after"></i>as exported</span>'
    return _section(
        "Ranges of the weights, channel by channel",
        f"{shown}: largest magnitude of each output channel. One step of a grid for the whole tensor is the widest "
        f"channel over 127; channels far below it lose their digits.<br>{key}",
        f'<div class="plots">{figures}</div>',
        escape_text=False,
    )


def _grids(report: Mapping[str, Any]) -> str:
    parts = []
    for kind, title in (("activation", "Activations"), ("weight", "Weights")):
        chosen = {name: grid for name, grid in report["encodings"].items() if grid["kind"] == kind}
        extent = max((max(abs(grid["minimum"]), abs(grid["maximum"])) for grid in chosen.values()), default=1.0)
        rows = [_grid_row(name, grid, extent) for name, grid in chosen.items()]
        headings = ["tensor", "type", "per", "minimum", "maximum", "", "scale", "zero point"]
        parts.append(
            f'<details><summary>{title}<span class="count">{len(chosen)}</span></summary>'
            f"{_table(headings, rows)}</details>"
        )
    return _section(
        "Grids",
        "The range that each tensor's integers span. Per-channel grids show the widest channel and the span of scales.",
        "".join(parts),
    )


def _grid_row(name: str, grid: Mapping[str, Any], extent: float) -> list[str]:
    scales, zeros = grid["scale"], grid["zero_point"]
    per = "tensor" if grid["axis"] is None else f"axis {grid['axis']}"
    if grid["block_size"]:
        per += f", blocks of {grid['block_size']}"
    return [
        _code(name),
        _type(grid) + ("" if grid["enabled"] else " (off)"),
        per,
        _figure(grid["minimum"]),
        _figure(grid["maximum"]),
        range_bar(grid["minimum"], grid["maximum"], extent=extent),
        _figure(min(scales)) if len(scales) == 1 else f"{_figure(min(scales))} … {_figure(max(scales))}",
        str(zeros[0]) if min(zeros) == max(zeros) else f"{min(zeros)} … {max(zeros)}",
    ]


def _type(grid: Mapping[str, Any]) -> str:
    """Returns the integer type; with the number of bits where the grid does not use all that it is stored in."""
    stored = int(grid["dtype"].removeprefix("u").removeprefix("int"))
    return grid["dtype"] if grid["num_bits"] == stored else f"{grid['num_bits']} bits in {grid['dtype']}"


def _origin(report: Mapping[str, Any]) -> str:
    operators = ", ".join(f"{count} {name}" for name, count in report["model"]["operators"].items())
    lines = {
        **{key.replace("_", " "): str(value) for key, value in report["source"].items()},
        "settings": ", ".join(f"{key}={value}" for key, value in report["settings"].items()),
        "operators": f"{operators}; {report['model']['num_parameters']:,} parameters; opset {report['model']['opset']}",
        "device": report["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in lines.items())
    return _section("Where this comes from", "", f"<dl>{items}</dl>")


def _section(title: str, text: str, content: str, *, escape_text: bool = True) -> str:
    paragraph = f"<p>{escape(text) if escape_text else text}</p>" if text else ""
    return f"<h2>{escape(title)}</h2>{paragraph}\n{content}\n"


def _table(
    headings: Iterable[str], rows: Sequence[Sequence[str]], *, numbers_from: int | None = None, mark_last: bool = False
) -> str:
    """Returns a table; cells are HTML already; columns from `numbers_from` on are aligned right."""

    def kind(column: int) -> str:
        return ' class="number"' if numbers_from is not None and column >= numbers_from else ""

    head = "".join(f"<th{kind(i)}>{escape(heading)}</th>" for i, heading in enumerate(headings))
    lines = [
        ("<tr class='last'>" if mark_last and row is rows[-1] else "<tr>")
        + "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _figure(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"
