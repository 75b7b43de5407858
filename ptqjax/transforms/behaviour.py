"""What scales between layers are to be chosen by: how far each channel reaches, its power, and what its noise costs."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ptqjax.ir import Model, Statistics
from ptqjax.pytrees import PyTreeNode
from ptqjax.transforms.gains import channel_gains
from ptqjax.transforms.moments import Distribution, distributions, within_bounds

NUM_STD = 6.0
"""Standard deviations of each channel that a range holds, those that `ranges.data_free` calibrates."""
NUM_STD_OF_INPUTS = 3.0
"""The same for graph inputs."""


class Behaviour(PyTreeNode):
    """How the channels of a tensor behave, as statistics imply it or data show it; all [c]."""

    low: Any
    """Least value."""
    high: Any
    """Largest value."""
    mean: Any
    """Mean."""
    power: Any
    """Mean square."""
    gain: Any
    """Noise of variance one in every element adds so much to the sum of the outputs' noise; any common unit."""


def implied_behaviour(model: Model) -> dict[str, Behaviour]:
    """Returns what batch norms imply of each tensor: what `fit.observe_behaviour` measures on data, without data.

    Ranges are those that `ranges.data_free` calibrates; mean and power are those of `moments.distributions`, gains
    those of `gains.channel_gains`. Tensors of which one of these does not follow are left out.
    """
    model = model.replace(params=jax.tree.map(np.asarray, dict(model.params)))
    known = distributions(model)
    within, inputs = within_bounds(model, known), {spec.name for spec in model.graph.inputs}
    gains = channel_gains(model, known)
    return {
        name: _implied(within[name], found.moments, gains[name], NUM_STD_OF_INPUTS if name in inputs else NUM_STD)
        for name, found in known.items()
        if name in gains
    }


def _implied(within: Distribution, moments: Statistics, gain: np.ndarray, num_std: float) -> Behaviour:
    power = moments.mean**2 + moments.std**2
    return Behaviour(low=within.at(-num_std), high=within.at(num_std), mean=moments.mean, power=power, gain=gain)
