"""From a graph to the pure JAX function that it denotes."""

from ptqjax.lowering.inputs import checked_inputs
from ptqjax.lowering.interpreter import Intercept, interpret, interpret_in_layout
from ptqjax.lowering.layout import Value, axis_in_layout, channels_last_value, in_onnx_layout
from ptqjax.lowering.program import apply, apply_few_times, compiled, compiled_in_two_parts, precision
from ptqjax.lowering.samples import interpret_by_samples
from ptqjax.lowering.stretches import Stretch, stretches

__all__ = [
    "Intercept",
    "Stretch",
    "Value",
    "apply",
    "apply_few_times",
    "axis_in_layout",
    "channels_last_value",
    "checked_inputs",
    "compiled",
    "compiled_in_two_parts",
    "in_onnx_layout",
    "interpret",
    "interpret_by_samples",
    "interpret_in_layout",
    "precision",
    "stretches",
]
