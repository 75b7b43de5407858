"""The parts of the page that say what was done: stages, transforms, ranges channel by channel, grids, where from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ptqjax.report import running
from ptqjax.report.markup import code, figure, folded, gallery, section, table
from ptqjax.report.plots import channel_plot, range_bar, spread
from ptqjax.report.texts import by_transform, figure_texts, metric_heading, metric_headings, metric_text, output_rows

_MOST_PLOTS = 12  # at a glance; the others are folded away
_FROM = ("top1", "token_accuracy", "perplexity")  # metrics that float has a figure of its own for
_CHANGED = 1.001  # ranges that differ by less are drawn as what stayed


def head(report: Mapping[str, Any], title: str) -> str:
    """Returns the title, and what it comes down to."""
    settings, stages = report["settings"], report["stages"]
    kinds = [encoding["kind"] for encoding in report["encodings"].values()]
    cards = [(f"{settings['weights']} x {settings['activations']}", f"weights per {settings['granularity']}")]
    last = stages[-1]["metrics"] if stages else {}
    for name in [name for name in metric_headings(stages) if name != "float_sqnr_db"]:
        first = next((stage["metrics"][name] for stage in stages if name in stage["metrics"]), None)
        note = f", from {metric_text(name, first)}" if name in _FROM else ""
        note = f": {output_rows(stages)[0][0]}" if name == "worst_sqnr_db" and output_rows(stages) else note
        cards.append((metric_text(name, last.get(name)) or "?", f"{metric_heading(name)}{note}"))
    cards += running.cards(report)
    cards.append((str(len(kinds)), f"grids: {kinds.count('weight')} weights, {kinds.count('activation')} activations"))
    cells = "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in cards)
    return f'<h1>{escape(title)}</h1>\n<div class="cards">{cells}</div>\n{running.warnings(report)}'


def stages(report: Mapping[str, Any]) -> str:
    """Returns the table of what each stage kept; nothing but a sentence where nothing was measured."""
    rows, headings = report["stages"], metric_headings(report["stages"])
    if not rows:
        return section("stages", "Stage by stage", "Nothing was measured, because there were no samples.", "")
    cells = [
        [code(stage["stage"]), *(metric_text(name, stage["metrics"].get(name)) for name in headings)] for stage in rows
    ]
    return section(
        "stages",
        f"Stage by stage: in {report['measured_in']}, on {report.get('measured_on', 'the calibration samples')}",
        "Each row is the model after one more step, against the float model. “In float” tells whether a transform "
        "kept the function; the other columns what is left of it when quantized. What the exported file is worth, on "
        "samples that took no part, “ptqjax evaluate” tells.",
        table(
            ["stage", *headings.values()],
            cells,
            identity="stage-table",
            caption="What each stage kept of the float model",
            numbers=range(1, 1 + len(headings)),
            mark_last=True,
        )
        + _outputs(rows),
    )


def _outputs(stages: Sequence[Mapping[str, Any]]) -> str:
    """Returns what each output, or part of one, is worth; nothing where there is but one."""
    rows = [[code(name), value, mark] for name, value, mark in output_rows(stages)]
    caption = "SQNR of each output after the last stage; of one that joins unlike parts, of each part"
    headings = ["output", "SQNR, dB", ""]
    return table(headings, rows, identity="output-table", caption=caption, numbers=(1,)) if rows else ""


def transforms(report: Mapping[str, Any]) -> str:
    """Returns what each transform did and left alone, a folded table for each."""
    groups = []
    for transform, records in by_transform(report["records"], lambda record: record["transform"]).items():
        num_done = sum(record["done"] for record in records)
        rows = [_record_row(record) for record in sorted(records, key=lambda record: record["done"])]
        listed = table(
            ["", "what", "where", "before → after", "why"],
            rows,
            identity=f"transform-{transform}",
            caption=f"What {transform} did and left alone",
            leave_out_empty=True,
        )
        groups.append(folded(code(transform), f"{num_done} done, {len(records) - num_done} left alone", listed))
    return section(
        "transforms",
        "What each transform did, and what it left alone",
        "One line per place that was looked at; what was left alone comes first, with the reason.",
        "".join(groups) or "<p>No transform ran.</p>",
    )


def _record_row(record: Mapping[str, Any]) -> list[str]:
    mark = '<span class="done">done</span>' if record["done"] else '<span class="alone">left alone</span>'
    figures = "<br>".join(map(escape, figure_texts(record["before"], record["after"])))
    where = " ".join(code(name) for name in record["where"])
    figures = f'<span class="figures">{figures}</span>' if figures else ""
    return [mark, escape(record["what"]), where, figures, escape(record["reason"])]


def ranges(report: Mapping[str, Any]) -> str:
    """Returns the pictures of ranges channel by channel, before and after equalization."""
    key = '<span class="key"><i class="before"></i>batch norms folded<i class="after"></i>as exported</span>'
    weights = section(
        "weight-ranges",
        "Ranges of the weights, channel by channel",
        "Largest magnitude of each output channel. One step of a grid for the whole tensor is the widest channel over "
        f"half the number of steps; channels far below it lose their digits.<br>{key}",
        _gallery(report["weight_ranges"]),
    )
    if not report["activation_ranges"]:
        return weights
    return weights + section(
        "activation-ranges",
        "Ranges of the activations, channel by channel",
        "What the batch norms tell without data: three standard deviations around the mean, within what is provable. "
        f"An activation has one grid for all channels.<br>{key}",
        _gallery(report["activation_ranges"]),
    )


def _gallery(pairs: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Returns the plots of all tensors, the most changed ones first."""
    order = sorted(pairs, key=lambda name: -_change(pairs[name]))
    changed = sum(_change(pairs[name]) > _CHANGED for name in order)
    text = f"<p>{changed} of {len(order)} tensors changed; the most changed come first.</p>"
    return text + gallery([_figure_of(name, pairs[name]) for name in order], shown=_MOST_PLOTS)


def _figure_of(name: str, pair: Mapping[str, Sequence[float]]) -> str:
    before, after = pair["before"], pair["after"]
    spreads = f"widest ÷ narrowest: {figure(spread(before))} → {figure(spread(after))}"
    plot = channel_plot(before, after, label=f"channel ranges of {name}")
    return f"<figure><figcaption>{code(name)}<br>{spreads}</figcaption>{plot}</figure>"


def _change(pair: Mapping[str, Sequence[float]]) -> float:
    """Returns by what factor the spread of the channels changed; 1 where it did not."""
    ratio = spread(pair["before"]) / spread(pair["after"])
    return max(ratio, 1 / ratio)


def grids(report: Mapping[str, Any]) -> str:
    """Returns a table of all grids, activations and weights."""
    parts = []
    for kind, title in (("activation", "Activations"), ("weight", "Weights")):
        chosen = {name: grid for name, grid in report["encodings"].items() if grid["kind"] == kind}
        extent = max((max(abs(grid["minimum"]), abs(grid["maximum"])) for grid in chosen.values()), default=1.0)
        rows = [_grid_row(name, grid, extent) for name, grid in chosen.items()]
        headings = ["tensor", "type", "per", "minimum", "maximum", "", "scale", "zero point"]
        listed = table(headings, rows, identity=f"{kind}-grids", caption=f"Grids of the {title.lower()}")
        parts.append(folded(title, str(len(chosen)), listed))
    return section(
        "grids",
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
        code(name),
        grid_type(grid) + ("" if grid["enabled"] else " (off)"),
        per,
        figure(grid["minimum"]),
        figure(grid["maximum"]),
        range_bar(grid["minimum"], grid["maximum"], extent=extent),
        figure(min(scales)) if len(scales) == 1 else f"{figure(min(scales))} … {figure(max(scales))}",
        str(zeros[0]) if min(zeros) == max(zeros) else f"{min(zeros)} … {max(zeros)}",
    ]


def grid_type(grid: Mapping[str, Any]) -> str:
    """Returns the type of the codes; with the number of bits where the grid does not use all that it is stored in."""
    stored = grid["dtype"].removeprefix("u").removeprefix("int")
    if not stored.isdigit() or grid["num_bits"] == int(stored):
        return grid["dtype"]
    return f"{grid['num_bits']} bits in {grid['dtype']}"


def seconds(report: Mapping[str, Any]) -> str:
    """Returns what each stage of the run took; nothing where that was not measured."""
    spent = report.get("seconds", [])
    if not spent:
        return ""
    names = ("seconds", "compiling_seconds", "processor_seconds")
    rows = [
        [
            code(each["stage"]),
            *(f"{each[name]:.1f}" for name in names),
            str(each["num_compiled"]),
            str(each["num_found"]),
        ]
        for each in spent
    ]
    headings = [
        "stage",
        "seconds",
        "of these tracing and compiling",
        "processor seconds",
        "programs compiled",
        "found on disk",
    ]
    total = sum(each["seconds"] for each in spent)
    return section(
        "seconds",
        "Where the time went",
        f"{total:.1f} seconds up to this report, by the clock; processor seconds are those of all threads. What was "
        "compiled is found on disk by the next run like this one.",
        table(headings, rows, identity="seconds-table", caption="What each stage took", numbers=range(1, 6)),
    )


def origin(report: Mapping[str, Any]) -> str:
    """Returns where the run comes from: files, hashes, settings, versions."""
    operators = ", ".join(f"{count} {name}" for name, count in report["model"]["operators"].items())
    lines = {
        **{key.replace("_", " "): str(value) for key, value in report["source"].items()},
        "settings": ", ".join(f"{key}={value}" for key, value in report["settings"].items()),
        "operators": f"{operators}; {report['model']['num_parameters']:,} parameters; opset {report['model']['opset']}",
        "device": report["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in lines.items())
    return section("origin", "Where this comes from", "", f"<dl>{items}</dl>")
