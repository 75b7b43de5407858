"""What needs the model's behaviour on data."""

from ptqjax.fit.bias_correction import correct_biases
from ptqjax.fit.magnitudes import observe_magnitudes

__all__ = ["correct_biases", "observe_magnitudes"]
