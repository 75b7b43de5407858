"""One pass over data: what each observer keeps of the tensors of the float model that it is told to look at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ptqjax.data.batches import checked_part, checked_parts, num_samples
from ptqjax.data.parts import Parts, merged, together
from ptqjax.errors import ConfigError, DataError, ModelError
from ptqjax.ir import Graph, Model
from ptqjax.lowering import axis_in_layout, compiled, interpret
from ptqjax.placement.counting import Counting
from ptqjax.ranges.ids import check_ids
from ptqjax.ranges.observers import Extremes, Observer

Watched: TypeAlias = tuple[str, Counting | None]
"""A tensor, and which of its values count; None: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """What an observer kept of several tensors."""

    observer: Observer
    """The way to observe."""
    rows: Mapping[Watched, int]
    """Where each tensor is along the first axis of the state's arrays."""
    state: Any
    """The observer's state, its leaves NumPy arrays."""

    def of(self, tensors: Sequence[Watched]) -> Any:
        """Returns the state of these tensors alone, in this order, on NumPy."""
        rows = np.asarray([self.rows[name] for name in tensors])
        return jax.tree.map(lambda leaf: leaf[rows], self.state)

    def extremes(self, tensors: Sequence[Watched]) -> Extremes:
        """Returns the extremes of these tensors, as NumPy arrays."""
        return jax.tree.map(np.asarray, self.observer.extremes(self.of(tensors)))


Axes: TypeAlias = tuple[tuple[str, int], ...]
"""Tensors, each with the axis (as ONNX has it) along which its channels lie."""

Means: TypeAlias = Mapping[tuple[int, int], Mapping[str, np.ndarray]]
"""By batch and first sample of a part of it: the mean of each channel, by tensor, shape [c]."""

MANY = 4096
"""Values of a tensor beyond which their number is not counted: then its extremes tell what is to come."""

_POSITIONS = 2048  # of a map that channel means are taken over, at most
_MOST_BYTES_OF_MEANS = 2**28  # beyond, they are measured again by those who need them: memory stays bounded


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a pass over the data saw."""

    observed: Mapping[Observer, Observed]
    """What each observer kept over all batches."""
    means: Means | None
    """The channel means of each batch, where they were asked for; None where there are too many to be kept."""
    num_values: Mapping[str, int]
    """How many values each tensor has had over all batches, counted up to `MANY`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is static in a step."""

    graph: Graph
    """The model's graph."""
    parts: tuple[tuple[Observer, tuple[Watched, ...]], ...]
    """The ways to observe, and the tensors that each is for."""
    measured: Axes
    """The tensors whose channel means are kept."""

    @property
    def observers(self) -> tuple[Observer, ...]:
        """The ways to observe."""
        return tuple(observer for observer, _ in self.parts)

    @property
    def tensors(self) -> tuple[str, ...]:
        """All tensors that are observed, once for each way."""
        return tuple(name for _, watched in self.parts for name, _ in watched)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is to be kept of some tensors."""

    observer: Observer
    """The way to observe."""
    tensors: tuple[Watched, ...]
    """The tensors."""
    scheme: str
    """The scheme that asks for it, for messages."""


def observe(model: Model, batches: Iterable[Any], wanted: Iterable[Wanted], *, measured: Axes = ()) -> Seen:
    """Returns what each observer keeps over all batches; the compiled step depends on the sets of tensors alone.

    Args:
        model: The float model.
        batches: Inputs by name.
        wanted: What is to be kept, and of which tensors.
        measured: The tensors whose channel means are kept batch by batch, for who goes through the same batches again.

    Raises:
        DataError: The batches do not fit the model, a tensor takes a value that is not finite, or an observer has no
            room for more samples; the message names the tensor or input and the batch.
        ModelError: A tensor depends on constants alone.
    """
    data = checked_parts(model.graph, batches)
    wanted = tuple(wanted)
    plan = _Plan(graph=model.graph, parts=_in_order(model.graph, wanted), measured=measured)
    if not plan.parts:
        for parts in data:  # bad ones are an error even where none are needed
            together(partial(_check, model, parts), is_shared=parts.is_shared)
        return Seen(observed={}, means=None, num_values={})
    states, is_shared, kept = _states(model, plan, wanted, data)
    observed = {
        observer: Observed(
            observer=observer,
            rows={each: row for row, each in enumerate(watched)},
            state=jax.tree.map(np.asarray, merged(observer.merge, [each[i] for each in states], is_shared=is_shared)),
        )
        for i, (observer, watched) in enumerate(plan.parts)
    }
    return Seen(observed=observed, means=kept.means if plan.measured else None, num_values=kept.num_values)


def _states(
    model: Model, plan: _Plan, wanted: Sequence[Wanted], data: Iterable[Parts]
) -> tuple[list[Any], bool, _Kept]:
    """Returns the states of this process's devices, whether other processes have some too, and what else is kept."""
    states: dict[Any, Any] = {}
    params: dict[Any, Any] = {}
    kept = _Kept()
    num_seen, is_shared = 0, False
    for index, parts in enumerate(data):
        num_seen += parts.num_samples
        _check_room(wanted, num_seen, index)
        _check_order(wanted, parts, index)
        is_shared |= parts.is_shared
        for part in parts.here:
            if part.device not in states:
                params[part.device] = jax.device_put(dict(model.params), part.device)
                states[part.device] = jax.device_put(_initial(plan), part.device)
        found = together(partial(_advance, plan, params, states, parts), is_shared=parts.is_shared)
        parts_seen = [part for some in found for part in some]
        kept.keep({(index, start): means for start, means, _ in parts_seen})
        kept.count(sizes for _, _, sizes in parts_seen)
    return list(states.values()) or [_initial(plan)], is_shared, kept


class _Kept:
    """Channel means of batches, until they are too many, and how many values each tensor has had."""

    def __init__(self) -> None:
        self.means: dict[tuple[int, int], Mapping[str, np.ndarray]] | None = {}
        self.num_values: dict[str, int] = {}
        self._num_bytes = 0

    def count(self, each: Iterable[Mapping[str, Any]]) -> None:
        """Adds the sizes of tensors, each up to `MANY` in all."""
        for name, size in (pair for sizes in each for pair in sizes.items()):
            self.num_values[name] = min(self.num_values.get(name, 0) + int(size), MANY)

    def keep(self, found: Mapping[tuple[int, int], Mapping[str, np.ndarray]]) -> None:
        """Adds those of a batch, or forgets all."""
        self._num_bytes += sum(mean.nbytes for means in found.values() for mean in means.values())
        if self.means is not None:
            self.means = None if self._num_bytes > _MOST_BYTES_OF_MEANS else {**self.means, **found}


def _advance(
    plan: _Plan, params: Mapping[Any, Any], states: dict[Any, Any], parts: Parts
) -> list[tuple[int, Mapping[str, np.ndarray], Mapping[str, Any]]]:
    """Replaces the states of the devices by those after one batch; returns start, means and sizes of each part."""
    running = []
    for part in parts.here:  # all devices work before the first is waited for
        inputs = checked_part(plan.graph, part)
        check_ids(plan.graph, params[part.device], inputs, part.place)
        looked, means, sizes = _look(plan, params[part.device], inputs)
        states[part.device], is_finite = _absorb(plan.observers, states[part.device], looked)
        running.append((part, is_finite, (means, sizes)))
    # Waits for the step: JAX would otherwise run ahead and hold many batches at once.
    for part, is_finite, _ in running:
        _check_finite(plan, params, np.asarray(is_finite), part.place)
    return [(part.start, *jax.device_get(kept)) for part, _, kept in running]


def _initial(plan: _Plan) -> Any:
    return tuple(observer.init(len(watched)) for observer, watched in plan.parts)


def _in_order(graph: Graph, wanted: Sequence[Wanted]) -> tuple[tuple[Observer, tuple[Watched, ...]], ...]:
    """Returns observers by name and their tensors in the graph's order, so that equal sets are one program."""
    place = _places(graph)
    tensors: dict[Observer, set[Watched]] = {}
    for each in wanted:
        tensors.setdefault(each.observer, set()).update(each.tensors)
    observers = sorted((observer for observer, watched in tensors.items() if watched), key=lambda each: each.name)
    return tuple(
        (observer, tuple(sorted(tensors[observer], key=lambda each: (place[each[0]], repr(each[1])))))
        for observer in observers
    )


def _places(graph: Graph) -> dict[str, int]:
    names = [spec.name for spec in graph.inputs] + [name for node in graph.nodes for name in node.outputs]
    return {name: place for place, name in enumerate(names)}


@partial(compiled, is_brief=True)
def _look(
    plan: _Plan, params: dict[str, Any], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, jax.Array], dict[str, Any]]:
    """Returns what each observer is to keep of one batch, channel means and sizes; the forward pass, little more."""
    axes = dict(plan.measured)
    ways: dict[str, list[Counting | None]] = {}
    for name, counted in dict.fromkeys(each for _, watched in plan.parts for each in watched):
        ways.setdefault(name, []).append(counted)

    def seen(name: str, value: jax.Array, channel_axis: int | None) -> tuple[jax.Array, Any]:
        if name not in ways and name not in axes:
            return value, None
        mean = channel_means(value, axes[name], channel_axis) if name in axes else None
        return value, ([_counted(value, way, channel_axis) for way in ways.get(name, ())], mean, value.size)

    _, found = interpret(plan.graph, params, inputs, intercept=seen)
    absent = [name for name in ways if name not in found]
    if absent:
        raise ModelError(f"tensor '{absent[0]}' depends on constants alone; fold it into a parameter, or exclude it")
    looked = tuple(
        observer.look([found[name][0][ways[name].index(way)] for name, way in watched], num_samples(inputs))
        for observer, watched in plan.parts
    )
    sizes = {name: np.int32(min(found[name][2], MANY)) for name in ways}
    return looked, {name: found[name][1] for name in axes if name in found}, sizes


def _counted(value: jax.Array, way: Counting | None, channel_axis: int | None) -> jax.Array:
    return value if way is None or not value.size else way.of(value, channel_axis)


def channel_means(value: jax.Array, axis: int, channel_axis: int | None) -> Float[Array, " c"]:
    """Returns the mean of each channel of a value that the interpreter holds; of maps, over positions of a lattice.

    Args:
        value: The value, in whatever layout.
        axis: Where the channels lie in ONNX's layout.
        channel_axis: Where ONNX's axis 1 lies in the value, as `interpret` tells it.
    """
    kept = axis_in_layout(axis % value.ndim, channel_axis)
    return jnp.mean(_on_lattice(value, kept), axis=tuple(i for i in range(value.ndim) if i != kept))


def _on_lattice(value: jax.Array, channels: int) -> jax.Array:
    """Returns every third position along the axes of large maps, of very large ones every ninth, and so on.

    An odd step meets both halves of what alternates, as the results of transposed convolutions do. The lattice begins
    at position 1, so that borders do not count for more than they are. Over all positions, means would cost a third of
    a forward pass (MobileNetV2, 2 cores, measured once: 12 ms a sample beside 33).
    """
    axes = [i for i in range(1, value.ndim) if i != channels]
    step = 1
    while math.prod(-(-value.shape[i] // step) for i in axes) > _POSITIONS:
        step *= 3
    spread = tuple(
        slice(1, None, step) if i in axes and value.shape[i] > step > 1 else slice(None) for i in range(value.ndim)
    )
    return value[spread] if step > 1 else value


@partial(compiled, donated=1, is_brief=True)
def _absorb(observers: tuple[Observer, ...], states: Any, looked: Any) -> tuple[Any, jax.Array]:
    """Returns the states after one batch, and which tensors were finite so far."""
    updated = tuple(each.absorb(*pair) for each, *pair in zip(observers, states, looked, strict=True))
    extremes = [each.extremes(state) for each, state in zip(observers, updated, strict=True)]
    return updated, jnp.concatenate([jnp.isfinite(each.lowest) & jnp.isfinite(each.highest) for each in extremes])


def _check_room(wanted: Sequence[Wanted], seen: int, index: int) -> None:
    for each in wanted:
        most = each.observer.most_samples
        if most is not None and seen > most:
            raise DataError(
                f"batch {index}: {seen} samples so far, and the scheme '{each.scheme}' has room for {most}; give fewer"
            )


def _check(model: Model, parts: Parts) -> None:
    for part in parts.here:
        check_ids(model.graph, model.params, checked_part(model.graph, part), part.place)


def _check_order(wanted: Sequence[Wanted], parts: Parts, index: int) -> None:
    ordered = next((each for each in wanted if each.observer.is_ordered), None)
    if ordered is not None and parts.num_parts > 1:
        raise ConfigError(
            f"batch {index} lies on {parts.num_parts} devices; what '{ordered.scheme}' with compatibility='aimet' "
            "makes of batches depends on their order: give them on one device"
        )


def _check_finite(plan: _Plan, params: Mapping[Any, Any], is_finite: np.ndarray, where: str) -> None:
    if not is_finite.all():
        place = _places(plan.graph)
        healthy = {name for name, fine in zip(plan.tensors, is_finite, strict=True) if fine}
        bad = min((name for name in plan.tensors if name not in healthy), key=place.__getitem__)
        cause = _cause(plan.graph, next(iter(params.values())), bad, healthy)
        raise DataError(
            f"tensor '{bad}' is NaN or infinite in {where}{cause}; check the model in float on that batch, or exclude "
            "the tensor"
        )


def _cause(graph: Graph, params: Mapping[str, Any], tensor: str, healthy: set[str]) -> str:
    """Returns which parameter makes a tensor NaN or infinite, to be said; "" where none does behind healthy tensors."""
    waiting, seen = [tensor], set[str]()
    while waiting:
        name = waiting.pop()
        if name in params and not np.isfinite(np.asarray(params[name])).all():
            return f", as is the parameter '{name}' that it is made of"
        node = graph.producers.get(name)
        if node is not None and name not in healthy | seen:
            waiting += reversed(node.inputs)
        seen.add(name)
    return ""
