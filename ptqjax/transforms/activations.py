"""Activation functions that act on each channel alone and are straight away from a kink: what may lie between layers.

Relu, LeakyRelu and PRelu commute with a positive factor per channel; bounds (Clip, and Min or Max with a parameter per
channel) commute when they are divided along.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ptqjax.ir import Model, Node, fresh_name, is_private, scalar_of
from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.precision import is_traced, widened
from ptqjax.transforms.linear import Edit

_BROADCASTING = 8  # the operator set since which Min and Max broadcast


def is_activation(model: Model, node: Node, tensor: str, num_channels: int, kernel_rank: int) -> bool:
    """Tells whether `node` is an activation of `tensor` (channels, then `kernel_rank` axes) that can be rewritten."""
    if node.domain:
        return False
    if node.op_type in {"Min", "Max"}:
        others = [name for name in node.inputs if name != tensor]
        is_alone = len(node.inputs) == 2 and len(others) == 1 and is_private(model.graph, others[0])  # noqa: PLR2004
        return is_alone and _is_per_channel(model, others[0], num_channels, kernel_rank)
    if node.op_type == "PRelu":
        slope = node.inputs[1]
        is_scalar = slope in model.params and model.params[slope].size == 1
        return node.inputs[0] == tensor and (is_scalar or _is_per_channel(model, slope, num_channels, kernel_rank))
    if node.op_type == "Clip":
        is_old = model.graph.opset() < _BROADCASTING
        return is_known_clip(model, node) and not (is_old and not commutes_with_scaling(model, node))
    return node.op_type in {"Relu", "LeakyRelu"}


def is_known_clip(model: Model, node: Node) -> bool:
    """Tells whether `node` is a Clip between numbers that are known, in whatever operator set."""
    known = all(name in model.params for name in node.inputs[1:] if name)
    return node.op_type == "Clip" and not node.domain and known


def limits_of(model: Model, node: Node) -> tuple[Any, Any]:
    """Returns (low, high) of an activation that bounds its input, infinite where it does not: scalars or [channels]."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type in {"Min", "Max"}:
        bound = widened(model.params[next(name for name in node.inputs if name in model.params)]).reshape(-1)
        return (-np.inf, bound) if node.op_type == "Min" else (bound, np.inf)
    if node.op_type == "Clip":
        return _clip_limit(model, node, 1, "min", -np.inf), _clip_limit(model, node, 2, "max", np.inf)
    return -np.inf, np.inf


def activate(model: Model, node: Node, values: Any) -> Any:
    """Returns the activation of one value per channel."""
    xp = array_namespace(values)
    if node.op_type == "LeakyRelu":
        return xp.where(values < 0, values * node.attribute("alpha", 0.01), values)
    if node.op_type == "PRelu":
        slope = widened(model.params[node.inputs[1]]).reshape(-1)
        return xp.where(values < 0, values * slope, values)
    low, high = limits_of(model, node)
    return array_namespace(values, low, high).clip(values, low, high)


def activated_interval(model: Model, node: Node, low: Any, high: Any) -> tuple[Any, Any]:
    """Returns the least and largest value per channel of the activation of what lies within low and high."""
    xp = array_namespace(low, high)
    kink = xp.clip(0.0, low, high)  # a slope may be negative: then the extreme is at zero
    corners = xp.stack([activate(model, node, corner) for corner in (low, kink, high)])
    return corners.min(axis=0), corners.max(axis=0)


def commutes_with_scaling(model: Model, node: Node) -> bool:
    """Tells whether f(s x) = s f(x) for every s > 0, so that the node can stay as it is."""
    limits = limits_of(model, node)
    return not any(is_traced(limit) for limit in limits) and all(_is_zero_or_infinite(limit) for limit in limits)


def with_limits(model: Model, node: Node, low: Any, high: Any, *, kernel_rank: int, dtype: Any) -> Edit:
    """Returns the edit that gives a Clip, Min or Max other limits, one per channel.

    A Min or Max gets another parameter. A Clip takes scalars alone, so it becomes Relu (Max, where low is not zero) and
    Min; a limit that is infinite everywhere needs no node.

    Args:
        model: Where the node is.
        node: The Clip, Min or Max.
        low: The new lower limits, [channels].
        high: The new upper limits, [channels].
        kernel_rank: Number of axes behind the channels'.
        dtype: The element type of what is limited.
    """
    shape = (-1,) + (1,) * kernel_rank
    if node.op_type in {"Min", "Max"}:
        name = next(name for name in node.inputs if name in model.params)
        old = model.params[name]
        return Edit(params={name: (high if node.op_type == "Min" else low).reshape(old.shape).astype(old.dtype)})
    above = fresh_name(model.graph, f"{node.output}_above")
    lower, lower_params = _lower(model, node, low, shape, dtype)
    upper, upper_params = _upper(model, node, high, shape, dtype)
    if lower and upper:
        lower, upper = replace(lower, outputs=(above,)), replace(upper, inputs=(above, upper.inputs[1]))
    nodes = tuple(found for found in (lower, upper) if found)
    return Edit(params=lower_params | upper_params, nodes={node.output: nodes})


def _lower(
    model: Model, clip: Node, low: Any, shape: tuple[int, ...], dtype: Any
) -> tuple[Node | None, dict[str, Any]]:
    """Returns the node that holds the lower limits, and its parameter; a Relu where they are zero."""
    if not is_traced(low) and not np.any(np.isfinite(low)):
        return None, {}
    if not is_traced(low) and not np.any(low):
        return Node(op_type="Relu", inputs=clip.inputs[:1], outputs=clip.outputs, name=clip.name), {}
    name = fresh_name(model.graph, f"{clip.output}_low")
    node = Node(op_type="Max", inputs=(clip.inputs[0], name), outputs=clip.outputs, name=clip.name)
    return node, {name: low.reshape(shape).astype(dtype)}


def _upper(
    model: Model, clip: Node, high: Any, shape: tuple[int, ...], dtype: Any
) -> tuple[Node | None, dict[str, Any]]:
    """Returns the node that holds the upper limits, and its parameter."""
    if not is_traced(high) and not np.any(np.isfinite(high)):
        return None, {}
    name = fresh_name(model.graph, f"{clip.output}_high")
    return Node(op_type="Min", inputs=(clip.inputs[0], name), outputs=clip.outputs), {
        name: high.reshape(shape).astype(dtype)
    }


def _clip_limit(model: Model, node: Node, index: int, attribute: str, default: float) -> Any:
    """Returns a limit of a Clip, an input since opset 11, an attribute before; what no number reaches is infinite."""
    name = dict(enumerate(node.inputs)).get(index, "")
    if name and is_traced(model.params[name]):
        return widened(model.params[name]).reshape(())
    limit = scalar_of(model, name) if name else node.attribute(attribute)
    return default if limit is None or abs(limit) >= np.finfo(np.float32).max else limit


def _is_zero_or_infinite(limit: Any) -> bool:
    return bool(np.all((np.asarray(limit) == 0) | np.isinf(limit)))


def _is_per_channel(model: Model, name: str, num_channels: int, kernel_rank: int) -> bool:
    """Tells whether a parameter holds one number per channel, along axis 1 of what it meets."""
    if name not in model.params:
        return False
    shape = tuple(model.params[name].shape)
    return shape[-1 - kernel_rank :] == (num_channels,) + (1,) * kernel_rank and set(shape[: -1 - kernel_rank]) <= {1}
