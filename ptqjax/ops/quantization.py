"""QuantizeLinear and DequantizeLinear: per tensor, along an axis, in blocks along an axis."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ptqjax.kernels.conversion import convert
from ptqjax.kernels.quotient import quotient
from ptqjax.kernels.run_time_grids import grid_of_values
from ptqjax.ops.element_types import element_type, integer_range
from ptqjax.ops.layout import along_axis, channels_last_axis
from ptqjax.ops.registry import lowers, lowers_channels_last

_UINT8 = 2  # the element type of what is quantized, where nothing names one


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

    The result of a floating type is x / scale + zero_point, rounded once; `saturate` is as in Cast.
    """
    dtype = np.dtype(zero_point.dtype) if zero_point is not None else element_type(output_dtype or _UINT8)
    compute = element_type(precision) if precision else _computed_in(scale)
    steps = quotient(x.astype(compute), _spread(scale.astype(compute), x, axis, block_size))
    is_float = jnp.issubdtype(dtype, jnp.floating)
    steps = steps if is_float else jnp.round(steps)
    if zero_point is not None:  # in float32 the sum is exact wherever it is on the grid
        steps = steps.astype(np.float32) + _spread(zero_point.astype(np.float32), x, axis, block_size)
    if is_float:
        return convert(steps, dtype, saturate=bool(saturate))
    return convert(jnp.clip(steps, *integer_range(dtype)), dtype)


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
    """Returns (x - zero_point) scale, computed in float32 at least and rounded once."""
    dtype = element_type(output_dtype) if output_dtype else _computed_in(scale)
    compute = jnp.promote_types(_computed_in(scale), np.float32)
    step = _spread(scale.astype(compute), x, axis, block_size)
    if zero_point is not None:
        # the difference is exact in int32: no type is wider, and 32-bit ones have no zero point but 0; so it is in
        # float32 for floats, whose zero points are 0
        exact = np.float32 if jnp.issubdtype(x.dtype, jnp.floating) else np.int32
        x = convert(x, exact) - _spread(convert(zero_point, exact), x, axis, block_size)
    return convert(convert(x, compute) * step, dtype)


@lowers_channels_last("DequantizeLinear", since=10, applies=_has_no_blocks)
def dequantize_linear_channels_last(
    x: Any, scale: Any, zero_point: Any = None, /, *, axis: int = 1, **settings: Any
) -> Any:
    """Returns `dequantize_linear` of a channels-last value."""
    return dequantize_linear(x, scale, zero_point, axis=_moved(axis, x, scale), **settings)


def _computed_in(scale: Any) -> np.dtype:
    """Returns the type to compute in: that of the scale, or float32 for integers and powers of two."""
    dtype = np.dtype(scale.dtype)
    can_compute = jnp.issubdtype(dtype, jnp.floating) and dtype != ml_dtypes.float8_e8m0fnu
    return dtype if can_compute else np.dtype(np.float32)


def _moved(axis: int, x: Any, scale: Any) -> int:
    return axis if scale.size == 1 else channels_last_axis(axis, x.ndim)


def _spread(scale: Any, x: Any, axis: int, block_size: int) -> Any:
    """Returns scale or zero point in a shape that broadcasts against `x`."""
    if block_size:
        return jnp.repeat(scale, block_size, axis=axis)[tuple(slice(size) for size in x.shape)]
    if scale.size == 1:
        return scale.reshape(())
    return along_axis(scale, axis, x.ndim)


@lowers("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(x: Any, /) -> tuple[Any, Any, Any]:
    """Returns `x` as uint8 on the grid from its least to its greatest value (and 0), with scale and zero point.

    The scale of zeros alone is 1, as ONNX Runtime has it; ONNX's definition divides by 0 there.
    """
    x = jnp.asarray(x)
    scale, zero_point = grid_of_values(x)
    zero_point = zero_point.astype(np.uint8)
    return quantize_linear(x, scale, zero_point), scale, zero_point
