"""What runs in integers, how large the file is and how long a run takes: on the first screen, and on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ptqjax.agreement import kilobytes
from ptqjax.report.markup import code, folded, section, table

_MOST_KERNELS = 12  # by name


def cards(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns what the first screen shows, each a figure and what it is: layers in integers, time, size."""
    found = report.get("execution")
    if not found or not found["measured"]:
        return []
    layers = found["layers"]
    return [
        (f"{_num_in_integers(layers)} of {len(layers)}", "layers run in integers"),
        (f"{found['milliseconds']:.3g} ms", f"a run on one thread here; float {found['float_milliseconds']:.3g} ms"),
        (kilobytes(found["num_bytes"]), f"the file; float {kilobytes(found['float_num_bytes'])}"),
    ]


def warnings(report: Mapping[str, Any]) -> str:
    """Returns what speaks against the file, for the first screen; "" where nothing does."""
    found = report.get("execution") or {}
    items = "".join(f"<li>{escape(_sentence(text))}</li>" for text in found.get("warnings", ()))
    return f'<ul class="warnings" id="execution-warnings">{items}</ul>\n' if items else ""


def execution(report: Mapping[str, Any]) -> str:
    """Returns the layers that run in float, each with the reason, and the kernels of the session."""
    found = report.get("execution")
    if not found:
        return ""
    title = "What runs in integers"
    if not found["measured"]:
        return section("execution", title, f"Not looked at: {escape(found['reason'])}", "")
    in_float = [layer for layer in found["layers"] if not layer["in_integers"]]
    rows = [[code(layer["name"]), escape(layer["operator"]), escape(layer["reason"])] for layer in in_float]
    headings = ["layer", "operator", "why"]
    listed = table(headings, rows, identity="float-layers", caption="Layers that ONNX Runtime runs in float")
    return section(
        "execution",
        title,
        f"In a session of ONNX Runtime without options: {_num_in_integers(found['layers'])} of {len(found['layers'])} "
        "layers have an integer kernel. Its operators, after its own rewriting: "
        f"{escape(kernel_text(found['kernels']))}. Times are of one thread's processor, medians, float in turns with "
        "the file.",
        folded("In float", str(len(in_float)), listed) if in_float else "",
    )


def lines(found: Mapping[str, Any] | None) -> list[str]:
    """Returns what the terminal says, a line each: layers, reasons, time and size; nothing where that is unknown."""
    if not found or not found["measured"]:
        return []
    layers = found["layers"]
    reasons = Counter((layer["operator"], layer["reason"]) for layer in layers if not layer["in_integers"])
    return [
        f"in ONNX Runtime {_num_in_integers(layers)} of {len(layers)} layers run in integers",
        *(f"  in float: {count} {operator}, because {reason}" for (operator, reason), count in reasons.items()),
        f"a run takes {found['milliseconds']:.3g} ms of one thread here, float {found['float_milliseconds']:.3g}",
        f"the file has {kilobytes(found['num_bytes'])}, float {kilobytes(found['float_num_bytes'])}",
    ]


def kernel_text(kernels: Mapping[str, int]) -> str:
    """Returns how many there are of each operator, the most frequent first."""
    named = list(kernels.items())
    rest = sum(count for _, count in named[_MOST_KERNELS:])
    texts = [f"{count} {name}" for name, count in named[:_MOST_KERNELS]]
    return ", ".join(texts + ([f"{rest} others"] if rest else []))


def _num_in_integers(layers: Sequence[Mapping[str, Any]]) -> int:
    return sum(layer["in_integers"] for layer in layers)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
