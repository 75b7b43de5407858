"""What batch norms tell of every tensor, channel by channel, without data: distributions, moments and ranges.

A tensor with `statistics` is normal with that mean and deviation. Forward through the graph, what follows it is that
normal variable behind piecewise linear functions (exact), or a normal variable of the mean and variance that follow
when channels, positions and summands are taken to be independent (approximate). What depends on anything else is
unknown. Padding is ignored: borders are treated like the interior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ptqjax.ir import Model, Node, Statistics, value_of
from ptqjax.kernels.grouped import respond_to_constant
from ptqjax.kernels.moments import clipped_normal, leaky_normal
from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.precision import is_traced, widened
from ptqjax.pytrees import PyTreeNode, static_field
from ptqjax.transforms.activations import is_activation, limits_of
from ptqjax.transforms.bounds import channel_bounds
from ptqjax.transforms.input_moments import input_moments
from ptqjax.transforms.linear import Linear, bias_of, linear_layers, weight_view
from ptqjax.transforms.routes import ROUTED, Facts, Lying, Route, routes
from ptqjax.transforms.sizes import ONE, Size

_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
_SUMS = frozenset({"Add", "Sub", "Sum"})
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})
_MATRIX = 2  # axes


class Distribution(PyTreeNode):
    """What is known of a tensor's channels: clip(f(x), low, high), x normal, f(x) = x above zero and slope x below."""

    mean: Any
    """The mean of the normal variable, [c]."""
    std: Any
    """The deviation of the normal variable, [c]; not negative."""
    low: Any
    """Least value, [c]; may be -inf."""
    high: Any
    """Largest value, [c]; may be inf."""
    slope: Any
    """The slope of f below zero, [c]; not negative, one where there is no such kink."""
    axis: int = static_field(default=1)
    """The axis that counts the channels."""
    repeats: Size = static_field(default=ONE)
    """How many neighbours on the axis belong to one channel, as behind a Flatten."""

    @property
    def lying(self) -> Lying:
        """How the channels lie."""
        return Lying(self.axis, self.mean.shape[0], self.repeats)

    @property
    def moments(self) -> Statistics:
        """Mean and standard deviation of each channel."""
        mean, variance = leaky_normal(self.mean, self.std, self.slope, self.low, self.high)
        plain = clipped_normal(self.mean, self.std, self.low, self.high)
        xp = array_namespace(mean)
        is_plain = self.slope == 1
        mean, variance = xp.where(is_plain, plain[0], mean), xp.where(is_plain, plain[1], variance)
        return Statistics(mean=mean, std=_root(variance))

    def at(self, deviations: float) -> Any:
        """Returns the value of each channel so many standard deviations of the normal variable above its mean."""
        xp = array_namespace(self.mean)
        x = self.mean + deviations * self.std
        return xp.clip(xp.where(x < 0, self.slope * x, x), self.low, self.high)

    def clipped(self, low: Any, high: Any) -> Distribution:
        """Returns the distribution behind a clip."""
        xp = array_namespace(self.mean, low, high)
        return self.replace(low=xp.clip(self.low, low, high), high=xp.clip(self.high, low, high))

    def repeated(self, num_channels: int) -> Distribution | None:
        """Returns the distribution of so many channels, which may stand behind a Flatten; None if they do not fit."""
        size = self.mean.shape[0]
        if size == num_channels:
            return self.replace(repeats=ONE)
        if self.repeats == ONE or num_channels % size:
            return None
        return self.mapped(lambda values: values.repeat(num_channels // size), repeats=ONE)

    def mapped(self, function: Callable[[Any], Any], **static: Any) -> Distribution:
        """Returns the distribution with `function` of each array, and other static fields."""
        fields = {name: function(getattr(self, name)) for name in ("mean", "std", "low", "high", "slope")}
        return self.replace(**fields, **static)


Known: TypeAlias = "dict[str, Distribution]"
"""Distributions by tensor."""


def normal(mean: Any, std: Any, *, axis: int = 1) -> Distribution:
    """Returns the distribution of normal channels."""
    xp = array_namespace(mean, std)
    ones = xp.ones_like(mean)
    return Distribution(mean=mean, std=xp.abs(std), low=-np.inf * ones, high=np.inf * ones, slope=ones, axis=axis)


def channel_moments(model: Model) -> dict[str, Statistics]:
    """Returns mean and standard deviation per channel of every tensor for which they follow, see `distributions`.

    Channels are those of axis 1, or of the last axis behind a MatMul of more than two axes; behind a Flatten, those
    before it.
    """
    return {name: found.moments for name, found in distributions(model).items()}


def channel_ranges(model: Model, *, num_std: float = 6.0) -> dict[str, tuple[Any, Any]]:
    """Returns least and largest value per channel: `num_std` deviations around the mean, within what is provable.

    Through an activation go the ends, so that a clipped channel's range is clipped. Where interval arithmetic
    (`bounds.channel_bounds`) proves a narrower range, that is taken.
    """
    found = within_bounds(model, distributions(model))
    return {name: (known.at(-num_std), known.at(num_std)) for name, known in found.items()}


def within_bounds(model: Model, known: Mapping[str, Distribution]) -> Known:
    """Returns the distributions clipped to the provable bounds of their tensors."""
    bounds = channel_bounds(model, linear_layers(model))
    return {
        name: found.clipped(*bounds[name]) if name in bounds and bounds[name][0].shape == found.mean.shape else found
        for name, found in known.items()
    }


def distributions(model: Model) -> Known:
    """Returns the distribution per channel of every tensor for which one follows from `model.statistics`.

    Exact, given the statistics: activations (a negative slope aside), Concat, Split, Slice, products with and sums of
    constants. Approximate: sums of tensors and linear layers without statistics (independent summands), average pools
    (the mean is exact; the deviation is kept, which is 1.6 to 2.3 times what it is behind the global pools of the
    MobileNets and ResNet-20: but the layer behind them has correlated inputs, and a range must hold its logits),
    MaxPool (as its input), graph inputs (`input_moments`).
    """
    finder = _Finder(model)
    stated = {spec.name: model.statistics[spec.name] for spec in model.graph.inputs if spec.name in model.statistics}
    for name, known in (input_moments(model) | stated).items():
        finder.known[name] = normal(known.mean, known.std)
    for node in model.graph.nodes:
        finder.visit(node)
    return finder.known


class _Finder:
    """One walk through a graph."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.facts = Facts(model)
        self.ranks = self.facts.ranks
        self.layers = {id(layer.bias_node or layer.node): layer for layer in linear_layers(model).values()}
        self.inside = {layer.node.output for layer in linear_layers(model).values() if layer.bias_node is not None}
        self.known: Known = {}

    def visit(self, node: Node) -> None:
        """Takes in what follows for the tensors that `node` produces."""
        found = {} if node.domain else self._followed(node)
        for name in filter(None, node.outputs):
            stated = self.model.statistics.get(name)
            if stated is not None:
                self.known[name] = normal(stated.mean, stated.std)
            elif name in found:
                self.known[name] = found[name]

    def _followed(self, node: Node) -> Known:
        if node.op_type in ROUTED:
            return self._moved(node)
        layer = self.layers.get(id(node))
        found = self._linear(layer) if layer is not None else self._single(node)
        return {} if found is None else {node.output: found}

    def _single(self, node: Node) -> Distribution | None:
        tensor = next((name for name in node.inputs if name in self.known), "")
        if node.output in self.inside or not tensor:
            return None
        known = self.known[tensor]
        if node.op_type in _SUMS and sum(name in self.known for name in node.inputs) > 1:
            return self._sum(node)
        if node.op_type in _ARITHMETIC:
            return self._with_constant(node, tensor, known)
        if self._is_activation(node, tensor, known):
            return self._activated(node, known)
        rule = _RULES.get(node.op_type)
        return rule(self, node, known) if rule is not None and node.inputs[0] == tensor else None

    def _is_activation(self, node: Node, tensor: str, known: Distribution) -> bool:
        if node.op_type in {"Relu", "LeakyRelu"}:
            return True
        size, rank = known.mean.shape[0], self.ranks.get(tensor)
        is_usual = known.axis == 1 and rank is not None and known.repeats == ONE
        return is_usual and is_activation(self.model, node, tensor, size, (rank or _MATRIX) - 2)

    def _linear(self, layer: Linear) -> Distribution | None:
        """Returns the normal distribution with mean W E[x] + b and variance sum W^2 var[x]."""
        known = self.layer_input(layer)
        if known is None:
            return None
        view, moments = weight_view(self.model, layer), known.moments
        mean = respond_to_constant(view, moments.mean) + bias_of(self.model, layer)
        return normal(mean, _root(respond_to_constant(view**2, moments.std**2)), axis=known.axis)

    def layer_input(self, layer: Linear) -> Distribution | None:
        """Returns the distribution of what a layer reads, one per input channel; None where it does not follow."""
        known = self.known.get(layer.input)
        rank = self.ranks.get(layer.input)
        axis = 1 if layer.channels_at_1 else (rank or 0) - 1
        if known is None or known.axis != axis:
            return None
        return known.repeated(layer.num_inputs)

    def _activated(self, node: Node, known: Distribution) -> Distribution:
        xp = array_namespace(known.mean)
        if node.op_type not in {"LeakyRelu", "PRelu"}:
            low, high = limits_of(self.model, node)
            return known.clipped(low, high)
        slope = (
            node.attribute("alpha", 0.01)
            if node.op_type == "LeakyRelu"
            else widened(self.model.params[node.inputs[1]]).reshape(-1)
        )
        if is_traced(slope) or np.any(np.asarray(slope) < 0):  # no monotone function of the normal variable
            moments = known.moments
            mean, variance = leaky_normal(moments.mean, moments.std, slope)
            return normal(mean, _root(variance))
        low, high = (xp.where(limit < 0, slope * limit, limit) for limit in (known.low, known.high))
        return known.replace(low=low, high=high, slope=known.slope * slope)

    def _sum(self, node: Node) -> Distribution | None:
        if not all(name in self.known for name in node.inputs):
            return None
        parts = [self.known[name] for name in node.inputs]
        if len({(part.mean.shape, part.axis, part.repeats) for part in parts}) > 1:
            return None
        if len({self.ranks.get(name) for name in node.inputs}) > 1 and parts[0].axis != 1:
            return None
        signs = (1.0, -1.0) if node.op_type == "Sub" else (1.0,) * len(parts)
        weights = dict.fromkeys(node.inputs, 0.0)
        for name, sign in zip(node.inputs, signs, strict=True):
            weights[name] += sign  # a tensor that is added to itself is not independent of itself
        moments = {name: self.known[name].moments for name in weights}
        mean = sum(weight * moments[name].mean for name, weight in weights.items())
        variance = sum(weight**2 * moments[name].std ** 2 for name, weight in weights.items())
        return normal(mean, _root(variance), axis=parts[0].axis).replace(repeats=parts[0].repeats)

    def _with_constant(self, node: Node, tensor: str, known: Distribution) -> Distribution | None:
        """Returns the distribution of x + c, c - x, x c or x / c; c is one number, or one per channel."""
        other = next((name for name in node.inputs if name != tensor), "")
        value = value_of(self.model, other) if len(node.inputs) == _MATRIX else None
        constant = None if value is None else self._per_channel(value, tensor, known)
        if constant is None or known.repeats != ONE or (node.op_type == "Div" and node.inputs[0] != tensor):
            return None
        factor, shift = {
            "Add": lambda: (1.0, constant),
            "Sub": lambda: (1.0, -constant) if node.inputs[0] == tensor else (-1.0, constant),
            "Mul": lambda: (constant, 0.0),
            "Div": lambda: (1.0 / constant, 0.0),
        }[node.op_type]()
        return _affine(known, factor, shift)

    def _per_channel(self, value: Any, tensor: str, known: Distribution) -> Any | None:
        """Returns a constant operand as one number per channel; None where it is not."""
        shape, size = np.shape(value), known.mean.shape[0]
        if np.size(value) == 1:
            return widened(value).reshape(())
        rank = self.ranks.get(tensor)
        if rank is None or len(shape) > rank:
            return None
        wanted = tuple(size if axis == known.axis else 1 for axis in range(rank))
        return widened(value).reshape(-1) if (1,) * (rank - len(shape)) + shape == wanted else None

    def _moved(self, node: Node) -> Known:
        """Returns the distributions of what only moves values; zeros of padding are left out."""
        known = [self.known.get(name) for name in node.inputs]
        found = routes(self.facts, node, [each and each.lying for each in known])
        names = zip(node.outputs, found if isinstance(found, list) else [], strict=False)
        return {name: _along(route, known) for name, route in names if name and route is not None}


def _along(route: Route, known: Sequence[Distribution | None]) -> Distribution:
    first = next(each for each in known if each is not None)
    xp = array_namespace(first.mean)
    fields = {
        name: route.gather([each and getattr(each, name) for each in known], xp, zero=float(name == "slope"))
        for name in ("mean", "std", "low", "high", "slope")
    }
    found = first.replace(**fields, axis=route.axis, repeats=route.repeats)
    if route.stays_within:
        return found
    return normal(found.moments.mean, found.moments.std, axis=route.axis).replace(repeats=route.repeats)


def _affine(known: Distribution, factor: Any, shift: Any) -> Distribution:
    """Returns the distribution of factor x + shift; normal where a kink would leave zero or turn around."""
    xp = array_namespace(known.mean)
    is_straight = not (is_traced(known.slope) or is_traced(factor)) and np.all(np.asarray(known.slope) == 1)
    keeps_kink = not (is_traced(factor) or is_traced(shift)) and np.all(factor > 0) and not np.any(shift)
    if not (is_straight or keeps_kink):
        moments = known.moments
        return normal(factor * moments.mean + shift, factor * moments.std, axis=known.axis)
    ends = [_times(factor, limit) + shift for limit in (known.low, known.high)]
    low, high = (xp.where(xp.asarray(factor) < 0, ends[1 - i], ends[i]) for i in (0, 1))
    return known.replace(mean=factor * known.mean + shift, std=xp.abs(factor) * known.std, low=low, high=high)


def _times(factor: Any, limit: Any) -> Any:
    """Returns factor * limit, zero where the factor is, however large the limit."""
    xp = array_namespace(factor, limit)
    is_zero = xp.asarray(factor) == 0
    return xp.where(is_zero, 0.0, xp.where(is_zero, 1.0, factor) * limit)


def _root(variance: Any) -> Any:
    """Returns the square root, with derivative zero at zero."""
    xp = array_namespace(variance)
    is_positive = variance > 0
    return xp.where(is_positive, xp.sqrt(xp.where(is_positive, variance, 1.0)), 0.0)


def _same(finder: _Finder, node: Node, known: Distribution) -> Distribution | None:
    del finder, node
    return known


def _is_behind_channels(finder: _Finder, node: Node, known: Distribution) -> bool:
    """Tells whether all axes that a reduction takes away are known and lie behind the channels'."""
    axes, rank = finder.facts.setting(node, 1, "axes"), finder.ranks.get(node.inputs[0])
    return axes is not None and rank is not None and all(int(axis) % rank > known.axis for axis in np.ravel(axes))


def _negated(finder: _Finder, node: Node, known: Distribution) -> Distribution:
    del finder, node
    return _affine(known, -1.0, 0.0)


def _pooled(finder: _Finder, node: Node, known: Distribution) -> Distribution | None:
    if node.op_type == "ReduceMean" and not _is_behind_channels(finder, node, known):
        return None
    moments = known.moments
    return normal(moments.mean, moments.std, axis=known.axis)


_RULES: Mapping[str, Callable[[_Finder, Node, Distribution], Distribution | None]] = {
    "MaxPool": _same,
    **dict.fromkeys(_POOLS, _pooled),
    "Neg": _negated,
}


def layer_input_moments(model: Model) -> dict[str, Statistics]:
    """Returns the moments of what each linear layer reads, one per input channel, by the tensor that it produces."""
    return {name: found.moments for name, found in layer_inputs(model).items()}


def layer_inputs(model: Model, known: Known | None = None) -> Known:
    """Returns the distribution of what each linear layer reads, per input channel, by the tensor that it produces."""
    finder = _Finder(model)
    finder.known = distributions(model) if known is None else known
    found = {layer.output: finder.layer_input(layer) for layer in finder.layers.values()}
    return {name: distribution for name, distribution in found.items() if distribution is not None}
