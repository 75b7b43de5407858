"""What needs the model's behaviour on data."""

from ptqjax.fit.bias_correction import correct_biases

__all__ = ["correct_biases"]
