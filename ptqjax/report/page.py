"""The facts of a report as one HTML page: style and pictures inside, nothing fetched, no script."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any

from ptqjax.report import explained, running, sections


def page(report: Mapping[str, Any]) -> str:
    """Returns the page for `facts(...)` or `ptqjax.explain(...)`, in the order in which a reader asks.

    What only `explain` finds (what runs in integers, histograms, noise along the depth, sensitivity, what the runtime
    computes) is left out where the facts do not have it, and so is what the stages took, where "seconds" is not among
    them.
    """
    title = f"{report['source'].get('model', 'model')}, quantized"
    style = resources.files("ptqjax.report").joinpath("style.css").read_text()
    parts = (
        sections.head(report, title),
        sections.stages(report),
        running.execution(report),
        explained.recommended(report),
        explained.sensitivity(report),
        explained.depth(report),
        explained.histograms(report),
        explained.runtime(report),
        sections.transforms(report),
        sections.ranges(report),
        sections.grids(report),
        sections.seconds(report),
        sections.origin(report),
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body>\n{''.join(parts)}</body></html>\n"
    )
