"""Integer operators as x86 computes them without VNNI: sums of two products saturate in 16 bits.

Of the domain `OPERATORS`, which no file has: `transforms.saturation.without_vnni` puts them in. Operands are
those of the operators that they stand for; weights are int8, inputs uint8.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.kernels.integer import requantize
from ptqjax.kernels.pair_sums import OPERATORS, saturating_product
from ptqjax.kernels.quotient import quotient
from ptqjax.kernels.windows import explicit_padding, output_sizes, pad_spatial, seen_by_tap
from ptqjax.ops.layout import with_rank
from ptqjax.ops.registry import lowers


@lowers("QLinearConv", since=1, domain=OPERATORS)
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
    """Returns the convolution of `x` [n, c, *spatial], requantized; the terms of a sum are taps by channels."""
    del kernel_shape
    ones = (1,) * (x.ndim - 2)
    window = {"strides": tuple(strides or ones), "dilations": tuple(dilations or ones)}
    pads = tuple(pads or (0,) * 2 * len(ones))
    columns = _columns(jnp.moveaxis(x, 1, -1), w.shape[2:], x_zero_point, window, pads=pads, auto_pad=auto_pad)
    columns = columns.reshape(*columns.shape[:-1], group, -1)  # [n, *spatial, taps, group, c]
    matrices = jnp.moveaxis(w, 1, -1).reshape(group, w.shape[0] // group, -1)
    parts = [
        _total(columns[..., i, :].reshape(*columns.shape[:-3], -1), x_zero_point, matrices[i].T, w_zero_point)
        for i in range(group)
    ]
    total = jnp.concatenate(parts, axis=-1)
    total = total if bias is None else total + _row(bias, total.ndim)
    y = requantize(total, _multiplier(x_scale, w_scale, y_scale, total.ndim), y_zero_point.reshape(()))
    return jnp.moveaxis(y, -1, 1)


def _columns(
    x: Any, kernel: tuple[int, ...], zero_point: Any, window: dict[str, Any], *, pads: Any, auto_pad: str
) -> Any:
    """Returns what each tap of the kernel sees, [n, *spatial, taps, c], of a channels-last `x`."""
    sizes = x.shape[1:-1]
    padding = explicit_padding(sizes, kernel=kernel, **window, pads=pads, auto_pad=auto_pad)
    counts = output_sizes(sizes, kernel=kernel, **window, padding=padding)
    padded = pad_spatial(x, padding, fill=zero_point.reshape(()))
    taps = product(*(range(size) for size in kernel))
    return jnp.stack([seen_by_tap(padded, tap, counts=counts, **window) for tap in taps], axis=-2)


@lowers("QLinearMatMul", since=1, domain=OPERATORS)
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
    """Returns the product of `a` with the matrix `b`, requantized."""
    total = _total(a, a_zero_point, b, b_zero_point)
    return requantize(total, _multiplier(a_scale, b_scale, y_scale, total.ndim), y_zero_point.reshape(()))


@lowers("QGemm", since=1, domain=OPERATORS)
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
    """Returns a b + bias, requantized; without y_scale in float."""
    total = _total(a.T if transA else a, a_zero_point, b.T if transB else b, b_zero_point)
    total = total if bias is None else total + with_rank(bias, 2)
    scale = np.float32(alpha) * a_scale
    if y_scale is None:
        return total.astype(np.float32) * _row(scale.reshape(1) * b_scale.reshape(-1), 2)
    return requantize(total, _multiplier(scale, b_scale, y_scale, 2), y_zero_point.reshape(()))


@lowers("MatMulIntegerToFloat", since=1, domain=OPERATORS)
def matmul_integer_to_float(  # noqa: PLR0917 - ONNX Runtime's operands
    a: Any, b: Any, a_scale: Any, b_scale: Any, a_zero_point: Any = None, b_zero_point: Any = None, bias: Any = None, /
) -> Any:
    """Returns the product of `a` with the matrix `b`, times both scales."""
    total = _total(a, a_zero_point, b, b_zero_point)
    y = total.astype(np.float32) * _row(a_scale.reshape(1) * b_scale.reshape(-1), total.ndim)
    return y if bias is None else y + _row(bias, total.ndim)


def _total(x: Any, x_zero_point: Any, w: Any, w_zero_point: Any) -> Any:
    """Returns sum (x - z_x)(w - z_w) with the products x w two by two in 16 bits; what zero points come to is exact."""
    x, w = x.astype(np.int32), w.astype(np.int32)
    zeros = (0 if zero is None else zero.astype(np.int32).reshape(-1)[0] for zero in (x_zero_point, w_zero_point))
    z_x, z_w = zeros
    per_row = z_w * (x.sum(axis=-1, keepdims=True) - x.shape[-1] * z_x)
    return saturating_product(x, w) - _row(z_x * w.sum(axis=0), x.ndim) - per_row


def _multiplier(x_scale: Any, w_scale: Any, y_scale: Any, rank: int) -> Any:
    return _row(quotient(x_scale.reshape(1) * w_scale.reshape(-1), y_scale.reshape(1)), rank)


def _row(value: Any, rank: int) -> Any:
    return value.reshape(*(1,) * (rank - 1), -1)
