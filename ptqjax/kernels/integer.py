"""The arithmetic of a runtime's integer kernels: exact integer sums, one float32 multiplication, one rounding.

All values are as ONNX Runtime's CPU kernels compute them, in their order of float32 operations (established on
onnxruntime 1.32, x86; `tests/test_integer.py` compares). Sums are exact: float32 holds every integer up to 2**24, so
a sum whose terms cannot exceed that is a float32 convolution or dot (which is what is fast), a larger one is split
into digits of its weights.

Integer arguments are arrays of 8-bit types; scales are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from ptqjax.kernels.platforms import current
from ptqjax.kernels.quotient import quotient

HALF = 128
"""What an unsigned byte is more than the signed one of the same bits, but for the highest."""
_EXACT_BELOW = 2**24  # float32 holds every integer up to here


class Grid(NamedTuple):
    """What the integers of a tensor stand for: (q - zero_point) * scale."""

    scale: Float[Array, "..."]
    """The step."""
    zero_point: Shaped[Array, "..."]
    """The integer that stands for 0, in the type of the integers."""


def largest_difference(dtype: Any) -> int:
    """Returns the largest magnitude of q - zero_point for values of an integer type, whatever the zero point."""
    info = ml_dtypes.iinfo(dtype)
    return int(info.max) - int(info.min)


def largest_magnitude(dtype: Any) -> int:
    """Returns the largest magnitude of a value of an integer type."""
    info = ml_dtypes.iinfo(dtype)
    return max(int(info.max), -int(info.min))


def centred(q: Shaped[Array, "..."], zero_point: Shaped[Array, "..."] | None) -> Float[Array, "..."]:
    """Returns q - zero_point as float32, exactly; shapes must broadcast, None stands for 0."""
    values = q.astype(jnp.float32)
    return values if zero_point is None else values - zero_point.astype(jnp.float32)


def sum_of_products(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    *,
    num_terms: int,
    largest_x: int,
    largest_w: int,
) -> Int[Array, "..."]:
    """Returns product(x, w) exactly, as int32, for integer-valued float32 `x` and `w`.

    Args:
        product: A bilinear function, such as a convolution or a dot, that computes in float32.
        x: The left factor, |x| <= `largest_x`.
        w: The right factor, |w| <= `largest_w`; it is split into digits where the sum would not be exact.
        num_terms: How many products at most are added for one element of the result.
        largest_x: See `x`.
        largest_w: See `w`.
    """
    base, count = _digits_needed(num_terms * largest_x, largest_w)
    total = jnp.zeros((), jnp.int32)
    for place, digit in enumerate(_digits(w, base, count)):
        part = product(x, digit).astype(jnp.int32)
        total = part if place == 0 else total + base**place * part
    return total


def _digits_needed(weight_of_one: int, largest: int) -> tuple[int, int]:
    """Returns (base, count): the fewest balanced digits of `largest` with each digit's sum exact in float32."""
    if weight_of_one * largest < _EXACT_BELOW:
        return 1, 1
    for count in range(2, 9):
        base, bound = min(
            ((2**bits, max(2 ** (bits - 1), -(-largest // 2 ** (bits * (count - 1))))) for bits in range(1, 9)),
            key=lambda choice: choice[1],
        )
        if weight_of_one * bound < _EXACT_BELOW:
            return base, count
    return 2, 8  # more terms than that do not fit an int32 sum either


def _digits(w: jax.Array, base: int, count: int) -> list[jax.Array]:
    """Returns balanced digits d, |d| <= base / 2 (the last takes the rest), with w = sum d[i] base**i."""
    digits = []
    for _ in range(count - 1):
        higher = jnp.round(w / base)
        digits.append(w - base * higher)
        w = higher
    return [*digits, w]


def quantize_to(y: Float[Array, "..."], zero_point: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Returns round_half_even(y) + zero_point, saturated to the zero point's type."""
    info = ml_dtypes.iinfo(zero_point.dtype)
    offset = zero_point.astype(jnp.float32)
    rounded = jnp.round(jnp.clip(y, info.min - offset, info.max - offset))
    return _stored(rounded + offset, zero_point.dtype)


def quantize_shifted(y: Float[Array, "..."], grid: Grid) -> Shaped[Array, "..."]:
    """Returns round(y / scale + zero_point), saturated: as pools do it, which add before they round."""
    return _saturated(quotient(y, grid.scale) + _real(grid.zero_point), grid.zero_point.dtype)


def requantize(
    total: Int[Array, "..."], multiplier: Float[Array, "..."], zero_point: Shaped[Array, "..."]
) -> Shaped[Array, "..."]:
    """Returns round(float32(total) * multiplier) + zero_point, saturated: the end of a convolution or dot."""
    return quantize_to(total.astype(jnp.float32) * multiplier, zero_point)


def add(
    a: Shaped[Array, "..."], a_grid: Grid, b: Shaped[Array, "..."], b_grid: Grid, y_grid: Grid
) -> Shaped[Array, "..."]:
    """Returns round(r_a a + (r_b b + c)), saturated, with r = scale / s_y and c what the zero points come to.

    The runtime uses fused multiply-adds here, as XLA does where the processor has them. Not so reliably for scalars:
    c is computed without relying on it, or a few of 100,000 sums in a whole network round the other way (measured).
    """
    ratio_a, ratio_b = a_grid.scale / y_grid.scale, b_grid.scale / y_grid.scale
    shift_b = ratio_b * _real(b_grid.zero_point)
    shift = _real(y_grid.zero_point) - _rounded_once(ratio_a, _real(a_grid.zero_point), shift_b)
    return _saturated(ratio_a * _real(a) + (ratio_b * _real(b) + shift), y_grid.zero_point.dtype)


def multiply(
    a: Shaped[Array, "..."], a_grid: Grid, b: Shaped[Array, "..."], b_grid: Grid, y_grid: Grid
) -> Shaped[Array, "..."]:
    """Returns round((q_a - z_a)(q_b - z_b) * (s_a s_b / s_y) + z_y), saturated."""
    product = centred(a, a_grid.zero_point) * centred(b, b_grid.zero_point)
    ratio = a_grid.scale * b_grid.scale / y_grid.scale
    return _saturated(product * ratio + _real(y_grid.zero_point), y_grid.zero_point.dtype)


def global_average(x: Shaped[Array, "n c *spatial"], x_grid: Grid, y_grid: Grid) -> Shaped[Array, "n c *ones"]:
    """Returns round(sum(q - z_x) * (s_x / (s_y * num))) + z_y, saturated: the mean of each plane."""
    axes = tuple(range(2, x.ndim))
    num = math.prod(x.shape[2:])
    total = jnp.sum(x.astype(jnp.int32) - x_grid.zero_point.astype(jnp.int32), axis=axes, keepdims=True)
    return requantize(total, x_grid.scale / (y_grid.scale * jnp.float32(num)), y_grid.zero_point)


def softmax(x: Shaped[Array, "..."], x_scale: Float[Array, "..."], y_grid: Grid, *, axis: int) -> Shaped[Array, "..."]:
    """Returns round(e * floor(1 / s_y) / sum(e)) + z_y with e = exp(s_x (q - max q)), saturated above.

    The runtime rounds 1 / s_y down to an integer: exact for the usual 1/256, 3 % off at 1/26.9.
    """
    distance = x.astype(jnp.int32) - jnp.max(x, axis=axis, keepdims=True).astype(jnp.int32)
    e = jnp.exp(distance.astype(jnp.float32) * x_scale)
    share = e * jnp.floor(1 / y_grid.scale) / jnp.sum(e, axis=axis, keepdims=True)
    return _saturated(jnp.round(share) + _real(y_grid.zero_point), y_grid.zero_point.dtype)


def _rounded_once(x: jax.Array, q: jax.Array, c: jax.Array) -> jax.Array:
    """Returns x q + c with one rounding, as a fused multiply-add, for integer-valued |q| < 2**12.

    x is split into halves whose products with q are exact; the error of the sum with c is added at the end.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    product, rest = high * q, (x - high) * q
    total = product + c
    from_c = total - product
    error = (product - (total - from_c)) + (c - from_c)
    return total + (error + rest)


def _real(q: jax.Array) -> jax.Array:
    return q.astype(jnp.float32)


def _saturated(y: jax.Array, dtype: Any) -> jax.Array:
    info = ml_dtypes.iinfo(dtype)
    return _stored(jnp.clip(jnp.round(y), info.min, info.max), dtype)


def _stored(integers: jax.Array, dtype: Any) -> jax.Array:
    """Returns integer-valued float32 numbers that fit the type in it.

    For GPUs an unsigned byte is written as a signed one and turned over: XLA's kernels of matrix products hold signed
    ones alone, and two turns, as the next layer makes one, are none.
    """
    if current().platform != "gpu" or dtype != jnp.uint8:
        return integers.astype(jnp.int32).astype(dtype)
    return turned((integers - HALF).astype(jnp.int32).astype(jnp.int8))


def turned(q: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Returns unsigned bytes as signed ones that are 128 less, or the other way round."""
    other = jnp.uint8 if q.dtype == jnp.int8 else jnp.int8
    if other == jnp.uint8:
        return jax.lax.bitcast_convert_type(q, other) + np.uint8(HALF)  # which wraps around
    return jax.lax.bitcast_convert_type(q + np.uint8(HALF), other)
