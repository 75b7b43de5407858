"""Moves the channels of a normalization's result to lie around zero, where layers alone read it, function kept.

A channel that lies far from zero takes many of a grid's steps and uses few. The shift goes out of what the
normalization adds and into the biases of the layers behind. Source: Li et al., RepQ-ViT (ICCV 2023), section 3.2,
where it makes zero points alike; we need no scales for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ptqjax.ir import Model, Node, Record, Report, Statistics, is_private
from ptqjax.kernels.grouped import respond_to_constant
from ptqjax.transforms.behaviour import Behaviour
from ptqjax.transforms.linear import Edit, Linear, edited, linear_layers, why_not_rewritable
from ptqjax.transforms.ties import Ties
from ptqjax.transforms.weights import WeightAndBias, weights_of, write_back

_SHIFT = 2  # LayerNormalization's input


def centre_channels(
    model: Model, ties: Ties, behaviour: Mapping[str, Behaviour]
) -> tuple[Model, dict[str, Behaviour], Report]:
    """Returns the model with channels of normalizations in the middle of their range, and their behaviour then.

    The function is kept up to rounding. A record stands for each tensor whose channels moved.

    Args:
        model: The model.
        ties: Its ties.
        behaviour: How channels behave on data; what is not there is left alone.
    """
    amounts = {
        name: (found.low + found.high) / 2
        for name in _movable(model, ties)
        if (found := behaviour.get(name)) is not None and np.shape(found.low) == ties.channels[name].scales.shape
    }
    known = {name: _moved(found, amounts[name]) if name in amounts else found for name, found in behaviour.items()}
    records = tuple(
        Record(
            transform="centre_channels",
            done=True,
            what="channels moved around zero",
            where=(name,),
            reason="the biases of the layers that read them make up for it",
            after={"largest shift": float(np.max(np.abs(amount)))},
        )
        for name, amount in amounts.items()
    )
    return shifted(model, ties, amounts), known, records


def shifted(model: Model, ties: Ties, amounts: Mapping[str, Any]) -> Model:
    """Returns the model with channels lowered by amounts [c], by tensor, which the layers' biases make up for."""
    movable, layers = _movable(model, ties), linear_layers(model)
    changed: dict[str, WeightAndBias] = {}
    params: dict[str, Any] = {}
    for name, amount in amounts.items():
        shifts, readers = movable[name]
        old = model.params[shifts]
        params[shifts] = (np.asarray(old, np.float64) - np.reshape(amount, np.shape(old))).astype(old.dtype)
        for layer in readers:
            view, bias = weights_of(model, layer, changed)
            changed[layer.output] = view, bias + respond_to_constant(view, np.asarray(amount, np.float64))
    statistics = {
        name: Statistics(mean=model.statistics[name].mean - amount, std=model.statistics[name].std)
        for name, amount in amounts.items()
        if name in model.statistics
    }
    return edited(model, [Edit(params=params), *write_back(model, layers, changed)], statistics)


def _movable(model: Model, ties: Ties) -> dict[str, tuple[str, tuple[Linear, ...]]]:
    """Returns tensors whose channels may be shifted -> what is added to them, and the layers that read them."""
    layers: dict[str, list[Linear]] = {}
    for layer in linear_layers(model).values():
        if not why_not_rewritable(model.graph, layer) and layer.node.op_type in ("Gemm", "MatMul"):
            layers.setdefault(layer.input, []).append(layer)
    numbers = set(np.concatenate([*ties.factors.values(), np.zeros(0, int)]).tolist())
    found: dict[str, tuple[str, tuple[Linear, ...]]] = {}
    for name, readers in layers.items():
        channels, node = ties.channels.get(name), model.graph.producers.get(name)
        is_alone = model.graph.num_readers(name) == len(readers) and name not in model.graph.output_names
        if channels is None or node is None or not is_alone or numbers.isdisjoint(channels.scales.tolist()):
            continue
        if shifts := _shifts_of(model, node, len(channels.scales)):
            found[name] = shifts, tuple(readers)
    return found


def _shifts_of(model: Model, node: Node, count: int) -> str:
    """Returns the parameter with one number per channel that a node of its own adds; "" where there is none."""
    if node.op_type == "LayerNormalization":
        names = node.inputs[_SHIFT:]
    else:
        names = node.inputs if node.op_type == "Add" else ()
    fit = (name for name in names if np.size(model.params.get(name, ())) == count and is_private(model.graph, name))
    return next((name for name in fit if np.shape(model.params[name])[-1] == count), "") if not node.domain else ""


def _moved(known: Behaviour, amount: np.ndarray) -> Behaviour:
    return known.replace(
        low=known.low - amount,
        high=known.high - amount,
        mean=known.mean - amount,
        power=known.power - 2 * amount * known.mean + amount**2,
    )
