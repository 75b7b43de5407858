"""The rounding of activations, in the form that suits what the program is made for."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.encodings.encoding import Encoding, along_axis, fake_quantize
from ptqjax.kernels.grid import round_in_a_chain
from ptqjax.kernels.platforms import current

_FINEST = np.float32(2.0**-64)
"""The step where nothing is to be rounded: float32 numbers from 2^-41 on are integers times it, up to 2^63."""


def fake_quantize_activation(x: Any, encoding: Encoding) -> Any:
    """Returns `fake_quantize` of an activation; for GPUs by a chain, which costs no kernel of its own.

    There, what is not enabled is rounded to multiples of 2^-64 between endless bounds, which changes numbers below
    2^-41 alone, by 2^-65 at most; and a zero point that is no integer may move the ends in their last bit.
    """
    if current().platform != "gpu" or encoding.float_format is not None:
        return fake_quantize(x, encoding)
    scale, zero_point = (along_axis(v, encoding, np.shape(x)) for v in (encoding.scale, encoding.zero_point))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    step = jnp.where(encoding.enabled, scale, _FINEST)
    low = jnp.where(encoding.enabled, encoding.qmin - zero_point, -jnp.inf)
    high = jnp.where(encoding.enabled, encoding.qmax - zero_point, jnp.inf)
    return round_in_a_chain(x.astype(dtype), *(each.astype(dtype) for each in (step, low, high))).astype(x.dtype)
