"""What each operator does to the scales of channels: passes them on, ties them, joins them, or fixes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ptqjax.ir import Model, Node, is_private, place_of, value_of
from ptqjax.kernels.precision import is_traced
from ptqjax.transforms.activations import commutes_with_scaling, is_activation
from ptqjax.transforms.factors import normalization, vector_product
from ptqjax.transforms.routes import ROUTED, ZEROS, Facts, Route, routes
from ptqjax.transforms.scale_numbers import FIXED, Channels, Scales
from ptqjax.transforms.sizes import ONE

_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})
_ELEMENTWISE = frozenset(
    {
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Mish",
        "Selu",
        "Sigmoid",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Tanh",
    }
)
_IMAGE = 3  # ranks from which there are positions behind the channels


class Marks:
    """What is known of the channels while one pass goes over the nodes."""

    def __init__(self, model: Model, left: frozenset[str], anew: frozenset[str] = frozenset()) -> None:
        self.model, self.graph, self.left, self.anew = model, model.graph, left, anew
        self.facts = Facts(model)
        self.ranks = self.facts.ranks
        self.scales = Scales()
        self.channels: dict[str, Channels] = {}
        self.limited: list[tuple[Node, np.ndarray, int]] = []
        self.shifts: list[tuple[str, int, np.ndarray]] = []
        self.factors: dict[str, np.ndarray] = {}
        self.passing: dict[str, str] = {}

    def fix(self, name: str, reason: str) -> None:
        """Fixes the scales of a tensor whose channels are known."""
        if name in self.channels:
            self.scales.fix(self.channels[name].scales, reason)

    def of(self, name: str, like: Channels | None = None) -> Channels | None:
        """Returns the channels of a tensor; where none are known, fixed ones like those of another tensor."""
        known = self.channels.get(name)
        if known is None and like is not None and self.ranks.get(name) is not None:
            return Channels(axis=like.axis, scales=np.zeros_like(like.scales), repeats=like.repeats)
        return known


def read_by(tensor: str, node: Node) -> str:
    """Returns the reason that an operator without a rule gives."""
    return f"'{tensor}' is read by {place_of(node)}, which does not commute with scales per channel"


def _nothing(marks: Marks, node: Node) -> list[Channels | None] | str:
    """The rule of what looks at the shape alone."""
    del marks
    return [None for _ in node.outputs]


def _same(marks: Marks, node: Node) -> list[Channels | None] | str:
    return [marks.of(node.inputs[0])]


def _function(marks: Marks, node: Node) -> list[Channels | None] | str:
    """The rule of what bends each element: channels stay apart and are fixed, so that they can be gates."""
    known = marks.of(node.inputs[0])
    if known is None:
        return [None]
    marks.fix(node.inputs[0], read_by(node.inputs[0], node))
    return [Channels(axis=known.axis, scales=np.zeros_like(known.scales), repeats=known.repeats)]


def _activation(marks: Marks, node: Node) -> list[Channels | None] | str:
    name = next((name for name in node.inputs if name in marks.channels), "")
    known = marks.of(name)
    if known is None:
        return [None]
    rank = marks.ranks.get(name)
    if rank is None or (known.repeats != ONE and node.op_type not in {"Relu", "LeakyRelu"}):
        return "the number of its channels is not known"
    if marks.ranks.get(node.output) != rank:
        return "it adds axes in front"
    if not is_activation(marks.model, node, name, len(known.scales), rank - 1 - known.axis):
        return "its bounds or slopes are not constants of its own, one number or one for each channel"
    if not commutes_with_scaling(marks.model, node):
        if node.output in marks.left:
            return "its bounds are to stay as they are"
        marks.limited.append((node, known.scales, rank - 1 - known.axis))
    return [known]


def _pool(marks: Marks, node: Node) -> list[Channels | None] | str:
    known = marks.of(node.inputs[0])
    if known is None:
        return [None]
    if known.axis != 1 or marks.ranks.get(node.inputs[0], 0) < _IMAGE:
        return "it pools over the channels"
    if sum(map(bool, node.outputs)) > 1:
        return "its indices are read"
    return [known]


def _reduction(marks: Marks, node: Node) -> list[Channels | None] | str:
    known, rank = marks.of(node.inputs[0]), marks.ranks.get(node.inputs[0])
    if known is None:
        return [None]
    axes = value_of(marks.model, node.inputs[1]) if len(node.inputs) > 1 else node.attribute("axes")
    if rank is None or axes is None or np.size(axes) == 0 or known.repeats != ONE:
        return "its axes are not known"
    reduced = {int(axis) % rank for axis in np.ravel(axes)}
    if known.axis in reduced:
        return "it reduces over the channels"
    gone = 0 if node.attribute("keepdims", 1) else sum(axis < known.axis for axis in reduced)
    return [Channels(axis=known.axis - gone, scales=known.scales)]


def _sum(marks: Marks, node: Node) -> list[Channels | None] | str:
    names = [name for name in node.inputs if name not in marks.model.params]
    constants = [name for name in node.inputs if name in marks.model.params]
    known = next((marks.channels[name] for name in names if name in marks.channels), None)
    if known is None:
        return [None]
    ranks = {marks.ranks.get(name) for name in names}
    if len(ranks) != 1 or None in ranks:
        return "the shapes that it adds are not known to be alike"
    rank = ranks.pop() or 0
    if marks.ranks.get(node.output) != rank:
        return "it adds axes in front"
    for name in names:
        other = marks.of(name, known)
        if other is None or (other.axis, len(other.scales), other.repeats) != (
            known.axis, len(known.scales), known.repeats,
        ):  # fmt: skip
            return "the channels that it adds do not match"
        marks.scales.tie(known.scales, other.scales, f"{place_of(node)} adds '{name}', whose scale is fixed")
    for name in constants:
        reason = _shift(marks, node, name, known, rank)
        if reason:
            return reason
    return [known]


def _shift(marks: Marks, node: Node, name: str, known: Channels, rank: int) -> str:
    """Notes a parameter that is added and must be divided along; returns why it cannot be."""
    value = marks.model.params[name]
    if not is_traced(value) and not np.any(np.asarray(value)):
        return ""
    axis = value.ndim - (rank - known.axis)
    if axis < 0 or value.ndim > rank or value.shape[axis] != len(known.scales) or known.repeats != ONE:
        return f"'{name}' is not one number for each channel"
    if node.op_type == "Sub" and node.inputs[0] == name:
        return "it subtracts from a constant"
    if not is_private(marks.graph, name):
        return f"'{name}' is shared with another node or is a graph output"
    marks.shifts.append((name, axis, known.scales))
    return ""


def _product(marks: Marks, node: Node) -> list[Channels | None] | str:
    if (anew := vector_product(marks, node)) is not None:
        return [anew]
    known = [name for name in node.inputs if name in marks.channels]
    if not known or (node.op_type == "Div" and node.inputs[1] in marks.channels):
        return [None] if not known else "it divides by them"
    tensor = next((name for name in known if not marks.scales.is_fixed(marks.channels[name].scales)), known[0])
    channels, rank = marks.channels[tensor], marks.ranks.get(tensor)
    other = next((name for name in node.inputs if name != tensor), tensor)
    other_rank = marks.ranks.get(other)
    if rank is None or other_rank is None or other_rank > rank or other == tensor or channels.repeats != ONE:
        return "what it multiplies is not known to keep the channels"
    if other in marks.model.params:
        axis = marks.model.params[other].ndim - (rank - channels.axis)
        if axis >= 0 and marks.model.params[other].shape[axis] not in {1, len(channels.scales)}:
            return "what it multiplies is not known to keep the channels"
    elif other not in marks.channels or len(marks.channels[other].scales) != len(channels.scales):
        return "what it multiplies is not known to keep the channels"
    marks.fix(other, f"'{other}' is multiplied with '{tensor}'")
    return [channels]


def _routed(marks: Marks, node: Node) -> list[Channels | None] | str:
    """The rule of what only moves values."""
    known = [marks.of(name) for name in node.inputs]
    found = routes(marks.facts, node, [channels and channels.lying for channels in known])
    if found is None or isinstance(found, str):
        return found or "what it does to the channels is not known"
    return [route and _along(marks, route, known) for route in found]


def _along(marks: Marks, route: Route, known: Sequence[Channels | None]) -> Channels:
    scales = route.gather([None if each is None else each.scales for each in known], np, zero=FIXED)
    scales = np.array(scales, int)
    zeros = route.source == ZEROS
    scales[zeros] = marks.scales.new(int(zeros.sum()))  # zeros take any scale
    return Channels(axis=route.axis, scales=scales, repeats=route.repeats)


def _concat(marks: Marks, node: Node) -> list[Channels | None] | str:
    """The rule of what strings channels together, or joins tensors of the same channels along another axis."""
    parts = [marks.of(name) for name in node.inputs]
    rank = next((marks.ranks[name] for name in node.inputs if name in marks.ranks), None)
    first = next((part for part in parts if part is not None), None)
    if first is None or rank is None or int(node.attribute("axis", 1)) % rank == first.axis:
        return _routed(marks, node)
    for part in parts:
        if part is None or part.axis != first.axis:
            return "the channels of some of its inputs are not known"
        if len(part.scales) != len(first.scales) or part.repeats != first.repeats:
            return "the channels that it joins do not match"
        marks.scales.tie(first.scales, part.scales, f"{place_of(node)} joins it with a tensor whose scale is fixed")
    return [first]


Rule = Callable[[Marks, Node], "list[Channels | None] | str"]
"""Returns the channels of a node's outputs, or the reason why there are none."""

RULES: dict[str, Rule] = {
    "Neg": _same,
    **dict.fromkeys(("Shape", "Size"), _nothing),
    **dict.fromkeys(_ELEMENTWISE, _function),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu", "Clip", "Min", "Max"), _activation),
    **dict.fromkeys(("Add", "Sum", "Sub"), _sum),
    **dict.fromkeys(("Mul", "Div"), _product),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), normalization),
    **dict.fromkeys(ROUTED, _routed),
    "Concat": _concat,
}
"""By operator of ONNX; what has none fixes what it reads."""
