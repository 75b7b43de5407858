"""Shifts between two linear layers with nothing in between: any amount per channel may move, function kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptqjax.ir import Model, Statistics
from ptqjax.kernels.grouped import respond_to_constant
from ptqjax.transforms.interfaces import Interface, find_interfaces
from ptqjax.transforms.linear import edited, linear_layers
from ptqjax.transforms.weights import WeightAndBias, weights_of, write_back


def find_shiftable(model: Model) -> tuple[Interface, ...]:
    """Returns the interfaces whose channels may be shifted: no activation between, and a reader that does not pad."""
    interfaces, _ = find_interfaces(model, linear_layers(model))
    return tuple(found for found in interfaces if not found.activations and not found.consumer.pads)


def shift(model: Model, amounts: Mapping[str, Any]) -> Model:
    """Returns the model with each channel lowered by its amount before the next layer, whose bias makes up for it.

    Args:
        model: The model.
        amounts: [c] by the tensor between, for interfaces that `find_shiftable` returns.
    """
    layers = linear_layers(model)
    changed: dict[str, WeightAndBias] = {}
    statistics: dict[str, Statistics] = {}
    for interface in find_shiftable(model):
        name = interface.producer.output
        if name not in amounts:
            continue
        view, bias = weights_of(model, interface.producer, changed)
        changed[name] = view, bias - amounts[name]
        view, bias = weights_of(model, interface.consumer, changed)
        changed[interface.consumer.output] = view, bias + respond_to_constant(view, amounts[name])
        if name in model.statistics:
            known = model.statistics[name]
            statistics[name] = Statistics(mean=known.mean - amounts[name], std=known.std)
    return edited(model, write_back(model, layers, changed), statistics)
