"""Roundings that gradients can move: each weight is a real number of steps, and its code the integer next to it.

The code counts, whatever the number in between; gradients pass straight through to the number. All element by element.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MOST = 0.45  # of a step from its code that a weight may begin at: the code must stay the nearest
_SHARE = 0.5  # of the way from its code to its value that a weight begins at


def start_of(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Returns numbers to begin at: their codes are `codes`, and they lie towards `values`.

    So weights that were as well rounded to the other side are the first to move.

    Args:
        values: The unrounded weights, in steps.
        codes: Integers, some of them not next to their values.
    """
    return (codes + np.clip(_SHARE * (values - codes), -_MOST, _MOST)).astype(np.float32)


def straight_codes(numbers: Any, low: Any, high: Any) -> Any:
    """Returns the codes next to the numbers, from `low` to `high`; the derivative is 1 between them and 0 outside.

    Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013, as in Cheng et al.,
        "SignRound", 2023. Rectified sigmoids (Nagel et al., "Up or Down?", ICML 2020, eq. 23) have no codes until they
        are decided, after thousands of steps; here each step is one of codes.
    """
    inside = jnp.clip(numbers, low, high)
    return inside + jax.lax.stop_gradient(jnp.round(inside) - inside)


def codes_of(numbers: Any, low: Any, high: Any) -> np.ndarray:
    """Returns the same codes on the host."""
    return np.round(np.clip(np.asarray(numbers), low, high))
