"""A constant Add behind a linear layer is the layer's bias, spelled apart: CNTK writes all of them so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ptqjax.ir import Model, Node, Record, Report, is_private, only_reader, place_of
from ptqjax.kernels.precision import is_traced, widened
from ptqjax.transforms.linear import Edit, Linear, bias_of, edited, linear_layers, rewrite, weight_view

NAME = "fold_biases"
"""What reports call it."""


def fold_constant_adds(model: Model) -> tuple[Model, Report]:
    """Returns the model in which layers add what constant Adds behind them added, and a record for each that did.

    (W x + b) + c = W x + (b + c), where c is one number, or one for each output channel, and nothing else reads the
    layer's result. Convolutions and Gemms; the Add behind a MatMul is part of that layer already. The sum is taken in
    float64 and stored in the weight's own type; the layer then produces what the Add did. An Add that raises the rank,
    or whose sum that type cannot hold, stays.
    """
    records: list[Record] = []
    while True:
        layers = linear_layers(model)
        edits: dict[str, Edit] = {}
        for add in (node for node in model.graph.nodes if node.op_type == "Add" and not node.domain):
            found = _edit(model, layers, add)
            if found is not None:
                layer, edits[layer.output] = found
                records.append(_record(layer, add))
        if not edits:
            return model, tuple(records)
        model = edited(model, list(edits.values()))


def _edit(model: Model, layers: Mapping[str, Linear], add: Node) -> tuple[Linear, Edit] | None:
    """Returns the layer that takes in the Add's constant, and the changes; None where none does."""
    tensor, constant = _operands(model, add)
    layer = layers.get(tensor)
    if layer is None or layer.node.op_type == "MatMul" or only_reader(model.graph, tensor) is None:
        return None
    if layer.bias and not is_private(model.graph, layer.bias):
        return None
    shift = _per_channel(layer, model.params[constant])
    if shift is None:
        return None
    dtype = model.params[layer.weight].dtype
    bias = bias_of(model, layer) + shift
    if not is_traced(bias) and not np.all(np.abs(bias) <= np.finfo(dtype).max):
        return None
    edit = rewrite(model, layer, weight_view(model, layer), bias, output=add.output)
    return layer, replace(edit, nodes={**edit.nodes, add.output: ()})


def _operands(model: Model, add: Node) -> tuple[str, str]:
    """Returns what is computed and what is constant; "" twice where it is not one of each."""
    constant = [name for name in add.inputs if name in model.params]
    computed = [name for name in add.inputs if name not in model.params]
    return (computed[0], constant[0]) if len(constant) == len(computed) == 1 else ("", "")


def _per_channel(layer: Linear, constant: Any) -> Any | None:
    """Returns a constant as one number per output channel; None where it is not that, or has another rank."""
    shape, rank = np.shape(constant), layer.kernel_rank + 2
    aligned = (1,) * (rank - len(shape)) + shape
    if len(shape) > rank or aligned not in {(1,) * rank, (1, layer.num_outputs, *(1,) * layer.kernel_rank)}:
        return None
    return widened(constant).reshape(-1) * np.ones(layer.num_outputs)


def _record(layer: Linear, add: Node) -> Record:
    what = f"its constant became the bias of {place_of(layer.node)}"
    return Record(transform=NAME, done=True, what=what, where=(add.output, layer.weight))
