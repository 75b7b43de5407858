"""The parts of the page that explain: what to do next, where the noise comes from, what met each grid, the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ptqjax.fit.trials import verdicts
from ptqjax.report.charts import depth_plot, histogram_plot, share_bar
from ptqjax.report.markup import code, decibels, figure, folded, gallery, percent, section, table
from ptqjax.report.recommendations import shares, stage_gains
from ptqjax.report.sections import grid_type

_MOST_PLOTS = 12  # histograms at a glance
_MOST_GROUPS = 15  # bars at a glance
_ON_ITS_GRID_DB = 25.0  # above the accumulated noise: what rounding adds there counts for nothing


def recommended(report: Mapping[str, Any]) -> str:
    """Returns what to do next, and what the stages have gained; or that nothing stands out."""
    if "recommendations" not in report:
        return ""
    items = "".join(map(_recommendation, report["recommendations"]))
    listed = f'<ol class="advice">{items}</ol>' if items else "<p>Nothing to recommend: no figure stands out.</p>"
    judged = verdicts((record["what"], record["reason"]) for record in report.get("records", ()))
    gains = "".join(f"<li>{escape(text)}</li>" for text in (*gain_texts(report["stages"]), *judged))
    return section(
        "recommendations",
        "What to do next",
        "Each follows from the figures beside it, measured on the calibration samples; gains are estimates, of each "
        "change by itself.",
        listed + (f'<h3>What the stages gained</h3><ul id="gains">{gains}</ul>' if gains else ""),
    )


def gain_texts(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what each stage gained, a sentence for each."""
    return [
        f"{gain['stage']}: {_signed(gain['sqnr_db'])} dB"
        + (f", {_signed(100 * gain['agreement'])} points of agreement" if "agreement" in gain else "")
        + (f", {_signed(100 * gain['top1'])} points of top-1" if "top1" in gain else "")
        + (f", {_signed(100 * gain['token_accuracy'])} points of tokens" if "token_accuracy" in gain else "")
        + (f", {gain['perplexity']:+.3f} of perplexity" if "perplexity" in gain else "")
        + f", over {gain['over']}"
        for gain in stage_gains(stages)
    ]


def _signed(value: float) -> str:
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}"  # noqa: PLR2004 - no sign where nothing is left of it


def _recommendation(each: Mapping[str, Any]) -> str:
    where = " ".join(map(code, each["where"]))
    gain = "" if each["gain_db"] is None else f'<span class="gain">about {each["gain_db"]:+.1f} dB</span>'
    return (
        f"<li><b>{escape(each['what'])}</b>{gain}<br>{escape(each['why'])}"
        + (f'<br><span class="where">{where}</span>' if where else "")
        + f"<pre>{escape(each['option'])}</pre></li>"
    )


def sensitivity(report: Mapping[str, Any]) -> str:
    """Returns a bar for each group of tensors: its share of the noise in the output."""
    found = report.get("sensitivity")
    if not found or not found["groups"]:
        return ""
    parts, groups = shares(report), {group["name"]: group for group in found["groups"]}
    rows = [_share_row(groups[name], share, max(parts.values())) for name, share in parts.items()]
    headings = ["rounded", "kind", "share, %", "", "alone: SQNR, dB"]
    caption = "Share of each group of tensors in the noise of the output"
    first = table(headings, rows[:_MOST_GROUPS], identity="sensitivity-table", caption=caption, numbers=(2, 4))
    rest = table(headings, rows[_MOST_GROUPS:], identity="sensitivity-rest", caption=caption, numbers=(2, 4))
    by_kind = {kind: sum(parts[n] for n in parts if groups[n]["kind"] == kind) for kind in ("weight", "activation")}
    return section(
        "sensitivity",
        "Where the noise in the output comes from",
        f"The share of each group of tensors with a common grid, estimated in one reverse pass over {found['samples']} "
        "samples, as if the groups did not act on each other; “alone” is what the output would be worth if nothing "
        f"else were rounded. Weights: {percent(by_kind['weight'])} %, activations: "
        f"{percent(by_kind['activation'])} %.",
        first + (folded("The others", str(len(rows) - _MOST_GROUPS), rest) if len(rows) > _MOST_GROUPS else ""),
    )


def _share_row(group: Mapping[str, Any], share: float, largest: float) -> list[str]:
    return [
        code(group["name"]),
        escape(group["kind"]),
        percent(share),
        share_bar(share, largest=largest, kind=group["kind"]),
        decibels(group["sqnr_db"]),
    ]


def depth(report: Mapping[str, Any]) -> str:
    """Returns SQNR tensor by tensor, from the inputs to the outputs: a picture, and the figures folded."""
    tensors = [tensor for tensor in report.get("tensors", []) if tensor["kind"] != "weight"]
    if not tensors:
        return ""
    names, total, own = ([tensor[key] for tensor in tensors] for key in ("name", "sqnr_db", "own_sqnr_db"))
    key = '<span class="key"><i class="after"></i>all rounded so far<i class="before"></i>its own rounding</span>'
    picture = depth_plot(names, total, own, label="SQNR of each tensor from the inputs to the outputs")
    rows = [[*_tensor_row(tensor, report), decibels(tensor["sqnr_db"]), *_own(tensor)] for tensor in tensors]
    headings = ["tensor", "operator", "type", "so far: SQNR, dB", "own rounding, dB", "outside the grid, %"]
    listed = table(
        headings, rows, identity="depth-table", caption="SQNR of each tensor along the depth", numbers=(3, 4, 5)
    )
    return section(
        "depth",
        "Noise along the depth",
        f"Each tensor of the quantized model against the float one, over {report['measured_samples']} samples: where "
        "the line falls, noise is made; marks near the line are the tensors whose own rounding makes it. A tensor that "
        f"lies on its grid already has no mark.<br>{key}",
        f'<div class="wide deep">{picture}</div>{folded("All figures", str(len(rows)), listed)}',
    )


def histograms(report: Mapping[str, Any]) -> str:
    """Returns what met each grid, with the grid drawn on it: the ones that lose most first, the others folded."""
    pictures = report.get("histograms")
    if not pictures:
        return ""
    tensors = {tensor["name"]: tensor for tensor in report["tensors"]}
    weights = [tensor for tensor in report["tensors"] if tensor["kind"] == "weight"]
    headings = ["tensor", "operator", "type", "own rounding, dB", "outside the grid, %"]
    rows = [[*_tensor_row(tensor, report), *_own(tensor)] for tensor in weights]
    listed = table(
        headings, rows, identity="weights-table", caption="What rounding adds to each weight", numbers=(3, 4)
    )
    kinds = []
    for kind, title in (("activation", "Activations"), ("weight", "Weights")):
        chosen = [name for name in pictures if tensors[name]["kind"] == kind]
        order = sorted(chosen, key=lambda name: tensors[name]["own_sqnr_db"])
        figures = [_picture(name, pictures[name], tensors[name], report["encodings"][name]) for name in order]
        kinds.append(f"<h3>{title}</h3>{gallery(figures, shown=_MOST_PLOTS // 2)}" if figures else "")
    return section(
        "histograms",
        "What meets each grid",
        "How often values occur (counts on a logarithmic scale), and the ends of the grid as lines; what lies in the "
        "shade outside is clipped. Where a grid has few steps, they are ticks. A weight with several scales is drawn "
        "in codes, all channels together. Those whose rounding adds most come first.",
        "".join(kinds) + (folded("Figures of the weights", str(len(rows)), listed) if rows else ""),
    )


def _tensor_row(tensor: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    grid = report["encodings"].get(tensor["name"])
    return [code(tensor["name"]), escape(tensor["operator"]), "float" if grid is None else escape(grid_type(grid))]


def _own(tensor: Mapping[str, Any]) -> list[str]:
    is_on_it = tensor["kind"] != "weight" and tensor["own_sqnr_db"] > tensor["sqnr_db"] + _ON_ITS_GRID_DB
    return ["on its grid" if is_on_it else decibels(tensor["own_sqnr_db"]), percent(tensor["clipped"])]


def _picture(name: str, histogram: Mapping[str, Any], tensor: Mapping[str, Any], grid: Mapping[str, Any]) -> str:
    unit = "codes" if histogram["unit"] == "codes" else "values"
    caption = f"{grid_type(grid)}, {unit}; own rounding {decibels(tensor['own_sqnr_db'])} dB"
    if tensor["clipped"]:
        caption += f"; {percent(tensor['clipped'])} % outside"
    plot = histogram_plot(histogram, label=f"histogram of {name} on its grid")
    return f"<figure><figcaption>{code(name)}<br>{escape(caption)}</figcaption>{plot}</figure>"


def runtime(report: Mapping[str, Any]) -> str:
    """Returns how the file in ONNX Runtime compares with what is simulated, or why that was not looked at."""
    found = report.get("runtime")
    if found is None:
        return ""
    title = "Disagreement with ONNX Runtime"
    if not found["compared"]:
        return section("runtime", title, f"Not compared: {escape(found['reason'])}", "")
    is_simulated = found.get("by") != "definition"
    names = {"integer": "integer program" if is_simulated else "operators as defined", "float": "float program"}
    programs = [(title, found[name]) for name, title in names.items() if found.get(name)]
    rows = [
        [name, decibels(each["sqnr"]), percent(each["agreement"]), percent(each["equal"])] for name, each in programs
    ]
    outputs = table(
        ["", "SQNR, dB", "same class, %", "equal, %"],
        rows,
        identity="runtime-outputs",
        caption=f"Outputs of the {'simulations' if is_simulated else 'operators'} against those of ONNX Runtime",
        numbers=(1, 2, 3),
    )
    headings = ["tensor", "operator", "alone: steps", "equal, %", "from the inputs: steps", "equal, %"]
    worst = table(
        headings,
        [_group_row(group) for group in found["groups"]],
        identity="runtime-groups",
        caption="The tensors whose integers differ most from ONNX Runtime's",
        numbers=(2, 3, 4, 5),
    )
    warnings = "".join(f"<li>{escape(text)}</li>" for text in found["warnings"])
    return section(
        "runtime",
        title,
        f"The exported file on {found['num_samples']} samples. {_exactness(found)} "
        + (_OF_FLOAT if is_simulated else _OF_DEFINITION),
        outputs
        + folded("The tensors that differ most", f"{len(found['groups'])} of {found['num_groups']}", worst)
        + (f'<ul class="warnings">{warnings}</ul>' if warnings else ""),
    )


_OF_FLOAT = (
    "The float program, which noise and sensitivities are from, rounds at the same places and adds in another order, "
    "so that some roundings differ."
)
_OF_DEFINITION = (
    "Its integer kernels were compared with the file's operators one by one as ONNX defines them, in float: sums of "
    "another order, so that single roundings differ, and from the inputs to the outputs more of them. With the integer "
    "program, which is to be equal to the bit, “ptqjax validate” compares, and --effort thorough."
)


def _exactness(found: Mapping[str, Any]) -> str:
    if found["lowest_equal"] == 1:
        other = "the operators'" if found.get("by") == "definition" else "the integer program's"
        return f"All integers of all {found['num_groups']} tensors are equal to {other}."
    return (
        f"Of the integers of {found['num_groups']} tensors at least {percent(found['lowest_equal'])} % are equal in "
        f"each group by itself; the largest difference is {figure(found['largest'])} steps."
    )


def _group_row(group: Mapping[str, Any]) -> list[str]:
    figures = [
        text
        for each in (group["alone"], group["end_to_end"])
        for text in (str(each["largest"]), percent(each["num_equal"] / max(each["num_elements"], 1)))
    ]
    return [code(group["tensor"]), escape(group["operator"]), *figures]
