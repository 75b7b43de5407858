"""Arithmetic and mathematical functions, element by element: the layout of their operands does not matter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.pointwise import lower_broadcast, lower_unary, lower_unary_by_name, of_one_rank
from ptqjax.ops.registry import lowers

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def _divide(xp: Any, a: Any, b: Any) -> Any:
    if jnp.issubdtype(a.dtype, np.integer):
        return lax.div(*jnp.broadcast_arrays(a, b))  # towards zero
    return xp.divide(a, b)


def _power(_: Any, base: Any, exponent: Any) -> Any:
    base, exponent = jnp.asarray(base), jnp.asarray(exponent)
    if not jnp.issubdtype(base.dtype, np.integer):
        return jnp.power(base, exponent).astype(base.dtype)
    if jnp.issubdtype(exponent.dtype, np.integer):
        return jnp.power(base, exponent.astype(base.dtype))
    # an integral exponent is not sent through floats, where 9^2 may be 80.99999, and its integer part 80
    inexact = jnp.trunc(jnp.power(base.astype(exponent.dtype), exponent)).astype(base.dtype)
    exact = jnp.power(base, jnp.maximum(exponent, 0).astype(base.dtype))
    return jnp.where((jnp.round(exponent) == exponent) & (exponent >= 0), exact, inexact)


for _op_type, _name in {
    "Abs": "abs",
    "Acos": "arccos",
    "Acosh": "arccosh",
    "Asin": "arcsin",
    "Asinh": "arcsinh",
    "Atan": "arctan",
    "Atanh": "arctanh",
    "Ceil": "ceil",
    "Cos": "cos",
    "Cosh": "cosh",
    "Exp": "exp",
    "Floor": "floor",
    "Log": "log",
    "Neg": "negative",
    "Round": "round",  # half to even
    "Sign": "sign",
    "Sin": "sin",
    "Sinh": "sinh",
    "Sqrt": "sqrt",
    "Tan": "tan",
    "Tanh": "tanh",
}.items():
    lower_unary_by_name(_op_type, _name)

lower_unary("Erf", lambda x: jax.scipy.special.erf(x).astype(x.dtype))
lower_unary("Reciprocal", lambda x: 1 / x)

for _op_type, _since, _binary in (
    ("Add", 7, lambda xp, a, b: xp.add(a, b)),
    ("Sub", 7, lambda xp, a, b: xp.subtract(a, b)),
    ("Mul", 7, lambda xp, a, b: xp.multiply(a, b)),
    ("Div", 7, _divide),
    ("Min", 6, lambda xp, a, b: xp.minimum(a, b)),
    ("Max", 6, lambda xp, a, b: xp.maximum(a, b)),
    ("Sum", 6, lambda xp, a, b: xp.add(a, b)),
    ("Pow", 7, _power),
):
    lower_broadcast(_op_type, _binary, since=_since)


@lowers("Mean", since=6, elementwise=True)
def mean(*operands: Any) -> Any:
    """Returns the mean of the operands, which are broadcast."""
    return sum(of_one_rank(*map(jnp.asarray, operands))) / len(operands)


@lowers("Mod", since=10, elementwise=True)
def mod(a: Any, b: Any, /, *, fmod: int = 0) -> Any:
    """Returns the remainder of a / b: with the sign of `b`, or with that of `a` where `fmod`.

    That of integers divided by 0 is undefined; that of floats is NaN.
    """
    a, b = jnp.broadcast_arrays(*of_one_rank(a, b))
    remainder = lax.rem(a, b)
    if fmod:
        return remainder
    shifted = jnp.where((remainder != 0) & ((remainder < 0) != (b < 0)), remainder + b, remainder)
    if jnp.issubdtype(a.dtype, np.integer):
        return shifted
    return jnp.where(shifted == 0, jnp.copysign(shifted, b), shifted)


@lowers("Clip", since=6, elementwise=True)
def clip_6(x: Any, /, *, min: float = -_FLOAT32_MAX, max: float = _FLOAT32_MAX) -> Any:  # noqa: A002 (ONNX's names)
    """Returns `x` brought into [min, max]."""
    with np.errstate(over="ignore"):  # the default bounds are infinite in float16
        return clip(x, np.asarray(min, x.dtype), np.asarray(max, x.dtype))


@lowers("Clip", since=11, elementwise=True)
def clip(x: Any, low: Any = None, high: Any = None, /) -> Any:
    """Returns min(max(x, low), high) with scalar bounds, either of which may be absent."""
    xp = array_namespace(x, low, high)
    if low is not None:
        x = xp.maximum(x, low.reshape(()))
    return x if high is None else xp.minimum(x, high.reshape(()))


@lowers("Identity", since=1, elementwise=True)
def identity(x: Any, /) -> Any:
    """Returns `x`, whatever it is."""
    return x
