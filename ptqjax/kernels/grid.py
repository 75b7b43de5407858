"""Integer grids: real numbers to codes and back, on NumPy or JAX, with gradients that pass straight through.

A grid is given by arrays: `scale`, `zero_point`, `qmin`, `qmax`, each of them a scalar or of the rank of `x` and
broadcastable to it (`encodings.encoding` brings per-channel and per-block scales into that shape). Nothing is static:
one compiled program serves all bit widths.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.errors import ConfigError
from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.quotient import quotient

FLOAT_FORMATS = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16")
"""Floating-point types that codes may have in place of integers."""

_DTYPE = re.compile(r"(?P<unsigned>u?)int(?P<bits>[2-9]|1[0-6]|32)")


def integer_range(dtype: str) -> tuple[int, int]:
    """Returns the smallest and largest integer of `dtype` ("int8", "uint4", ...).

    Grids of 3, 5, 6, 7 and 9 to 15 bits have no array type of their own: the next wider one holds them.

    Raises:
        ConfigError: `dtype` is not an integer type of 2 to 16 or of 32 bits.
    """
    match = _DTYPE.fullmatch(dtype)
    if match is None:
        raise ConfigError(
            f"dtype {dtype!r} is no grid of integers; expected int or uint with 2 to 16 or 32 bits, as in 'int8'"
        )
    unsigned, bits = match["unsigned"], int(match["bits"])
    return (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def quantize(x: Any, scale: Any, zero_point: Any, qmin: Any, qmax: Any) -> Any:
    """Returns the codes of `x`, as integer-valued floats: clip(round(x / scale) + zero_point, qmin, qmax).

    Rounds half to even and divides (no product with a reciprocal), as ONNX's QuantizeLinear does, to the bit.
    """
    xp = array_namespace(x, scale, zero_point, qmin, qmax)
    return xp.clip(xp.round(_divide(x, scale)) + zero_point, qmin, qmax)


def dequantize(codes: Any, scale: Any, zero_point: Any) -> Any:
    """Returns the real numbers that the codes stand for: (codes - zero_point) * scale."""
    return (codes - zero_point) * scale


def fake_quantize(x: Any, scale: Any, zero_point: Any, qmin: Any, qmax: Any, *, enabled: Any) -> Any:
    """Returns `x` rounded to the grid, in its own dtype; `x` itself where `enabled` is False.

    The derivative in `x` is 1 where the rounded value lies on the grid and 0 where it is clipped. With codes c, the
    derivative in `scale` is (c - zero_point) - x / scale on the grid and c - zero_point outside; that in `zero_point`
    is 0 on the grid and -scale outside. `qmin` and `qmax` have no derivative.

    Source: Esser et al., Learned Step Size Quantization (2020), eqs. 3 and 5, without their gradient scale; Jain et
        al., Trained Quantization Thresholds (2020), for the offset.
    """
    xp = array_namespace(x, scale, zero_point, qmin, qmax, enabled)
    if xp is np:
        rounded = dequantize(quantize(x, scale, zero_point, qmin, qmax), scale, zero_point)
        return np.where(enabled, rounded, x).astype(np.asarray(x).dtype)
    x = jnp.asarray(x)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    grid = (jnp.asarray(value).astype(dtype) for value in (scale, zero_point, qmin, qmax))
    return _rounded_where(enabled, x, *grid)


@jax.jit  # traced once for each shape, not once for each tensor
def _rounded_where(enabled: Any, x: Any, *grid: Any) -> Any:
    return jnp.where(enabled, _straight_through(x.astype(grid[0].dtype), *grid).astype(x.dtype), x)


@jax.custom_jvp
def _straight_through(x: Any, scale: Any, zero_point: Any, qmin: Any, qmax: Any) -> Any:
    return dequantize(quantize(x, scale, zero_point, qmin, qmax), scale, zero_point)


@_straight_through.defjvp
def _straight_through_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    x, scale, zero_point, qmin, qmax = primals
    dx, dscale, dzero_point = tangents[:3]
    steps = _divide(x, scale)
    wanted = jnp.round(steps) + zero_point
    codes = jnp.clip(wanted, qmin, qmax)
    inside = wanted == codes
    slope = (codes - zero_point) - jnp.where(inside, steps, 0)
    tangent = jnp.where(inside, dx, 0) + slope * dscale - jnp.where(inside, 0, scale) * dzero_point
    return dequantize(codes, scale, zero_point), tangent


@jax.custom_jvp
def round_in_a_chain(x: Any, step: Any, low: Any, high: Any) -> Any:
    """Returns min(max(round(x / step), low), high) * step: `fake_quantize` by operations that read one value each.

    XLA's compiler for GPUs takes such a chain into the kernel of the matrix product in front of it. A value that is
    read twice, to tell whether it is to be rounded, it writes to memory, and rounds it in a kernel of its own.
    Compilers for GPUs divide by a broadcast scalar, so that nothing need keep them from anything else. With `low` None
    nothing is cut off below: three scalars beside a value are what XLA takes into a product behind it.

    The derivatives are those of `fake_quantize`; that in an end is `step` where it clips.
    """
    return _cut(jnp.round(x / step), low, high) * step


def _cut(steps: Any, low: Any, high: Any) -> Any:
    return jnp.minimum(steps if low is None else jnp.maximum(steps, low), high)


@round_in_a_chain.defjvp
def _round_in_a_chain_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    (x, step, low, high), (dx, dstep, dlow, dhigh) = primals, tangents
    steps = x / step
    wanted = jnp.round(steps)
    codes = _cut(wanted, low, high)
    inside = wanted == codes
    ends = (dhigh if low is None else jnp.where(wanted < low, dlow, dhigh)) * step
    slope = codes - jnp.where(inside, steps, 0)
    return codes * step, jnp.where(inside, dx, ends) + slope * dstep


def _divide(x: Any, scale: Any) -> Any:
    with np.errstate(over="ignore"):  # what is infinitely many steps away saturates
        return quotient(x, scale)
