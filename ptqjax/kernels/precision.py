"""In what precision weights are rewritten, and whether their values are there to be looked at."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def widened(array: Float[Array | np.ndarray, "..."]) -> Float[Array | np.ndarray, "..."]:
    """Returns the array in the precision of calculation: float64 in NumPy, in JAX its own but float32 at least."""
    if isinstance(array, np.ndarray):
        return array.astype(np.float64)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def is_traced(array: Any) -> bool:
    """Tells whether the array stands for values that are not known yet (under `jit`, `grad` or `vmap`)."""
    return isinstance(array, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]
