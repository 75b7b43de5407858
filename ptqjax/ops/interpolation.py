"""What the operators that read images between their elements share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.errors import UnsupportedOperatorError


def in_real_arithmetic(x: Any) -> Any:
    """Returns `x` as it is in float32 or float64, anything else in float32."""
    return jnp.asarray(x, x.dtype if x.dtype in (np.float32, np.float64) else np.float32)


def check_choice(value: str, allowed: Iterable[str], name: str) -> None:
    """Checks that an attribute is one of the words that it may be.

    Raises:
        UnsupportedOperatorError: It is not.
    """
    if value not in set(allowed):
        raise UnsupportedOperatorError(f"attribute '{name}' is '{value}'; expected one of {sorted(allowed)}")
