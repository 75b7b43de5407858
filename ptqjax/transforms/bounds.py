"""Provable bounds of activations, channel by channel: what no input of the network can exceed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from ptqjax.ir import Model, Node
from ptqjax.kernels.intervals import UNBOUNDED, linear_interval
from ptqjax.kernels.namespace import array_namespace
from ptqjax.transforms.activations import activated_interval, is_activation, is_known_clip
from ptqjax.transforms.linear import Linear, bias_of, weight_view
from ptqjax.transforms.routes import ROUTED, Facts, Lying, routes
from ptqjax.transforms.sizes import ONE

Bounds: TypeAlias = "tuple[Any, Any]"
"""Least and largest value per channel, `UNBOUNDED` where nothing is known."""

LARGEST_INPUT = 65504.0
"""No input of the graph is assumed to be larger in magnitude: float16's largest number, far above any real input."""

_SAME_RANGE = frozenset({"MaxPool", "GlobalMaxPool", "GlobalAveragePool"})


def channel_bounds(model: Model, layers: Mapping[str, Linear]) -> dict[str, Bounds]:
    """Returns bounds per channel (axis 1) of every tensor for which the operators imply them.

    Interval arithmetic, forward through the graph: correct for every input of the network, up to rounding, and wide,
    since channels are taken to vary on their own. A graph input is taken to lie within +-`LARGEST_INPUT`.
    """
    by_node = {id(layer.bias_node or layer.node): layer for layer in layers.values()}
    facts = Facts(model)
    bounds: dict[str, Bounds] = {}
    for node in model.graph.nodes:
        if node.op_type in ROUTED and not node.domain:
            bounds |= _moved_bounds(facts, node, bounds)
            continue
        layer = by_node.get(id(node))
        found = _linear_bounds(model, layer, bounds) if layer else _other_bounds(model, node, facts.ranks, bounds)
        if found is not None:
            bounds[node.output] = found
    return bounds


def _linear_bounds(model: Model, layer: Linear, bounds: Mapping[str, Bounds]) -> Bounds | None:
    if not layer.channels_at_1:
        return None
    view = weight_view(model, layer)
    xp = array_namespace(view)
    is_input = any(spec.name == layer.input for spec in model.graph.inputs)
    unknown = xp.full(layer.num_inputs, LARGEST_INPUT if is_input else UNBOUNDED, dtype=view.dtype)
    low, high = bounds.get(layer.input, (-unknown, unknown))
    if low.shape != unknown.shape:
        low, high = -unknown, unknown
    if layer.pads:
        low, high = xp.minimum(low, 0), xp.maximum(high, 0)
    return linear_interval(view, bias_of(model, layer), low, high)


def _other_bounds(model: Model, node: Node, ranks: Mapping[str, int], bounds: Mapping[str, Bounds]) -> Bounds | None:
    known = [bounds[name] for name in node.inputs if name in bounds]
    if node.domain or not known:
        return None
    low, high = known[0]
    if node.op_type in _SAME_RANGE:
        return low, high
    if node.op_type == "AveragePool":
        xp = array_namespace(low)
        return xp.minimum(low, 0), xp.maximum(high, 0)
    if node.op_type == "Add" and len(known) == len(node.inputs) and known[1][0].shape == low.shape:
        return low + known[1][0], high + known[1][1]
    tensor = next(name for name in node.inputs if name in bounds)
    is_known = tensor in ranks and is_activation(model, node, tensor, low.size, ranks[tensor] - 2)
    if is_known or is_known_clip(model, node):
        return activated_interval(model, node, low, high)
    return None


def _moved_bounds(facts: Facts, node: Node, bounds: Mapping[str, Bounds]) -> dict[str, Bounds]:
    """Returns the bounds of what only moves values, where its channels are still along axis 1."""
    known = [bounds.get(name) for name in node.inputs]
    found = routes(facts, node, [None if each is None else Lying(1, each[0].size) for each in known])
    moved: dict[str, Bounds] = {}
    for name, route in zip(node.outputs, found if isinstance(found, list) else [], strict=False):
        if not name or route is None or not route.stays_within or (route.axis, route.repeats) != (1, ONE):
            continue
        xp = array_namespace(*(each[0] for each in known if each is not None))
        low, high = (route.gather([each and each[end] for each in known], xp) for end in (0, 1))
        moved[name] = (xp.minimum(low, 0), xp.maximum(high, 0)) if route.fills else (low, high)
    return moved
