"""Cross-layer scaling: channels are scaled between layers so that one weight range per tensor serves all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ptqjax.ir import Model, Record, Report, Statistics
from ptqjax.kernels.equalization import (
    common_factors,
    imbalance,
    level,
    log_scales,
    ranges_of_inputs,
    ranges_of_outputs,
    tap_ranges,
)
from ptqjax.kernels.grouped import scale_inputs, scale_outputs
from ptqjax.kernels.intervals import UNBOUNDED
from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.precision import is_traced, widened
from ptqjax.transforms.activations import activated_interval, commutes_with_scaling, limits_of, with_limits
from ptqjax.transforms.interfaces import Interface, find_interfaces
from ptqjax.transforms.linear import Edit, Linear, edited, linear_layers, weight_view
from ptqjax.transforms.weights import WeightAndBias, weights_of, write_back

_NAME = "scale_channels"
_STANDARD_DEVIATIONS = 6.0  # on real pictures channels reach beyond four, see `constant_channels`
_STEP = 1.4  # over-relaxation: a chain of 27 layers takes half the sweeps that it takes at 1 (measured)
_CONVERGED = 3e-4  # largest change of a log scale in the last sweep: ranges equal to 0.1 %, an 8-bit step is 0.8 %
_SWEEPS = 100
_BALANCED = 2e-3  # changes below this are what convergence and the rounding of weights left to an earlier run


def scale_channels(
    model: Model, *, limit: float | None = 2.0, magnitudes: Mapping[str, Any] | None = None
) -> tuple[Model, Report]:
    """Returns the model with its channels scaled between layers, function kept, and for each interface what was done.

    Each interface gets the scales of `kernels.equalization.log_scales`, in turn and again until none changes: so
    pairs, depthwise triples and longer chains balance as a whole. A Clip stays exact: its bounds become one per
    channel (Relu and Min, or Max and Min). Scales are not powers of two: the function is kept up to rounding.

    Args:
        model: The model; batch norms are best folded before, they tell how large activations become.
        limit: How far a channel's activation may reach above the median channel's; None to balance weights alone.
        magnitudes: Largest magnitude per channel of the tensors that layers read, where it was observed on data; else
            it is |mean| + 6 std of `statistics`, through the activation, or the activation's own limits.
    """
    layers = linear_layers(model)
    interfaces, reasons = find_interfaces(model, layers)
    observed = magnitudes or {}
    sizes = [None if limit is None else _magnitude(model, interface, observed) for interface in interfaces]
    chain = _Chain(interfaces=interfaces, ranges=_weight_ranges(model, interfaces))
    scales: Sequence[Any | None] = [None] * len(interfaces)
    if not _is_balanced(chain, sizes, limit or 1.0):
        scales = _balanced(chain, sizes, limit or 1.0)
    figures = [_imbalances(chain, scales, index) for index in range(len(interfaces))]
    records = [_record(*parts) for parts in zip(interfaces, scales, sizes, figures, strict=True)]
    left = [_left(layers[output], reason) for output, reason in reasons.items()]
    return _scaled(model, layers, interfaces, scales), (*records, *left)


@dataclass(frozen=True, kw_only=True)
class _Chain:
    """The interfaces with the weight ranges around them."""

    interfaces: tuple[Interface, ...]
    ranges: Mapping[str, Any]
    """Tap ranges of each layer concerned, by the tensor that it produces."""

    @cached_property
    def before(self) -> tuple[int | None, ...]:
        """For each interface the one that scales the inputs of its producer."""
        index = {found.consumer.output: number for number, found in enumerate(self.interfaces)}
        return tuple(index.get(found.producer.output) for found in self.interfaces)

    @cached_property
    def behind(self) -> tuple[int | None, ...]:
        """For each interface the one that scales the outputs of its consumer."""
        index = {found.producer.output: number for number, found in enumerate(self.interfaces)}
        return tuple(index.get(found.consumer.output) for found in self.interfaces)

    def ranges_around(self, scales: Sequence[Any | None], index: int) -> tuple[Any, Any]:
        """Returns weight ranges before and behind an interface, scaled by its neighbours and not yet by itself."""
        found, before, behind = self.interfaces[index], self.before[index], self.behind[index]
        r1 = ranges_of_outputs(self.ranges[found.producer.output], None if before is None else scales[before])
        r2 = ranges_of_inputs(self.ranges[found.consumer.output], None if behind is None else scales[behind])
        return r1, r2


def _magnitude(model: Model, interface: Interface, observed: Mapping[str, Any]) -> Any | None:
    """Returns the largest magnitude per channel of what the consumer reads; None where nothing bounds it."""
    if interface.tensors[-1] in observed:
        return widened(np.asarray(observed[interface.tensors[-1]]))
    known = model.statistics.get(interface.producer.output)
    if known is None:
        high = np.full(interface.num_channels, UNBOUNDED)
        low = -high
    else:
        low, high = known.mean - _STANDARD_DEVIATIONS * known.std, known.mean + _STANDARD_DEVIATIONS * known.std
    for node in interface.activations:
        low, high = activated_interval(model, node, low, high)
    xp = array_namespace(low, high)
    magnitude = xp.maximum(xp.abs(low), xp.abs(high))
    return None if known is None and (is_traced(magnitude) or np.any(magnitude >= UNBOUNDED)) else magnitude


def _weight_ranges(model: Model, interfaces: Sequence[Interface]) -> dict[str, Any]:
    """Returns the tap ranges of each layer concerned, reduced over the channels that are not scaled."""
    consumers = {interface.consumer.output: interface.consumer for interface in interfaces}
    producers = {interface.producer.output: interface.producer for interface in interfaces}
    ranges: dict[str, Any] = {}
    for output, layer in (consumers | producers).items():
        found = tap_ranges(weight_view(model, layer))
        found = found if output in consumers else found.max(axis=2, keepdims=True)
        ranges[output] = found if output in producers else found.max(axis=1, keepdims=True)
    return ranges


def _balanced(chain: _Chain, sizes: Sequence[Any | None], limit: float) -> list[Any]:
    """Returns the log scales of each interface at which none asks for another.

    One interface after the other, sweep after sweep, each step a little longer than it asks for. All that depends on a
    factor common to all channels are the neighbours' common factors: these are found at once in the end.
    """
    scales: list[Any] = [None] * len(sizes)
    changes: list[float] = [np.inf] * len(sizes)
    for sweep in range(_SWEEPS):
        for index, size in enumerate(sizes):
            near = (index, chain.before[index], chain.behind[index])
            if all(changes[other] < _CONVERGED for other in near if other is not None):
                continue  # nothing around it has moved
            asked = log_scales(*chain.ranges_around(scales, index), size, limit=limit)
            asked = asked - asked.mean()
            old = asked * 0 if sweep == 0 else scales[index]
            scales[index] = asked if sweep == 0 else old + _STEP * (asked - old)
            changes[index] = np.inf if is_traced(asked) else float(abs(asked - old).max())
        if max(changes) < _CONVERGED:
            break
    levels = [level(*chain.ranges_around(scales, index), scale) for index, scale in enumerate(scales)]
    numbers = range(len(sizes))
    neighbours = np.array([[k in {chain.before[i], chain.behind[i]} for k in numbers] for i in numbers])
    factors = common_factors(array_namespace(*levels).stack(levels), neighbours)
    return [scale + factor for scale, factor in zip(scales, factors, strict=True)]


def _is_balanced(chain: _Chain, sizes: Sequence[Any | None], limit: float) -> bool:
    """Tells whether no interface asks for other scales than it has: so it is after an earlier run."""
    for index, size in enumerate(sizes):
        r1, r2 = chain.ranges_around([None] * len(sizes), index)
        asked = log_scales(r1, r2, size, limit=limit)
        if is_traced(asked) or max(abs(asked - asked.mean()).max(), abs(level(r1, r2, asked * 0))) > _BALANCED:
            return False
    return True


def _imbalances(chain: _Chain, scales: Sequence[Any | None], index: int) -> tuple[Any, Any]:
    """Returns the imbalance of an interface before and after all scaling."""
    r1, r2 = chain.ranges_around([None] * len(scales), index)
    before = imbalance(r1, r2, r1 * 0)
    r1, r2 = chain.ranges_around(scales, index)
    scale = scales[index]
    return before, imbalance(r1, r2, r1 * 0 if scale is None else scale)


def _scaled(
    model: Model, layers: Mapping[str, Linear], interfaces: Sequence[Interface], scales: Sequence[Any | None]
) -> Model:
    """Returns the model with each interface's channels divided by exp(scale), where it has one."""
    changed: dict[str, WeightAndBias] = {}
    edits: list[Edit] = []
    statistics: dict[str, Statistics] = {}
    for interface, log_scale in zip(interfaces, scales, strict=True):
        if log_scale is None:
            continue
        scale = array_namespace(log_scale).exp(log_scale)
        view, bias = weights_of(model, interface.producer, changed)
        changed[interface.producer.output] = scale_outputs(view, 1 / scale), bias / scale
        view, bias = weights_of(model, interface.consumer, changed)
        changed[interface.consumer.output] = scale_inputs(view, scale), bias
        edits += _scaled_limits(model, interface, scale)
        known = {name: model.statistics[name] for name in interface.tensors if name in model.statistics}
        statistics |= {name: Statistics(mean=was.mean / scale, std=was.std / scale) for name, was in known.items()}
    return edited(model, [*edits, *write_back(model, layers, changed)], statistics)


def _scaled_limits(model: Model, interface: Interface, scale: Any) -> list[Edit]:
    """Returns the edits that divide the activations' limits along with the channels."""
    dtype = model.params[interface.producer.weight].dtype
    kernel_rank = interface.producer.kernel_rank
    edits: list[Edit] = []
    for node in interface.activations:
        if not commutes_with_scaling(model, node):
            low, high = (limit / scale for limit in limits_of(model, node))
            edits.append(with_limits(model, node, low, high, kernel_rank=kernel_rank, dtype=dtype))
    return edits


def _record(interface: Interface, scale: Any | None, size: Any | None, figures: tuple[Any, Any]) -> Record:
    where = (interface.tensors[-1], interface.producer.weight, interface.consumer.weight)
    record = Record(transform=_NAME, done=scale is not None, what="scaled channels", where=where)
    if is_traced(scale):
        return replace(record, reason="traced: unmeasured")
    before, after = ({"largest |log(r1 / r2)|": float(figure)} for figure in figures)
    if scale is None:
        return replace(record, what="left alone", reason="balanced already", before=before, after=after)
    reason = "by weights alone: nothing is known of the activations" if size is None else "limited by the activations"
    spread = {"largest |log scale|": float(abs(scale).max())}
    return replace(record, reason=reason, before=before, after=after | spread)


def _left(layer: Linear, reason: str) -> Record:
    return Record(transform=_NAME, done=False, what="left alone", where=(layer.output, layer.weight), reason=reason)
