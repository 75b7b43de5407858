"""Batch normalizations become part of the linear layer before them, or behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from ptqjax.errors import ModelError
from ptqjax.ir import Model, Node, Record, Report, Statistics, only_reader, place_of
from ptqjax.kernels.folding import batch_norm_as_affine, fold_after, fold_before
from ptqjax.kernels.precision import is_traced, widened
from ptqjax.transforms.linear import (
    Edit,
    Linear,
    bias_of,
    edited,
    linear_layers,
    rewrite,
    weight_view,
    why_not_rewritable,
)

_NAME = "fold_batch_norms"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fold:
    """One batch norm, the layer that takes it in, and the changes."""

    norm: Node
    layer: Linear
    edit: Edit


_Attempt: TypeAlias = Callable[[Model, Mapping[str, Linear], Node], "_Fold | str"]
"""Tries to fold one batch norm; the reason where that cannot be."""


def fold_batch_norms(model: Model) -> tuple[Model, Report]:
    """Returns the model with its batch norms folded into linear layers, and what was folded or left, one by one.

    A batch norm is folded into the layer that produces its input (Conv, ConvTranspose, Gemm, MatMul, MatMul and Add);
    the layer then produces the batch norm's output. Else it is folded into a Conv or Gemm that alone reads its output,
    where that is exact: without padding, or with a shift of zero. A layer without a bias gets one; a MatMul becomes a
    Gemm. What cannot be folded exactly is left and reported with the reason. Weights are computed in float64 (NumPy)
    and stored in their own type. Every batch norm leaves `statistics` of its output: mean beta, std |gamma|.

    Raises:
        ModelError: A parameter of a batch norm or of its layer is not finite, or a variance is negative, or zero
            together with epsilon. The message names the tensor.
    """
    for node in _norms(model):
        _check_values(model, node)
    order = [node.output for node in _norms(model)]
    model = model.replace(statistics=_implied_statistics(model) | model.statistics)
    model, behind = _repeat(model, _into_producer)
    model, ahead = _repeat(model, _into_reader)
    left = [_left_alone(model, node) for node in _norms(model)]
    return model, tuple(sorted((*behind, *ahead, *left), key=lambda record: order.index(record.where[0])))


def _norms(model: Model) -> tuple[Node, ...]:
    return tuple(node for node in model.graph.nodes if node.op_type == "BatchNormalization" and not node.domain)


def _repeat(model: Model, attempt: _Attempt) -> tuple[Model, list[Record]]:
    """Folds what can be folded until nothing can: one batch norm that goes may make way for another."""
    records: list[Record] = []
    while True:
        layers = linear_layers(model)
        folds = [fold for node in _norms(model) if isinstance(fold := attempt(model, layers, node), _Fold)]
        if not folds:
            return model, records
        records += [_folded(fold) for fold in folds]
        model = edited(model, [fold.edit for fold in folds])


def _into_producer(model: Model, layers: Mapping[str, Linear], norm: Node) -> _Fold | str:
    source = norm.inputs[0]
    layer = layers.get(source)
    if layer is None:
        producer = model.graph.producers.get(source)
        found = f"{place_of(producer)}" if producer else "a graph input"
        return f"its input comes from {found}, which is no linear layer with a constant weight"
    if only_reader(model.graph, source) is None:
        return f"'{source}', the layer's own output, is read elsewhere or is a graph output"
    reason = _why_not(model, layer, norm) or ("" if layer.channels_at_1 else "axis 1 may not be the layer's channels")
    if reason:
        return reason
    view, bias = fold_after(weight_view(model, layer), bias_of(model, layer), *_affine(model, norm))
    edit = rewrite(model, layer, view, bias, output=norm.output)
    return _checked(model, norm, layer, Edit(nodes={**edit.nodes, norm.output: ()}, params=edit.params))


def _into_reader(model: Model, layers: Mapping[str, Linear], norm: Node) -> _Fold | str:
    reader = only_reader(model.graph, norm.output)
    layer = next((found for found in layers.values() if found.node is reader and found.input == norm.output), None)
    if layer is None:
        return "its output is not read by one linear layer alone"
    reason = _why_not(model, layer, norm) or ("" if layer.channels_at_1 else "axis 1 may not be the layer's channels")
    if reason:
        return reason
    scale, shift = _affine(model, norm)
    if layer.pads and (is_traced(shift) or np.any(shift)):
        return f"{place_of(layer.node)} pads with zeros, which the batch norm would have shifted"
    view, bias = fold_before(weight_view(model, layer), bias_of(model, layer), scale, shift)
    edit = rewrite(model, layer, view, bias)
    nodes = {output: tuple(_reading(node, norm) for node in nodes) for output, nodes in edit.nodes.items()}
    return _checked(model, norm, layer, Edit(nodes={**nodes, norm.output: ()}, params=edit.params))


def _reading(node: Node, norm: Node) -> Node:
    """Returns the node with the batch norm's input in place of its output."""
    return replace(node, inputs=tuple(norm.inputs[0] if name == norm.output else name for name in node.inputs))


def _why_not(model: Model, layer: Linear, norm: Node) -> str:
    """Returns why this batch norm cannot be an affine map of this layer's channels; "" where it can."""
    if norm.attribute("training_mode", 0) or sum(map(bool, norm.outputs)) > 1:
        return "it is in training mode"
    computed = [name for name in norm.inputs[1:5] if name not in model.params]
    if computed:
        return f"its parameter '{computed[0]}' is not a constant"
    return why_not_rewritable(model.graph, layer)


def _affine(model: Model, norm: Node) -> tuple[Any, Any]:
    gamma, beta, mean, variance = (widened(model.params[name]) for name in norm.inputs[1:5])
    return batch_norm_as_affine(gamma, beta, mean, variance, epsilon=norm.attribute("epsilon", 1e-5))


def _implied_statistics(model: Model) -> dict[str, Statistics]:
    """Returns what each batch norm with constant parameters says of its output."""
    known = (node for node in _norms(model) if all(name in model.params for name in node.inputs[1:3]))
    return {
        node.output: Statistics(
            mean=widened(model.params[node.inputs[2]]), std=abs(widened(model.params[node.inputs[1]]))
        )
        for node in known
    }


def _check_values(model: Model, norm: Node) -> None:
    """Refuses parameters that no training gives.

    Raises:
        ModelError: One is not finite, or the variance is negative or, with epsilon, zero.
    """
    for name in norm.inputs[1:5]:
        _check_finite(model, name, norm)
    variance = model.params.get(norm.inputs[4])
    if variance is None or is_traced(variance):
        return
    smallest = float(np.min(widened(variance), initial=np.inf))
    epsilon = norm.attribute("epsilon", 1e-5)
    if smallest < 0 or smallest + epsilon <= 0:
        raise ModelError(
            f"the variance '{norm.inputs[4]}' of {place_of(norm)} has the value {smallest:g} (epsilon {epsilon:g}); "
            "expected variances of at least zero, and above zero together with epsilon: the file is damaged"
        )


def _check_finite(model: Model, name: str, node: Node) -> None:
    value = model.params.get(name)
    if value is None or is_traced(value) or np.all(np.isfinite(widened(value))):
        return
    raise ModelError(
        f"parameter '{name}' of {place_of(node)} holds values that are not finite (nan or inf); "
        "expected finite numbers: the file is damaged, or its training diverged"
    )


def _checked(model: Model, norm: Node, layer: Linear, edit: Edit) -> _Fold | str:
    """Returns the fold, unless its numbers do not fit the weight's element type.

    Raises:
        ModelError: The layer's own weight or bias is not finite.
    """
    for name in (layer.weight, layer.bias):
        _check_finite(model, name, layer.node)
    concrete = [value for value in edit.params.values() if not is_traced(value)]
    if not all(np.all(np.isfinite(widened(value))) for value in concrete):
        return f"the folded weight exceeds what {model.params[layer.weight].dtype} can hold"
    return _Fold(norm=norm, layer=layer, edit=edit)


def _folded(fold: _Fold) -> Record:
    names = (fold.norm.output, fold.layer.weight, *fold.norm.inputs[1:5])
    return Record(transform=_NAME, done=True, what=f"folded into {place_of(fold.layer.node)}", where=names)


def _left_alone(model: Model, norm: Node) -> Record:
    layers = linear_layers(model)
    reasons = [str(attempt(model, layers, norm)) for attempt in (_into_producer, _into_reader)]
    reason = f"backward: {reasons[0]}; forward: {reasons[1]}"
    return Record(transform=_NAME, done=False, what="left alone", where=(norm.output,), reason=reason)
