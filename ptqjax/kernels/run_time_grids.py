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
    x = _constant(x if x.size else xp.zeros(1, x.dtype))
    low, high = xp.minimum(xp.min(x), 0).astype(x.dtype), xp.maximum(xp.max(x), 0).astype(x.dtype)
    scale = xp.where(high == low, xp.ones((), x.dtype), quotient(high - low, np.asarray(_STEPS, x.dtype)))
    return scale, xp.round(xp.clip(-low / scale, 0, _STEPS))


def scales_of_blocks(x: Any, block_size: int) -> Any:
    """Returns for each value the step of the symmetric int8 grid of its block, in the shape of `x`.

    Blocks are `block_size` neighbours along the last axis, of which the last may be partial; the largest magnitude of a
    block becomes 127, and the step of zeros alone is 1. No gradient passes.

    Source:
        onnxruntime 1.32, MatMulNBits with accuracy_level 4 (measured: equal up to float rounding).
    """
    xp = array_namespace(x)
    magnitudes = xp.abs(_constant(x))
    size = x.shape[-1]
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -size % block_size)]
    blocks = xp.pad(magnitudes, padding).reshape(*x.shape[:-1], -(-size // block_size), block_size)
    largest = xp.max(blocks, axis=-1, initial=0)
    scale = xp.where(largest > 0, quotient(largest, np.asarray(LARGEST_IN_BLOCK, x.dtype)), xp.ones((), x.dtype))
    return xp.repeat(scale, block_size, axis=-1)[..., :size]


def _constant(x: Any) -> Any:
    return lax.stop_gradient(x) if is_traced(x) else x
