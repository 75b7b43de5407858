"""Operators that work element by element: the layout of their operands does not matter, only that it is the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.element_types import element_type
from ptqjax.ops.layout import with_rank
from ptqjax.ops.registry import lowers

_FLOAT32_MAX = 3.4028234663852886e38
_NARROW = ("int4", "uint4", "int2", "uint2")


def _lower_unary(op_type: str, function: Callable[[Any], Any]) -> None:
    def unary(x: Any, /) -> Any:
        return function(x)

    unary.__doc__ = f"Returns ONNX's {op_type} of `x`, element by element."
    lowers(op_type, since=1, elementwise=True)(unary)


def _lower_variadic(op_type: str, since: int, function: Callable[[Any, Any, Any], Any]) -> None:
    def variadic(*operands: Any) -> Any:
        xp = array_namespace(*operands)
        rank = max(operand.ndim for operand in operands)
        return reduce(lambda a, b: function(xp, a, b), (with_rank(operand, rank) for operand in operands))

    variadic.__doc__ = f"Returns ONNX's {op_type} of the operands, which are broadcast."
    lowers(op_type, since=since, elementwise=True)(variadic)


def _divide(xp: Any, a: Any, b: Any) -> Any:
    if not np.issubdtype(a.dtype, np.integer):
        return xp.divide(a, b)
    quotient = xp.abs(a) // xp.abs(b)  # integers are divided towards zero
    return xp.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


for _op_type, _function in {
    "Abs": jnp.abs,
    "Erf": jax.scipy.special.erf,
    "Exp": jnp.exp,
    "HardSwish": lambda x: x * jnp.clip(x * x.dtype.type(1 / 6) + x.dtype.type(0.5), 0, 1),
    "Identity": lambda x: x,
    "Log": jnp.log,
    "Neg": lambda x: -x,
    "Relu": lambda x: jnp.maximum(x, jnp.zeros((), x.dtype)),
    "Sigmoid": jax.nn.sigmoid,
    "Sqrt": jnp.sqrt,
    "Tanh": jnp.tanh,
}.items():
    _lower_unary(_op_type, _function)

for _op_type, _since, _binary in (
    ("Add", 7, lambda xp, a, b: xp.add(a, b)),
    ("Sub", 7, lambda xp, a, b: xp.subtract(a, b)),
    ("Mul", 7, lambda xp, a, b: xp.multiply(a, b)),
    ("Div", 7, _divide),
    ("Min", 8, lambda xp, a, b: xp.minimum(a, b)),
    ("Max", 8, lambda xp, a, b: xp.maximum(a, b)),
    ("PRelu", 7, lambda xp, x, slope: xp.where(x < 0, x * slope, x)),
    ("Pow", 7, lambda xp, x, exponent: xp.power(x, exponent).astype(x.dtype)),
):
    _lower_variadic(_op_type, _since, _binary)


@lowers("Clip", since=6, elementwise=True)
def clip_6(x: Any, /, *, min: float = -_FLOAT32_MAX, max: float = _FLOAT32_MAX) -> Any:  # noqa: A002
    """Returns `x` brought into [min, max]."""
    return clip(x, np.asarray(min, x.dtype), np.asarray(max, x.dtype))


@lowers("Clip", since=11, elementwise=True)
def clip(x: Any, low: Any = None, high: Any = None, /) -> Any:
    """Returns min(max(x, low), high) with scalar bounds, either of which may be absent."""
    xp = array_namespace(x, low, high)
    if low is not None:
        x = xp.maximum(x, low.reshape(()))
    return x if high is None else xp.minimum(x, high.reshape(()))


@lowers("LeakyRelu", since=1, elementwise=True)
def leaky_relu(x: Any, /, *, alpha: float = 0.01) -> Any:
    """Returns `x` where it is not negative, else alpha x."""
    return jnp.where(x < 0, x * x.dtype.type(alpha), x)


@lowers("HardSigmoid", since=1, elementwise=True)
def hard_sigmoid(x: Any, /, *, alpha: float = 0.2, beta: float = 0.5) -> Any:
    """Returns alpha x + beta, brought into [0, 1]."""
    return jnp.clip(x * x.dtype.type(alpha) + x.dtype.type(beta), 0, 1)


@lowers("Gelu", since=20, elementwise=True)
def gelu(x: Any, /, *, approximate: str = "none") -> Any:
    """Returns x Phi(x), exactly or by the tanh formula."""
    return jax.nn.gelu(x, approximate=approximate == "tanh")


@lowers("Cast", since=6, elementwise=True)
def cast(x: Any, /, *, to: int, saturate: int = 1, round_mode: str = "up") -> Any:
    """Returns `x` as ONNX's element type number `to`; floats lose their fraction on the way to integers."""
    del saturate, round_mode  # they speak of 8-bit floats alone, which are refused
    dtype = element_type(to)
    if dtype.name in _NARROW:
        x = x.astype(np.int32)  # what does not fit wraps around, as it does for the wider integers
    return x.astype(dtype)
