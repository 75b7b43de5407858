"""Comparisons, logic, and the choice between two tensors."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.pointwise import lower_broadcast, lower_unary, lower_unary_by_name, of_one_rank
from ptqjax.ops.registry import lowers

for _op_type, _since, _binary in (
    ("And", 7, lambda xp, a, b: xp.logical_and(a, b)),
    ("Or", 7, lambda xp, a, b: xp.logical_or(a, b)),
    ("Xor", 7, lambda xp, a, b: xp.logical_xor(a, b)),
    ("Equal", 7, lambda _, a, b: a == b),
    ("Greater", 7, lambda _, a, b: a > b),
    ("GreaterOrEqual", 12, lambda _, a, b: a >= b),
    ("Less", 7, lambda _, a, b: a < b),
    ("LessOrEqual", 12, lambda _, a, b: a <= b),
):
    lower_broadcast(_op_type, _binary, since=_since)

lower_unary_by_name("Not", "logical_not")
lower_unary("IsNaN", jnp.isnan, since=9)


@lowers("IsInf", since=10, elementwise=True)
def is_infinite(x: Any, /, *, detect_negative: int = 1, detect_positive: int = 1) -> Any:
    """Returns where `x` is infinite, of the signs asked for."""
    found = jnp.isinf(x)
    if not detect_negative:
        found &= ~jnp.signbit(x)
    return found if detect_positive else found & jnp.signbit(x)


@lowers("Where", since=9, elementwise=True)
def where(condition: Any, x: Any, y: Any, /) -> Any:
    """Returns `x` where the condition holds, else `y`; the three are broadcast."""
    return array_namespace(condition, x, y).where(*of_one_rank(condition, x, y))
