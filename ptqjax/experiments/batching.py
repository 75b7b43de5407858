"""Ways to run many variants of one program on the same inputs: one by one, side by side, a device each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ptqjax.encodings.encoding import Encodings
from ptqjax.ir import Graph, Model
from ptqjax.lowering import compiled
from ptqjax.simulation import simulate

Inputs: TypeAlias = Mapping[str, Any]
"""A batch."""

_ABREAST = 8  # variants side by side: the digits network gains nothing beyond, and activations take memory for each


class Arguments(NamedTuple):
    """What differs between variants of one program."""

    params: Mapping[str, Any]
    """The parameters."""
    encodings: Encodings
    """The encodings, in the program's structure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One call of a compiled program."""

    positions: tuple[int, ...]
    """Which variants it runs."""
    run: Callable[[Inputs], dict[str, Any]]
    """Returns their outputs, along a first axis where it is of several; what is there beyond `positions` is padding."""
    is_stacked: bool
    """Whether there is that axis."""

    def outputs(self, found: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
        """Returns what `run` gave as an array for each output and variant; waits for it."""
        host = {name: np.asarray(value) for name, value in found.items()}
        if not self.is_stacked:
            return [host]
        return [{name: value[i] for name, value in host.items()} for i in range(len(self.positions))]


def loop(graph: Graph, variants: Mapping[int, Arguments]) -> list[Step]:
    """Returns a step for each variant, by its position; all of them call the program that `simulate` compiles."""
    placed: dict[int, Any] = {}  # what variants share is on the device once

    def on_device(leaf: Any) -> Any:
        return placed.setdefault(id(leaf), leaf) if id(leaf) in placed else placed.setdefault(id(leaf), put(leaf))

    return [
        Step(positions=(position,), run=partial(_simulated, graph, jax.tree.map(on_device, each)), is_stacked=False)
        for position, each in variants.items()
    ]


def side_by_side(graph: Graph, variants: Mapping[int, Arguments]) -> list[Step]:
    """Returns steps of several variants each by `vmap`; what is the same in all variants has no axis of variants.

    So where weights agree, theirs is one rounding for all, and convolutions stay what they are; else they become
    grouped ones.
    """
    static = _static(graph, variants)
    if not any(static.varying):
        return loop(graph, variants)

    def step(positions: tuple[int, ...], leaves: list[Any]) -> Step:
        return Step(positions=positions, run=partial(_vmapped, static, leaves), is_stacked=True)

    return [step(*chunk) for chunk in _chunks(static, variants, min(_ABREAST, len(variants)), put, put)]


def over_devices(graph: Graph, variants: Mapping[int, Arguments]) -> list[Step]:
    """Returns steps of as many variants as there are devices; each device runs the program of one variant."""
    mesh = Mesh(np.asarray(jax.local_devices()), ("variants",))
    static = _static(graph, variants)
    apart, alike = NamedSharding(mesh, PartitionSpec("variants")), NamedSharding(mesh, PartitionSpec())

    def step(positions: tuple[int, ...], leaves: list[Any]) -> Step:
        def run(inputs: Inputs) -> dict[str, Any]:
            return _sharded(static, mesh, leaves, {name: put(value, alike) for name, value in inputs.items()})

        return Step(positions=positions, run=run, is_stacked=True)

    chunks = _chunks(static, variants, mesh.size, partial(put, where=apart), partial(put, where=alike))
    return [step(*chunk) for chunk in chunks]


def put(value: Any, where: NamedSharding | None = None) -> Any:
    """Returns an array on the device, or on those of a sharding; 64-bit types stay on the host, which keeps them."""
    is_array = isinstance(value, np.ndarray | np.generic | jax.Array)
    if not is_array or value.dtype.kind not in "fiub" or value.dtype.itemsize > 4:  # noqa: PLR2004 - bytes
        return value
    return jax.device_put(value, where)


WAYS: Mapping[str, Callable[[Graph, Mapping[int, Arguments]], list[Step]]] = {
    "loop": loop,
    "vmap": side_by_side,
    "shard": over_devices,
}
"""The ways by name."""


def _simulated(graph: Graph, arguments: Arguments, inputs: Inputs) -> dict[str, Any]:
    params, encodings = arguments
    return simulate(Model(graph=graph, params=dict(params)), encodings)(params, encodings, inputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Static:
    """What is static in a program of several variants."""

    graph: Graph
    structure: Any
    """The structure of `Arguments`."""
    varying: tuple[bool, ...]
    """Which leaves have an axis of variants."""

    def one(self, leaves: Sequence[Any], inputs: Inputs) -> dict[str, Any]:
        """Returns the outputs of one variant."""
        return _simulated(self.graph, jax.tree.unflatten(self.structure, leaves), inputs)


@compiled
def _vmapped(static: _Static, leaves: list[Any], inputs: Inputs) -> dict[str, Any]:
    axes = [0 if varies else None for varies in static.varying]
    return jax.vmap(static.one, in_axes=(axes, None))(leaves, inputs)


@partial(compiled, num_static=2)
def _sharded(static: _Static, mesh: Mesh, leaves: list[Any], inputs: Inputs) -> dict[str, Any]:
    def block(leaves: list[Any], inputs: Inputs) -> dict[str, Any]:
        own = [leaf[0] if varies else leaf for leaf, varies in zip(leaves, static.varying, strict=True)]
        return jax.tree.map(lambda value: value[None], static.one(own, inputs))

    apart, alike = PartitionSpec("variants"), PartitionSpec()
    specs = ([apart if varies else alike for varies in static.varying], alike)
    return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=apart, check_vma=False)(leaves, inputs)


def _static(graph: Graph, variants: Mapping[int, Arguments]) -> _Static:
    leaves = [jax.tree.leaves(each) for each in variants.values()]
    varying = tuple(any(not _is_same(first, other) for other in rest) for first, *rest in zip(*leaves, strict=True))
    return _Static(graph=graph, structure=jax.tree.structure(next(iter(variants.values()))), varying=varying)


def _is_same(one: Any, other: Any) -> bool:
    return one is other or np.array_equal(np.asarray(one), np.asarray(other))


def _chunks(
    static: _Static,
    variants: Mapping[int, Arguments],
    size: int,
    place: Callable[[Any], Any],
    place_shared: Callable[[Any], Any],
) -> list[tuple[tuple[int, ...], list[Any]]]:
    """Returns for `size` variants at a time their positions and leaves, stacked where they vary.

    The last variant is repeated where the number does not divide them, so that one program serves all chunks.
    """
    positions, leaves = list(variants), [jax.tree.leaves(each) for each in variants.values()]
    shared = [None if varies else place_shared(leaf) for leaf, varies in zip(leaves[0], static.varying, strict=True)]
    chunks = []
    for start in range(0, len(positions), size):
        some = leaves[start : start + size]
        some += [some[-1]] * (size - len(some))
        columns = zip(zip(*some, strict=True), static.varying, shared, strict=True)
        stacked = [
            place(np.stack([np.asarray(x) for x in column])) if varies else one for column, varies, one in columns
        ]
        chunks.append((tuple(positions[start : start + size]), stacked))
    return chunks
