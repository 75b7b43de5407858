"""The facts of a report as one HTML page: style and pictures inside, nothing fetched, no script."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any, TypeVar

from ptqjax.report.plots import channel_plot, range_bar, spread

_MOST_PLOTS = 12  # at a glance; the others are folded away
_CHANGED = 1.001  # ranges that differ by less are drawn as what stayed
_Record = TypeVar("_Record")
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


def figure_texts(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Returns a record's figures, one text each: "ratio: 8 → 2", or "channels: 3" where but one side is known."""
    texts = []
    for name in dict.fromkeys((*before, *after)):
        known = [_figure(side[name]) for side in (before, after) if name in side]
        texts.append(f"{name}: {' → '.join(known)}")
    return texts


def by_transform(records: Iterable[_Record], name_of: Callable[[_Record], str]) -> dict[str, list[_Record]]:
    """Returns the records of each transform, in the order in which transforms first ran."""
    groups: dict[str, list[_Record]] = {}
    for record in records:
        groups.setdefault(name_of(record), []).append(record)
    return groups


def _transforms(report: Mapping[str, Any]) -> str:
    groups = []
    for transform, records in by_transform(report["records"], lambda record: record["transform"]).items():
        num_done = sum(record["done"] for record in records)
        rows = [_record_row(record) for record in sorted(records, key=lambda record: record["done"])]
        count = f"{num_done} done, {len(records) - num_done} left alone"
        groups.append(
            f'<details><summary>{_code(transform)}<span class="count">{count}</span></summary>'
            f"{_table(['', 'what', 'where', 'before → after', 'why'], rows, leave_out_empty=True)}</details>"
        )
    return _section(
        "What each transform did, and what it left alone",
        "One line per place that was looked at; what was left alone comes first, with the reason.",
        "".join(groups) or "<p>No transform ran.</p>",
    )


def _record_row(record: Mapping[str, Any]) -> list[str]:
    mark = '<span class="done">done</span>' if record["done"] else '<span class="alone">left alone</span>'
    figures = "<br>".join(map(escape, figure_texts(record["before"], record["after"])))
    where = " ".join(_code(name) for name in record["where"])
    figures = f'<span class="figures">{figures}</span>' if figures else ""
    return [mark, escape(record["what"]), where, figures, escape(record["reason"])]


def _plots(report: Mapping[str, Any]) -> str:
    key = '<span class="key"><i class="before"></i>batch norms folded<i class="after"></i>as exported</span>'
    weights = _section(
        "Ranges of the weights, channel by channel",
        "Largest magnitude of each output channel. One step of a grid for the whole tensor is the widest channel over "
        f"half the number of steps; channels far below it lose their digits.<br>{key}",
        _gallery(report["weight_ranges"]),
        escape_text=False,
    )
    if not report["activation_ranges"]:
        return weights
    return weights + _section(
        "Ranges of the activations, channel by channel",
        "What the batch norms tell without data: three standard deviations around the mean, within what is provable. "
        f"An activation has one grid for all channels.<br>{key}",
        _gallery(report["activation_ranges"]),
        escape_text=False,
    )


def _gallery(ranges: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Returns the plots of all tensors, the most changed ones first and at a glance, the others folded away."""
    order = sorted(ranges, key=lambda name: -_change(ranges[name]))
    figures = [_figure_of(name, ranges[name]) for name in order]
    shown, folded = figures[:_MOST_PLOTS], figures[_MOST_PLOTS:]
    changed = sum(_change(ranges[name]) > _CHANGED for name in order)
    text = f"<p>{changed} of {len(order)} tensors changed; the most changed come first.</p>"
    rest = (
        f'<details><summary>The others<span class="count">{len(folded)}</span></summary>'
        f'<div class="plots">{"".join(folded)}</div></details>'
    )
    return f'{text}<div class="plots">{"".join(shown)}</div>{rest if folded else ""}'


def _figure_of(name: str, pair: Mapping[str, Sequence[float]]) -> str:
    before, after = pair["before"], pair["after"]
    spreads = f"widest ÷ narrowest: {_figure(spread(before))} → {_figure(spread(after))}"
    plot = channel_plot(before, after, label=f"channel ranges of {name}")
    return f"<figure><figcaption>{_code(name)}<br>{spreads}</figcaption>{plot}</figure>"


def _change(pair: Mapping[str, Sequence[float]]) -> float:
    """Returns by what factor the spread of the channels changed; 1 where it did not."""
    ratio = spread(pair["before"]) / spread(pair["after"])
    return max(ratio, 1 / ratio)


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
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers_from: int | None = None,
    mark_last: bool = False,
    leave_out_empty: bool = False,
) -> str:
    """Returns a table; cells are HTML already; columns from `numbers_from` on are aligned right."""
    if leave_out_empty:
        kept = [i for i in range(len(headings)) if any(row[i] for row in rows)]
        headings, rows = [headings[i] for i in kept], [[row[i] for i in kept] for row in rows]

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
