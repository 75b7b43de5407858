"""Where each channel of an operator's results comes from, for operators that only move values.

Along them ties gather numbers of scales, moments distributions, bounds intervals, and derivatives come back.
What an operator does to the values themselves (an activation, a sum, a pool) is none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from ptqjax.ir import Model, Node, value_of
from ptqjax.transforms.passages import Channels as Passing
from ptqjax.transforms.passages import across
from ptqjax.transforms.rank import ranks_of
from ptqjax.transforms.sizes import ONE, Shape, Size, shapes_of

ZEROS = -1
"""The source of a channel that no input has: the zeros of a Pad."""


@dataclass(frozen=True, slots=True)
class Lying:
    """How the channels of a tensor lie: index i along the axis belongs to channel i // repeats."""

    axis: int
    """The axis that counts the channels, from the front."""
    count: int
    """The number of channels."""
    repeats: Size = ONE
    """How many neighbours along the axis belong to one channel."""


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """Where each channel of one result comes from."""

    axis: int
    """The axis of the result that counts its channels, from the front."""
    source: np.ndarray
    """For each channel of the result the position of the input that it comes from; `ZEROS` for a channel of zeros."""
    index: np.ndarray
    """For each channel of the result the channel of that input; 0 for a channel of zeros."""
    repeats: Size = ONE
    """How many neighbours along the axis belong to one channel of the result."""
    fills: bool = False
    """Whether zeros are added along other axes, as by a Pad."""
    stays_within: bool = True
    """Whether no value of a channel lies outside of what the input's channel holds, as behind a cubic Resize."""

    def gather(self, arrays: Sequence[Any], xp: Any, *, zero: Any = 0.0) -> Any:
        """Returns one number for each channel of the result from one for each channel of each input, [c].

        Args:
            arrays: One array per input; of an input that nothing comes from, anything.
            xp: The library of the arrays.
            zero: The number of a channel of zeros.
        """
        parts, starts, start = [xp.full(1, zero)], {ZEROS: 0}, 1
        for position in sorted(set(self.source.tolist()) - {ZEROS}):
            parts.append(arrays[position])
            starts[position] = start
            start += arrays[position].shape[0]
        if len(starts) == len(parts) == 2 and np.array_equal(self.index, np.arange(start - 1)):  # noqa: PLR2004
            return arrays[int(self.source[0])]  # every channel stays where it is
        places = self.index + np.array([starts[each] for each in self.source.tolist()], int)
        return xp.concatenate(parts)[places]


Routes: TypeAlias = "list[Route | None] | str"
"""For each result its route, None where no channels are known; or the reason why there is none."""


class Facts:
    """What routes need to know of a graph."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.ranks = ranks_of(model)
        self._shapes: dict[str, Shape] | None = None

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The shapes, found when they are first asked for."""
        if self._shapes is None:
            self._shapes = shapes_of(self.model)
        return self._shapes

    def setting(self, node: Node, position: int, attribute: str) -> Any | None:
        """Returns a setting: an input since some operator set, an attribute before; None where it is computed."""
        name = node.inputs[position] if position < len(node.inputs) else ""
        return value_of(self.model, name) if name else node.attribute(attribute)

    def is_computed(self, node: Node, position: int) -> bool:
        """Tells whether an input is given, and is not constant."""
        name = node.inputs[position] if position < len(node.inputs) else ""
        return bool(name) and value_of(self.model, name) is None


def routes(facts: Facts, node: Node, known: Sequence[Lying | None]) -> Routes | None:
    """Returns for each result of a node where its channels come from; None where the node does more than move values.

    Law: where all values of a channel are one number, those of the result are what `Route.gather` gives of them,
    beside zeros where the route `fills`. Where the values differ, those of the result lie between the channel's least
    and largest, if the route `stays_within`.

    Args:
        facts: The graph's.
        node: The node.
        known: For each input how its channels lie; None where that is not known.
    """
    rule = None if node.domain else _RULES.get(node.op_type)
    if rule is None:
        return None
    if not any(known):
        return [None for _ in node.outputs]
    if node.op_type != "Concat" and known[0] is None:
        return [None for _ in node.outputs]
    return rule(facts, node, known)


def _straight(lying: Lying, axis: int | None = None, repeats: Size | None = None, *, fills: bool = False) -> Route:
    """Returns the route on which every channel of the first input keeps its number."""
    return Route(
        lying.axis if axis is None else axis,
        np.zeros(lying.count, int),
        np.arange(lying.count),
        lying.repeats if repeats is None else repeats,
        fills,
    )


def _picked(lying: Lying, index: Iterable[int]) -> Route:
    """Returns the route on which the result has these channels of the first input; a negative one is zeros."""
    found = np.fromiter(index, int)
    return Route(lying.axis, np.where(found < 0, ZEROS, 0), np.maximum(found, 0))


def _same(facts: Facts, node: Node, known: Sequence[Lying | None]) -> Routes:
    del facts
    first = known[0]
    return [first and _straight(first), *(None for _ in node.outputs[1:])]


def _transpose(facts: Facts, node: Node, known: Sequence[Lying | None]) -> Routes:
    first, rank = known[0], facts.ranks.get(node.inputs[0])
    order = node.attribute("perm")
    if order is None and rank is None:
        return "its rank is not known"
    order = tuple(order or reversed(range(rank or 0)))
    return [_straight(first, order.index(first.axis))] if first else [None]


def _in_same_order(facts: Facts, node: Node, known: Sequence[Lying | None]) -> Routes:
    """The rule of what changes axes alone: Flatten, Reshape, a Squeeze that names no axes."""
    first = known[0]
    if first is None:
        return [None]
    here, there = facts.shapes.get(node.inputs[0]), facts.shapes.get(node.output)
    if here is None or there is None or first.axis >= len(here):
        return "the axes on either side of it are not known"
    found = across(node, Passing(first.count, first.axis, first.repeats), here, there, forward=True)
    if found is None or there[found.axis] != Size(first.count) * found.repeats:
        return "it is not known to keep the channels apart"
    return [_straight(first, found.axis, found.repeats)]


def _squeeze(facts: Facts, node: Node, known: Sequence[Lying | None]) -> Routes:
    """The rule of Squeeze and Unsqueeze: what they take away or add is single."""
    first, rank = known[0], facts.ranks.get(node.inputs[0])
    axes = facts.setting(node, 1, "axes")
    if facts.is_computed(node, 1) or rank is None:
        return "its axes are not known"
    if first is None or axes is None:
        return _in_same_order(facts, node, known)
    behind = rank + (np.size(axes) if node.op_type == "Unsqueeze" else 0)
    named = {int(axis) % behind for axis in np.ravel(axes)}
    kept = [axis for axis in range(behind) if axis not in named]
    if node.op_type == "Unsqueeze":
        return [_straight(first, kept[first.axis])]
    return [_straight(first, kept.index(first.axis))] if first.axis in kept else "it drops the channels"


def _concat(facts: Facts, node: Node, known: Sequence[Lying | None]) -> Routes:
    rank = next((facts.ranks[name] for name in node.inputs if name in facts.ranks), None)
    parts = [lying for lying in known if lying is not None]
    first = parts[0]
    if rank is None or len(parts) < len(known) or any(part.axis != first.axis for part in parts):
        return "the channels of some of its inputs are not known"
    if any(part.repeats != ONE for part in parts):
        return "how many numbers a channel has is not known"
    if int(node.attribute("axis", 1)) % rank != first.axis:
        return "it joins them along another axis"
    counts = [part.count for part in parts]
    source = np.repeat(np.arange(len(parts)), counts)
    return [Route(first.axis, source, np.concatenate([np.arange(count) for count in counts]))]


def _split(facts: Facts, node: Node, known: Sequence[Lying | None]) -> Routes:
    first, rank = known[0], facts.ranks.get(node.inputs[0])
    if first is None:
        return [None for _ in node.outputs]
    if rank is None:
        return "its rank is not known"
    if int(node.attribute("axis", 0)) % rank != first.axis:
        return [_straight(first) for _ in node.outputs]
    sizes = facts.setting(node, 1, "split")
    if facts.is_computed(node, 1) or first.repeats != ONE:
        return "the sizes of its parts are not known"
    count, size = len(node.outputs), first.count
    sizes = [-(-size // count)] * (count - 1) if sizes is None else [int(each) for each in np.ravel(sizes)]
    ends = [0, *np.cumsum(sizes[: count - 1]).tolist(), size]
    return [_picked(first, range(ends[i], ends[i + 1])) for i in range(count)]


def _slice(facts: Facts, node: Node, known: Sequence[Lying | None]) -> Routes:
    first, rank = known[0], facts.ranks.get(node.inputs[0])
    if first is None:
        return [None]
    cuts = slices_of(facts, node)
    if rank is None or cuts is None:
        return "where it starts and ends is not known"
    if all(axis % rank != first.axis for axis, _ in cuts):
        return [_straight(first)]
    if first.repeats != ONE:
        return "how many numbers a channel has is not known"
    return [_picked(first, kept_by_slice(cuts, first.axis, rank=rank, size=first.count))]


def _within(cut: slice, size: int) -> slice:
    """Returns a slice as Python has it, where ONNX's, going back, is at the first element if it lies before that."""
    if cut.step > 0:
        return cut
    return slice(max(cut.start, -size), None if cut.stop < -size else cut.stop, cut.step)


def kept_by_slice(cuts: Iterable[tuple[int, slice]], axis: int, *, rank: int, size: int) -> range:
    """Returns the places along one axis that a Slice keeps, in their new order.

    Args:
        cuts: The axes that it cuts and how, as `slices_of` returns them.
        axis: The axis, from the front.
        rank: The number of axes.
        size: The number of places along the axis.
    """
    kept = range(size)
    for cut in (cut for at, cut in cuts if at % rank == axis):
        kept = kept[_within(cut, len(kept))]
    return kept


def slices_of(facts: Facts, node: Node) -> list[tuple[int, slice]] | None:
    """Returns the axes that a Slice cuts, and how; None where that is computed."""
    if any(facts.is_computed(node, position) for position in range(1, len(node.inputs))):
        return None
    names = ("starts", "ends", "axes", "steps")
    starts, ends, axes, steps = (facts.setting(node, position, name) for position, name in enumerate(names, 1))
    if starts is None or ends is None:
        return None
    starts, ends = np.ravel(starts).tolist(), np.ravel(ends).tolist()
    axes = list(range(len(starts))) if axes is None else np.ravel(axes).tolist()
    steps = [1] * len(starts) if steps is None else np.ravel(steps).tolist()
    found = zip(axes, starts, ends, steps, strict=True)
    return [(int(axis), slice(int(start), int(end), int(step))) for axis, start, end, step in found]


def pads_of(facts: Facts, node: Node) -> np.ndarray | None:
    """Returns how much a Pad adds before and behind each axis, [2, rank]; None where that is not known."""
    rank, pads = facts.ranks.get(node.inputs[0]), facts.setting(node, 1, "pads")
    if rank is None or pads is None or any(node.inputs[3:]) or np.size(pads) != 2 * rank:
        return None
    return np.asarray(pads).reshape(2, rank)


def _pad(facts: Facts, node: Node, known: Sequence[Lying | None]) -> Routes:
    first, ends = known[0], pads_of(facts, node)
    if ends is None:
        return "how much it pads is not known"
    if first is None:
        return [None]
    before, after = ends[:, first.axis].tolist()
    if node.attribute("mode", "constant") != "constant":
        return "it pads with other channels" if before or after else [_straight(first)]
    filling = facts.setting(node, 2, "value")
    if facts.is_computed(node, 2) or (filling is not None and np.any(filling)):
        return "it pads with something other than zeros"
    if before < 0 or after < 0 or (first.repeats != ONE and (before or after)):
        return "it cuts channels off"
    index = [ZEROS] * before + list(range(first.count)) + [ZEROS] * after
    fills = bool(np.any(np.delete(ends, first.axis, axis=1) > 0))
    return [replace(_picked(first, index), repeats=first.repeats, fills=fills)]


def _resize(facts: Facts, node: Node, known: Sequence[Lying | None]) -> Routes:
    first, rank = known[0], facts.ranks.get(node.inputs[0])
    if first is None:
        return [None]
    factors = value_of(facts.model, node.inputs[-1]) if len(node.inputs) in {2, 3} else node.attribute("scales")
    is_plain = node.attribute("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
    if rank is None or factors is None or np.size(factors) != rank or not is_plain:
        return "what it does to the channels is not known"
    if float(np.ravel(factors)[first.axis]) != 1.0:
        return "it resizes along the channels"
    is_mean = node.attribute("mode", "nearest") != "cubic"  # of neighbours, weights from 0 to 1; cubic ones overshoot
    return [replace(_straight(first), stays_within=is_mean)]


_RULES: Mapping[str, Callable[[Facts, Node, Sequence[Lying | None]], Routes]] = {
    **dict.fromkeys(("Identity", "Dropout"), _same),
    **dict.fromkeys(("Flatten", "Reshape"), _in_same_order),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _squeeze),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Concat": _concat,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}
"""By operator of ONNX."""

ROUTED = frozenset(_RULES)
"""The operators that only move values."""
