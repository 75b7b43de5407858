"""What a run did and what came of it: as data (`report.json`) and as a page (`report.html`)."""

from ptqjax.report.facts import PLAIN_SESSION, Row, contents, facts, to_json
from ptqjax.report.inspection import Inspection, inspect
from ptqjax.report.measure import Measured, MeasuredStage, measure
from ptqjax.report.page import page
from ptqjax.report.recommendations import Recommendation, as_facts, recommendations
from ptqjax.report.texts import metric_headings, metric_text

__all__ = [
    "PLAIN_SESSION",
    "Inspection",
    "Measured",
    "MeasuredStage",
    "Recommendation",
    "Row",
    "as_facts",
    "contents",
    "facts",
    "inspect",
    "measure",
    "metric_headings",
    "metric_text",
    "page",
    "recommendations",
    "to_json",
]
