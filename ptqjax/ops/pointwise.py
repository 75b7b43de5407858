"""How operators that work element by element are registered: one table row each."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.layout import with_rank
from ptqjax.ops.registry import lowers


def lower_unary(op_type: str, function: Callable[[Any], Any], *, since: int = 1) -> None:
    """Registers `function` of a JAX array, element by element, as the meaning of `op_type`, which has no attributes."""

    def unary(x: Any, /) -> Any:
        return function(jnp.asarray(x))

    unary.__doc__ = f"Returns ONNX's {op_type} of `x`, element by element."
    lowers(op_type, since=since, elementwise=True)(unary)


def lower_unary_by_name(op_type: str, name: str, *, since: int = 1) -> None:
    """Registers the function that NumPy and `jax.numpy` both call `name` as the meaning of `op_type`."""

    @np.errstate(all="ignore")  # 1 / 0 is infinite, as it is under jit
    def unary(x: Any, /) -> Any:
        return getattr(array_namespace(x), name)(x)

    unary.__doc__ = f"Returns ONNX's {op_type} of `x`, element by element."
    lowers(op_type, since=since, elementwise=True)(unary)


def lower_broadcast(op_type: str, function: Callable[[Any, Any, Any], Any], *, since: int) -> None:
    """Registers `function` of a namespace and two arrays, applied from left to right, as the meaning of `op_type`."""

    @np.errstate(all="ignore")
    def variadic(*operands: Any) -> Any:
        xp = array_namespace(*operands)
        return reduce(lambda a, b: function(xp, a, b), of_one_rank(*operands))

    variadic.__doc__ = f"Returns ONNX's {op_type} of the operands, which are broadcast."
    lowers(op_type, since=since, elementwise=True)(variadic)


def of_one_rank(*operands: Any) -> list[Any]:
    """Returns the operands with axes of size 1 in front, so that they broadcast axis by axis."""
    rank = max(operand.ndim for operand in operands)
    return [with_rank(operand, rank) for operand in operands]
