"""Exported files in ONNX Runtime, compared with what is simulated. This room alone imports `onnxruntime`."""

from ptqjax.validate.comparison import validate
from ptqjax.validate.findings import Distance, Group, Likeness, OperatorSummary, Validation
from ptqjax.validate.plain_sums import exact_function, may_saturate, saturates_here
from ptqjax.validate.runtime import run, session
from ptqjax.validate.totals import decibels

__all__ = [
    "Distance",
    "Group",
    "Likeness",
    "OperatorSummary",
    "Validation",
    "decibels",
    "exact_function",
    "may_saturate",
    "run",
    "saturates_here",
    "session",
    "validate",
]
