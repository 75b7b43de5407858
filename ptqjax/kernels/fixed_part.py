"""What a program computes of some of its arguments alone, apart from the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

_FEW = 2**14
"""Elements of a result that may be larger than what it is made of: a number repeated for each channel."""
_RESHAPES = frozenset({"broadcast_in_dim", "expand_dims", "reshape", "slice", "squeeze"})
"""Operations that compilers take into what reads them: handing their results over would cost memory."""


def in_two_parts(program: Callable[[Any, Any], Any], fixed: Any, example: Any) -> tuple[Any, Any]:
    """Returns (prepare, finish) with finish(prepare(fixed), x) = program(fixed, x), for `x` of the shapes of `example`.

    `prepare` computes what depends on `fixed` alone, where that is not larger than what it is made of, and returns the
    values that `finish` reads: a list of arrays. Both are pure, and not compiled.
    """
    closed, shape = jax.make_jaxpr(program, return_shape=True)(fixed, example)
    jaxpr, num_fixed = closed.jaxpr, len(jax.tree.leaves(fixed))
    given, fed = jaxpr.invars[:num_fixed], jaxpr.invars[num_fixed:]
    constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    first, second = _divided(jaxpr.eqns, {*given, *constants})
    handed = _read_later(second, jaxpr.outvars, {*given, *(out for each in first for out in each.outvars)})

    def prepare(fixed: Any) -> list[Any]:
        values = constants | dict(zip(given, jax.tree.leaves(fixed), strict=True))
        _all(first, values)
        return [values[each] for each in handed]

    def finish(prepared: Sequence[Any], x: Any) -> Any:
        values = constants | dict(zip(handed, prepared, strict=True)) | dict(zip(fed, jax.tree.leaves(x), strict=True))
        _all(second, values)
        return jax.tree.unflatten(jax.tree.structure(shape), [_read(atom, values) for atom in jaxpr.outvars])

    return prepare, finish


def _divided(equations: Sequence[Any], fixed: set[Any]) -> tuple[list[Any], list[Any]]:
    """Returns the equations that only need `fixed`, and the others with what they need of the cheap ones."""
    known, first, second = set(fixed), [], []
    for equation in equations:
        if _is_fixed(equation, known):
            known.update(equation.outvars)
            first.append(equation)
        else:
            second.append(equation)
    needed = {atom for equation in second for atom in _variables(equation)}
    again = []
    for equation in reversed(first):
        if equation.primitive.name in _RESHAPES and needed.intersection(equation.outvars):
            needed.update(_variables(equation))
            again.append(equation)
    repeated = {id(equation) for equation in again}
    return first, [each for each in equations if id(each) in repeated or not set(each.outvars) <= known]


def _is_fixed(equation: Any, known: set[Any]) -> bool:
    operands = _variables(equation)
    if equation.effects or any(atom not in known for atom in operands):
        return False
    size = sum(out.aval.size for out in equation.outvars)
    return size <= max([_FEW, *(atom.aval.size for atom in operands)])


def _read_later(equations: Sequence[Any], results: Sequence[Any], known: set[Any]) -> list[Any]:
    """Returns which of the known values the equations read, or the results are."""
    own = {out for equation in equations for out in equation.outvars}
    read = [atom for equation in equations for atom in _variables(equation)]
    read += [atom for atom in results if not isinstance(atom, core.Literal)]
    return [atom for atom in dict.fromkeys(read) if atom in known and atom not in own]


def _variables(equation: Any) -> list[Any]:
    return [atom for atom in equation.invars if not isinstance(atom, core.Literal)]


def _all(equations: Sequence[Any], values: dict[Any, Any]) -> None:
    for equation in equations:
        evaluate(equation, values)


def evaluate(equation: Any, values: dict[Any, Any]) -> None:
    """Adds the results of an equation of a jaxpr to the values, by variable, that it reads."""
    settings = equation.primitive.get_bind_params(equation.params)
    functions, settings = settings if isinstance(settings, tuple) else ((), settings)  # a pair before JAX 0.10
    with equation.ctx.manager:
        results = equation.primitive.bind(*functions, *(_read(atom, values) for atom in equation.invars), **settings)
    outputs = results if equation.primitive.multiple_results else [results]
    values.update(zip(equation.outvars, outputs, strict=True))


def _read(atom: Any, values: Mapping[Any, Any]) -> Any:
    return atom.val if isinstance(atom, core.Literal) else values[atom]
