"""Operators of com.microsoft on one quantized tensor at a time, which the runtime computes by tables of 256 values.

Each is a function between real numbers: dequantized, computed in float32, quantized with half to even.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ptqjax.ops.activation import leaky_relu
from ptqjax.ops.layout import with_rank
from ptqjax.ops.pooling import max_pool
from ptqjax.ops.quantization import dequantize_linear, quantize_linear
from ptqjax.ops.registry import MICROSOFT, lowers


@lowers("QLinearLeakyRelu", since=1, domain=MICROSOFT, elementwise=True)
def qlinear_leaky_relu(
    x: Any, x_scale: Any, x_zero_point: Any, y_scale: Any, y_zero_point: Any, /, *, alpha: float = 0.01
) -> Any:
    """Returns the leaky ReLU of the quantized `x`, quantized."""
    return _between(lambda real: leaky_relu(real, alpha=alpha), x, (x_scale, x_zero_point), (y_scale, y_zero_point))


@lowers("QLinearSigmoid", since=1, domain=MICROSOFT, elementwise=True)
def qlinear_sigmoid(x: Any, x_scale: Any, x_zero_point: Any, y_scale: Any, y_zero_point: Any, /) -> Any:
    """Returns the sigmoid of the quantized `x`, quantized."""
    return _between(jax.nn.sigmoid, x, (x_scale, x_zero_point), (y_scale, y_zero_point))


@lowers("QLinearConcat", since=1, domain=MICROSOFT)
def qlinear_concat(y_scale: Any, y_zero_point: Any, /, *operands: Any, axis: int) -> Any:
    """Returns the tensors one behind another on one grid; `operands` are each tensor, its scale and its zero point."""
    parts = zip(operands[::3], operands[1::3], operands[2::3], strict=True)
    moved = [_between(lambda real: real, x, (scale, zero), (y_scale, y_zero_point)) for x, scale, zero in parts]
    return jnp.concatenate(moved, axis=axis)


@lowers("QLinearWhere", since=1, domain=MICROSOFT, elementwise=True)
def qlinear_where(condition: Any, *operands: Any) -> Any:
    """Returns x where the condition holds, else y, on the grid of the result: x, its scale and zero point, y's, z's."""
    rank = max(value.ndim for value in (condition, *operands))
    x, x_scale, x_zero, y, y_scale, y_zero, z_scale, z_zero = operands
    x, y = (
        _between(lambda real: real, value, grid, (z_scale, z_zero))
        for value, grid in ((x, (x_scale, x_zero)), (y, (y_scale, y_zero)))
    )
    return jnp.where(with_rank(condition, rank), with_rank(x, rank), with_rank(y, rank))


@lowers("NhwcMaxPool", since=1, domain=MICROSOFT)
def nhwc_max_pool(
    x: Any,
    /,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Any:
    """Returns the largest element of each window of `x` [n, *spatial, c]."""
    y = max_pool(
        jnp.moveaxis(x, -1, 1),
        kernel_shape=kernel_shape,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
        dilations=dilations,
        pads=pads,
        strides=strides,
    )
    return jnp.moveaxis(y[0] if isinstance(y, tuple) else y, 1, -1)


def _between(function: Callable[[Any], Any], x: Any, x_grid: tuple[Any, Any], y_grid: tuple[Any, Any]) -> Any:
    scale, zero = (None if value is None else value.reshape(()) for value in x_grid)
    y_scale, y_zero = (None if value is None else value.reshape(()) for value in y_grid)
    return quantize_linear(function(dequantize_linear(x, scale, zero)), y_scale, y_zero)
