"""Which library computes: kernels are written once and run on NumPy arrays at once, on JAX arrays under any transform.

Transforms of a model work on a few thousand small arrays; dispatched one by one through XLA each new shape would be
compiled (seconds for a MobileNetV2), in NumPy the whole is milliseconds. The same source under `jit`, `grad` or `vmap`
gets tracers and uses `jax.numpy`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def array_namespace(*arrays: Any) -> Any:
    """Returns `jax.numpy` if one of `arrays` is a JAX array or tracer, else `numpy`."""
    for array in arrays:
        if type(array) is not np.ndarray and isinstance(array, jax.Array):  # the first question is much the cheaper one
            return jnp
    return np
