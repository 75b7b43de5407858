"""Softmax, LogSoftmax and Hardmax: how each element compares with those along an axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ptqjax.ops.layout import channels_last_axis
from ptqjax.ops.registry import lowers, lowers_channels_last


def _hardmax(x: Any, *, axis: int) -> Any:
    if not x.size:
        return x  # nothing is the greatest of nothing
    first = jnp.argmax(x, axis=axis)
    return jax.nn.one_hot(first, x.shape[axis], dtype=x.dtype, axis=axis)


def _lower(op_type: str, function: Callable[..., Any], equation: str) -> None:
    def over_the_rest(x: Any, /, *, axis: int = 1) -> Any:
        start = axis % x.ndim if axis < 0 else axis
        flat = jnp.asarray(x).reshape(math.prod(x.shape[:start]), math.prod(x.shape[start:]))
        return function(flat, axis=1).reshape(x.shape)

    def along_one(x: Any, /, *, axis: int = -1) -> Any:
        return function(jnp.asarray(x), axis=axis)

    def along_one_channels_last(x: Any, /, *, axis: int = -1) -> Any:
        return along_one(x, axis=channels_last_axis(axis, x.ndim))

    over_the_rest.__doc__ = f"Returns {equation} over all axes from `axis` on together."
    along_one.__doc__ = f"Returns {equation} along `axis`."
    lowers(op_type, since=1)(over_the_rest)
    lowers(op_type, since=13)(along_one)
    lowers_channels_last(op_type, since=13)(along_one_channels_last)


_lower("Softmax", jax.nn.softmax, "exp(x) divided by its sum")
_lower("LogSoftmax", jax.nn.log_softmax, "x minus the logarithm of the sum of exp(x)")
_lower("Hardmax", _hardmax, "1 for the first of the greatest elements and 0 for the others,")
