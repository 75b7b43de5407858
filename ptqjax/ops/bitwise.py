"""Operators on the bits of numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.kernels.conversion import num_bits
from ptqjax.ops.element_types import element_type
from ptqjax.ops.pointwise import lower_broadcast, lower_unary_by_name, of_one_rank
from ptqjax.ops.registry import lowers

for _op_type, _binary in (
    ("BitwiseAnd", lambda _, a, b: a & b),
    ("BitwiseOr", lambda _, a, b: a | b),
    ("BitwiseXor", lambda _, a, b: a ^ b),
):
    lower_broadcast(_op_type, _binary, since=18)

lower_unary_by_name("BitwiseNot", "bitwise_not", since=18)


@lowers("BitShift", since=11, elementwise=True)
def bit_shift(x: Any, amount: Any, /, *, direction: str) -> Any:
    """Returns `x` shifted by `amount` bits; signed integers keep their sign to the right.

    Shifts by a negative amount, or by all bits and more, leave what the sign fills in: 0, or -1.
    """
    x, amount = jnp.broadcast_arrays(*of_one_rank(x, amount))
    width = num_bits(x.dtype)
    beyond = (amount < 0) | (amount >= width)
    if direction == "LEFT":
        return jnp.where(beyond, np.zeros((), x.dtype), lax.shift_left(x, jnp.where(beyond, 0, amount)))
    shift = lax.shift_right_arithmetic if jnp.issubdtype(x.dtype, jnp.signedinteger) else lax.shift_right_logical
    kept = shift(x, jnp.where(beyond, width - 1, amount).astype(x.dtype))
    return jnp.where(beyond & (x >= 0), np.zeros((), x.dtype), kept)


@lowers("BitCast", since=26, elementwise=True)
def bit_cast(x: Any, /, *, to: int) -> Any:
    """Returns the bits of `x` as numbers of ONNX's element type `to`, which is as wide.

    Raises:
        UnsupportedOperatorError: The widths differ, or JAX narrows 64-bit types under the caller's transformation.
    """
    dtype = element_type(to)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise UnsupportedOperatorError(f"BitCast to {dtype} needs 64 bits, which JAX narrows here; set jax_enable_x64")
    if num_bits(np.dtype(x.dtype)) != num_bits(dtype):
        raise UnsupportedOperatorError(f"BitCast from {x.dtype} to {dtype} has no meaning: the widths differ")
    return x.view(dtype)
