"""Channels that hold one value, whatever the input: their value becomes bias, their weights zero.

Trained networks have channels that died: weights of 1e-9, or a bias so low that ReLU6 never opens. Scaling by weights
alone blows them up, so they go first. Only what is proven goes (`bounds`): a channel that is constant at four standard
deviations of its batch norm reaches 6.0 on real pictures (measured on MobileNetV2), while the proven ones number 17
there and include all whose weights have vanished.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ptqjax.ir import Model, Record, Report, Statistics
from ptqjax.kernels.equalization import constant_channels, pin_channels, remove_channels, unused_channels
from ptqjax.kernels.grouped import input_ranges, output_ranges
from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.precision import is_traced
from ptqjax.transforms.activations import activate
from ptqjax.transforms.bounds import Bounds, channel_bounds
from ptqjax.transforms.interfaces import Interface, find_interfaces
from ptqjax.transforms.linear import edited, linear_layers
from ptqjax.transforms.weights import WeightAndBias, weights_of, write_back

_NAME = "remove_constant_channels"


def remove_constant_channels(model: Model) -> tuple[Model, Report]:
    """Returns the model without channels that provably hold one value, and for each interface what was found.

    A channel between two layers whose least and largest activation agree (to 1e-6 of its magnitude) for every input
    of the network is *removed*: its value moves into the next layer's bias, its weights and bias become zero. Where the
    next layer pads and the value is not zero, that would be wrong at the borders: the channel is *pinned*, its value
    comes from its bias alone. A channel that the next layer multiplies by zero is removed as well. Shapes stay.
    """
    layers = linear_layers(model)
    interfaces, _ = find_interfaces(model, layers)
    bounds = channel_bounds(model, layers) if interfaces else {}
    changed: dict[str, WeightAndBias] = {}
    statistics: dict[str, Statistics] = {}
    records: list[Record] = []
    for interface in reversed(interfaces):  # a channel that goes may leave the ones before it unused
        weights = (weights_of(model, interface.producer, changed), weights_of(model, interface.consumer, changed))
        removed, pinned, value = _classified(interface, bounds, weights)
        records.append(_record(interface, removed, pinned))
        if not records[-1].done:
            continue
        held = _held_before_activation(interface, bounds, value)
        first, second = remove_channels(*weights, value, removed)
        changed[interface.producer.output] = pin_channels(first, held, pinned)
        changed[interface.consumer.output] = second
        statistics |= _statistics(model, interface, removed, pinned, held)
    return edited(model, write_back(model, layers, changed), statistics), tuple(reversed(records))


def _classified(
    interface: Interface, bounds: Mapping[str, Bounds], weights: tuple[WeightAndBias, WeightAndBias]
) -> tuple[Any, Any, Any]:
    """Returns which channels to remove, which to pin, and the value of each: all per channel."""
    (first, first_bias), (second, _) = weights
    xp = array_namespace(first, second)
    low, high = bounds[interface.tensors[-1]]
    value = (low + high) / 2
    computed, read = output_ranges(first) > 0, input_ranges(second) > 0
    is_constant = constant_channels(low, high)
    is_movable = (value == 0) | (not interface.consumer.pads)
    removed = is_constant & is_movable & (computed | (first_bias != 0) | read) | unused_channels(first, second)
    return removed, is_constant & ~is_movable & computed, xp.where(is_constant, value, 0.0)


def _held_before_activation(interface: Interface, bounds: Mapping[str, Bounds], value: Any) -> Any:
    """Returns a value per channel that the activation turns into `value`, where the channel is constant."""
    low, high = bounds[interface.producer.output]
    xp = array_namespace(low, value)
    # Where the activation alone makes the channel constant, it is at a limit, which it leaves as it is.
    return xp.where(constant_channels(low, high), (low + high) / 2, value)


def _statistics(model: Model, interface: Interface, removed: Any, pinned: Any, held: Any) -> dict[str, Statistics]:
    """Returns what is known of the interface's tensors once its constant channels are zero, or what they hold."""
    xp = array_namespace(removed, held)
    value = xp.where(removed, 0.0, held)
    found: dict[str, Statistics] = {}
    for tensor, node in zip(interface.tensors, (None, *interface.activations), strict=True):
        value = value if node is None else activate(model, node, value)
        if tensor in model.statistics:
            known = model.statistics[tensor]
            is_known = removed | pinned
            mean, std = xp.where(is_known, value, known.mean), xp.where(is_known, 0.0, known.std)
            found[tensor] = Statistics(mean=mean, std=std)
    return found


def _record(interface: Interface, removed: Any, pinned: Any) -> Record:
    where = (interface.tensors[-1], interface.producer.weight, interface.consumer.weight)
    if is_traced(removed):
        return Record(
            transform=_NAME, done=True, what="removed constant channels", where=where, reason="traced: uncounted"
        )
    counts = {"channels": float(interface.num_channels), "removed": float(removed.sum()), "pinned": float(pinned.sum())}
    if not np.any(removed | pinned):
        return Record(
            transform=_NAME, done=False, what="left alone", where=where, reason="no channel is provably constant"
        )
    reason = "proven for every input by interval bounds"
    return Record(
        transform=_NAME, done=True, what="removed constant channels", where=where, reason=reason, after=counts
    )
