"""QuantizeLinear and DequantizeLinear: per tensor, along an axis, in blocks along an axis."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.kernels.quotient import quotient
from ptqjax.ops.element_types import element_type, integer_range
from ptqjax.ops.layout import along_axis, channels_last_axis
from ptqjax.ops.registry import lowers, lowers_channels_last


def _has_no_blocks(attributes: Any) -> bool:
    return not attributes.get("block_size", 0)


@lowers("QuantizeLinear", since=10)
def quantize_linear(
    x: Any,
    scale: Any,
    zero_point: Any = None,
    /,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Any:
    """Returns round(x / scale) + zero_point, half to even, brought into the range of the integer type.

    Raises:
        UnsupportedOperatorError: The result is of a floating type.
    """
    del saturate  # it speaks of 8-bit floats alone
    dtype = np.dtype(zero_point.dtype) if zero_point is not None else element_type(output_dtype or 2)
    low, high = _grid(dtype, "QuantizeLinear")
    compute = element_type(precision) if precision else scale.dtype
    step = _spread(scale, x, axis, block_size).astype(compute)
    steps = jnp.round(quotient(x.astype(compute), step))
    if zero_point is not None:
        steps = steps + _spread(zero_point, x, axis, block_size).astype(compute)
    return jnp.clip(steps, low, high).astype(dtype)


@lowers_channels_last("QuantizeLinear", since=10, applies=_has_no_blocks)
def quantize_linear_channels_last(
    x: Any, scale: Any, zero_point: Any = None, /, *, axis: int = 1, **settings: Any
) -> Any:
    """Returns `quantize_linear` of a channels-last value."""
    return quantize_linear(x, scale, zero_point, axis=_moved(axis, x, scale), **settings)


@lowers("DequantizeLinear", since=10)
def dequantize_linear(
    x: Any,
    scale: Any,
    zero_point: Any = None,
    /,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Any:
    """Returns (x - zero_point) scale.

    Raises:
        UnsupportedOperatorError: `x` is of a floating type.
    """
    _grid(np.dtype(x.dtype), "DequantizeLinear")
    dtype = element_type(output_dtype) if output_dtype else scale.dtype
    step = _spread(scale, x, axis, block_size)
    if zero_point is None:
        return (x.astype(step.dtype) * step).astype(dtype)
    # the difference is exact in int32: no type is wider, and 32-bit ones have no zero point but 0
    steps = x.astype(jnp.int32) - _spread(zero_point, x, axis, block_size).astype(jnp.int32)
    return (steps.astype(step.dtype) * step).astype(dtype)


@lowers_channels_last("DequantizeLinear", since=10, applies=_has_no_blocks)
def dequantize_linear_channels_last(
    x: Any, scale: Any, zero_point: Any = None, /, *, axis: int = 1, **settings: Any
) -> Any:
    """Returns `dequantize_linear` of a channels-last value."""
    return dequantize_linear(x, scale, zero_point, axis=_moved(axis, x, scale), **settings)


def _grid(dtype: np.dtype, op_type: str) -> tuple[int, int]:
    if jnp.issubdtype(dtype, jnp.floating):
        raise UnsupportedOperatorError(f"{op_type} with {dtype.name} has no lowering; integer types have")
    return integer_range(dtype)


def _moved(axis: int, x: Any, scale: Any) -> int:
    return axis if scale.size == 1 else channels_last_axis(axis, x.ndim)


def _spread(scale: Any, x: Any, axis: int, block_size: int) -> Any:
    """Returns scale or zero point in a shape that broadcasts against `x`."""
    if block_size:
        return jnp.repeat(scale, block_size, axis=axis)[tuple(slice(size) for size in x.shape)]
    if scale.size == 1:
        return scale.reshape(())
    return along_axis(scale, axis, x.ndim)
