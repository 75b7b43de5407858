"""How much of a channel is there nearly always, and how much of its mass lies below that.

Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019), section 4.1.3.
"""

from __future__ import annotations

import math

import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

from ptqjax.kernels.namespace import array_namespace

Channels = Float[Array | np.ndarray, " c"]

_STANDARD_DEVIATIONS = 3.0  # the paper's: 0.13 % of a normal variable lie below


def nearly_always_there(mean: Channels, std: Channels) -> Channels:
    """Returns max(0, mean - 3 std): what a normal variable exceeds in 99.87 % of cases, where that is above zero."""
    xp = array_namespace(mean, std)
    return xp.maximum(mean - _STANDARD_DEVIATIONS * std, 0.0)


def mass_below(amount: Channels, mean: Channels, std: Channels) -> Channels:
    """Returns the probability that a normal variable lies below `amount`; where std is 0, whether the mean does."""
    xp = array_namespace(amount, mean, std)
    is_spread = std > 0
    steps = xp.where(is_spread, amount - mean, 0.0) / xp.where(is_spread, std, 1.0)
    mass = ndtr(steps) if xp is not np else np.array([math.erfc(-step / math.sqrt(2)) / 2 for step in steps])
    return xp.where(is_spread, mass, xp.where(mean < amount, 1.0, 0.0))
