"""Where the channels of a tensor are, on either side of an operator that moves values or averages over positions.

A map per channel, y = k x + t, may move across such an operator: that is how a batch norm reaches a layer that is not
right beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptqjax.ir import Model, Node
from ptqjax.transforms.sizes import ONE, Shape, Size, product

_SAME_ORDER = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
_SAME = frozenset({"Identity", "Dropout"})
_FIRST_WITH_MODE = 12  # the operator set in which Dropout got its input `training_mode`
_FIRST_INFERENCE = 7  # before, Dropout trains unless told otherwise


@dataclass(frozen=True, slots=True)
class Channels:
    """How the channels lie along one axis: index i of it belongs to channel (i // repeats) % count."""

    count: int
    """Number of channels."""
    axis: int = 1
    """The axis, counted from the front."""
    repeats: Size = ONE
    """How many neighbours along the axis belong to one channel."""

    def of_each(self, shape: Shape, size: int) -> np.ndarray | None:
        """Returns the channel of each index along the axis, which has `size` of them; None where it is not known."""
        repeats = self.repeats.number
        if self.repeats.unknown:  # known all the same where the axis holds each channel once
            if shape[self.axis].divided_by(Size(self.count)) != self.repeats:
                return None
            repeats = size // self.count
        return None if size % (self.count * repeats) else np.arange(size) // repeats % self.count


def is_passage(model: Model, node: Node) -> bool:
    """Tells whether a map per channel may move across the node, if only the channels stay apart."""
    if node.domain or not node.inputs:
        return False
    if node.op_type == "Dropout":
        return _keeps_all(model, node)
    if node.op_type == "AveragePool":
        is_padded = any(node.attribute("pads") or ()) or node.attribute("auto_pad", "NOTSET") not in {"NOTSET", "VALID"}
        return not is_padded and not node.attribute("ceil_mode", 0)
    return node.op_type in _SAME_ORDER | _SAME | {"Transpose", "GlobalAveragePool"}


def _keeps_all(model: Model, node: Node) -> bool:
    opset, has_mode = model.graph.opset(), len(node.inputs) > 2 and node.inputs[2] != ""  # noqa: PLR2004  its third
    if sum(map(bool, node.outputs)) > 1 or has_mode:
        return False
    return opset >= _FIRST_WITH_MODE or opset >= _FIRST_INFERENCE


def across(node: Node, channels: Channels, here: Shape, there: Shape, *, forward: bool) -> Channels | None:
    """Returns where the channels are on the other side of a passage; None where they do not stay apart.

    Args:
        node: The passage.
        channels: Where they are on this side.
        here: The shape on this side.
        there: The shape on the other side.
        forward: Whether this side is the node's input.
    """
    if node.op_type == "Transpose":
        order = node.attribute("perm") or tuple(range(len(here)))[::-1]
        axis = order.index(channels.axis) if forward else order[channels.axis]
        return Channels(channels.count, axis, channels.repeats)
    if node.op_type in {"AveragePool", "GlobalAveragePool"}:
        return channels if channels.axis == 1 else None
    return _in_the_same_order(channels, here, there) if node.op_type in _SAME_ORDER else channels


def _in_the_same_order(channels: Channels, here: Shape, there: Shape) -> Channels | None:
    """Returns the channels after a change of axes alone: element f in memory belongs to (f // inner) % count still."""
    inner = product(here[channels.axis + 1 :]) * channels.repeats
    period = inner * Size(channels.count)
    for axis in sorted(range(len(there)), key=lambda axis: axis != channels.axis):  # a single channel is on all axes
        step = product(there[axis + 1 :])  # elements of memory from one index to the next
        repeats = inner.divided_by(step)
        is_of_whole_axes = axis <= channels.axis and here[:axis] == there[:axis]
        has_whole_periods = is_of_whole_axes or (step * there[axis]).divided_by(period) is not None
        if repeats is not None and has_whole_periods:
            return Channels(channels.count, axis, repeats)
    return None
