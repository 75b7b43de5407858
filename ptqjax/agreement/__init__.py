"""Exported files in ONNX Runtime, compared with what is simulated. This room alone imports `onnxruntime`."""

from ptqjax.agreement.comparison import validate
from ptqjax.agreement.execution import Execution, Layer, execution, kilobytes, milliseconds, plain_session
from ptqjax.agreement.findings import Distance, Group, Likeness, OperatorSummary, Validation
from ptqjax.agreement.plain_sums import exact_function, may_saturate, saturates_here
from ptqjax.agreement.run_time import accuracy_levels
from ptqjax.agreement.runtime import as_written, run, session
from ptqjax.metrics import decibels

__all__ = [
    "Distance",
    "Execution",
    "Group",
    "Layer",
    "Likeness",
    "OperatorSummary",
    "Validation",
    "accuracy_levels",
    "as_written",
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
