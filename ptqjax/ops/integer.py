"""Products of 8-bit integers with exact 32-bit sums: ConvInteger and MatMulInteger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ptqjax.kernels import gpu_integer, integer
from ptqjax.kernels.platforms import current
from ptqjax.ops.convolution import conv
from ptqjax.ops.layout import with_rank
from ptqjax.ops.registry import lowers


@lowers("ConvInteger", since=10)
def conv_integer(
    x: Any,
    w: Any,
    x_zero_point: Any = None,
    w_zero_point: Any = None,
    /,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Any:
    """Returns the convolution of x - x_zero_point with w - w_zero_point (one, or one per output channel) as int32."""
    window = {"auto_pad": auto_pad, "dilations": dilations, "group": group, "pads": pads, "strides": strides}
    del kernel_shape  # the weight has it
    return _sum_of_products(
        lambda a, b: conv(a, b, **window),
        x,
        w,
        _aligned(x_zero_point, x.ndim, vector=(1, -1)),
        None if w_zero_point is None else w_zero_point.reshape(-1, *(1,) * (w.ndim - 1)),
        num_terms=w[0].size,
    )


@lowers("MatMulInteger", since=10)
def matmul_integer(a: Any, b: Any, a_zero_point: Any = None, b_zero_point: Any = None, /) -> Any:
    """Returns the matrix product of a - a_zero_point and b - b_zero_point as int32.

    Zero points are one, one per row of `a` or per column of `b`, or of the operand's rank.
    """
    rank = max(a.ndim, b.ndim)
    a_zero, b_zero = (
        _aligned(a_zero_point, a.ndim, vector=(-1, 1)),
        _aligned(b_zero_point, b.ndim, vector=(1, -1)),
    )
    if current().platform == "gpu" and gpu_integer.are_narrow(a, b) and min(a.ndim, b.ndim) > 1:
        return gpu_integer.multiply_matrices(gpu_integer.signed(a, a_zero), gpu_integer.signed(b, b_zero))

    def product(x: Any, w: Any) -> Any:
        if a.ndim > 1 and b.ndim > 1:
            x, w = with_rank(x, rank), with_rank(w, rank)
        return jnp.matmul(x, w, precision="highest")

    return _sum_of_products(
        product,
        a,
        b,
        a_zero,
        b_zero,
        num_terms=a.shape[-1],
    )


def _aligned(zero_point: Any, rank: int, *, vector: tuple[int, int]) -> Any:
    """Returns the zero point with `rank` axes; one of several elements in a row is first shaped as `vector`."""
    if zero_point is None:
        return None
    if zero_point.size == 1:
        return zero_point.reshape((1,) * rank)
    return with_rank(zero_point.reshape(vector) if zero_point.ndim == 1 else zero_point, rank)


def _sum_of_products(product: Any, x: Any, w: Any, x_zero: Any, w_zero: Any, *, num_terms: int) -> Any:
    x, w = jnp.asarray(x), jnp.asarray(w)
    return integer.sum_of_products(
        product,
        integer.centred(x, None if x_zero is None else jnp.asarray(x_zero)),
        integer.centred(w, None if w_zero is None else jnp.asarray(w_zero)),
        num_terms=num_terms,
        largest_x=_largest(x, x_zero),
        largest_w=_largest(w, w_zero),
    )


def _largest(x: Any, zero_point: Any) -> int:
    return integer.largest_magnitude(x.dtype) if zero_point is None else integer.largest_difference(x.dtype)
