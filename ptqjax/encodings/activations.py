"""The rounding of activations, in the form that suits what the program is made for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.encodings.encoding import Encoding, Encodings, along_axis, fake_quantize
from ptqjax.kernels.grid import round_in_a_chain
from ptqjax.kernels.platforms import current
from ptqjax.kernels.precision import is_traced


def fake_quantize_activation(x: Any, encoding: Encoding, *, is_on: bool = False, has_negatives: bool = True) -> Any:
    """Returns `fake_quantize` of an activation; for GPUs by a chain, which costs no kernel of its own.

    There, a zero point that is no integer may move the ends in their last bit. Grids that are found at run time, and
    those of floats, are no chains: they read what they round twice.

    Args:
        x: The activation.
        encoding: Its grid.
        is_on: Whether the encoding is known to be enabled; else a value is read a second time, to be left as it is.
        has_negatives: Whether a value may be below 0; else, with 0 on the grid, nothing is cut off below.
    """
    if current().platform != "gpu" or encoding.float_format is not None or encoding.is_dynamic:
        return fake_quantize(x, encoding)
    scale, zero_point = (along_axis(v, encoding, np.shape(x)) for v in (encoding.scale, encoding.zero_point))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    low, high = encoding.qmin - zero_point if has_negatives else None, encoding.qmax - zero_point
    grid = jax.tree.map(lambda each: jnp.asarray(each).astype(dtype), (scale, low, high))
    rounded = round_in_a_chain(x.astype(dtype), *grid).astype(x.dtype)
    return rounded if is_on else jnp.where(encoding.enabled, rounded, x)


class Switches:
    """What tells whether all encodings are on, with 0 on their grids; of the same arrays it is looked up once."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] = ()
        self._are_on = False

    def are_on(self, encodings: Encodings) -> bool:
        """Returns whether all are known to be, where programs for GPUs are made (it waits for one); elsewhere False."""
        switches = tuple(each for e in encodings.values() for each in (e.enabled, e.qmin, e.zero_point))
        if current().platform != "gpu" or any(map(is_traced, switches)):
            return False
        if not all(isinstance(each, jax.Array) for each in switches):
            return _all(switches)
        if len(switches) != len(self._last) or any(a is not b for a, b in zip(switches, self._last, strict=True)):
            self._last, self._are_on = switches, _all(jax.device_get(switches))
        return self._are_on


def _all(switches: tuple[Any, ...]) -> bool:
    on, lowest, zeros = switches[::3], switches[1::3], switches[2::3]
    return all(map(np.all, on)) and all(np.all(low <= zero) for low, zero in zip(lowest, zeros, strict=True))
