"""Reductions along axes, and Softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.element_types import integer_range
from ptqjax.ops.layout import channels_last_axis
from ptqjax.ops.registry import lowers, lowers_channels_last, static_integers


def _lower_reduction(op_type: str, axes_are_an_input_since: int) -> None:
    name = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceMin": "min"}[op_type]

    def reduce_1(x: Any, /, *, axes: Sequence[int] | None = None, keepdims: int = 1) -> Any:
        return _reduced(name, x, axes, keepdims)

    def reduce_1_channels_last(x: Any, /, *, axes: Sequence[int] | None = None, keepdims: int = 1) -> Any:
        return _reduced(name, x, _channels_last(axes, x.ndim), keepdims)

    def reduce(x: Any, axes: Any = None, /, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
        along = _axes(axes, op_type)
        return x if not along and noop_with_empty_axes else _reduced(name, x, along, keepdims)

    def reduce_channels_last(x: Any, axes: Any = None, /, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
        along = _channels_last(_axes(axes, op_type), x.ndim)
        return x if not along and noop_with_empty_axes else _reduced(name, x, along, keepdims)

    pairs = ((1, reduce_1, reduce_1_channels_last), (axes_are_an_input_since, reduce, reduce_channels_last))
    for since, function, channels_last in pairs:
        function.__doc__ = f"Returns ONNX's {op_type} of `x` along `axes`, all where none are given."
        lowers(op_type, since=since)(function)
        lowers_channels_last(op_type, since=since, applies=lambda node: bool(node.get("keepdims", 1)))(channels_last)


@lowers("Softmax", since=1)
def softmax_1(x: Any, /, *, axis: int = 1) -> Any:
    """Returns exp(x) divided by its sum over all axes from `axis` on together."""
    axis %= x.ndim
    flat = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    return jax.nn.softmax(flat, axis=1).reshape(x.shape)


@lowers("Softmax", since=13)
def softmax(x: Any, /, *, axis: int = -1) -> Any:
    """Returns exp(x) divided by its sum along `axis`."""
    return jax.nn.softmax(x, axis=axis)


@lowers_channels_last("Softmax", since=13)
def softmax_channels_last(x: Any, /, *, axis: int = -1) -> Any:
    """Returns `softmax` of a channels-last value."""
    return softmax(x, axis=channels_last_axis(axis, x.ndim))


def _reduced(name: str, x: Any, axes: Sequence[int] | None, keepdims: int) -> Any:
    along = tuple(axes) if axes else None
    reduce = getattr(array_namespace(x), name)
    of_nothing = {"initial": _extreme(x.dtype, name)} if name in ("max", "min") else {}
    return reduce(x, axis=along, keepdims=bool(keepdims), **of_nothing).astype(x.dtype)


def _extreme(dtype: np.dtype, name: str) -> Any:
    """Returns the largest value, for a minimum of nothing, or the smallest, for a maximum."""
    if dtype == np.bool_:
        return name == "min"
    if jnp.issubdtype(dtype, jnp.floating):
        return np.inf if name == "min" else -np.inf
    return integer_range(dtype)[name == "min"]


def _axes(axes: Any, op_type: str) -> tuple[int, ...]:
    return () if axes is None else static_integers(axes, f"the axes of {op_type}")


def _channels_last(axes: Sequence[int] | None, rank: int) -> tuple[int, ...]:
    return tuple(channels_last_axis(axis, rank) for axis in axes or ())


for _op_type, _since in {"ReduceMean": 18, "ReduceSum": 13, "ReduceMax": 18, "ReduceMin": 18}.items():
    _lower_reduction(_op_type, _since)
