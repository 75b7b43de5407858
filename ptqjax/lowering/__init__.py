"""From a graph to the pure JAX function that it denotes."""

from ptqjax.lowering.inputs import checked_inputs
from ptqjax.lowering.interpreter import Intercept, interpret
from ptqjax.lowering.layout import axis_in_layout
from ptqjax.lowering.program import apply, apply_few_times, compiled, precision
from ptqjax.lowering.samples import interpret_by_samples

__all__ = [
    "Intercept",
    "apply",
    "apply_few_times",
    "axis_in_layout",
    "checked_inputs",
    "compiled",
    "interpret",
    "interpret_by_samples",
    "precision",
]
