"""Reductions along axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ptqjax.ops.element_types import integer_range
from ptqjax.ops.layout import channels_last_axes
from ptqjax.ops.registry import lowers, lowers_channels_last, static_integers

Reduction: TypeAlias = Callable[..., Any]
"""A function of an array, `axis` and `keepdims`."""


def _sum(x: Any, **along: Any) -> Any:
    return _namespace(x).sum(x, **along)


def _mean(x: Any, **along: Any) -> Any:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.mean(x, **along)
    total = jnp.asarray(_sum(x, **along))  # of integers: exact, then cut towards 0
    return lax.div(total, jnp.full_like(total, x.size // max(total.size, 1)))


def _extreme(name: str) -> Reduction:
    def reduce(x: Any, **along: Any) -> Any:
        return getattr(_namespace(x), name)(x, initial=_of_nothing(x.dtype, name), **along)

    return reduce


def _l2(x: Any, **along: Any) -> Any:
    return jnp.sqrt(_as_float(_sum(x * x, **along)))


def _log_sum(x: Any, **along: Any) -> Any:
    return jnp.log(_as_float(_sum(x, **along)))


def _log_sum_exp(x: Any, **along: Any) -> Any:
    return jax.scipy.special.logsumexp(_as_float(x), **along)


_REDUCTIONS: dict[str, Reduction] = {
    "ReduceL1": lambda x, **along: _sum(abs(x), **along),
    "ReduceL2": _l2,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": _extreme("max"),
    "ReduceMean": _mean,
    "ReduceMin": _extreme("min"),
    "ReduceProd": lambda x, **along: _namespace(x).prod(x, **along),
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda x, **along: _sum(x * x, **along),
}


def _lower_reduction(op_type: str, function: Reduction, axes_are_an_input_since: int) -> None:
    def reduce_1(x: Any, /, *, axes: Sequence[int] | None = None, keepdims: int = 1) -> Any:
        return _reduced(function, x, axes, keepdims)

    def reduce_1_channels_last(x: Any, /, *, axes: Sequence[int] | None = None, keepdims: int = 1) -> Any:
        return _reduced(function, x, channels_last_axes(axes or (), x.ndim), keepdims)

    def reduce(x: Any, axes: Any = None, /, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
        return _reduced(function, x, _axes(axes, op_type), keepdims, noop_with_empty_axes)

    def reduce_channels_last(x: Any, axes: Any = None, /, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
        return _reduced(function, x, channels_last_axes(_axes(axes, op_type), x.ndim), keepdims, noop_with_empty_axes)

    pairs = ((1, reduce_1, reduce_1_channels_last), (axes_are_an_input_since, reduce, reduce_channels_last))
    for since, by_axes, channels_last in pairs:
        by_axes.__doc__ = f"Returns ONNX's {op_type} of `x` along `axes`, all where none are given."
        lowers(op_type, since=since)(by_axes)
        lowers_channels_last(op_type, since=since, applies=lambda node: bool(node.get("keepdims", 1)))(channels_last)


def _reduced(function: Reduction, x: Any, axes: Sequence[int] | None, keepdims: int, noop: int = 0) -> Any:
    """Returns the reduction along the axes; without any along all, or along none if `noop`."""
    along = tuple(axes) if axes else () if noop else None
    return function(x, axis=along, keepdims=bool(keepdims)).astype(x.dtype)


def _namespace(x: Any) -> Any:
    """Returns NumPy for what shapes are made of; 16-bit floats it would round term by term."""
    return np if isinstance(x, np.ndarray) and x.dtype.kind in "iub" else jnp


def _as_float(x: Any) -> Any:
    """Returns `x`, integers in the widest floating type."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jax.dtypes.canonicalize_dtype(np.float64))


def _of_nothing(dtype: np.dtype, name: str) -> Any:
    """Returns the largest value, for a minimum of nothing, or the smallest, for a maximum."""
    if dtype == np.bool_:
        return name == "min"
    if jnp.issubdtype(dtype, jnp.floating):
        return np.inf if name == "min" else -np.inf
    return integer_range(dtype)[name == "min"]


def _axes(axes: Any, op_type: str) -> tuple[int, ...]:
    return () if axes is None else static_integers(axes, f"the axes of {op_type}")


for _op_type, _function in _REDUCTIONS.items():
    _lower_reduction(_op_type, _function, axes_are_an_input_since=13 if _op_type == "ReduceSum" else 18)
