"""A program for a batch, run on a few samples at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from ptqjax.kernels.fixed_part import evaluate

_SMALL_CONSTANT = 1024  # elements of a constant (an iota) that may be computed outside of the loop as well


def map_chunks(program: Callable[[Any, Any], Any], fixed: Any, batch: Any, *, num_chunks: int) -> Any:
    """Returns program(fixed, batch) for a program that treats each sample (first axis) of the arrays in `batch` alone.

    It runs in a loop over chunks of equal size (where they do not come out even, the last samples are computed
    twice). What the program computes from `fixed` and constants alone is computed once, before the loop.
    """
    fixed, batch = jax.tree.map(jnp.asarray, (fixed, batch))
    total = jax.tree.leaves(batch)[0].shape[0]
    size = -(-total // num_chunks)
    rest = num_chunks * size - total

    def in_chunks(x: jax.Array) -> jax.Array:
        whole = jnp.concatenate([x, x[total - rest :]]) if rest else x
        return whole.reshape(num_chunks, size, *x.shape[1:])

    chunks = jax.tree.map(in_chunks, batch)
    mapped = lax.map(_with_fixed_part_done(program, fixed, jax.tree.map(lambda x: x[0], chunks)), chunks)
    return jax.tree.map(lambda y: y.reshape(num_chunks * size, *y.shape[2:])[:total], mapped)


def _with_fixed_part_done(program: Callable[[Any, Any], Any], fixed: Any, example: Any) -> Callable[[Any], Any]:
    """Returns chunk -> program(fixed, chunk), with the operations that need no chunk done already.

    Those that make their operands larger (broadcasts) stay where they are: there they are fused.
    """
    closed, shape = jax.make_jaxpr(program, return_shape=True)(fixed, example)
    jaxpr, leaves = closed.jaxpr, jax.tree.leaves(fixed)
    done: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    done |= dict(zip(jaxpr.invars[: len(leaves)], leaves, strict=True))
    left = []
    for equation in jaxpr.eqns:
        if _is_fixed(equation, done):
            evaluate(equation, done)
        if not _is_fixed(equation, done) or not equation.invars:
            left.append(equation)  # a constant stays one, there as well

    def rest(chunk: Any) -> Any:
        values = dict(done) | dict(zip(jaxpr.invars[len(leaves) :], jax.tree.leaves(chunk), strict=True))
        for equation in left:
            evaluate(equation, values)
        return jax.tree.unflatten(jax.tree.structure(shape), [_read(atom, values) for atom in jaxpr.outvars])

    return rest


def _is_fixed(equation: Any, done: Mapping[Any, Any]) -> bool:
    operands = [atom for atom in equation.invars if not isinstance(atom, core.Literal)]
    if equation.effects or any(atom not in done for atom in operands):
        return False
    largest = sum(atom.aval.size for atom in operands) if operands else _SMALL_CONSTANT
    return sum(out.aval.size for out in equation.outvars) <= largest


def _read(atom: Any, values: Mapping[Any, Any]) -> Any:
    return atom.val if isinstance(atom, core.Literal) else values[atom]
