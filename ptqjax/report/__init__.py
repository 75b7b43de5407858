"""What a run did and what came of it: as data (`report.json`) and as a page (`report.html`)."""

from ptqjax.report.facts import Row, contents, facts, to_json
from ptqjax.report.inspection import Inspection, inspect
from ptqjax.report.measure import MeasuredStage, measure
from ptqjax.report.page import metric_headings, metric_text, page

__all__ = [
    "Inspection",
    "MeasuredStage",
    "Row",
    "contents",
    "facts",
    "inspect",
    "measure",
    "metric_headings",
    "metric_text",
    "page",
    "to_json",
]
