"""Recurrent networks: what one step computes, and running it along a sequence.

What a step needs of its input alone is one matrix product for the whole sequence, made before; here it is called the
gates, [t, b, g]. Only the product with the state is left inside the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Activation: TypeAlias = Callable[[Any], Any]
"""Applied element by element."""
State: TypeAlias = tuple[Float[Array, "b h"], ...]
"""What a step hands on; the first is its output."""
Step: TypeAlias = Callable[[State, Float[Array, "b g"]], State]
"""From a state and the gates of one moment to the next state."""

_EXACT = lax.Precision.HIGHEST  # float32 products, never TF32 or bfloat16


def run(
    step: Step,
    gates: Float[Array, "t b g"],
    initial: State,
    *,
    lengths: Int[Array, " b"] | None,
    reverse: bool,
) -> tuple[Float[Array, "t b h"], State]:
    """Returns the outputs of all moments, and the state after the last step of each sequence.

    Args:
        step: What happens in one moment.
        gates: The part of the gates that comes from the input.
        initial: The state before the first step.
        lengths: How many moments each sequence of the batch has; the rest has outputs of 0 and leaves the state alone.
            Where there are none, the last state is 0 as well (ONNX Runtime's choice). None: all of them.
        reverse: Whether to begin with the last moment.
    """

    def advance(state: State, moment: tuple[Any, Any]) -> tuple[State, Any]:
        time, gates_now = moment
        after = step(state, gates_now)
        if lengths is None:
            return after, after[0]
        lasts = (time < lengths)[:, None]
        return _where(lasts, after, state), _or_zero(lasts, after[0])

    final, outputs = lax.scan(advance, initial, (jnp.arange(gates.shape[0]), gates), reverse=reverse)
    if lengths is None:
        return outputs, final
    return outputs, tuple(_or_zero((lengths > 0)[:, None], state) for state in final)


def simple_step(*, recurrence: Float[Array, "h h"], activation: Activation) -> Step:
    """Returns the step h' = f(gates + h R)."""

    def step(state: State, gates: Any) -> State:
        (h,) = state
        return (activation(gates + _product(h, recurrence)),)

    return step


def gru_step(
    *,
    recurrence: Float[Array, "h 3*h"],
    bias: Float[Array, " h"] | None,
    gate: Activation,
    candidate: Activation,
) -> Step:
    """Returns the step of a gated recurrent unit; the gates are update z, reset r and candidate n.

    z = f(gates_z + h R_z), r = f(gates_r + h R_r), h' = (1 - z) n + z h with n = g(gates_n + (r h) R_n), or, where
    `bias` is given, n = g(gates_n + r (h R_n + bias)).
    """
    size = recurrence.shape[0]

    def step(state: State, gates: Any) -> State:
        (h,) = state
        z, r = jnp.split(gate(gates[:, : 2 * size] + _product(h, recurrence[:, : 2 * size])), 2, axis=1)
        if bias is None:
            mixed = _product(r * h, recurrence[:, 2 * size :])
        else:
            mixed = r * (_product(h, recurrence[:, 2 * size :]) + bias[None])
        return ((1 - z) * candidate(gates[:, 2 * size :] + mixed) + z * h,)

    return step


def lstm_step(
    *,
    recurrence: Float[Array, "h 4*h"],
    peepholes: Float[Array, "3 h"] | None,
    gate: Activation,
    candidate: Activation,
    output: Activation,
    is_coupled: bool,
) -> Step:
    """Returns the step of a long short-term memory; the gates are input i, output o, forget f and candidate n.

    i = f(gates_i + h R_i + p_i c), f likewise (1 - i where coupled), c' = f c + i g(gates_n + h R_n),
    o = f(gates_o + h R_o + p_o c'), h' = o h(c').
    """
    p_i, p_o, p_f = (0, 0, 0) if peepholes is None else peepholes[:, None]

    def step(state: State, gates: Any) -> State:
        h, c = state
        i, o, f, n = jnp.split(gates + _product(h, recurrence), 4, axis=1)
        i = gate(i + p_i * c)
        f = 1 - i if is_coupled else gate(f + p_f * c)
        c = f * c + i * candidate(n)
        return gate(o + p_o * c) * output(c), c

    return step


def _where(condition: Any, new: State, old: State) -> State:
    return tuple(jnp.where(condition, after, before) for after, before in zip(new, old, strict=True))


def _or_zero(condition: Any, value: Any) -> Any:
    return jnp.where(condition, value, jnp.zeros((), value.dtype))


def _product(h: Any, recurrence: Any) -> Any:
    return jnp.dot(h, recurrence, precision=_EXACT)
