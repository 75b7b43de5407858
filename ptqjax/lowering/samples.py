"""The part of a graph that treats each sample by itself, run on a few samples at a time.

On a CPU a layer whose activations leave the caches waits for memory, and a program's temporary memory is mapped anew,
page by page, in every run. So the first layers of a network for images run chunk by chunk of the batch, up to where
the activations of the whole batch are small; what depends on parameters alone is computed once, before the loop.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.extend.backend import backends

from ptqjax.errors import PtqjaxError
from ptqjax.ir import Graph, Node, captured, place_of
from ptqjax.kernels.chunks import map_chunks
from ptqjax.kernels.platforms import current
from ptqjax.lowering.interpreter import Intercept, interpret
from ptqjax.lowering.partition import unspecified
from ptqjax.ops import find_lowering

_BYTES_PER_CORE = 5 * 2**20  # one layer's largest activation: measured best at 2 cores with 2 MiB of L2 each
_WORTH_A_LOOP = 1.5  # with less above the bound, chunks would be small for little

_FIRST_IMAGE_RANK = 4  # of the tensors that a Transpose only relabels

_ON_EACH_SAMPLE = frozenset(
    {
        ("", "AveragePool"),
        ("", "BatchNormalization"),
        ("", "Conv"),
        ("", "ConvTranspose"),
        ("", "DepthToSpace"),
        ("", "GlobalAveragePool"),
        ("", "GlobalMaxPool"),
        ("", "InstanceNormalization"),
        ("", "LRN"),
        ("", "MaxPool"),
        ("", "QLinearConv"),
        ("", "SpaceToDepth"),
        ("com.microsoft", "QLinearAveragePool"),
        ("com.microsoft", "QLinearGlobalAveragePool"),
    }
)
"""Operators [n, ...] -> [n, ...] that compute each sample of their first input alone; the others are parameters."""

_ALONG_AN_AXIS = frozenset({"Concat", "DequantizeLinear", "QuantizeLinear"})
"""Operators that do so unless their axis is the first."""


def interpret_by_samples(
    graph: Graph, params: Mapping[str, Any], inputs: Mapping[str, Any], *, intercept: Intercept | None = None
) -> dict[str, Any]:
    """Returns the graph's outputs as `interpret` does; on a CPU the large first layers run on a few samples at a time.

    The sums of a convolution may be taken in another order than over the whole batch: equal up to rounding.

    Args:
        graph: What to compute.
        params: The arrays that `graph.parameters` names.
        inputs: The graph's inputs by name, in ONNX's layout.
        intercept: See `interpret`; it must treat each sample by itself and observe nothing. It meets what both the
            chunks and the rest read from the caller twice.
    """
    is_for_cpu = set(backends()) == {"cpu"} and current().platform == "cpu"
    plan = _plan(graph, params, inputs) if is_for_cpu else None
    if plan is None:
        return interpret(graph, params, inputs, intercept=intercept)[0]

    handed = frozenset(spec.name for spec in plan.first.outputs)
    hook, later = _except_for(intercept, handed - plan.crossing), _except_for(intercept, handed | plan.crossing)

    def first(fixed: Any, chunk: Any) -> dict[str, Any]:
        return interpret(plan.first, fixed, chunk, intercept=hook, platform="cpu")[0]

    chunked = {spec.name: inputs[spec.name] for spec in plan.first.inputs}
    reached = map_chunks(first, dict(params), chunked, num_chunks=plan.num_chunks)
    return interpret(plan.second, params, {**inputs, **reached}, intercept=later, platform="cpu")[0]


def _except_for(intercept: Intercept | None, names: frozenset[str]) -> Intercept | None:
    if intercept is None:
        return None

    def hook(name: str, value: jax.Array, channel_axis: int | None) -> tuple[jax.Array, Any]:
        return (value, None) if name in names else intercept(name, value, channel_axis)

    return hook


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """How a graph is run."""

    first: Graph
    """What runs chunk by chunk; its outputs are what the second reads."""
    second: Graph
    """What then runs on the whole batch."""
    crossing: frozenset[str]
    """The names of the tensors that the first computes of each sample: what the second reads of them is done."""
    num_chunks: int
    """How often the first runs."""


def _plan(graph: Graph, params: Mapping[str, Any], inputs: Mapping[str, Any]) -> _Plan | None:
    """Returns how to run the graph in chunks; None where that would not pay."""
    batch = _batch(graph, inputs)
    if not batch:
        return None
    (size,) = {inputs[name].shape[0] for name in batch}
    nodes = _on_each_sample(graph, batch, _shapes_of_parameters(graph, params), None)
    if not nodes:
        return None
    try:
        shapes = _shapes(graph, nodes, params, inputs)
    except PtqjaxError:
        return None  # running it says what is wrong
    nodes = _on_each_sample(graph, batch, shapes, size)
    bound = _BYTES_PER_CORE * len(_cores())
    large = [position for position, node in enumerate(nodes) if _num_bytes(node, shapes) > bound]
    if not large or max(_num_bytes(node, shapes) for node in nodes) < _WORTH_A_LOOP * bound:
        return None
    nodes = nodes[: large[-1] + 1]
    first, second = _divided(graph, batch, nodes, shapes)
    most = max(_num_bytes(node, shapes) for node in nodes)
    crossing = frozenset(name for node in nodes for name in node.outputs)
    return _Plan(first=first, second=second, crossing=crossing, num_chunks=min(size, -(-most // bound)))


def _batch(graph: Graph, inputs: Mapping[str, Any]) -> frozenset[str]:
    """Returns the names of the inputs along whose first axis several samples lie: those of images."""
    images = [spec.name for spec in graph.inputs if getattr(inputs[spec.name], "ndim", 0) > 2]  # noqa: PLR2004
    sizes = {inputs[name].shape[0] for name in images}
    return frozenset(images) if len(sizes) == 1 and min(sizes) > 1 else frozenset()


def _on_each_sample(
    graph: Graph, batch: frozenset[str], shapes: Mapping[str, tuple[int, ...]], size: int | None
) -> list[Node]:
    """Returns the nodes that compute each sample alone, up to where others come between; `size`: how many samples."""
    fixed = {name for name, _ in graph.constants} | set(graph.parameters)
    samples, nodes = set(batch), []
    for node in graph.nodes:
        read = {name for name in (*node.inputs, *captured(node)) if name}
        if read <= fixed:
            fixed.update(node.outputs)
        elif read <= fixed | samples and _is_on_each_sample(node, graph, samples, shapes, size):
            samples.update(node.outputs)
            nodes.append(node)
    return nodes


def _is_on_each_sample(
    node: Node, graph: Graph, samples: set[str], shapes: Mapping[str, tuple[int, ...]], size: int | None
) -> bool:
    if len([name for name in node.outputs if name]) != 1 or node.attribute("training_mode", 0):
        return False
    read = [name for name in node.inputs if name]
    if size is not None and shapes.get(node.output, ())[:1] != (size,):
        return False
    if (node.domain, node.op_type) in _ON_EACH_SAMPLE:
        return read[0] in samples and samples.isdisjoint(read[1:])
    rank = len(shapes.get(node.output, ()))
    if node.op_type in _ALONG_AN_AXIS:
        together = set(read) <= samples if node.op_type == "Concat" else samples.isdisjoint(read[1:])
        return together and (size is None or node.attribute("axis", 1) % rank != 0)
    lowering = find_lowering(node.op_type, opset=graph.opset(node.domain), domain=node.domain, place=place_of(node))
    variant = lowering.channels_last
    if variant is None or variant.function is not lowering.function:
        return False
    # element by element: an unbatched operand must broadcast over the batch axis
    return size is None or all(
        len(shapes[name]) == rank if name in samples else len(shapes[name]) < rank or shapes[name][:1] == (1,)
        for name in read
    )


def _shapes_of_parameters(graph: Graph, params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(params[name]) for name in graph.parameters} | {
        name: value.shape for name, value in graph.constant_values.items()
    }


def _shapes(
    graph: Graph, nodes: Iterable[Node], params: Mapping[str, Any], inputs: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of parameters, constants, inputs, and of what the nodes (and what is fixed) write."""
    needed = _with_fixed(graph, nodes)
    written = [name for node in needed for name in node.outputs if name]
    part = replace(graph, nodes=needed, outputs=tuple(unspecified(name) for name in written))
    values = jax.eval_shape(lambda p, x: interpret(part, p, x, platform="cpu")[0], dict(params), dict(inputs))
    shapes = _shapes_of_parameters(graph, params) | {name: np.shape(value) for name, value in inputs.items()}
    return shapes | {name: value.shape for name, value in values.items() if hasattr(value, "shape")}


def _with_fixed(graph: Graph, nodes: Iterable[Node]) -> tuple[Node, ...]:
    """Returns the nodes, and those that compute what they read from parameters, in the graph's order."""
    wanted, kept = {id(node) for node in nodes}, []
    read: set[str] = set()
    for node in reversed(graph.nodes):
        if id(node) in wanted or read.intersection(node.outputs):
            kept.append(node)
            read.update((*node.inputs, *captured(node)))
    return tuple(reversed(kept))


def _num_bytes(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Returns the size of what the node writes, as float32."""
    return 4 * int(np.prod(shapes[node.output]))


def _divided(
    graph: Graph, batch: frozenset[str], nodes: list[Node], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Graph, Graph]:
    """Returns the graph of `nodes`, and the rest, which reads its outputs."""
    needed = _with_fixed(graph, nodes)
    inside = {id(node) for node in nodes}
    rest = tuple(node for node in graph.nodes if id(node) not in inside)
    written = {name for node in nodes for name in node.outputs if name}
    read = [name for node in rest for name in (*node.inputs, *captured(node))] + [spec.name for spec in graph.outputs]
    crossing = [name for name in dict.fromkeys(read) if name in written]
    given, taken = zip(*(_handed_over(name, len(shapes[name])) for name in crossing), strict=True)
    first_reads = {name for node in needed for name in (*node.inputs, *captured(node))}
    first = replace(
        graph,
        nodes=(*needed, *itertools.chain(*given)),
        inputs=tuple(spec for spec in graph.inputs if spec.name in batch),
        outputs=tuple(
            unspecified(nodes[-1].output if nodes else name) for name, nodes in zip(crossing, given, strict=True)
        ),
        parameters=tuple(name for name in graph.parameters if name in first_reads),
    )
    left = tuple(spec for spec in graph.inputs if spec.name not in batch or spec.name in read)
    return first, replace(graph, nodes=(*itertools.chain(*taken), *rest), inputs=(*left, *first.outputs))


def _handed_over(name: str, rank: int) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Returns the nodes that end the first part and begin the second for a tensor that crosses.

    Images go with their channels last: so both parts hold them, and nothing is moved.
    """
    if rank < _FIRST_IMAGE_RANK:
        return (), ()
    axes = tuple(range(rank))
    last = f"{name} with its channels last"
    there = Node(op_type="Transpose", inputs=(name,), outputs=(last,), attributes=(("perm", (0, *axes[2:], 1)),))
    back = Node(
        op_type="Transpose", inputs=(last,), outputs=(name,), attributes=(("perm", (0, rank - 1, *axes[1:-1])),)
    )
    return (there,), (back,)


def _cores() -> set[int]:
    """Returns the processor's cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
