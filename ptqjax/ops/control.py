"""If, Loop and Scan: subgraphs, which arrive as functions of arrays, on `lax.cond`, `lax.while_loop` and `lax.scan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ptqjax.errors import DataDependentError, UnsupportedOperatorError
from ptqjax.ops.registry import is_concrete, lowers

Body: TypeAlias = Callable[..., tuple[Any, ...]]


@lowers("If", since=1)
def if_(condition: Any, /, *, then_branch: Body, else_branch: Body) -> tuple[Any, ...]:
    """Returns what one branch gives: the other is not computed where the condition is known, nor at run time."""
    if is_concrete(condition):
        return then_branch() if bool(np.asarray(condition).item()) else else_branch()
    try:
        return lax.cond(jnp.reshape(condition, ()), _as_arrays(then_branch), _as_arrays(else_branch))
    except TypeError as error:
        raise DataDependentError(
            "its branches give different types or shapes, so that its condition must be known while tracing; call "
            f"ptqjax.apply on concrete arrays, outside jit, vmap and grad ({error})"
        ) from error


@lowers("Loop", since=1)
def loop(max_trips: Any = None, condition: Any = None, /, *initial: Any, body: Body) -> tuple[Any, ...]:
    """Returns the carried values after the last trip, and what each trip gives, stacked.

    `body(trip, condition, *carried)` gives the next condition and carried values, then what is stacked. A loop of
    known length that no condition ends is a `lax.scan` (which has a gradient); one that a condition ends is a
    `lax.while_loop` and stacks nothing; where neither fits (carried values that change their shapes, sequences that
    grow, a stack of unknown height), the trips are computed one by one, which needs conditions that are known.
    """
    if max_trips is None and condition is None:
        raise ValueError("it has neither a number of trips nor a condition, so it never ends")
    condition = np.asarray(True) if condition is None else condition
    trip_limit = np.asarray(np.iinfo(np.int64).max) if max_trips is None else max_trips
    try:
        endless, stacked = _probe(body, initial, condition)
        if endless and max_trips is not None and is_concrete(max_trips):
            return _counted_loop(int(np.asarray(max_trips).item()), initial, body)
        if not stacked:
            return _conditional_loop(trip_limit, condition, initial, body)
    except (TypeError, DataDependentError) as error:
        if not is_concrete(trip_limit, condition):
            raise DataDependentError(f"the number of its trips depends on data ({error})") from error
    return _trip_by_trip(trip_limit, condition, initial, body)


def _probe(body: Body, initial: tuple[Any, ...], condition: Any) -> tuple[bool, int]:
    """Returns whether the condition is true for ever, and how many values a trip gives to be stacked."""
    found = []

    def trip(index: Any, carried: Any) -> Any:
        next_condition, *results = body(index, np.asarray(True), *carried)
        found.append((next_condition, len(results) - len(carried)))
        return results

    jax.eval_shape(trip, jax.ShapeDtypeStruct((), _index_type()), jax.tree.map(jnp.asarray, initial))
    ((next_condition, num_stacked),) = found
    known = [value for value in (condition, next_condition) if is_concrete(value)]
    return len(known) == 2 and all(bool(np.asarray(value).item()) for value in known), num_stacked  # noqa: PLR2004


def _counted_loop(num_trips: int, initial: tuple[Any, ...], body: Body) -> tuple[Any, ...]:
    def trip(carried: Any, index: Any) -> tuple[Any, Any]:
        _, *results = _arrays(body(index, np.asarray(True), *carried))
        return tuple(results[: len(carried)]), tuple(results[len(carried) :])

    carried, stacked = lax.scan(trip, _arrays(initial), jnp.arange(num_trips, dtype=_index_type()))
    return (*carried, *stacked)


def _conditional_loop(trip_limit: Any, condition: Any, initial: tuple[Any, ...], body: Body) -> tuple[Any, ...]:
    limit = _as_index(trip_limit)

    def is_going_on(state: tuple[Any, ...]) -> Any:
        index, going, _ = state
        return going & (index < limit)

    def trip(state: tuple[Any, ...]) -> tuple[Any, ...]:
        index, going, carried = state
        next_condition, *results = _arrays(body(index, going, *carried))
        return index + 1, jnp.reshape(next_condition, ()), tuple(results)

    start = (jnp.zeros((), _index_type()), jnp.reshape(jnp.asarray(condition), ()), _arrays(initial))
    return lax.while_loop(is_going_on, trip, start)[2]


def _trip_by_trip(trip_limit: Any, condition: Any, carried: tuple[Any, ...], body: Body) -> tuple[Any, ...]:
    index, limit, going, num_carried = 0, int(np.asarray(trip_limit).item()), condition, len(carried)
    stacks: list[tuple[Any, ...]] = []
    while index < limit and _is_true(going):
        going, *results = body(np.asarray(index, np.int64), np.asarray(True), *carried)
        carried = tuple(results[:num_carried])
        stacks.append(tuple(results[num_carried:]))
        index += 1
    if not stacks:
        _, *results = jax.eval_shape(lambda *values: _arrays(body(np.asarray(0), np.asarray(True), *values)), *carried)
        return (*carried, *(jnp.zeros((0, *one.shape), one.dtype) for one in results[num_carried:]))
    return (*carried, *(jnp.stack([jnp.asarray(one) for one in column]) for column in zip(*stacks, strict=True)))


def _is_true(condition: Any) -> bool:
    if not is_concrete(condition):
        raise DataDependentError(
            "the number of its trips depends on data, and what it gives does not have one shape for all numbers of "
            "trips; call ptqjax.apply on concrete arrays, outside jit, vmap and grad"
        )
    return bool(np.asarray(condition).item())


@lowers("Scan", since=9)
def scan(
    *inputs: Any,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] = (),
    scan_input_directions: Sequence[int] = (),
    scan_output_axes: Sequence[int] = (),
    scan_output_directions: Sequence[int] = (),
) -> tuple[Any, ...]:
    """Returns the last state and what each step gives, stacked along `scan_output_axes`.

    `body(*state, *elements)` gives the next state, then what is stacked. The scan goes along `scan_input_axes`, and
    where a direction is 1 from the end (what it gives: put in front).
    """
    num_states = len(inputs) - num_scan_inputs
    state, sequences = _arrays(inputs[:num_states]), _arrays(inputs[num_states:])
    axes = scan_input_axes or (0,) * num_scan_inputs
    directions = scan_input_directions or (0,) * num_scan_inputs
    elements = tuple(
        jnp.flip(jnp.moveaxis(sequence, axis, 0), 0) if backward else jnp.moveaxis(sequence, axis, 0)
        for sequence, axis, backward in zip(sequences, axes, directions, strict=True)
    )

    def step(state: Any, element: Any) -> tuple[Any, Any]:
        results = _arrays(body(*state, *element))
        return tuple(results[:num_states]), tuple(results[num_states:])

    state, stacked = lax.scan(step, state, elements)
    output_axes = scan_output_axes or (0,) * len(stacked)
    output_directions = scan_output_directions or (0,) * len(stacked)
    return *state, *(
        jnp.moveaxis(jnp.flip(stack, 0) if backward else stack, 0, axis)
        for stack, axis, backward in zip(stacked, output_axes, output_directions, strict=True)
    )


@lowers("Scan", since=8)
def scan_8(
    lengths: Any = None, /, *inputs: Any, body: Body, num_scan_inputs: int, directions: Sequence[int] = ()
) -> tuple[Any, ...]:
    """Returns `scan` along axis 1 for each element of the batch (axis 0)."""
    if lengths is not None:
        raise UnsupportedOperatorError("sequence_lens of Scan before opset 9 has no lowering; convert it to opset 9")
    one = jax.vmap(
        lambda *values: scan(
            *values, body=body, num_scan_inputs=num_scan_inputs, scan_input_directions=tuple(directions)
        )
    )
    return one(*_arrays(inputs))


def _arrays(values: Any) -> Any:
    return jax.tree.map(jnp.asarray, tuple(values))


def _as_arrays(branch: Body) -> Body:
    return lambda: _arrays(branch())


def _as_index(trip_limit: Any) -> Any:
    """Returns the limit in the type of the index; exporters write the largest of int64 for "without end"."""
    if is_concrete(trip_limit):
        trip_limit = min(int(np.asarray(trip_limit).item()), int(np.iinfo(_index_type()).max))
    return jnp.reshape(jnp.asarray(trip_limit, _index_type()), ())


def _index_type() -> np.dtype:
    return jax.dtypes.canonicalize_dtype(np.int64)
