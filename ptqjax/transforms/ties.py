"""Finds which channels of a graph must share one scale, and which may have one at all.

Each channel of a tensor gets the number of a scale. A linear layer divides its output channels by their scales and
multiplies its input columns by theirs; everything between layers passes the numbers on (an activation, a pool, a
Transpose), joins them (a residual sum needs one scale for what it adds), strings them together (Concat) or fixes them
to one (a Softmax, a graph output, a shared weight). Number 0 is the fixed scale. So pairs, depthwise triples, chains
and residual trunks are one thing: sets of channels that are tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ptqjax.ir import Model, Node, captured, is_private, place_of, value_of
from ptqjax.kernels.precision import is_traced
from ptqjax.transforms.activations import commutes_with_scaling, is_activation
from ptqjax.transforms.linear import Linear, linear_layers, why_not_rewritable
from ptqjax.transforms.rank import ranks_of

FIXED = 0
"""The number of the scale that is one."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Channels:
    """The channels of a tensor."""

    axis: int
    """The axis that counts them, from the front."""
    scales: np.ndarray
    """The number of each channel's scale; `FIXED` where it is one."""
    repeats: bool = False
    """Whether each stands for several neighbours on the axis: behind a Flatten, until a layer tells how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TiedLayer:
    """A linear layer and the scales of its channels."""

    layer: Linear
    """The layer."""
    inputs: np.ndarray
    """The number of the scale of each input channel, [inputs]."""
    outputs: np.ndarray
    """The number of the scale of each output channel, [outputs]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limited:
    """An activation with bounds, which are to be divided along with what they bound."""

    node: Node
    """The Clip, Min or Max."""
    scales: np.ndarray
    """The number of the scale of each channel."""
    kernel_rank: int
    """Number of axes behind the channels'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TiedSet:
    """Scales that the outputs of the same layers have: what is scaled together, and reported as one place."""

    scales: np.ndarray
    """Their numbers, sorted."""
    producers: tuple[str, ...]
    """The layers (by the tensor that they produce) whose outputs have these scales."""
    consumers: tuple[str, ...]
    """The layers whose inputs have these scales."""
    tensors: tuple[str, ...]
    """The tensors with these scales, in graph order."""

    @property
    def place(self) -> str:
        """The tensor that the set is known by: the last one."""
        return self.tensors[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ties:
    """All scales of a graph."""

    num_scales: int
    """How many there are, the fixed one included."""
    channels: Mapping[str, Channels]
    """Of each tensor whose channels are known."""
    layers: Mapping[str, TiedLayer]
    """The linear layers by the tensor that they produce, in graph order."""
    sets: tuple[TiedSet, ...]
    """The tied sets in graph order; channels of a set are never fixed."""
    limited: tuple[Limited, ...]
    """Activations with bounds between scaled channels, in graph order."""
    shifts: tuple[tuple[str, int, np.ndarray], ...]
    """Parameters that are added: name, axis from the front of the parameter, and scales along it."""
    reasons: Mapping[str, str]
    """For each layer all of whose output channels are fixed, why."""


def find_ties(model: Model, *, left: Iterable[str] = ()) -> Ties:
    """Returns which channels share scales.

    Args:
        model: The model.
        left: Tensors produced by activations with bounds that are to stay as they are: nothing is scaled there.
    """
    finder = _Finder(model, frozenset(left))
    finder.run()
    return finder.result()


class _Scales:
    """Numbers of scales while they are being tied (a union of sets); a set may be fixed for a reason."""

    def __init__(self) -> None:
        self._parents: list[int] = [FIXED]
        self._reasons: dict[int, str] = {FIXED: "its scale is fixed"}

    def new(self, count: int) -> np.ndarray:
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, number: int) -> int:
        parents = self._parents
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    def tie(self, first: np.ndarray, second: np.ndarray, reason: str = "") -> None:
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            a, b = sorted((self.root(one), self.root(other)))
            if a == b:
                continue
            if a == FIXED:
                self._reasons.setdefault(b, reason or self._reasons[FIXED])
                continue
            self._parents[b] = a
            fixed = self._reasons.get(a) or self._reasons.get(b)
            if fixed:
                self._reasons[a] = fixed

    def fix(self, numbers: np.ndarray, reason: str) -> None:
        for number in np.unique(numbers).tolist():
            self._reasons.setdefault(self.root(number), reason)

    def is_fixed(self, numbers: np.ndarray) -> bool:
        return all(self.root(number) in self._reasons for number in np.unique(numbers).tolist())

    def reason(self, numbers: np.ndarray) -> str:
        return next((self._reasons[root] for n in numbers.tolist() if (root := self.root(n)) in self._reasons), "")

    def compressed(self) -> tuple[np.ndarray, int]:
        """Returns the final number of each number, and how many there are."""
        roots = [self.root(number) for number in range(len(self._parents))]
        free = sorted({root for root in roots if root not in self._reasons})
        final = {root: index + 1 for index, root in enumerate(free)}
        return np.array([final.get(root, FIXED) for root in roots]), len(free) + 1


class _Finder:
    """One pass over the nodes; a rule returns the channels of the node's outputs, or the reason why there are none."""

    def __init__(self, model: Model, left: frozenset[str]) -> None:
        self.model, self.graph, self.left = model, model.graph, left
        self.ranks = ranks_of(model)
        self.layers = linear_layers(model)
        self.scales = _Scales()
        self.channels: dict[str, Channels] = {}
        self.tied: dict[str, tuple[Linear, np.ndarray, np.ndarray]] = {}
        self.limited: list[tuple[Node, np.ndarray, int]] = []
        self.shifts: list[tuple[str, int, np.ndarray]] = []

    def run(self) -> None:
        products = {id(layer.node): layer for layer in self.layers.values()}
        biases = {id(layer.bias_node) for layer in self.layers.values() if layer.bias_node is not None}
        for node in self.graph.nodes:
            if id(node) in biases:
                continue  # belongs to its product
            for name in captured(node):
                self.fix(name, f"'{name}' is read by a subgraph of {place_of(node)}")
            layer = products.get(id(node))
            if layer is not None:
                self.layer(layer)
                continue
            rule = _RULES.get(node.op_type) if not node.domain else None
            found = rule(self, node) if rule else f"{place_of(node)} does not commute with scales per channel"
            if isinstance(found, str):
                for name in node.inputs:
                    self.fix(name, f"'{name}' is read by {place_of(node)}: {found}" if rule else _read_by(name, node))
                continue
            for name, channels in zip(node.outputs, found, strict=False):
                if name and channels is not None:
                    self.channels[name] = channels
        for name in self.graph.output_names:
            self.fix(name, f"'{name}' is a graph output")

    def fix(self, name: str, reason: str) -> None:
        if name in self.channels:
            self.scales.fix(self.channels[name].scales, reason)

    def of(self, name: str, like: Channels | None = None) -> Channels | None:
        """Returns the channels of a tensor; where none are known, fixed ones like those of another tensor."""
        known = self.channels.get(name)
        if known is None and like is not None and self.ranks.get(name) is not None:
            return Channels(axis=like.axis, scales=np.zeros_like(like.scales), repeats=like.repeats)
        return known

    # --- layers

    def layer(self, layer: Linear) -> None:
        axis = _channel_axis(layer, self.ranks)
        reason = why_not_rewritable(self.graph, layer)
        if axis is None:
            reason = reason or f"the channels of '{layer.output}' may not lie along one axis"
        inputs = self.inputs_of(layer, axis, reason)
        outputs = self.scales.new(layer.num_outputs)
        if reason:
            self.scales.fix(outputs, reason)
        if axis is not None:
            self.channels[layer.output] = Channels(axis=axis, scales=outputs)
        self.tied[layer.output] = (layer, inputs, outputs)

    def inputs_of(self, layer: Linear, axis: int | None, reason: str) -> np.ndarray:
        """Returns the scales of the layer's inputs; fixes them where the layer cannot follow them."""
        known = self.channels.get(layer.input)
        fixed = np.full(layer.num_inputs, FIXED)
        if known is None:
            return fixed
        count = len(known.scales)
        fits = layer.num_inputs % count == 0 if known.repeats else layer.num_inputs == count
        if reason or known.axis != axis or not fits:
            self.fix(layer.input, reason or f"{place_of(layer.node)} does not read the channels of '{layer.input}'")
            return fixed
        return np.repeat(known.scales, layer.num_inputs // count)

    # --- what passes channels on

    def nothing(self, node: Node) -> list[Channels | None] | str:
        """The rule of what looks at the shape alone."""
        return [None for _ in node.outputs]

    def same(self, node: Node) -> list[Channels | None] | str:
        return [self.of(node.inputs[0])]

    def function(self, node: Node) -> list[Channels | None] | str:
        """The rule of what bends each element: channels stay apart and are fixed, so that they can be gates."""
        known = self.of(node.inputs[0])
        if known is None:
            return [None]
        self.fix(node.inputs[0], _read_by(node.inputs[0], node))
        return [Channels(axis=known.axis, scales=np.zeros_like(known.scales), repeats=known.repeats)]

    def activation(self, node: Node) -> list[Channels | None] | str:
        name = next((name for name in node.inputs if name in self.channels), "")
        known = self.of(name)
        if known is None:
            return [None]
        rank = self.ranks.get(name)
        if rank is None or known.repeats:
            return "the number of its channels is not known"
        if self.ranks.get(node.output) != rank:
            return "it adds axes in front"
        if not is_activation(self.model, node, name, len(known.scales), rank - 1 - known.axis):
            return "its bounds or slopes are not constants of its own, one number or one for each channel"
        if not commutes_with_scaling(self.model, node):
            if node.output in self.left:
                return "its bounds are to stay as they are"
            self.limited.append((node, known.scales, rank - 1 - known.axis))
        return [known]

    def pool(self, node: Node) -> list[Channels | None] | str:
        known = self.of(node.inputs[0])
        if known is None:
            return [None]
        if known.axis != 1 or self.ranks.get(node.inputs[0], 0) < _IMAGE:
            return "it pools over the channels"
        if sum(map(bool, node.outputs)) > 1:
            return "its indices are read"
        return [known]

    def reduction(self, node: Node) -> list[Channels | None] | str:
        known, rank = self.of(node.inputs[0]), self.ranks.get(node.inputs[0])
        if known is None:
            return [None]
        axes = value_of(self.model, node.inputs[1]) if len(node.inputs) > 1 else node.attribute("axes")
        if rank is None or axes is None or np.size(axes) == 0 or known.repeats:
            return "its axes are not known"
        reduced = {int(axis) % rank for axis in np.ravel(axes)}
        if known.axis in reduced:
            return "it reduces over the channels"
        gone = 0 if node.attribute("keepdims", 1) else sum(axis < known.axis for axis in reduced)
        return [Channels(axis=known.axis - gone, scales=known.scales)]

    def sum(self, node: Node) -> list[Channels | None] | str:
        names = [name for name in node.inputs if name not in self.model.params]
        constants = [name for name in node.inputs if name in self.model.params]
        known = next((self.channels[name] for name in names if name in self.channels), None)
        if known is None:
            return [None]
        ranks = {self.ranks.get(name) for name in names}
        if len(ranks) != 1 or None in ranks:
            return "the shapes that it adds are not known to be alike"
        rank = ranks.pop() or 0
        if self.ranks.get(node.output) != rank:
            return "it adds axes in front"
        for name in names:
            other = self.of(name, known)
            if other is None or (other.axis, len(other.scales), other.repeats) != (
                known.axis, len(known.scales), known.repeats,
            ):  # fmt: skip
                return "the channels that it adds do not match"
            self.scales.tie(known.scales, other.scales, f"{place_of(node)} adds '{name}', whose scale is fixed")
        for name in constants:
            reason = self.shift(node, name, known, rank)
            if reason:
                return reason
        return [known]

    def shift(self, node: Node, name: str, known: Channels, rank: int) -> str:
        """Notes a parameter that is added and must be divided along; returns why it cannot be."""
        value = self.model.params[name]
        if not is_traced(value) and not np.any(np.asarray(value)):
            return ""
        axis = value.ndim - (rank - known.axis)
        if axis < 0 or value.ndim > rank or value.shape[axis] != len(known.scales) or known.repeats:
            return f"'{name}' is not one number for each channel"
        if node.op_type == "Sub" and node.inputs[0] == name:
            return "it subtracts from a constant"
        if not is_private(self.graph, name):
            return f"'{name}' is shared with another node or is a graph output"
        self.shifts.append((name, axis, known.scales))
        return ""

    def product(self, node: Node) -> list[Channels | None] | str:
        known = [name for name in node.inputs if name in self.channels]
        if not known or (node.op_type == "Div" and node.inputs[1] in self.channels):
            return [None] if not known else "it divides by them"
        tensor = next((name for name in known if not self.scales.is_fixed(self.channels[name].scales)), known[0])
        channels, rank = self.channels[tensor], self.ranks.get(tensor)
        other = next((name for name in node.inputs if name != tensor), tensor)
        other_rank = self.ranks.get(other)
        if rank is None or other_rank is None or other_rank > rank or other == tensor or channels.repeats:
            return "what it multiplies is not known to keep the channels"
        if other in self.model.params:
            axis = self.model.params[other].ndim - (rank - channels.axis)
            if axis >= 0 and self.model.params[other].shape[axis] not in {1, len(channels.scales)}:
                return "what it multiplies is not known to keep the channels"
        elif other not in self.channels or len(self.channels[other].scales) != len(channels.scales):
            return "what it multiplies is not known to keep the channels"
        self.fix(other, f"'{other}' is multiplied with '{tensor}'")
        return [channels]

    def transpose(self, node: Node) -> list[Channels | None] | str:
        known, rank = self.of(node.inputs[0]), self.ranks.get(node.inputs[0])
        if known is None:
            return [None]
        if rank is None:
            return "its rank is not known"
        order = tuple(node.attribute("perm", tuple(reversed(range(rank)))))
        return [Channels(axis=order.index(known.axis), scales=known.scales, repeats=known.repeats)]

    def flatten(self, node: Node) -> list[Channels | None] | str:
        known = self.of(node.inputs[0])
        if known is None:
            return [None]
        if node.attribute("axis", 1) != 1 or known.axis != 1:
            return "it does not flatten each sample from its channels on"
        return [Channels(axis=1, scales=known.scales, repeats=True)]

    def reshape(self, node: Node) -> list[Channels | None] | str:
        known = self.of(node.inputs[0])
        if known is None:
            return [None]
        shape = self.graph.constant_values.get(node.inputs[1])
        sizes = [] if shape is None else shape.tolist()
        one_sample = all(spec.shape is not None and spec.shape[:1] == (1,) for spec in self.graph.inputs)
        keeps_samples = len(sizes) == 2 and (sizes[0] == 0 or (sizes[0] == 1 and one_sample))  # noqa: PLR2004
        if known.axis != 1 or node.attribute("allowzero", 0) or not keeps_samples or sizes[1] == 0:
            return "it is not known to flatten each sample from its channels on"
        return [Channels(axis=1, scales=known.scales, repeats=True)]

    def squeeze(self, node: Node) -> list[Channels | None] | str:
        known, rank = self.of(node.inputs[0]), self.ranks.get(node.inputs[0])
        if known is None:
            return [None]
        axes = value_of(self.model, node.inputs[1]) if len(node.inputs) > 1 else node.attribute("axes")
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

    def concat(self, node: Node) -> list[Channels | None] | str:
        found = [self.of(name) for name in node.inputs]
        known = next((channels for channels in found if channels is not None), None)
        rank = next((self.ranks[name] for name in node.inputs if name in self.ranks), None)
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
            self.scales.tie(known.scales, part.scales, f"{place_of(node)} joins it with a tensor whose scale is fixed")
        return [known]

    def split(self, node: Node) -> list[Channels | None] | str:
        known, rank = self.of(node.inputs[0]), self.ranks.get(node.inputs[0])
        if known is None:
            return [None]
        if rank is None or known.repeats:
            return "its rank is not known"
        if int(node.attribute("axis", 0)) % rank != known.axis:
            return [known for _ in node.outputs]
        second = value_of(self.model, node.inputs[1]) if len(node.inputs) > 1 else node.attribute("split")
        if second is None and any(node.inputs[1:]):
            return "the sizes of its parts are not known"
        count, size = len(node.outputs), len(known.scales)
        sizes = [int(part) for part in np.ravel(second)] if second is not None else [-(-size // count)] * (count - 1)
        ends = np.cumsum(sizes)[: count - 1]
        return [Channels(axis=known.axis, scales=part) for part in np.split(known.scales, ends)]

    def slice(self, node: Node) -> list[Channels | None] | str:
        known, rank = self.of(node.inputs[0]), self.ranks.get(node.inputs[0])
        if known is None:
            return [None]
        ends = self.slice_ends(node)
        if rank is None or ends is None or known.repeats:
            return "where it starts and ends is not known"
        scales = known.scales
        for start, stop, axis, step in ends:
            if axis % rank == known.axis:
                whole = range(len(scales))
                scales = scales[list(whole[slice(start, None if stop < -len(scales) else stop, step)])]
        return [Channels(axis=known.axis, scales=scales)]

    def slice_ends(self, node: Node) -> list[tuple[int, int, int, int]] | None:
        if len(node.inputs) == 1:
            starts, stops = node.attribute("starts"), node.attribute("ends")
            axes, steps = node.attribute("axes", range(len(starts))), [1] * len(starts)
        else:
            values = [value_of(self.model, name) if name else None for name in node.inputs[1:]]
            values += [None] * (4 - len(values))
            if values[0] is None or values[1] is None:
                return None
            starts, stops = values[0].tolist(), values[1].tolist()
            if any(name and value is None for name, value in zip(node.inputs[1:], values, strict=False)):
                return None
            axes = range(len(starts)) if values[2] is None else values[2].tolist()
            steps = [1] * len(starts) if values[3] is None else values[3].tolist()
        return [(int(a), int(b), int(c), int(d)) for a, b, c, d in zip(starts, stops, axes, steps, strict=True)]

    def pad(self, node: Node) -> list[Channels | None] | str:
        known, rank = self.of(node.inputs[0]), self.ranks.get(node.inputs[0])
        if known is None:
            return [None]
        pads = value_of(self.model, node.inputs[1]) if len(node.inputs) > 1 else node.attribute("pads")
        if rank is None or pads is None or known.repeats or (len(node.inputs) > 3 and node.inputs[3]):  # noqa: PLR2004
            return "how much it pads is not known"
        before, after = (int(pads[known.axis + offset]) for offset in (0, rank))
        if not before and not after and node.attribute("mode", "constant") != "constant":
            return [known]
        filling = node.inputs[2] if len(node.inputs) > 2 else ""  # noqa: PLR2004
        value = value_of(self.model, filling) if filling else node.attribute("value", 0.0)
        if node.attribute("mode", "constant") != "constant" or value is None or is_traced(value) or np.any(value):
            return "it pads with something other than zeros"
        if before < 0 or after < 0:
            return "it cuts channels off"
        scales = np.concatenate([self.scales.new(before), known.scales, self.scales.new(after)])
        return [Channels(axis=known.axis, scales=scales)]

    def resize(self, node: Node) -> list[Channels | None] | str:
        known, rank = self.of(node.inputs[0]), self.ranks.get(node.inputs[0])
        if known is None:
            return [None]
        factors = value_of(self.model, node.inputs[-1]) if len(node.inputs) in {2, 3} else node.attribute("scales")
        is_plain = node.attribute("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
        if rank is None or factors is None or np.size(factors) != rank or not is_plain or known.repeats:
            return "what it does to the channels is not known"
        return [known] if float(np.ravel(factors)[known.axis]) == 1.0 else "it resizes along the channels"

    # --- the result

    def result(self) -> Ties:
        final, count = self.scales.compressed()
        channels = {
            name: Channels(axis=found.axis, scales=final[found.scales], repeats=found.repeats)
            for name, found in self.channels.items()
        }
        layers = {
            output: TiedLayer(layer=layer, inputs=final[inputs], outputs=final[outputs])
            for output, (layer, inputs, outputs) in self.tied.items()
        }
        reasons = {
            output: self.scales.reason(outputs)
            for output, (_, _, outputs) in self.tied.items()
            if not final[outputs].any()
        }
        return Ties(
            num_scales=count,
            channels=channels,
            layers=layers,
            sets=_sets(channels, layers, count),
            limited=tuple(
                Limited(node=node, scales=final[scales], kernel_rank=rank)
                for node, scales, rank in self.limited
                if final[scales].any()
            ),
            shifts=tuple((name, axis, final[scales]) for name, axis, scales in self.shifts if final[scales].any()),
            reasons=reasons,
        )


def _sets(channels: Mapping[str, Channels], layers: Mapping[str, TiedLayer], count: int) -> tuple[TiedSet, ...]:
    """Returns the scales grouped by the layers whose outputs have them, in the order of these layers."""
    groups = _Scales()
    groups.new(count - 1)
    for tied in layers.values():
        free = np.unique(tied.outputs[tied.outputs != FIXED])
        groups.tie(free[:-1], free[1:])
    is_produced = np.zeros(count, bool)
    for tied in layers.values():
        is_produced[tied.outputs] = True
    root_of = np.array([groups.root(number) if is_produced[number] else FIXED for number in range(count)])
    root_of[FIXED] = FIXED

    def roots(numbers: np.ndarray) -> set[int]:
        return set(np.unique(root_of[numbers]).tolist()) - {FIXED}

    producers = {output: roots(tied.outputs) for output, tied in layers.items()}
    consumers = {output: roots(tied.inputs) for output, tied in layers.items()}
    carriers = {name: roots(found.scales) for name, found in channels.items()}
    order = dict.fromkeys(root for found in producers.values() for root in sorted(found))
    return tuple(
        TiedSet(
            scales=np.flatnonzero(root_of == root),
            producers=tuple(output for output, found in producers.items() if root in found),
            consumers=tuple(output for output, found in consumers.items() if root in found),
            tensors=tuple(name for name, found in carriers.items() if root in found),
        )
        for root in order
    )


def _channel_axis(layer: Linear, ranks: Mapping[str, int]) -> int | None:
    if layer.channels_at_1:
        return 1
    rank = ranks.get(layer.input)
    return rank - 1 if layer.node.op_type == "MatMul" and rank is not None and rank > 1 else None


def _read_by(tensor: str, node: Node) -> str:
    return f"'{tensor}' is read by {place_of(node)}, which does not commute with scales per channel"


_Rule = Callable[[_Finder, Node], "list[Channels | None] | str"]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_SAME, _Finder.same),
    **dict.fromkeys(("Shape", "Size"), _Finder.nothing),
    **dict.fromkeys(_ELEMENTWISE, _Finder.function),
    **dict.fromkeys(_POOLS, _Finder.pool),
    **dict.fromkeys(_REDUCTIONS, _Finder.reduction),
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu", "Clip", "Min", "Max"), _Finder.activation),
    **dict.fromkeys(("Add", "Sum", "Sub"), _Finder.sum),
    **dict.fromkeys(("Mul", "Div"), _Finder.product),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _Finder.squeeze),
    **dict.fromkeys(("Resize", "Upsample"), _Finder.resize),
    "Transpose": _Finder.transpose,
    "Flatten": _Finder.flatten,
    "Reshape": _Finder.reshape,
    "Concat": _Finder.concat,
    "Split": _Finder.split,
    "Slice": _Finder.slice,
    "Pad": _Finder.pad,
}
