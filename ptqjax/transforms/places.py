"""How many places a tensor has behind its channels, and which of them windows, pads and slices reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptqjax.ir import Model, Node
from ptqjax.kernels.windows import explicit_padding, output_sizes
from ptqjax.transforms.routes import Facts, kept_by_slice, pads_of, slices_of

_INPUT_SIDE = 224  # places along an axis of an input that declares none: the pictures of ImageNet, 49 places at the end
_SIDE = 7  # the same for tensors whose size cannot be followed
_IMAGE = 3  # axes from which there are places behind the channels


def places_of(model: Model) -> dict[str, tuple[int, ...]]:
    """Returns the size of each tensor behind its channels, from the declared shapes of the inputs; () for matrices."""
    facts, found = Facts(model), {}
    for spec in model.graph.inputs:
        sizes = spec.shape[2:] if spec.shape is not None else ()
        found[spec.name] = tuple(size if isinstance(size, int) and size > 0 else _INPUT_SIDE for size in sizes)
    for node in model.graph.nodes:
        before = next((found[name] for name in node.inputs if name in found), ())
        if (kernel := _kernel(model, node)) and len(kernel) != len(before):  # behind a Reshape, say
            before = found[node.inputs[0]] = (_SIDE,) * len(kernel)
        rank = facts.ranks.get(node.output, 2)
        after = _places_behind(facts, node, before) if rank >= _IMAGE else ()
        after = after if len(after) == max(rank - 2, 0) else (_SIDE,) * max(rank - 2, 0)
        found |= dict.fromkeys((name for name in node.outputs if name), after)
    return found


def _places_behind(facts: Facts, node: Node, sizes: tuple[int, ...]) -> tuple[int, ...]:
    model = facts.model
    if node.op_type.startswith("Global") or node.op_type == "ReduceMean":
        return (1,) * len(sizes)
    if _kernel(model, node):
        kernel, strides, dilations, padding = window(model, node, sizes)
        ceil = bool(node.attribute("ceil_mode", 0))
        behind = output_sizes(
            sizes, kernel=kernel, strides=strides, dilations=dilations, padding=padding, ceil_mode=ceil
        )
        return tuple(max(size, 1) for size in behind)
    if node.op_type == "ConvTranspose":
        return tuple(size * stride for size, stride in zip(sizes, _setting(node, "strides", len(sizes)), strict=True))
    if node.op_type in {"Pad", "Slice"}:
        return tuple(len(kept_places(facts, node, axis + 2, size)) for axis, size in enumerate(sizes))
    return sizes


def _kernel(model: Model, node: Node) -> tuple[int, ...]:
    """Returns the sizes of a window that moves over the input; () for other nodes, and where they are not known."""
    if node.domain or node.op_type not in {"Conv", "AveragePool", "MaxPool"}:
        return ()
    weight = model.params.get(node.inputs[1]) if node.op_type == "Conv" else None
    return tuple(node.attribute("kernel_shape") or (() if weight is None else weight.shape[2:]))


def _setting(node: Node, name: str, rank: int) -> tuple[int, ...]:
    return tuple(node.attribute(name) or (1,) * rank)


def window(model: Model, node: Node, sizes: Sequence[int]) -> tuple[Any, Any, Any, Any]:
    """Returns kernel, strides, dilations and padding of a convolution or pool."""
    rank = len(sizes)
    kernel = _kernel(model, node)
    strides, dilations = (_setting(node, name, rank) for name in ("strides", "dilations"))
    padding = explicit_padding(
        sizes, kernel=kernel, strides=strides, dilations=dilations, pads=node.attribute("pads") or (0,) * 2 * rank,
        auto_pad=node.attribute("auto_pad", "NOTSET"),
    )  # fmt: skip
    return tuple(kernel), strides, dilations, padding


def kept_places(facts: Facts, node: Node, axis: int, size: int) -> np.ndarray:
    """Returns for each place of the output of a Pad or Slice along an axis its place in the input, -1 for none.

    Where the operator's settings are not known, every place.
    """
    places = np.arange(size)
    if node.op_type == "Pad":
        pads = pads_of(facts, node)
        before, after = (0, 0) if pads is None else pads[:, axis].tolist()
        places = np.pad(places, (max(before, 0), max(after, 0)), constant_values=-1)
        return places[max(-before, 0) : len(places) - max(-after, 0)]
    cuts, rank = slices_of(facts, node), facts.ranks.get(node.inputs[0])
    return places if cuts is None or rank is None else np.array(kept_by_slice(cuts, axis, rank=rank, size=size), int)
