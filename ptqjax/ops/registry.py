"""The operators that have a meaning here, by domain, name and opset version.

A lowering is a function of arrays: inputs positional (None for an optional input left out), attributes keyword-only
under ONNX's names, with the schema's defaults. It returns an array, or a tuple for several outputs. Inputs that are
`numpy.ndarray` are static: known while tracing, which is what shapes are made of.

A lowering may come with a second function that computes the same on values whose channels are last, [n, *spatial, c],
which is what is fast on a CPU (`lowers_channels_last`); an elementwise one is its own second function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np

from ptqjax.errors import DataDependentError, UnsupportedOperatorError

Function: TypeAlias = Callable[..., Any]
_F = TypeVar("_F", bound=Function)

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelsLast:
    """How an operator computes on values whose channels are last."""

    function: Function
    """Takes and returns channels-last values; same attributes, in ONNX's terms (axis 1 is the channel)."""
    num_values: int | None
    """How many leading inputs are such values; None: all of them, aligned to one rank. The others are ONNX's."""
    starts: bool
    """Whether it is worth bringing an ONNX-layout input into this layout; else only values that are in it stay so."""
    applies: Callable[[Mapping[str, Any]], bool]
    """Whether the node with these attributes can be computed so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lowering:
    """The meaning of one operator from one opset version on."""

    function: Function
    """The function of arrays."""
    since: int
    """The first version of the operator set in which it means this."""
    parameters: frozenset[str]
    """The keyword-only parameters of the function: the attributes that it knows."""
    channels_last: ChannelsLast | None = None
    """The lowering of channels-last values, where there is one."""


_lowerings: dict[tuple[str, str], dict[int, Lowering]] = {}  # (domain, op_type) -> since -> lowering; filled on import
_history: list[Function] = []  # every function in the order of its registration


def lowers(op_type: str, *, since: int, domain: str = "", elementwise: bool = False) -> Callable[[_F], _F]:
    """Returns a decorator that makes a function the meaning of `op_type` from opset `since` on.

    Args:
        op_type: The operator's name.
        since: The first opset version in which the function holds, up to the next that is registered.
        domain: The operator set; "" is ONNX's own.
        elementwise: The function works element by element on broadcast inputs, so that layout does not matter to it.
    """

    def register(function: _F) -> _F:
        same = ChannelsLast(function=function, num_values=None, starts=False, applies=lambda _: True)
        _lowerings.setdefault((domain, op_type), {})[since] = Lowering(
            function=function,
            since=since,
            parameters=_keywords(function),
            channels_last=same if elementwise else None,
        )
        _history.append(function)
        return function

    return register


def lowers_channels_last(
    op_type: str,
    *,
    since: int,
    domain: str = "",
    num_values: int | None = 1,
    starts: bool = False,
    applies: Callable[[Mapping[str, Any]], bool] = lambda _: True,
) -> Callable[[_F], _F]:
    """Returns a decorator that gives the registered meaning of `op_type` its channels-last function.

    The function takes the same inputs and attributes as the registered one; see `ChannelsLast` for the arguments.
    """

    def register(function: _F) -> _F:
        variant = ChannelsLast(function=function, num_values=num_values, starts=starts, applies=applies)
        versions = _lowerings[domain, op_type]
        versions[since] = replace(versions[since], channels_last=variant)
        _history.append(function)
        return function

    return register


def find_lowering(op_type: str, *, opset: int, domain: str = "", place: str = "") -> Lowering:
    """Returns the newest lowering of `op_type` that is not newer than `opset`.

    Raises:
        UnsupportedOperatorError: There is none; `place` (how errors name the node) is in the message.
    """
    versions = _lowerings.get((domain, op_type), {})
    fitting = [since for since in versions if since <= opset]
    if fitting:
        return versions[max(fitting)]
    known = f"; it is known from opset {min(versions)} on" if versions else ""
    name = f'"{op_type}", since={opset}' + (f', domain="{domain}"' if domain else "")
    raise UnsupportedOperatorError(
        f"{place or op_type}: operator {domain or 'ai.onnx'}.{op_type} of opset {opset} has no lowering{known}; "
        f"register one: @ptqjax.lowers({name}) on a function of its inputs (positional) and attributes (keyword)"
    )


def registered() -> dict[tuple[str, str], tuple[int, ...]]:
    """Returns the versions registered of each (domain, op_type)."""
    return {operator: tuple(sorted(versions)) for operator, versions in sorted(_lowerings.items())}


def is_static(*values: Any) -> bool:
    """Tells whether all values are known while tracing (absent ones count as known)."""
    return all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(values))


def revision() -> int:
    """Returns a number that grows with each registration: a program compiled before one may have another meaning."""
    return len(_history)


def is_concrete(*values: Any) -> bool:
    """Tells whether no array in the values (pytrees) is being traced."""
    tracer = jax.core.Tracer  # pyright: ignore[reportAttributeAccessIssue]
    return not any(isinstance(leaf, tracer) for leaf in jax.tree.leaves(values))


def known(value: Any, what: str) -> np.ndarray:
    """Returns a value that decides a shape: static, or concrete outside of all transformations.

    Raises:
        DataDependentError: `value` is computed from data under a transformation; `what` names it in the message.
    """
    if is_concrete(value):
        return np.asarray(value)
    raise DataDependentError(
        f"{what} depends on data, but must be known while tracing; make it a constant of the graph, or call "
        "ptqjax.apply on concrete arrays, outside jit, vmap and grad"
    )


def static_integers(value: Any, what: str) -> tuple[int, ...]:
    """Returns the elements of a static tensor as Python integers, so that none is truncated.

    Raises:
        DataDependentError: See `known`.
    """
    return tuple(int(element) for element in np.atleast_1d(known(value, what)).ravel())


def _keywords(function: Function) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
