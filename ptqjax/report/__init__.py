"""What a run did and what came of it: as data (`report.json`) and as a page (`report.html`)."""

from ptqjax.report.facts import Row, contents, facts, to_json
from ptqjax.report.page import metric_headings, metric_text, page

__all__ = ["Row", "contents", "facts", "metric_headings", "metric_text", "page", "to_json"]
