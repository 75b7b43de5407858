"""Upsample, and Resize of opset 10, as the Resize of later opsets that samples at the same places.

onnx.version_converter makes a Resize of Upsample whose coordinates are those of half pixels: in mode "linear" that is
another function. Here coordinates stay asymmetric, x_original = x / scale, and the nearest place is the one below.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ptqjax.ir import Constant, Model, Node, fresh_name

_SINCE = 11  # the opset of Resize with coordinates to choose from
_MODES = ("nearest", "linear")


def is_old_resize(node: Node, old: int, new: int) -> bool:
    """Tells whether the node is one that `with_new_resize` is for, on the way from one opset to another."""
    return not node.domain and node.op_type in ("Upsample", "Resize") and old < _SINCE <= new


def keeps_places(model: Model, node: Node) -> bool:
    """Tells whether a later Resize samples at the same places: "nearest" is the place below where no axis shrinks."""
    mode = node.attribute("mode", "nearest")
    if mode != "nearest":
        return mode in _MODES
    scales = _scales(model, node)
    return scales is not None and bool((np.asarray(scales) >= 1).all())


def with_new_resize(model: Model, index: int) -> Model:
    """Returns the model with its node of that index as a Resize of opset 11 or later; `keeps_places` holds of it."""
    graph = model.graph
    node, constants = graph.nodes[index], dict(graph.constants)
    roi = fresh_name(graph, f"{node.output}_roi")
    constants[roi] = Constant(np.zeros(0, np.float32))
    scales = next(iter(node.inputs[1:]), "") or fresh_name(graph, f"{node.output}_scales")
    if scales not in graph.producers and scales not in graph.parameters:
        constants.setdefault(scales, Constant(np.asarray(_scales(model, node), np.float32)))
    attributes = {
        "coordinate_transformation_mode": "asymmetric",
        "mode": node.attribute("mode", "nearest"),
        "nearest_mode": "floor",
    }
    nodes = list(graph.nodes)
    inputs = (node.inputs[0], roi, scales)
    nodes[index] = replace(node, op_type="Resize", inputs=inputs, attributes=tuple(sorted(attributes.items())))
    return model.replace(graph=replace(graph, nodes=tuple(nodes), constants=tuple(sorted(constants.items()))))


def _scales(model: Model, node: Node) -> np.ndarray | None:
    """Returns the scale of each axis; None where it is computed."""
    if len(node.inputs) == 1:
        return np.asarray(node.attribute("scales"), np.float32)
    return model.graph.constant_values.get(node.inputs[1], model.params.get(node.inputs[1]))
