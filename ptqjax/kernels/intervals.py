"""What a linear layer can make of bounded inputs."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float

from ptqjax.kernels.grouped import View
from ptqjax.kernels.namespace import array_namespace

UNBOUNDED = 1e30
"""Stands for infinity: finite, so that a weight of zero makes nothing of it."""


def linear_interval(
    view: View,
    bias: Float[Array | np.ndarray, " outputs"],
    low: Float[Array | np.ndarray, " inputs"],
    high: Float[Array | np.ndarray, " inputs"],
) -> tuple[Float[Array | np.ndarray, " outputs"], Float[Array | np.ndarray, " outputs"]]:
    """Returns the least and the largest output of each channel, for inputs anywhere within low and high.

    With middle m = (low + high) / 2 and radius r = (high - low) / 2 these are w m + b -+ |w| r: attained where every
    tap may take any value on its own. Widened by the rounding of this calculation. Where the layer pads with zeros,
    the caller has widened low and high to hold zero.
    """
    xp = array_namespace(view, low, high)
    groups, _, inputs, taps = view.shape
    sums, magnitudes = (view, xp.abs(view)) if taps == 1 else (view.sum(axis=3), xp.abs(view).sum(axis=3))
    sums, magnitudes = (array.reshape(groups, -1, inputs) for array in (sums, magnitudes))
    middle = (sums @ ((low + high) / 2).reshape(groups, inputs, 1)).reshape(-1) + bias
    radius = (magnitudes @ ((high - low) / 2).reshape(groups, inputs, 1)).reshape(-1)
    rounding = 4 * xp.finfo(view.dtype).eps * (xp.abs(middle) + radius)
    least, largest = middle - radius - rounding, middle + radius + rounding
    return xp.clip(least, -UNBOUNDED, UNBOUNDED), xp.clip(largest, -UNBOUNDED, UNBOUNDED)
