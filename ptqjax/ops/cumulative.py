"""Sums and products of all elements up to each."""

from __future__ import annotations

from typing import Any

from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.registry import lowers, static_integers


@lowers("CumSum", since=11)
def cum_sum(x: Any, axis: Any, /, *, exclusive: int = 0, reverse: int = 0) -> Any:
    """Returns the sums along `axis` up to each element (without it: `exclusive`; from it on: `reverse`)."""
    return _accumulated("cumsum", x, axis, exclusive, reverse)


@lowers("CumProd", since=26)
def cum_prod(x: Any, axis: Any, /, *, exclusive: int = 0, reverse: int = 0) -> Any:
    """Returns `cum_sum` with products."""
    return _accumulated("cumprod", x, axis, exclusive, reverse)


def _accumulated(name: str, x: Any, axis: Any, exclusive: int, reverse: int) -> Any:
    (along,) = static_integers(axis, f"the axis of {name}")
    xp = array_namespace(x)
    x = xp.moveaxis(x, along, 0)
    x = x[::-1] if reverse else x
    if exclusive:
        x = xp.concatenate([xp.full_like(x[:1], 1 if name == "cumprod" else 0), x[:-1]])
    results = getattr(xp, name)(x, axis=0, dtype=x.dtype)
    return xp.moveaxis(results[::-1] if reverse else results, 0, along)
