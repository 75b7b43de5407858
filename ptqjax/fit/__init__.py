"""What needs the model's behaviour on data."""

from ptqjax.fit.behaviour import observe_behaviour
from ptqjax.fit.bias_correction import correct_biases
from ptqjax.fit.learned_scales import Learning, learn_scales
from ptqjax.fit.selection import Choice, scale_as_configured

__all__ = [
    "Choice",
    "Learning",
    "correct_biases",
    "learn_scales",
    "observe_behaviour",
    "scale_as_configured",
]
