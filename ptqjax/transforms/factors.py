"""Where scales begin without a layer: what parameters of its own multiply, channel by channel, can be divided by any.

A normalization's factors are such, operator or in pieces, and every product by a vector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptqjax.ir import Node, is_private, place_of
from ptqjax.transforms.scale_numbers import Channels
from ptqjax.transforms.sizes import ONE

if TYPE_CHECKING:
    from ptqjax.transforms.tie_rules import Marks


def normalization(marks: Marks, node: Node) -> list[Channels | None] | str:
    """The rule of what normalizes over the channels, whose factors and shifts may be divided: scales begin anew."""
    rank = marks.ranks.get(node.inputs[0])
    marks.fix(node.inputs[0], f"'{node.inputs[0]}' is read by {place_of(node)}, which normalizes over the channels")
    if rank is None or int(node.attribute("axis", -1)) % rank != rank - 1 or any(node.outputs[1:]):
        return [None for _ in node.outputs]
    found = _factor(marks, node.output, tuple(name for name in node.inputs[1:] if name), rank)
    return [found, *(None for _ in node.outputs[1:])]


def _factor(marks: Marks, output: str, params: tuple[str, ...], rank: int) -> Channels | None:
    """Returns new scales for a result that parameters of its own, along the last axis, multiply; None elsewhere."""
    shapes = {np.shape(marks.model.params.get(name, 0.0)) for name in params}
    sizes = {shape[-1] if shape and set(shape[:-1]) <= {1} and len(shape) <= rank else 1 for shape in shapes}
    if len(sizes) != 1 or sizes == {1} or not all(is_private(marks.graph, name) for name in params):
        return None
    scales = marks.scales.new(sizes.pop())
    marks.shifts += [(name, np.ndim(marks.model.params[name]) - 1, scales) for name in params]
    marks.factors[output] = scales
    return Channels(axis=rank - 1, scales=scales)


def vector_product(marks: Marks, node: Node) -> Channels | None:
    """Returns the channels of a product of what has no scales with a parameter along the last axis; None elsewhere.

    Whether it has none is known for good behind the last node: a product that passes scales on till then is noted.
    """
    rank = marks.ranks.get(node.output)
    params = tuple(name for name in node.inputs if name in marks.model.params)
    others = [name for name in node.inputs if name not in marks.model.params]
    is_plain = node.op_type == "Mul" and len(params) == 1 == len(others) and marks.ranks.get(others[0]) == rank
    if rank is None or not is_plain:
        return None
    known = marks.channels.get(others[0])
    if known is not None and (known.axis != rank - 1 or known.repeats != ONE):
        return None
    if known is None or node.output in marks.anew or marks.scales.is_fixed(known.scales):
        return _factor(marks, node.output, params, rank)
    marks.passing[node.output] = others[0]
    return None
