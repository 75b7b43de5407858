"""How far values count: what exp cannot tell from nothing beside the largest of its row, and what means "never"."""

from __future__ import annotations

from math import log, prod

import jax.numpy as jnp
from jaxtyping import Array, Float

_LOST = 2.0**-12
"""The share of a row's sum that all values below its reach may have together, whatever the width, so that one compiled
step serves all: a sixteenth of a step of 8-bit probabilities."""


def reach_below(length: int) -> float:
    """Returns how far below the largest of n values exp can tell one: n exp(-r) = `_LOST`."""
    return log(max(length, 1)) - log(_LOST)


def within_reach(
    value: Float[Array, "..."], *, axes: tuple[int, ...], never: float, is_masked: bool
) -> Float[Array, "..."]:
    """Returns the values that a Softmax along `axes` can tell, with these axes as the last one: max(x, top - reach).

    Rows without any value that counts are zeros, which every grid has. NaN and +inf stay, -inf does not.

    Args:
        value: What Softmax reads.
        axes: The axes of a row, not negative.
        never: Rows whose largest value is not above -never do not count; inf: those of -inf alone.
        is_masked: Whether values may be masked in data to come: then the end of each row's reach is among the values.
    """
    kept = tuple(axis for axis in range(value.ndim) if axis not in axes)
    rows = jnp.transpose(value, (*kept, *axes)).reshape(*(value.shape[axis] for axis in kept), -1)
    top = jnp.max(rows, axis=-1, keepdims=True, initial=-jnp.inf)
    end = top - jnp.asarray(reach_below(prod(value.shape[axis] for axis in axes)), value.dtype)
    found = jnp.maximum(rows, end)
    found = jnp.concatenate([found, end], axis=-1) if is_masked else found
    return jnp.where(top <= -never, jnp.zeros((), value.dtype), found)


def without_never(value: Float[Array, "..."], never: float) -> Float[Array, "..."]:
    """Returns the values with 0, which every grid has, in place of those of the magnitude `never` or above.."""
    return jnp.where(jnp.abs(value) >= never, jnp.zeros((), value.dtype), value)
