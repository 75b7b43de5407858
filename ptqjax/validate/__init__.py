"""Exported files in ONNX Runtime, compared with what is simulated. This room alone imports `onnxruntime`."""

from ptqjax.validate.comparison import validate
from ptqjax.validate.execution import Execution, Layer, execution, kilobytes, milliseconds, plain_session
from ptqjax.validate.findings import Distance, Group, Likeness, OperatorSummary, Validation
from ptqjax.validate.plain_sums import exact_function, may_saturate, saturates_here
from ptqjax.validate.runtime import run, session
from ptqjax.validate.totals import decibels

__all__ = [
    "Distance",
    "Execution",
    "Group",
    "Layer",
    "Likeness",
    "OperatorSummary",
    "Validation",
    "decibels",
    "exact_function",
    "execution",
    "kilobytes",
    "may_saturate",
    "milliseconds",
    "plain_session",
    "run",
    "saturates_here",
    "session",
    "validate",
]
