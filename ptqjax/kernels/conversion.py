"""From one element type to another, down to floats of 4 bits and integers of 2.

JAX converts between all of them save the 6-bit floats, which NumPy alone holds; both round half to even.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ptqjax.errors import UnsupportedOperatorError

_SIX_BITS = {np.dtype(ml_dtypes.float6_e2m3fn), np.dtype(ml_dtypes.float6_e3m2fn)}
_POWERS_OF_TWO = np.dtype(ml_dtypes.float8_e8m0fnu)
_FLOATS_OF_8_BITS = {
    np.dtype(ml_dtypes.float8_e4m3fn),
    np.dtype(ml_dtypes.float8_e4m3fnuz),
    np.dtype(ml_dtypes.float8_e5m2),
    np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_NAN_CODE = 255


def num_bits(dtype: Any) -> int:
    """Returns the bits of one number of the type; booleans count as bytes."""
    if jnp.issubdtype(dtype, np.integer):
        return ml_dtypes.iinfo(dtype).bits
    return ml_dtypes.finfo(dtype).bits if jnp.issubdtype(dtype, np.floating) else 8 * np.dtype(dtype).itemsize


def convert(x: Any, dtype: Any, *, saturate: bool = True, round_mode: str = "up") -> Any:
    """Returns `x` with its elements converted to `dtype`, as ONNX's Cast does.

    Floats are rounded half to even; on the way to integers they lose their fraction, and those of up to 16 bits wrap
    around, as integers do on the way to narrower ones. What is beyond the range of a wider integer is undefined in
    ONNX, and becomes its nearest end here. Under 32-bit JAX, 64-bit types become 32-bit ones.

    Args:
        x: Numbers or booleans of any type.
        dtype: Any type of numbers, or bool.
        saturate: Whether what is beyond the range of an 8-bit float becomes its largest number; else it becomes
            infinite, or NaN where the type has no infinity.
        round_mode: How `float8_e8m0fnu`, the powers of two, is rounded to: "up", "down" or "nearest" (ties go up).

    Raises:
        UnsupportedOperatorError: The type is a float of 6 bits and `x` is not a NumPy array.
    """
    dtype = np.dtype(dtype)
    if dtype in _SIX_BITS or np.dtype(x.dtype) in _SIX_BITS:
        return _convert_six_bits(x, dtype)
    x = jnp.asarray(x)
    if dtype == _POWERS_OF_TWO:
        return to_powers_of_two(x, saturate=saturate, round_mode=round_mode)
    from_float, to_float = jnp.issubdtype(x.dtype, jnp.floating), jnp.issubdtype(dtype, jnp.floating)
    if to_float and num_bits(dtype) <= 8 and not from_float:  # noqa: PLR2004
        x = x.astype(np.float32)
    if dtype in _FLOATS_OF_8_BITS and saturate:
        largest = float(ml_dtypes.finfo(dtype).max)
        x = jnp.clip(x, -largest, largest)
    if jnp.issubdtype(dtype, jnp.integer) and num_bits(dtype) < (32 if from_float else 8):
        x = x.astype(np.int32)
    return x.astype(jax.dtypes.canonicalize_dtype(dtype))


def to_powers_of_two(x: Any, *, saturate: bool, round_mode: str) -> Any:
    """Returns |x| rounded to float32 and then to 2^-127, ..., 2^127, as float8_e8m0fnu; NaN is NaN.

    What is smaller than 2^-127, 0 too, becomes that, and what is larger than 2^127 becomes that, if `saturate`; else
    both become NaN. `round_mode` is "up", "down" or "nearest" (in the value, not in the exponent; ties go up).
    """
    bits = jax.lax.bitcast_convert_type(x.astype(np.float32), np.uint32)  # no arithmetic: XLA would flush subnormals
    exponent, fraction = bits >> 23 & 0xFF, bits & 0x7FFFFF
    # below 2^-126 the exponent is 0 and float32 has the fraction / 2^149: 2^-127 is 0x400000 there
    start = jnp.where(exponent == 0, np.uint32(0x400000), np.uint32(0))
    above = jnp.where(fraction > start, fraction - start, 0)
    half = jnp.where(exponent == 0, np.uint32(0x200000), np.uint32(0x400000))
    rounds_up = {"up": above > 0, "nearest": above >= half, "down": jnp.zeros(x.shape, bool)}[round_mode]
    code = exponent + rounds_up.astype(np.uint32)
    if saturate:
        code = jnp.minimum(code, _NAN_CODE - 1)
    else:
        code = jnp.where(fraction < start, _NAN_CODE, jnp.minimum(code, _NAN_CODE))
    code = jnp.where(jnp.isnan(x), _NAN_CODE, code).astype(np.uint8)
    return jax.lax.bitcast_convert_type(code, _POWERS_OF_TWO)


def _convert_six_bits(x: Any, dtype: np.dtype) -> np.ndarray:
    if not isinstance(x, np.ndarray):
        name = dtype.name if dtype in _SIX_BITS else x.dtype
        raise UnsupportedOperatorError(f"JAX has no arrays of {name}: only constants of the graph can be of this type")
    wide = x.astype(np.float32)
    return wide.astype(dtype) if dtype in _SIX_BITS else np.asarray(convert(wide, dtype))
