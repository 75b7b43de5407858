"""What needs the model's behaviour on data."""

from ptqjax.fit.behaviour import observe_behaviour
from ptqjax.fit.bias_correction import correct_biases, correct_each
from ptqjax.fit.learned_rounding import RoundingLearning, learn_rounding
from ptqjax.fit.learned_scales import Learning, learn_scales
from ptqjax.fit.rounding import Solving, solve_rounding
from ptqjax.fit.selection import Choice, scale_as_configured, scale_each

__all__ = [
    "Choice",
    "Learning",
    "RoundingLearning",
    "Solving",
    "correct_biases",
    "correct_each",
    "learn_rounding",
    "learn_scales",
    "observe_behaviour",
    "scale_as_configured",
    "scale_each",
    "solve_rounding",
]
