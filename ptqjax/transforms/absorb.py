"""High-bias absorption: a part of a channel that is always there moves from its bias into the next layer's bias.

Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019), section 4.1.3.
There the part is mean - 3 std, and what falls below is lost; here it is what provably never is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ptqjax.ir import Model, Record, Report, Statistics
from ptqjax.kernels.grouped import respond_to_constant
from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.precision import is_traced
from ptqjax.transforms.activations import limits_of, with_limits
from ptqjax.transforms.bounds import Bounds, channel_bounds
from ptqjax.transforms.interfaces import Interface, find_interfaces
from ptqjax.transforms.linear import Edit, edited, linear_layers
from ptqjax.transforms.weights import WeightAndBias, weights_of, write_back

_NAME = "absorb_biases"
_WORTHWHILE = 1e-3  # of the channel's own magnitude: less is rounding, or what an earlier run left


def absorb_biases(model: Model) -> tuple[Model, Report]:
    """Returns the model with biases moved into the next layer where that is exact, and what was moved or left.

    Between two layers without an activation the mean is moved (where `statistics` know it), since any amount may be.
    Behind Relu, Clip and the like it is the least value that the channel can have, where that is above zero: it passes
    the activation unchanged; an upper limit moves along. The next layer must not pad: zeros at the border would stay.
    """
    layers = linear_layers(model)
    interfaces, _ = find_interfaces(model, layers)
    bounds = channel_bounds(model, layers) if interfaces else {}
    changed: dict[str, WeightAndBias] = {}
    edits: list[Edit] = []
    statistics: dict[str, Statistics] = {}
    records: list[Record] = []
    for interface in interfaces:
        amount = _movable(model, interface, bounds)
        records.append(_record(interface, amount))
        if isinstance(amount, str) or not records[-1].done:
            continue
        view, bias = weights_of(model, interface.producer, changed)
        changed[interface.producer.output] = view, bias - amount
        view, bias = weights_of(model, interface.consumer, changed)
        changed[interface.consumer.output] = view, bias + respond_to_constant(view, amount)
        edits += _shifted_limits(model, interface, amount)
        known = {name: model.statistics[name] for name in interface.tensors if name in model.statistics}
        statistics |= {name: Statistics(mean=was.mean - amount, std=was.std) for name, was in known.items()}
    return edited(model, [*edits, *write_back(model, layers, changed)], statistics), tuple(records)


def _movable(model: Model, interface: Interface, bounds: Mapping[str, Bounds]) -> Any | str:
    """Returns how much of each channel can move with the function kept, or why nothing can."""
    if interface.consumer.pads:
        return "the next layer pads with zeros, which would have to be shifted as well"
    low, high = bounds[interface.producer.output]
    xp = array_namespace(low)
    if not interface.activations:
        known = model.statistics.get(interface.producer.output)
        if known is None:
            return "nothing is known of the mean: no batch norm was folded here"
        return xp.where(xp.abs(known.mean) > _WORTHWHILE * known.std, known.mean, 0.0)
    needed = low * 0.0
    for node in interface.activations:
        needed = xp.maximum(needed, xp.where(xp.isfinite(limits_of(model, node)[0]), limits_of(model, node)[0], 0.0))
    is_free = (low > needed) & (low > _WORTHWHILE * high)
    return xp.where(is_free, low, 0.0)


def _shifted_limits(model: Model, interface: Interface, amount: Any) -> list[Edit]:
    """Returns the edits that keep the activations' limits where they were, for channels that are lower by `amount`."""
    xp = array_namespace(amount)
    edits: list[Edit] = []
    for node in interface.activations:
        low, high = (xp.broadcast_to(xp.asarray(limit), amount.shape) for limit in limits_of(model, node))
        if node.op_type not in {"Clip", "Min", "Max"} or not (is_traced(amount) or np.any(amount)):
            continue
        # A lower limit never binds where something was moved: zero stays, so that Clip becomes Relu and not Max.
        low = xp.where(amount > 0, xp.minimum(low, 0.0), low)
        kernel_rank = interface.producer.kernel_rank
        dtype = model.params[interface.producer.weight].dtype
        edits.append(with_limits(model, node, low, high - amount, kernel_rank=kernel_rank, dtype=dtype))
    return edits


def _record(interface: Interface, amount: Any | str) -> Record:
    where = (interface.tensors[-1], interface.producer.weight, interface.consumer.weight)
    left = Record(transform=_NAME, done=False, what="left alone", where=where)
    if isinstance(amount, str):
        return replace(left, reason=amount)
    if is_traced(amount):
        return replace(left, done=True, what="absorbed biases", reason="traced: uncounted")
    if not np.any(amount):
        return replace(left, reason="no channel has a provable part to move")
    after = {"channels": float(np.count_nonzero(amount)), "largest": float(abs(amount).max())}
    return replace(left, done=True, what="absorbed biases", after=after)
