"""Operators on integers, as ONNX Runtime's CPU kernels compute them: ONNX's QLinear* and com.microsoft's.

Zero points of weights may be left out where they are zero, which halves the bound on their sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ptqjax.kernels import gpu_integer, integer
from ptqjax.kernels.integer import Grid
from ptqjax.kernels.platforms import current
from ptqjax.kernels.quotient import quotient
from ptqjax.ops.convolution import conv, conv_channels_last, window_of
from ptqjax.ops.layout import with_rank
from ptqjax.ops.pooling import average_pool
from ptqjax.ops.quantization import dequantize_linear, quantize_linear
from ptqjax.ops.registry import MICROSOFT, lowers, lowers_channels_last

# The runtime's own spelling, for types that ONNX's operators of the model's opset do not have yet.
lowers("QuantizeLinear", since=1, domain=MICROSOFT)(quantize_linear)
lowers("DequantizeLinear", since=1, domain=MICROSOFT)(dequantize_linear)


@lowers("QLinearConv", since=10)
def qlinear_conv(  # noqa: PLR0917 - ONNX's operands
    x: Any,
    x_scale: Any,
    x_zero_point: Any,
    w: Any,
    w_scale: Any,
    w_zero_point: Any,
    y_scale: Any,
    y_zero_point: Any,
    bias: Any = None,
    /,
    *,
    auto_pad: str = "NOTSET",
    dilations: Any = (),
    group: int = 1,
    kernel_shape: Any = (),
    pads: Any = (),
    strides: Any = (),
) -> Any:
    """Returns the integer convolution of `x` [n, c, *spatial], requantized."""
    window = {"auto_pad": auto_pad, "dilations": dilations, "group": group, "pads": pads, "strides": strides}
    del kernel_shape
    operands = (x, x_scale, x_zero_point, w, w_scale, w_zero_point, y_scale, y_zero_point, bias)
    return _convolved(partial(conv, **window), *operands, columns=(1, -1, *(1,) * (x.ndim - 2)))


@lowers_channels_last("QLinearConv", since=10, starts=True)
def qlinear_conv_channels_last(x: Any, /, *operands: Any, **window: Any) -> Any:
    """Returns `qlinear_conv` of a channels-last `x`, with its operands and attributes, channels last."""
    product = partial(conv_channels_last, **window)
    if current().platform == "gpu" and gpu_integer.are_narrow(x, operands[2]):
        product = _ExactProduct(window)
    return _convolved(product, x, *operands, columns=(*(1,) * (x.ndim - 1), -1))


class _ExactProduct(NamedTuple):
    """A convolution of integers of 8 bits, channels last, for GPUs."""

    attributes: Mapping[str, Any]
    """The attributes of the node."""

    def sum_of(self, x: Any, x_zero_point: Any, w: Any, w_zero_point: Any) -> Any:
        """Returns the exact sums, int32."""
        given = {key: value for key, value in self.attributes.items() if key not in {"group", "kernel_shape"}}
        left = gpu_integer.signed(x, _scalar(x_zero_point, x.ndim))
        right = gpu_integer.signed(w, _column(w_zero_point, w.ndim))
        window = window_of(x.shape[1:-1], w.shape[2:], **given)
        return gpu_integer.convolve(left, right, groups=self.attributes.get("group", 1), **window)


def _convolved(  # noqa: PLR0917 - ONNX's operands
    product: Callable[[Any, Any], Any] | _ExactProduct,
    x: Any,
    x_scale: Any,
    x_zero_point: Any,
    w: Any,
    w_scale: Any,
    w_zero_point: Any,
    y_scale: Any,
    y_zero_point: Any,
    bias: Any = None,
    /,
    *,
    columns: tuple[int, ...],
) -> Any:
    """Returns the sums of the products, requantized; `columns` is the shape in which a vector lies along channels."""
    total = _conv_sum(product, x, x_zero_point, w, w_zero_point)
    return _requantized(total, bias, _multiplier(x_scale, w_scale, y_scale), y_zero_point, columns)


def _conv_sum(product: Any, x: Any, x_zero_point: Any, w: Any, w_zero_point: Any) -> Any:
    if isinstance(product, _ExactProduct):
        return product.sum_of(x, x_zero_point, w, w_zero_point)
    kernels = integer.centred(w, _column(w_zero_point, w.ndim))
    return integer.sum_of_products(
        product,
        integer.centred(x, _scalar(x_zero_point, x.ndim)),
        kernels,
        num_terms=int(np.prod(w.shape[1:])),
        largest_x=integer.largest_difference(x.dtype),
        largest_w=_largest_weight(w, w_zero_point),
    )


def _multiplier(x_scale: Any, w_scale: Any, y_scale: Any) -> Any:
    return quotient(_scalar(x_scale, 1) * w_scale.reshape(-1), _scalar(y_scale, 1))


def _requantized(total: Any, bias: Any, multiplier: Any, zero_point: Any, along: tuple[int, ...]) -> Any:
    """Returns the sums with the bias, requantized; bias and multiplier run along one axis of them."""
    if bias is not None:
        total = total + bias.reshape(along)
    return integer.requantize(total, multiplier.reshape(along), _scalar(zero_point, total.ndim))


@lowers("QLinearMatMul", since=10)
def qlinear_matmul(  # noqa: PLR0917 - ONNX's operands
    a: Any,
    a_scale: Any,
    a_zero_point: Any,
    b: Any,
    b_scale: Any,
    b_zero_point: Any,
    y_scale: Any,
    y_zero_point: Any,
    /,
) -> Any:
    """Returns the integer product of matrices, requantized; the scale of `b` may be one per column."""
    total = _dot_sum(a, a_zero_point, b, b_zero_point)
    along = (*(1,) * (total.ndim - 1), -1)
    return _requantized(total, None, _multiplier(a_scale, b_scale, y_scale), y_zero_point, along)


@lowers("QGemm", since=1, domain=MICROSOFT)
def qgemm(  # noqa: PLR0917 - ONNX's operands
    a: Any,
    a_scale: Any,
    a_zero_point: Any,
    b: Any,
    b_scale: Any,
    b_zero_point: Any,
    bias: Any = None,
    y_scale: Any = None,
    y_zero_point: Any = None,
    /,
    *,
    alpha: float = 1.0,
    transA: int = 0,  # noqa: N803 - ONNX's name
    transB: int = 0,  # noqa: N803 - ONNX's name
) -> Any:
    """Returns a b + bias in integers, requantized by alpha s_a s_b / s_y; without y_scale times alpha s_a s_b."""
    total = _dot_sum(a.T if transA else a, a_zero_point, b.T if transB else b, b_zero_point)
    if bias is not None:
        total = total + with_rank(bias, 2)
    a_scale = np.float32(alpha) * a_scale
    if y_scale is None:
        return total.astype(np.float32) * _row(_scalar(a_scale, 1) * b_scale.reshape(-1), 2)
    return _requantized(total, None, _multiplier(a_scale, b_scale, y_scale), y_zero_point, (1, -1))


def _dot_sum(a: Any, a_zero_point: Any, b: Any, b_zero_point: Any) -> Any:
    columns = None if b_zero_point is None else _row(b_zero_point.reshape(-1), b.ndim)
    if current().platform == "gpu" and gpu_integer.are_narrow(a, b) and min(a.ndim, b.ndim) > 1:
        left, right = gpu_integer.signed(a, _scalar(a_zero_point, a.ndim)), gpu_integer.signed(b, columns)
        return gpu_integer.multiply_matrices(left, right)
    return integer.sum_of_products(
        lambda x, w: jnp.matmul(x, w, precision="highest"),
        integer.centred(a, _scalar(a_zero_point, a.ndim)),
        integer.centred(b, columns),
        num_terms=a.shape[-1],
        largest_x=integer.largest_difference(a.dtype),
        largest_w=_largest_weight(b, b_zero_point),
    )


@lowers("QLinearAdd", since=1, domain=MICROSOFT, elementwise=True)
def qlinear_add(*operands: Any) -> Any:
    """Returns the sum of two quantized tensors, quantized: a, its scale and zero point, b and its, those of the sum."""
    return _elementwise(integer.add, *operands)


@lowers("QLinearMul", since=1, domain=MICROSOFT, elementwise=True)
def qlinear_mul(*operands: Any) -> Any:
    """Returns the product of two quantized tensors, quantized; the operands are those of `qlinear_add`."""
    return _elementwise(integer.multiply, *operands)


def _elementwise(function: Callable[..., Any], *operands: Any) -> Any:
    rank = max(value.ndim for value in operands)
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (with_rank(value, rank) for value in operands)
    return function(a, Grid(a_scale, a_zero), b, Grid(b_scale, b_zero), Grid(y_scale, y_zero))


@lowers("QLinearGlobalAveragePool", since=1, domain=MICROSOFT)
def qlinear_global_average_pool(
    x: Any, x_scale: Any, x_zero_point: Any, y_scale: Any, y_zero_point: Any, /, *, channels_last: int = 0
) -> Any:
    """Returns the mean of each plane of `x` [n, c, *spatial], requantized."""
    values = jnp.moveaxis(x, -1, 1) if channels_last else x
    y = integer.global_average(values, _grid(x_scale, x_zero_point, x.ndim), _grid(y_scale, y_zero_point, x.ndim))
    return jnp.moveaxis(y, 1, -1) if channels_last else y


@lowers("QLinearAveragePool", since=1, domain=MICROSOFT)
def qlinear_average_pool(
    x: Any,
    x_scale: Any,
    x_zero_point: Any,
    y_scale: Any,
    y_zero_point: Any,
    /,
    *,
    kernel_shape: Any,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    channels_last: int = 0,
    count_include_pad: int = 0,
    dilations: Any = (),
    pads: Any = (),
    strides: Any = (),
) -> Any:
    """Returns the mean of each window of the dequantized `x`, quantized; the zero point is added before rounding."""
    real = dequantize_linear(x, x_scale, x_zero_point)
    mean = average_pool(
        jnp.moveaxis(real, -1, 1) if channels_last else real,
        kernel_shape=kernel_shape,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        dilations=dilations,
        pads=pads,
        strides=strides,
    )
    y = integer.quantize_shifted(mean, _grid(y_scale, y_zero_point, x.ndim))
    return jnp.moveaxis(y, 1, -1) if channels_last else y


@lowers("QLinearSoftmax", since=1, domain=MICROSOFT)
def qlinear_softmax(
    x: Any, x_scale: Any, x_zero_point: Any, y_scale: Any, y_zero_point: Any, /, *, axis: int = -1, opset: int = 13
) -> Any:
    """Returns the softmax over `axis` (before opset 13: over all axes from it on), quantized."""
    del x_zero_point  # a shift of x leaves softmax as it is
    first_of_many = 13
    values = x if opset >= first_of_many else x.reshape(*x.shape[: axis % x.ndim], -1)
    along = axis if opset >= first_of_many else -1
    y_grid = _grid(y_scale, y_zero_point, values.ndim)
    return integer.softmax(values, _scalar(x_scale, values.ndim), y_grid, axis=along).reshape(x.shape)


def _grid(scale: Any, zero_point: Any, rank: int) -> Grid:
    return Grid(_scalar(scale, rank), _scalar(zero_point, rank))


def _scalar(value: Any, rank: int) -> Any:
    """Returns a tensor of one element with `rank` axes; None stays None."""
    return None if value is None else value.reshape((1,) * rank)


def _column(value: Any, rank: int) -> Any:
    return None if value is None else value.reshape((-1, *(1,) * (rank - 1)))


def _row(value: Any, rank: int) -> Any:
    return value.reshape((*(1,) * (rank - 1), -1))


def _largest_weight(w: Any, zero_point: Any) -> int:
    return integer.largest_difference(w.dtype) if zero_point is not None else integer.largest_magnitude(w.dtype)
