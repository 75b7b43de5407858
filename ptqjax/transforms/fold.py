"""Batch normalizations become part of the linear layer before them, or behind them; else what they are, k x + t."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from ptqjax.errors import ModelError
from ptqjax.ir import Model, Node, Record, Report, Statistics, fresh_name, only_reader, place_of
from ptqjax.kernels.folding import batch_norm_as_affine, fold_after, fold_before
from ptqjax.kernels.precision import is_traced, widened
from ptqjax.transforms.fold_adds import fold_constant_steps, fold_gemm_factors
from ptqjax.transforms.linear import (
    HOSTS,
    Edit,
    Linear,
    bias_of,
    edited,
    linear_layers,
    rewrite,
    weight_view,
    why_not_rewritable,
)
from ptqjax.transforms.passages import Channels, across, is_passage
from ptqjax.transforms.sizes import ONE, Shape, element_type, shapes_of

_NAME = "fold_batch_norms"
_FIRST_INFERENCE = (
    7  # the operator set before which a batch norm trains unless told otherwise, and Add hardly broadcasts
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """A model and what folding asks of it."""

    model: Model
    """The model."""
    layers: Mapping[str, Linear]
    """Its linear layers, by the tensor that they produce."""
    shapes: Mapping[str, Shape]
    """The shapes of its tensors, where known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """One batch norm, the layer that takes it in, and the changes."""

    norm: Node
    """The batch norm."""
    layer: Linear
    """The layer before it or behind it."""
    factor: Any
    """What multiplies the layer's outputs (before it), or its inputs (behind it), channel by channel."""
    between: tuple[str, ...]
    """The tensors between the two, from the batch norm to the layer."""
    edit: Edit
    """What becomes of nodes and parameters."""
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    """What the batch norm says of the layer's own output."""


_Attempt: TypeAlias = Callable[[Survey, Node], "Fold | str"]
"""Tries to fold one batch norm; the reason where that cannot be."""


def fold_batch_norms(model: Model) -> tuple[Model, Report]:
    """Returns the model with its batch norms folded into linear layers, and what was done with each.

    First, a Gemm's alpha and beta and the constants that are added to layers or multiply them become parts of their
    parameters (`fold_gemm_factors`, `fold_constant_steps`).

    A batch norm is folded into the layer that produces its input (Conv, ConvTranspose, Gemm, MatMul, MatMul and Add);
    what the layer's way led to then has the batch norm's name. Else it is folded into the layer that alone reads its
    output, where that is exact: without padding, or with a shift of zero. Operators in between that only move values
    (Reshape, Flatten, Squeeze, Unsqueeze, Transpose, Identity, Dropout) or average without padding are passed where the
    channels stay apart. A layer without a bias gets one where it needs it; a MatMul then becomes a Gemm, or an Add
    follows.

    What cannot be folded becomes a Mul and an Add with one number per channel (a Mul alone where the shift is zero),
    unless it stands alone behind a linear layer, where runtimes and grids take both as one. Batch norms in training,
    with computed parameters, or with an input of unknown rank are left. Arithmetic is float64 (NumPy), storage in the
    weight's own type. Every batch norm leaves `statistics` of its output: mean beta, std |gamma|.

    Raises:
        ModelError: A parameter of a batch norm or of its layer is not finite, or a variance is negative, or zero
            together with epsilon. The message names the tensor.
    """
    for node in norms_of(model):
        check_values(model, node)
    model, factors = fold_gemm_factors(model)
    model, steps = fold_constant_steps(model)
    order = [node.output for node in norms_of(model)]
    model = model.replace(statistics=implied_statistics(model) | model.statistics)
    model, behind = _repeat(model, fold_behind)
    model, ahead = _repeat(model, fold_ahead)
    model, rest = _written_out(model)
    return model, (*factors, *steps, *sorted((*behind, *ahead, *rest), key=lambda record: order.index(record.where[0])))


def norms_of(model: Model) -> tuple[Node, ...]:
    """Returns the batch norms of the graph, in its order."""
    return tuple(node for node in model.graph.nodes if node.op_type == "BatchNormalization" and not node.domain)


def survey_of(model: Model) -> Survey:
    """Returns the model with what folding asks of it."""
    return Survey(model=model, layers=linear_layers(model), shapes=shapes_of(model))


def _repeat(model: Model, attempt: _Attempt) -> tuple[Model, list[Record]]:
    """Folds what can be folded until nothing can: one batch norm that goes may make way for another."""
    records: list[Record] = []
    while True:
        survey = survey_of(model)
        folds = [fold for node in norms_of(model) if isinstance(fold := attempt(survey, node), Fold)]
        if not folds:
            return model, records
        records += [_folded(fold) for fold in folds]
        model = with_folds(model, folds)


def with_folds(model: Model, folds: Iterable[Fold]) -> Model:
    """Returns the model after folds that were found in it; of each batch norm and layer there may be one."""
    folds = tuple(folds)
    statistics = {name: value for fold in folds for name, value in fold.statistics.items()}
    return edited(model, [fold.edit for fold in folds], statistics)


def fold_behind(survey: Survey, norm: Node) -> Fold | str:
    """Returns the fold of a batch norm into the layer before it, or why there is none."""
    model = survey.model
    found = why_not_affine(model, norm) or _layer_before(survey, norm)
    if isinstance(found, str):
        return found
    layer, passages, channels = found
    which = _channels_at(survey, layer.output, channels, layer.output_axis, layer.num_outputs)
    reason = why_not_rewritable(model.graph, layer)
    if reason or isinstance(which, str):
        return reason or str(which)
    scale, shift = (values[which] for values in _affine(model, norm))
    view, bias = fold_after(weight_view(model, layer), bias_of(model, layer), scale, shift)
    output = layer.output if passages else norm.output
    edit = rewrite(model, layer, view, bias if _needs_bias(layer, bias) else None, output=output)
    nodes = {**edit.nodes, norm.output: ()}
    if passages:
        nodes[passages[0].output] = (replace(passages[0], outputs=(norm.output,)),)
    known = {}
    if passages and layer.channels_at_1 and channels.repeats == ONE and channels.count == layer.num_outputs:
        is_averaged = any("Pool" in node.op_type for node in passages)
        known = {} if is_averaged else {layer.output: model.statistics[norm.output]}
    between = tuple(dict.fromkeys((norm.inputs[0], *(node.inputs[0] for node in passages))))
    edit = replace(edit, nodes=nodes)
    return _checked(model, Fold(norm=norm, layer=layer, factor=scale, between=between, edit=edit, statistics=known))


def fold_ahead(survey: Survey, norm: Node) -> Fold | str:
    """Returns the fold of a batch norm into the layer behind it, or why there is none."""
    model = survey.model
    found = why_not_affine(model, norm) or _layer_after(survey, norm)
    if isinstance(found, str):
        return found
    layer, passages, channels = found
    which = _channels_at(survey, layer.input, channels, layer.input_axis, layer.num_inputs)
    reason = why_not_rewritable(model.graph, layer)
    if reason or isinstance(which, str):
        return reason or str(which)
    scale, shift = (values[which] for values in _affine(model, norm))
    if layer.pads and (is_traced(shift) or np.any(shift)):
        return f"{place_of(layer.node)} pads with zeros, which the batch norm would have shifted"
    view, bias = fold_before(weight_view(model, layer), bias_of(model, layer), scale, shift)
    edit = rewrite(model, layer, view, bias if _needs_bias(layer, bias) else None)
    first = passages[0] if passages else layer.node
    nodes = {first.output: (first,), **edit.nodes, norm.output: ()}
    nodes = {output: tuple(_reading(node, norm) for node in new) for output, new in nodes.items()}
    between = (norm.output, *(node.output for node in passages))
    edit = replace(edit, nodes=nodes)
    return _checked(model, Fold(norm=norm, layer=layer, factor=scale, between=between, edit=edit))


def _layer_before(survey: Survey, norm: Node) -> tuple[Linear, list[Node], Channels] | str:
    """Returns the layer before a batch norm, what lies between (the nearest first), and where its channels are."""
    graph, tensor, passages = survey.model.graph, norm.inputs[0], []
    channels = Channels(_num_channels(survey.model, norm))
    while tensor not in survey.layers:
        node = graph.producers.get(tensor)
        if node is None or not is_passage(survey.model, node):
            found = place_of(node) if node else "a graph input"
            return f"its input comes from {found}, which is no linear layer with a constant weight"
        moved = _moved(survey, node, channels, forward=False)
        if only_reader(graph, tensor) is None:
            return f"'{tensor}' is read elsewhere or is a graph output"
        if isinstance(moved, str):
            return moved
        tensor, channels = node.inputs[0], moved
        passages.append(node)
    if only_reader(graph, tensor) is None:
        return f"'{tensor}', the layer's own output, is read elsewhere or is a graph output"
    return survey.layers[tensor], passages, channels


def _layer_after(survey: Survey, norm: Node) -> tuple[Linear, list[Node], Channels] | str:
    """Returns the layer behind a batch norm, what lies between (the nearest first), and where its channels are."""
    graph, tensor, passages = survey.model.graph, norm.output, []
    channels = Channels(_num_channels(survey.model, norm))
    by_node = {id(layer.node): layer for layer in survey.layers.values()}
    while (reader := only_reader(graph, tensor)) is not None:
        layer = by_node.get(id(reader))
        if layer is not None and layer.input == tensor:
            return layer, passages, channels
        if not is_passage(survey.model, reader) or reader.inputs[0] != tensor:
            break
        moved = _moved(survey, reader, channels, forward=True)
        if isinstance(moved, str):
            return moved
        tensor, channels = reader.output, moved
        passages.append(reader)
    return "its output is not read by one linear layer alone"


def _moved(survey: Survey, node: Node, channels: Channels, *, forward: bool) -> Channels | str:
    ends = (node.inputs[0], node.output) if forward else (node.output, node.inputs[0])
    here, there = (survey.shapes.get(name) for name in ends)
    if here is None or there is None:
        return f"the shapes around {place_of(node)} are not known"
    return across(node, channels, here, there, forward=forward) or f"{place_of(node)} does not keep the channels apart"


def _channels_at(survey: Survey, tensor: str, channels: Channels, axis: int, size: int) -> np.ndarray | str:
    """Returns the channel of each index along the layer's own axis of `tensor`, or why that is not known."""
    shape = survey.shapes.get(tensor)
    if shape is None and (axis < 0 or channels.repeats.unknown):
        return f"the rank of '{tensor}' is not known"
    axis = axis if shape is None else axis % len(shape)
    which = channels.of_each(shape or (), size) if channels.axis == axis else None
    return "axis 1 may not be the layer's channels" if which is None else which


def _needs_bias(layer: Linear, bias: Any) -> bool:
    return bool(layer.bias) or is_traced(bias) or bool(np.any(bias))


def _reading(node: Node, norm: Node) -> Node:
    """Returns the node with the batch norm's input in place of its output."""
    return replace(node, inputs=tuple(norm.inputs[0] if name == norm.output else name for name in node.inputs))


def why_not_affine(model: Model, norm: Node) -> str:
    """Returns why a batch norm is no map k x + t with constants per channel; "" where it is."""
    is_old = model.graph.opset() < _FIRST_INFERENCE
    if norm.attribute("training_mode", 0) or sum(map(bool, norm.outputs)) > 1:
        return "it is in training mode"
    if is_old or not norm.attribute("spatial", 1):
        return f"its operator set {model.graph.opset()} is too old" if is_old else "its parameters are per position"
    computed = [name for name in norm.inputs[1:5] if name not in model.params]
    return f"its parameter '{computed[0]}' is not a constant" if computed else ""


def _num_channels(model: Model, norm: Node) -> int:
    return int(np.shape(model.params[norm.inputs[1]])[0])


def _affine(model: Model, norm: Node) -> tuple[Any, Any]:
    gamma, beta, mean, variance = (widened(model.params[name]) for name in norm.inputs[1:5])
    return batch_norm_as_affine(gamma, beta, mean, variance, epsilon=norm.attribute("epsilon", 1e-5))


def _written_out(model: Model) -> tuple[Model, list[Record]]:
    """Returns the model with the batch norms that are left as Mul and Add, where that can be, and a record for each."""
    survey, edits, records = survey_of(model), [], []
    for norm in norms_of(model):
        reason = why_not_affine(model, norm)
        reason = reason or f"backward: {fold_behind(survey, norm)}; forward: {fold_ahead(survey, norm)}"
        found = _as_affine(survey, norm)
        record = Record(transform=_NAME, done=False, what="left alone", where=(norm.output,), reason=reason)
        if isinstance(found, Edit):
            edits.append(found)
            where = (norm.output, *found.params)
            record = replace(record, done=True, what="became a per-channel affine", where=where)
        elif found and found not in reason:
            record = replace(record, reason=f"{reason}; as it is: {found}")
        records.append(record)
    return edited(model, edits) if edits else model, records


def _as_affine(survey: Survey, norm: Node) -> Edit | str:
    """Returns the edit that makes a batch norm a Mul and an Add, or why it stays."""
    model, source = survey.model, norm.inputs[0]
    shape, dtype = survey.shapes.get(source), element_type(model, source)
    reason = why_not_affine(model, norm)
    if reason or _follows_a_layer(survey, source):
        return reason or "a linear layer and the batch norm behind it are rounded as one"
    if shape is None or dtype is None or len(shape) < 2:  # noqa: PLR2004  rows and channels
        return f"rank or element type of '{source}' are not known, or it has no channels"
    with np.errstate(over="ignore"):
        parts = [part.reshape(-1, *(1,) * (len(shape) - 2)).astype(dtype) for part in _affine(model, norm)]
    if not all(is_traced(part) or np.all(np.isfinite(widened(part))) for part in parts):
        return f"as an affine map it exceeds what {dtype} can hold"
    scale, shift, scaled = (fresh_name(model.graph, f"{norm.output}_{part}") for part in ("scale", "shift", "scaled"))
    has_shift = is_traced(parts[1]) or bool(np.any(parts[1]))
    product = Node(
        op_type="Mul", inputs=(source, scale), outputs=(scaled if has_shift else norm.output,), name=norm.name
    )
    total = Node(op_type="Add", inputs=(scaled, shift), outputs=(norm.output,))
    nodes = (product, total) if has_shift else (product,)
    return Edit(nodes={norm.output: nodes}, params=dict(zip((scale, shift)[: len(nodes)], parts, strict=False)))


def _follows_a_layer(survey: Survey, tensor: str) -> bool:
    producer = survey.model.graph.producers.get(tensor)
    is_layer = tensor in survey.layers or (producer is not None and producer.op_type in HOSTS and not producer.domain)
    return is_layer and only_reader(survey.model.graph, tensor) is not None


def implied_statistics(model: Model) -> dict[str, Statistics]:
    """Returns what each batch norm with constant parameters says of its output."""
    known = (node for node in norms_of(model) if all(name in model.params for name in node.inputs[1:3]))
    return {
        node.output: Statistics(
            mean=widened(model.params[node.inputs[2]]), std=abs(widened(model.params[node.inputs[1]]))
        )
        for node in known
        if node.attribute("spatial", 1)
    }


def check_values(model: Model, norm: Node) -> None:
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


def _checked(model: Model, fold: Fold) -> Fold | str:
    """Returns the fold, unless its numbers do not fit the weight's element type.

    Raises:
        ModelError: The layer's own weight or bias is not finite.
    """
    for name in (fold.layer.weight, fold.layer.bias):
        _check_finite(model, name, fold.layer.node)
    concrete = [value for value in fold.edit.params.values() if not is_traced(value)]
    if not all(np.all(np.isfinite(widened(value))) for value in concrete):
        return f"the folded weight exceeds what {model.params[fold.layer.weight].dtype} can hold"
    return fold


def _folded(fold: Fold) -> Record:
    names = (fold.norm.output, fold.layer.weight, *fold.norm.inputs[1:5])
    return Record(transform=_NAME, done=True, what=f"folded into {place_of(fold.layer.node)}", where=names)
