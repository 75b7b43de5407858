"""How noise in each channel of each tensor reaches the outputs, from weights and statistics alone: one backward sweep.

Noise of variance one in every element of a channel adds to the outputs the sum over places of the squared derivative.
The backward sweep yields a map of derivatives per channel. Kept of it are its mean over places, along up to 16
directions of the output, and the sum of squares of the remainder. The means are added and multiplied as they are,
with their signs: behind a global pool all places have one derivative, so that a filter adds up its taps, and a
residual sum its branches, before anything is squared. Activations let some places through and others not: there the
rest grows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import jax
import numpy as np

from ptqjax.ir import Model, Node, value_of
from ptqjax.kernels.moments import passing_probability
from ptqjax.transforms.activations import limits_of
from ptqjax.transforms.linear import Linear, linear_layers, weight_view
from ptqjax.transforms.moments import Distribution, Known
from ptqjax.transforms.places import kept_places, places_of, window
from ptqjax.transforms.routes import Facts, Route, routes

_ACTIVATIONS = frozenset({"Clip", "LeakyRelu", "Max", "Min", "PRelu", "Relu"})
_SAME = frozenset({"Add", "Sub", "Sum", "Neg", "Identity", "Dropout", "Transpose", "Flatten", "Reshape", "Squeeze"})

_PROBES = 16  # directions of the output that are followed, where it has more channels; 64 agree no better with data


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """What is sent back to a tensor."""

    mean: np.ndarray
    """Mean of the derivatives over the places, times the root of their number, [directions, c]."""
    rest: np.ndarray
    """Sum over directions and places of the squares of what is left, [c]."""

    @property
    def whole(self) -> np.ndarray:
        """Sum of all squares, [c]."""
        return (self.mean**2).sum(axis=0) + self.rest

    def __add__(self, other: Gain) -> Gain:
        return Gain(mean=self.mean + other.mean, rest=self.rest + other.rest)

    def times(self, factor: np.ndarray, square: np.ndarray) -> Gain:
        """Returns the gain in front of a factor that has this mean and mean square, place by place."""
        return gain_of(self.mean * factor, self.whole * square)

    def mapped(self, function: Callable[[np.ndarray], np.ndarray]) -> Gain:
        """Returns the gain with `function` of its arrays, which works on the last axis."""
        return Gain(mean=function(self.mean), rest=function(self.rest))


def gain_of(mean: np.ndarray, whole: np.ndarray) -> Gain:
    """Returns the gain with this mean and sum of all squares."""
    return Gain(mean=mean, rest=np.maximum(whole - (mean**2).sum(axis=0), 0.0))


def channel_gains(model: Model, known: Known) -> dict[str, np.ndarray]:
    """Returns for each tensor that reaches an output what noise of variance one in a channel adds to the outputs, [c].

    The sum over places of the squared derivative of the outputs, each output in units of its mean sum of squares (or
    one, where no moments of it are known), as `fit.observe_behaviour` measures it. Exact for convolutions (stride,
    dilation and padding too), matrices, average pools and sums, as long as the derivatives of a channel are the same at
    all places and the output has no more channels than directions are followed. What differs from place to place is
    taken to be independent between channels and places. Activations pass with the probability that their input lies
    within their limits, each place and channel by itself. Gains of several readers add; a maximum sends
    each window's to one place. An operator that is not followed (Softmax, say) sends every channel of its inputs
    the mean of its outputs' gains: left out, what lies before it would count as free of cost.

    Args:
        model: The model; parameters must not be traced.
        known: Distributions of its tensors, `moments.distributions`.
    """
    sweep = _Sweep(model.replace(params=jax.tree.map(np.asarray, dict(model.params))), known)
    return {name: gain.whole for name, gain in sweep.run().items()}


class _Sweep:
    """One walk through a graph, from its outputs back."""

    def __init__(self, model: Model, known: Known) -> None:
        self.model, self.known = model, known
        self.facts = Facts(model)
        self.places = places_of(model)
        self.layers = {layer.output: layer for layer in linear_layers(model).values()}
        self.products = {layer.node.output for layer in self.layers.values() if layer.bias_node is not None}
        self.num_directions = _PROBES
        self.gains: dict[str, Gain] = {}

    def run(self) -> dict[str, Gain]:
        for name in self.model.graph.output_names:
            self.start(name)
        for node in reversed(self.model.graph.nodes):
            if node.output in self.products:
                continue  # belongs to the Add behind it
            layer = self.layers.get(node.output)
            if layer is not None and layer.output in self.gains:
                self.send(layer.input, self.through_layer(layer, self.gains[layer.output]))
            elif layer is None:
                self.follow(node)
        return self.gains

    def start(self, name: str) -> None:
        """Gives an output its gain: one over its mean sum of squares, places apart."""
        layer, known = self.layers.get(name), self.known.get(name)
        if known is None and layer is None:
            return
        count = known.mean.shape[0] if known is not None else layer.num_outputs  # pyright: ignore[reportOptionalMemberAccess]
        power = 1.0
        if known is not None:
            moments = known.moments
            power = float(np.sum(np.asarray(moments.mean) ** 2 + np.asarray(moments.std) ** 2)) or 1.0
        rest = np.full(count, float(self.num_places(name) > 1))
        mean = (1 - rest) * _directions(self.num_directions, count)
        self.send(name, Gain(mean=mean / np.sqrt(power), rest=rest / power))

    def num_places(self, name: str) -> int:
        return prod(self.places.get(name, ()))

    def channels(self, name: str) -> int | None:
        known = self.known.get(name)
        return None if known is None else known.mean.shape[0]

    def send(self, name: str, gain: Gain | None) -> None:
        """Adds what one reader sends to a tensor; behind a Flatten, what the places of one channel get is added up."""
        if gain is None or name in self.model.params or name in self.model.graph.constant_values or not name:
            return
        size = len(gain.rest)
        count = self.channels(name) or size
        if size != count:
            if size % count:
                return
            gain = self.rest_only(gain.whole.reshape(count, -1).sum(axis=1))
        if name in self.gains and self.gains[name].rest.shape != gain.rest.shape:
            return
        self.gains[name] = self.gains[name] + gain if name in self.gains else gain

    def rest_only(self, whole: np.ndarray) -> Gain:
        return Gain(mean=np.zeros((self.num_directions, len(whole))), rest=whole)

    def follow(self, node: Node) -> None:
        gains = {name: self.gains[name] for name in node.outputs if name in self.gains}
        if not gains:
            return
        rule = None if node.domain else _RULES.get(node.op_type)
        found = rule(self, node, gains) if rule is not None else None
        for name in dict.fromkeys(node.inputs):
            if name not in self.model.params:
                self.send(name, found.get(name) if found is not None else self.unfollowed(name, gains))

    def unfollowed(self, name: str, gains: Mapping[str, Gain]) -> Gain | None:
        count = self.channels(name)
        mean = np.concatenate([gain.whole for gain in gains.values()]).mean()
        return None if count is None else self.rest_only(np.full(count, mean))

    # --- layers and windows

    def through_layer(self, layer: Linear, gain: Gain) -> Gain:
        view = np.asarray(weight_view(self.model, layer), np.float32)  # half the time; the sums are short
        groups, outputs = view.shape[:2]
        if layer.node.op_type == "Conv":
            counts, overlaps = self.taps(layer.node)
        else:
            counts, overlaps = np.ones(view.shape[3], np.float32), np.eye(view.shape[3], dtype=np.float32)
        share = self.num_places(layer.output) / max(self.num_places(layer.input), 1)
        share = 1 / max(share, 1.0) if layer.node.op_type == "ConvTranspose" else share
        mean = gain.mean.reshape(-1, groups, outputs).swapaxes(0, 1)
        sent = mean.astype(np.float32) @ view.reshape(groups, outputs, -1)
        sent = sent.reshape(*sent.shape[:2], *view.shape[2:])
        from_mean = np.einsum("gdik,gdik->gi", sent @ overlaps, sent)
        rest = gain.rest.astype(np.float32).reshape(groups, 1, outputs)
        from_rest = (rest @ (view**2).reshape(groups, outputs, -1)).reshape(groups, *view.shape[2:]) @ counts
        to_mean = (sent @ counts).swapaxes(0, 1).reshape(len(gain.mean), -1) * np.sqrt(share)
        return gain_of(to_mean, (from_mean + from_rest).ravel())

    def taps(self, node: Node) -> tuple[np.ndarray, np.ndarray]:
        """Returns how often each tap lies within the input, [k], and how often two of them meet there, [k, k].

        Per place of the output. Two taps meet where, for different outputs, they lie on one place of the input.
        """
        sizes = self.places[node.inputs[0]]
        kernel, strides, dilations, padding = window(self.model, node, sizes)
        axes = [
            _meetings(size, behind, taps, stride=stride, dilation=dilation, low=low)
            for size, behind, taps, stride, dilation, (low, _) in zip(
                sizes, self.places[node.output], kernel, strides, dilations, padding, strict=True
            )
        ]
        overlaps = reduce(np.kron, axes, np.ones((1, 1))).astype(np.float32)
        return np.diag(overlaps).copy(), overlaps

    def average(self, node: Node, gains: Mapping[str, Gain]) -> dict[str, Gain]:
        counts, overlaps = self.taps(node)
        gain, size = gains[node.output], len(counts)
        share = self.num_places(node.output) / max(self.num_places(node.inputs[0]), 1)
        whole = (overlaps.sum() * (gain.mean**2).sum(axis=0) + counts.sum() * gain.rest) / size**2
        return {node.inputs[0]: gain_of(counts.sum() / size * np.sqrt(share) * gain.mean, whole)}

    def maximum(self, node: Node, gains: Mapping[str, Gain]) -> dict[str, Gain]:
        share = self.num_places(node.output) / max(self.num_places(node.inputs[0]), 1)
        gain = gains[node.output]
        return {node.inputs[0]: gain_of(gain.mean * np.sqrt(share), gain.whole)}

    def over_all(self, node: Node, gains: Mapping[str, Gain]) -> dict[str, Gain] | None:
        """A mean over all places: each gets the same."""
        gain, places = gains[node.output], max(self.num_places(node.inputs[0]), 1)
        if node.op_type == "ReduceMean" and self.channels(node.inputs[0]) != len(gain.rest):
            return None
        return {node.inputs[0]: Gain(mean=gain.mean / np.sqrt(places), rest=gain.rest / places)}

    # --- element by element

    def same(self, node: Node, gains: Mapping[str, Gain]) -> dict[str, Gain]:
        gain = gains[node.output]
        turned = replace(gain, mean=-gain.mean)
        positive = () if node.op_type == "Neg" else node.inputs[:1] if node.op_type == "Sub" else node.inputs
        return {name: gain if name in positive else turned for name in node.inputs}

    def activation(self, node: Node, gains: Mapping[str, Gain]) -> dict[str, Gain] | None:
        tensor = next((name for name in node.inputs if name in self.known), "")
        known, gain = self.known.get(tensor), gains[node.output]
        is_one = sum(name not in self.model.params for name in node.inputs if name) == 1
        if known is None or not is_one or known.mean.shape[0] != len(gain.rest):
            return None
        return {tensor: gain.times(*_slopes(self.model, node, known))}

    def product(self, node: Node, gains: Mapping[str, Gain]) -> dict[str, Gain] | None:
        gain, found = gains[node.output], {}
        for name, other in zip(node.inputs, node.inputs[::-1], strict=True):
            if name in self.model.params:
                continue
            factor = self.factor(other, len(gain.rest))
            if factor is None or (node.op_type == "Div" and other not in self.model.params):
                return None
            mean, square = factor if node.op_type == "Mul" else (1 / factor[0], 1 / factor[1])
            found[name] = gain.times(mean, square)
        return found

    def factor(self, name: str, count: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns mean and mean square of what a tensor is multiplied with, [c] or [1]."""
        value = value_of(self.model, name)
        if value is not None:
            values = np.asarray(value, np.float64).ravel()
            return (values, values**2) if values.size in {1, count} else None
        moments = None if name not in self.known else self.known[name].moments
        if moments is None or moments.mean.shape[0] != count:
            return None
        return moments.mean, moments.mean**2 + moments.std**2

    # --- what moves channels

    def moved(self, node: Node, gains: Mapping[str, Gain]) -> dict[str, Gain] | None:
        """What a Concat or Split moves, back to where it came from."""
        known = [self.known.get(name) for name in node.inputs]
        found = routes(self.facts, node, [each and each.lying for each in known])
        if not isinstance(found, list):
            return self.joined(node, gains) if node.op_type == "Concat" else None
        ways = zip(node.outputs, found, strict=True)
        reached = [(route, gains[out]) for out, route in ways if route is not None and out in gains]
        sent: dict[str, Gain] = {}
        for position, (name, each) in enumerate(zip(node.inputs, known, strict=True)):
            if each is not None and reached:
                parts = [_back(route, gain, position, each.lying.count) for route, gain in reached]
                sent[name] = reduce(Gain.__add__, [*parts, *([sent[name]] if name in sent else [])])
        return sent

    def joined(self, node: Node, gains: Mapping[str, Gain]) -> dict[str, Gain] | None:
        """What tensors of the same channels that are joined along another axis get."""
        gain = gains[node.output]
        is_alike = all(self.channels(name) == len(gain.rest) for name in node.inputs)
        return dict.fromkeys(node.inputs, gain) if is_alike else None

    def cut(self, node: Node, gains: Mapping[str, Gain]) -> dict[str, Gain] | None:
        """What a Pad or Slice leaves in place."""
        count, gain = self.channels(node.inputs[0]), gains[node.output]
        if count is None:
            return None
        axis, sizes = self.known[node.inputs[0]].axis, self.places[node.inputs[0]]
        kept = kept_places(self.facts, node, axis, count)
        if len(kept) != len(gain.rest):
            return None
        taken = (kept[:, None] == np.arange(count)).astype(gain.rest.dtype)  # [channels behind, channels]
        within = [kept_places(self.facts, node, i, size) for i, size in enumerate(sizes, 2) if i != axis]
        seen, behind = prod(int((places >= 0).sum()) for places in within), prod(map(len, within))
        mean, rest = gain.mean @ taken, gain.rest @ taken
        whole = ((mean**2).sum(axis=0) + rest) * seen / max(behind, 1)
        return {node.inputs[0]: gain_of(mean * seen / np.sqrt(max(behind * prod(sizes), 1)), whole)}


def _back(route: Route, gain: Gain, position: int, count: int) -> Gain:
    """Returns what of a gain goes back along a route to the channels of one input, of which there are `count`."""
    own = route.source == position
    taken = np.zeros((len(gain.rest), count), gain.rest.dtype)
    taken[np.flatnonzero(own), route.index[own]] = 1
    return gain.mapped(lambda values: values @ taken)


def _directions(count: int, outputs: int) -> np.ndarray:
    """Returns directions whose squares add up to one in each output: its axes, or signs where there are too many."""
    if outputs <= count:
        return np.eye(count, outputs)
    return np.random.default_rng(0).choice([-1.0, 1.0], (count, outputs)) / np.sqrt(count)


def _meetings(size: int, behind: int, taps: int, *, stride: int, dilation: int, low: int) -> np.ndarray:
    """Returns along one axis how often two taps meet on a place of the input, [taps, taps], per output place."""
    places = np.arange(behind)[:, None] * stride + np.arange(taps) * dilation - low
    within = (places >= 0) & (places < size)
    at = np.zeros((size, taps))
    np.add.at(at, (places[within], np.broadcast_to(np.arange(taps), places.shape)[within]), 1.0)
    return at.T @ at / behind


def _slopes(model: Model, node: Node, known: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and mean square of an activation's derivative, [c]."""
    if node.op_type in {"LeakyRelu", "PRelu"}:
        below = node.attribute("alpha", 0.01) if node.op_type == "LeakyRelu" else model.params[node.inputs[1]].ravel()
        above = passing_probability(known.mean, known.std, *_before(known, 0.0, np.inf))
        return above + below * (1 - above), above + np.asarray(below) ** 2 * (1 - above)
    passing = passing_probability(known.mean, known.std, *_before(known, *limits_of(model, node)))
    return passing, passing


def _before(known: Distribution, low: Any, high: Any) -> tuple[Any, Any]:
    """Returns the limits of the normal variable between which what follows from it lies within low and high."""
    found = []
    for limit, is_idle, idle in ((low, low < known.low, -np.inf), (high, high > known.high, np.inf)):
        slope = np.where(known.slope > 0, known.slope, 1.0)
        found.append(np.where(is_idle, idle, np.where(np.asarray(limit) < 0, limit / slope, limit)))
    return found[0], found[1]


_Rule = Callable[[_Sweep, Node, Mapping[str, Gain]], "dict[str, Gain] | None"]
_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_SAME, _Sweep.same),
    **dict.fromkeys(_ACTIVATIONS, _Sweep.activation),
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), _Sweep.over_all),
    **dict.fromkeys(("MaxPool", "GlobalMaxPool"), _Sweep.maximum),
    **dict.fromkeys(("Mul", "Div"), _Sweep.product),
    **dict.fromkeys(("Pad", "Slice"), _Sweep.cut),
    "AveragePool": _Sweep.average,
    **dict.fromkeys(("Concat", "Split"), _Sweep.moved),
}
