"""From a graph to the pure JAX function that it denotes."""

from ptqjax.lowering.inputs import checked_inputs
from ptqjax.lowering.interpreter import Intercept, interpret
from ptqjax.lowering.program import apply, compiled, precision

__all__ = ["Intercept", "apply", "checked_inputs", "compiled", "interpret", "precision"]
