"""Floating-point grids: real numbers to the nearest number of a short format and back, on NumPy or JAX.

A grid is a format and, for those of 8 bits, a scale of the rank of `x`, broadcastable to it. Those of 16 bits have a
range of their own and no scale: x becomes what a cast makes of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.quotient import quotient


class FloatFormat(NamedTuple):
    """What decides how numbers are rounded to a format."""

    fraction_bits: int
    """Bits behind the leading one."""
    smallest_exponent: int
    """Exponent of the smallest normal number; below it the step stays the same."""
    largest: float
    """The largest finite number."""
    has_scale: bool
    """Whether numbers are divided by a scale first, and saturate; else what is too large becomes infinite."""


_FORMATS = {
    "float8_e4m3fn": FloatFormat(3, -6, 448.0, has_scale=True),
    "float8_e5m2": FloatFormat(2, -14, 57344.0, has_scale=True),
    "float16": FloatFormat(10, -14, 65504.0, has_scale=False),
    "bfloat16": FloatFormat(7, -126, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), has_scale=False),
}

_EXPONENT = np.uint32(0x7F800000)  # its bits in float32
_SINGLE_BITS = 8  # bits of the exponent of float32 and bfloat16


def float_format(name: str) -> FloatFormat:
    """Returns the format of one of `grid.FLOAT_FORMATS`."""
    return _FORMATS[name]


def largest_number(name: str) -> float:
    """Returns the largest finite number of a format: 448 for "float8_e4m3fn"."""
    return _FORMATS[name].largest


def num_bits_of(name: str) -> int:
    """Returns the number of bits of a format, 8 or 16."""
    return ml_dtypes.finfo(array_type(name)).bits


def array_type(name: str) -> np.dtype:
    """Returns the array type of a format."""
    return np.dtype(getattr(ml_dtypes, name, name))


def round_to_format(x: Any, name: str) -> Any:
    """Returns the numbers of the format that are nearest to `x`, as float32; ties go to the even fraction.

    Beyond the largest number, formats of 8 bits saturate (infinity, too), and those of 16 bits have infinity, from half
    a step beyond on: as ONNX's Cast and QuantizeLinear with saturate=1, and as casts of `ml_dtypes` below that. NaN
    stays NaN. Exact, and the same on NumPy and JAX, except that XLA may flush numbers below 2^-126 to 0.
    """
    if array_namespace(x) is np:
        return _cast(np.asarray(x, np.float32), name)
    x = jnp.asarray(x, np.float32)
    # Not by a conversion there and back, which XLA may leave out (xla_allow_excess_precision), or do by way of float16.
    if name == "bfloat16":
        return jax.lax.reduce_precision(x, _SINGLE_BITS, _FORMATS[name].fraction_bits)
    return _rounded(x, _FORMATS[name])


def _cast(x: np.ndarray, name: str) -> np.ndarray:
    kind = _FORMATS[name]
    if kind.has_scale:
        x = np.clip(x, -kind.largest, kind.largest)
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(array_type(name)).astype(np.float32)


def _rounded(x: jax.Array, kind: FloatFormat) -> jax.Array:
    x = jnp.clip(x, -2 * kind.largest, 2 * kind.largest)  # infinity has no step
    bits = jax.lax.bitcast_convert_type(x, np.uint32)
    power = jax.lax.bitcast_convert_type(bits & _EXPONENT, np.float32)  # 2^floor(log2 |x|), 0 for subnormals
    step = jnp.maximum(power, 2.0**kind.smallest_exponent) * np.float32(2.0**-kind.fraction_bits)
    nearest = jnp.round(x / step) * step  # exact: the step is a power of two
    if kind.has_scale:
        return jnp.clip(nearest, -kind.largest, kind.largest)
    return jnp.where(jnp.abs(nearest) > kind.largest, jnp.sign(nearest) * jnp.inf, nearest)


def quantize_float(x: Any, scale: Any, name: str) -> Any:
    """Returns the codes of `x`, as float32: x / scale rounded to the format; without a scale, `x` rounded to it."""
    return round_to_format(quotient(x, scale) if _FORMATS[name].has_scale else x, name)


def dequantize_float(codes: Any, scale: Any, name: str) -> Any:
    """Returns the real numbers that the codes stand for."""
    return codes * scale if _FORMATS[name].has_scale else codes


def fake_quantize_float(x: Any, scale: Any, name: str, *, enabled: Any) -> Any:
    """Returns `x` rounded to the format, in its own dtype; `x` itself where `enabled` is False.

    Straight-through: the derivative in `x` is 1 where x / scale is not beyond the format's largest number, else 0; with
    the code c, that in `scale` is c - x / scale there, c elsewhere, and 0 for formats without a scale.

    Source: as `grid.fake_quantize`, whose steps are all equal.
    """
    if array_namespace(x, scale, enabled) is np:
        codes = quantize_float(np.asarray(x, np.float32), scale, name)
        return np.where(enabled, dequantize_float(codes, scale, name), x).astype(np.asarray(x).dtype)
    x = jnp.asarray(x)
    wide = x.astype(np.float32)
    rounded = _straight_through(wide, jnp.asarray(scale, np.float32), name)
    return jnp.where(enabled, rounded.astype(x.dtype), x)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _straight_through(x: Any, scale: Any, name: str) -> Any:
    return dequantize_float(quantize_float(x, scale, name), scale, name)


@_straight_through.defjvp
def _straight_through_jvp(name: str, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    (x, scale), (dx, dscale) = primals, tangents
    kind = _FORMATS[name]
    codes = quantize_float(x, scale, name)
    steps = quotient(x, scale) if kind.has_scale else x
    inside = jnp.abs(steps) <= kind.largest
    tangent = jnp.where(inside, dx, 0)
    if kind.has_scale:
        tangent = tangent + (codes - jnp.where(inside, steps, 0)) * dscale
    return dequantize_float(codes, scale, name), tangent
