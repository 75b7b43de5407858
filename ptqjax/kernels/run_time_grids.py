"""Grids that are found from the values, at run time: of a whole tensor, or of each block along its last axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import lax

from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.precision import is_traced
from ptqjax.kernels.quotient import quotient

LARGEST_IN_BLOCK = 127
"""The integer that the largest magnitude of a block becomes."""
_STEPS = 255


def grid_of_values(x: Any) -> tuple[Any, Any]:
    """Returns scale and zero point (a float) of the uint8 grid from the least to the greatest of `x`, and 0.

    The scale of zeros alone, and of nothing, is 1. No gradient passes.

    Source:
        ONNX, DynamicQuantizeLinear; of zeros alone as ONNX Runtime has it: ONNX's definition divides by 0 there.
    """
    xp = array_namespace(x)
    x = constant(x if x.size else xp.zeros(1, x.dtype))
    low, high = xp.minimum(xp.min(x), 0).astype(x.dtype), xp.maximum(xp.max(x), 0).astype(x.dtype)
    scale = xp.where(high == low, xp.ones((), x.dtype), quotient(high - low, np.asarray(_STEPS, x.dtype)))
    return scale, xp.round(xp.clip(-low / scale, 0, _STEPS))


def codes_in_blocks(x: Any, block_size: int) -> tuple[Any, Any]:
    """Returns the int8 codes of each value (as floats) on the grid of its block, and its step, in the shape of `x`.

    Blocks are `block_size` neighbours along the last axis, of which the last may be partial; the largest magnitude of a
    block becomes 127, and the step of zeros alone is 0. Codes are x (127 / largest), rounded half to even: rows of a
    table in few bits have exact ties, which a quotient by the step would round otherwise. No gradient passes.

    Source:
        onnxruntime 1.32, MatMulNBits with accuracy_level 4 (mlas, QuantizeARow_CompInt8).
    """
    xp = array_namespace(x)
    x = constant(x)
    size = x.shape[-1]
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -size % block_size)]
    blocks = xp.pad(xp.abs(x), padding).reshape(*x.shape[:-1], -(-size // block_size), block_size)
    largest, end = xp.max(blocks, axis=-1, initial=0), np.asarray(LARGEST_IN_BLOCK, x.dtype)
    inverse = xp.where(largest > 0, quotient(end, xp.where(largest > 0, largest, end)), 0).astype(x.dtype)
    inverse, step = (xp.repeat(each, block_size, axis=-1)[..., :size] for each in (inverse, quotient(largest, end)))
    return xp.round(x * inverse), step


def constant(x: Any) -> Any:
    """Returns `x`, through which no gradient passes."""
    return lax.stop_gradient(x) if is_traced(x) else x
