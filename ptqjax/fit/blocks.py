"""A network in blocks of a few layers: what is learned together, cut where little crosses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ptqjax.ir import Graph, captured
from ptqjax.lowering import Stretch, stretches
from ptqjax.transforms.linear import Linear

FEW = 2
"""Layers from which a block ends at the next place where one tensor crosses."""
MANY = 8
"""Layers beyond which a block is cut where most is read behind it, at the place that least crosses."""


def blocks(graph: Graph, layers: Mapping[str, Linear], crossing: Collection[str]) -> tuple[Stretch, ...]:
    """Returns the graph in blocks, see `block_starts`; the first may be empty."""
    return stretches(graph, block_starts(graph, layers, crossing), crossing)


def layers_of_blocks(graph: Graph, layers: Mapping[str, Linear], crossing: Collection[str]) -> tuple[Stretch, ...]:
    """Returns the graph in stretches that begin with a block or with a layer; the first may be empty."""
    return stretches(graph, {*block_starts(graph, layers, crossing), *layers}, crossing)


def block_starts(graph: Graph, layers: Mapping[str, Linear], crossing: Collection[str]) -> list[str]:
    """Returns the tensors whose nodes begin a block: a residual block, half of a transformer block, else two layers.

    A block ends where one tensor crosses, once it has `FEW` layers and the last of them mixes all channels (a depthwise
    layer stays with what follows). What has more than `MANY` layers and no such place is cut where fewest tensors
    cross.

    Args:
        graph: The whole graph.
        layers: Its layers to learn, by the tensor that their node writes.
        crossing: Tensors that may cross, as `stretches` takes them.
    """
    counts = _crossings(graph, crossing)
    at = [layers.get(next((name for name in node.outputs if name in layers), "")) for node in graph.nodes]
    starts, begin = [], 0
    for end in _ends(counts, at):
        inside = [layer for layer in at[begin:end] if layer is not None]
        if len(inside) >= FEW and inside[-1].groups == 1:
            starts += [*_cuts(counts, at, begin, end), end]
            begin = end
    starts += _cuts(counts, at, begin, len(at))
    return [graph.nodes[start].output for start in starts]


def _crossings(graph: Graph, crossing: Collection[str]) -> list[int]:
    """Returns for each node how many tensors are read there or behind it that are made before."""
    last: dict[str, int] = {}
    made = {spec.name: -1 for spec in graph.inputs}
    for index, node in enumerate(graph.nodes):
        last |= {name: index for name in (*node.inputs, *captured(node)) if name in crossing}
        made |= {name: index for name in node.outputs if name}
    counts = [0] * len(graph.nodes)
    for name, until in last.items():
        for index in range(made.get(name, until) + 1, until + 1):
            counts[index] += 1
    return counts


def _ends(counts: Sequence[int], at: Sequence[Linear | None]) -> list[int]:
    """Returns the places between layers where one tensor crosses: of those between two layers the last."""
    found: dict[int, int] = {}
    number = 0
    for index, layer in enumerate(at):
        if counts[index] == 1 and number:
            found[number] = index
        number += layer is not None
    return [index for count, index in found.items() if count < number]


def _cuts(counts: Sequence[int], at: Sequence[Linear | None], begin: int, end: int) -> list[int]:
    """Returns where a run of too many layers is cut again."""
    places = [index for index in range(begin, end) if at[index] is not None]
    if len(places) <= MANY:
        return []
    middle = places[len(places) // 2]
    inner = places[FEW : 1 - FEW]
    best = min(inner, key=lambda index: (counts[index], abs(index - middle)))
    return [*_cuts(counts, at, begin, best), best, *_cuts(counts, at, best, end)]
