"""What each operator does to the scales of channels: passes them on, ties them, joins them, or fixes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptqjax.ir import Model, Node, is_private, place_of, value_of
from ptqjax.kernels.precision import is_traced
from ptqjax.transforms.activations import commutes_with_scaling, is_activation
from ptqjax.transforms.factors import normalization, vector_product
from ptqjax.transforms.rank import ranks_of
from ptqjax.transforms.scale_numbers import Channels, Scales

_SAME = frozenset({"Identity", "Dropout", "Neg"})
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
        self.ranks = ranks_of(model)
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
    if rank is None or known.repeats:
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
    if rank is None or axes is None or np.size(axes) == 0 or known.repeats:
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
    if axis < 0 or value.ndim > rank or value.shape[axis] != len(known.scales) or known.repeats:
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
    if rank is None or other_rank is None or other_rank > rank or other == tensor or channels.repeats:
        return "what it multiplies is not known to keep the channels"
    if other in marks.model.params:
        axis = marks.model.params[other].ndim - (rank - channels.axis)
        if axis >= 0 and marks.model.params[other].shape[axis] not in {1, len(channels.scales)}:
            return "what it multiplies is not known to keep the channels"
    elif other not in marks.channels or len(marks.channels[other].scales) != len(channels.scales):
        return "what it multiplies is not known to keep the channels"
    marks.fix(other, f"'{other}' is multiplied with '{tensor}'")
    return [channels]


def _transpose(marks: Marks, node: Node) -> list[Channels | None] | str:
    known, rank = marks.of(node.inputs[0]), marks.ranks.get(node.inputs[0])
    if known is None:
        return [None]
    if rank is None:
        return "its rank is not known"
    order = tuple(node.attribute("perm", tuple(reversed(range(rank)))))
    return [Channels(axis=order.index(known.axis), scales=known.scales, repeats=known.repeats)]


def _flatten(marks: Marks, node: Node) -> list[Channels | None] | str:
    known = marks.of(node.inputs[0])
    if known is None:
        return [None]
    if node.attribute("axis", 1) != 1 or known.axis != 1:
        return "it does not flatten each sample from its channels on"
    return [Channels(axis=1, scales=known.scales, repeats=True)]


def _reshape(marks: Marks, node: Node) -> list[Channels | None] | str:
    known = marks.of(node.inputs[0])
    if known is None:
        return [None]
    shape = marks.graph.constant_values.get(node.inputs[1])
    sizes = [] if shape is None else shape.tolist()
    one_sample = all(spec.shape is not None and spec.shape[:1] == (1,) for spec in marks.graph.inputs)
    keeps_samples = len(sizes) == 2 and (sizes[0] == 0 or (sizes[0] == 1 and one_sample))  # noqa: PLR2004
    if known.axis != 1 or node.attribute("allowzero", 0) or not keeps_samples or sizes[1] == 0:
        return "it is not known to flatten each sample from its channels on"
    return [Channels(axis=1, scales=known.scales, repeats=True)]


def _squeeze(marks: Marks, node: Node) -> list[Channels | None] | str:
    known, rank = marks.of(node.inputs[0]), marks.ranks.get(node.inputs[0])
    if known is None:
        return [None]
    axes = value_of(marks.model, node.inputs[1]) if len(node.inputs) > 1 else node.attribute("axes")
    if rank is None or axes is None or known.repeats:
        return "its axes are not known"
    new_rank = rank + np.size(axes) if node.op_type == "Unsqueeze" else rank
    places = sorted(int(axis) % new_rank for axis in np.ravel(axes))
    if node.op_type == "Squeeze":
        if known.axis in places:
            return "it drops the channels"
        return [Channels(axis=known.axis - sum(place < known.axis for place in places), scales=known.scales)]
    kept = [axis for axis in range(new_rank) if axis not in places]
    return [Channels(axis=kept[known.axis], scales=known.scales)]


def _concat(marks: Marks, node: Node) -> list[Channels | None] | str:
    found = [marks.of(name) for name in node.inputs]
    known = next((channels for channels in found if channels is not None), None)
    rank = next((marks.ranks[name] for name in node.inputs if name in marks.ranks), None)
    if known is None:
        return [None]
    if rank is None or any(channels is None or channels.axis != known.axis for channels in found):
        return "the channels of some of its inputs are not known"
    parts = [channels for channels in found if channels is not None]
    if any(part.repeats for part in parts):
        return "how many numbers a channel has is not known"
    if int(node.attribute("axis", 1)) % rank == known.axis:
        return [Channels(axis=known.axis, scales=np.concatenate([part.scales for part in parts]))]
    for part in parts[1:]:
        if len(part.scales) != len(known.scales):
            return "the channels that it joins do not match"
        marks.scales.tie(known.scales, part.scales, f"{place_of(node)} joins it with a tensor whose scale is fixed")
    return [known]


def _split(marks: Marks, node: Node) -> list[Channels | None] | str:
    known, rank = marks.of(node.inputs[0]), marks.ranks.get(node.inputs[0])
    if known is None:
        return [None]
    if rank is None or known.repeats:
        return "its rank is not known"
    if int(node.attribute("axis", 0)) % rank != known.axis:
        return [known for _ in node.outputs]
    second = value_of(marks.model, node.inputs[1]) if len(node.inputs) > 1 else node.attribute("split")
    if second is None and any(node.inputs[1:]):
        return "the sizes of its parts are not known"
    count, size = len(node.outputs), len(known.scales)
    sizes = [int(part) for part in np.ravel(second)] if second is not None else [-(-size // count)] * (count - 1)
    ends = np.cumsum(sizes)[: count - 1]
    return [Channels(axis=known.axis, scales=part) for part in np.split(known.scales, ends)]


def _slice(marks: Marks, node: Node) -> list[Channels | None] | str:
    known, rank = marks.of(node.inputs[0]), marks.ranks.get(node.inputs[0])
    if known is None:
        return [None]
    ends = _slice_ends(marks, node)
    if rank is None or ends is None or known.repeats:
        return "where it starts and ends is not known"
    scales = known.scales
    for start, stop, axis, step in ends:
        if axis % rank == known.axis:
            whole = range(len(scales))
            scales = scales[list(whole[slice(start, None if stop < -len(scales) else stop, step)])]
    return [Channels(axis=known.axis, scales=scales)]


def _slice_ends(marks: Marks, node: Node) -> list[tuple[int, int, int, int]] | None:
    if len(node.inputs) == 1:
        starts, stops = node.attribute("starts"), node.attribute("ends")
        axes, steps = node.attribute("axes", range(len(starts))), [1] * len(starts)
    else:
        values = [value_of(marks.model, name) if name else None for name in node.inputs[1:]]
        values += [None] * (4 - len(values))
        if values[0] is None or values[1] is None:
            return None
        starts, stops = values[0].tolist(), values[1].tolist()
        if any(name and value is None for name, value in zip(node.inputs[1:], values, strict=False)):
            return None
        axes = range(len(starts)) if values[2] is None else values[2].tolist()
        steps = [1] * len(starts) if values[3] is None else values[3].tolist()
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in zip(starts, stops, axes, steps, strict=True)]


def _pad(marks: Marks, node: Node) -> list[Channels | None] | str:
    known, rank = marks.of(node.inputs[0]), marks.ranks.get(node.inputs[0])
    if known is None:
        return [None]
    pads = value_of(marks.model, node.inputs[1]) if len(node.inputs) > 1 else node.attribute("pads")
    if rank is None or pads is None or known.repeats or (len(node.inputs) > 3 and node.inputs[3]):  # noqa: PLR2004
        return "how much it pads is not known"
    before, after = (int(pads[known.axis + offset]) for offset in (0, rank))
    if not before and not after and node.attribute("mode", "constant") != "constant":
        return [known]
    filling = node.inputs[2] if len(node.inputs) > 2 else ""  # noqa: PLR2004
    value = value_of(marks.model, filling) if filling else node.attribute("value", 0.0)
    if node.attribute("mode", "constant") != "constant" or value is None or is_traced(value) or np.any(value):
        return "it pads with something other than zeros"
    if before < 0 or after < 0:
        return "it cuts channels off"
    scales = np.concatenate([marks.scales.new(before), known.scales, marks.scales.new(after)])
    return [Channels(axis=known.axis, scales=scales)]


def _resize(marks: Marks, node: Node) -> list[Channels | None] | str:
    known, rank = marks.of(node.inputs[0]), marks.ranks.get(node.inputs[0])
    if known is None:
        return [None]
    factors = value_of(marks.model, node.inputs[-1]) if len(node.inputs) in {2, 3} else node.attribute("scales")
    is_plain = node.attribute("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
    if rank is None or factors is None or np.size(factors) != rank or not is_plain or known.repeats:
        return "what it does to the channels is not known"
    return [known] if float(np.ravel(factors)[known.axis]) == 1.0 else "it resizes along the channels"


Rule = Callable[[Marks, Node], "list[Channels | None] | str"]
"""Returns the channels of a node's outputs, or the reason why there are none."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(("Shape", "Size"), _nothing),
    **dict.fromkeys(_ELEMENTWISE, _function),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu", "Clip", "Min", "Max"), _activation),
    **dict.fromkeys(("Add", "Sum", "Sub"), _sum),
    **dict.fromkeys(("Mul", "Div"), _product),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _squeeze),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), normalization),
    "Transpose": _transpose,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
}
"""By operator of ONNX; what has none fixes what it reads."""
