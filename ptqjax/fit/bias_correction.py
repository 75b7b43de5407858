"""Bias correction: the mean error that quantization leaves in a layer's output, taken out through its bias."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from ptqjax.data.batches import checked_part, checked_parts, num_samples
from ptqjax.data.parts import Part, Parts, together
from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import ConfigError, DataError
from ptqjax.fit.analytic_correction import expected_errors
from ptqjax.fit.quantized_pass import OnDevices, QuantizedPass
from ptqjax.ir import (
    Graph,
    Model,
    Node,
    Record,
    Report,
    bias_behind,
    fresh_name,
    is_one_per_output,
    is_private,
    rebuild,
)
from ptqjax.lowering import compiled, interpret
from ptqjax.placement.tensors import check_not_quantized
from ptqjax.qdq.insert import check_tensors
from ptqjax.ranges.observing import Axes, Means, channel_means
from ptqjax.transforms.linear import linear_layers

_METHODS = ("empirical", "analytic")
_BIAS_INPUT = 2  # of Conv, ConvTranspose and Gemm


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """A layer whose mean output error a bias can take out."""

    output: str
    """The tensor measured: the layer's output with its bias, before the activation function."""
    node: Node
    """The node that adds the bias: the layer itself, or the Add behind a MatMul."""
    weight: str
    """The quantized weight."""
    bias: str | None
    """The bias parameter; None where the layer has none yet."""
    axis: int
    """Where the output has its channels: the last axis (-1, MatMul) or axis 1."""


def correct_biases(
    model: Model,
    encodings: Encodings,
    batches: Iterable[Any] | None,
    *,
    method: str | None = None,
    weights: Mapping[str, Any] | None = None,
) -> tuple[Model, Report]:
    """Returns the model with biases that take out the mean error which quantization leaves in each layer's output.

    b <- b - E[y_q - y], y the layer's float output before its activation function, y_q that of the quantized model in
    which every earlier layer is corrected already.

    "empirical": the mean over the data, sequential. One pass: within a batch each layer's error is subtracted as the
    program runs, so that the next layer sees it corrected; the error that goes into the bias is the mean over all
    batches, weighted by their size. Memory is that of one batch.

    "analytic": the mean that batch norms imply, without data, see `analytic_correction.expected_errors`.

    Args:
        model: The float model that `encodings` belong to.
        encodings: Of weights and activations.
        batches: Arrays by input name; samples along the first axis. Checked one by one as they come. None where there
            is no data.
        method: "empirical" or "analytic"; None for the empirical one where there is data, else the analytic one.
        weights: Parameters, by name, that the quantized model has in place of `model`'s (`ranges.pairs.fit_pairs`); the
            result has them. None: it has the model's.

    Returns:
        The corrected model, and a record per layer with the mean error of its worst channel, in the output's units.

    Raises:
        DataError: "empirical": there is no batch; one does not fit the model, is empty, or holds NaN or infinity; or a
            layer's output becomes NaN or infinite. The message names the input or tensor, and the batch. "analytic":
            nothing is known of what the layers read; the message names them.
        ConfigError: An encoding is for a tensor that the model has not, or `method` is unknown.
        ModelError: The model is quantized already.
        UnsupportedOperatorError: A node has no lowering ("empirical").

    Source:
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2
        and appendices B to D. There the empirical correction is measured layer by layer with a forward pass each.
    """
    return correct_each(model, (encodings,), batches, method=method, weights=(weights or {},))[0]


def correct_each(
    model: Model,
    variants: Sequence[Encodings],
    batches: Iterable[Any] | None,
    *,
    method: str | None = None,
    means: Means | None = None,
    weights: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[tuple[Model, Report], ...]:
    """Returns what `correct_biases` returns for each of several encodings, in order, from one pass over the data.

    The float model runs once a batch for all of them; encodings of one structure (the same tensors, axes and block
    sizes) share a compiled program. The other arguments and the errors are those of `correct_biases`.

    Args:
        model: The float model.
        variants: Encodings of it.
        batches: As `correct_biases` takes them.
        method: As `correct_biases` takes it.
        means: Channel means of the tensors in `layer_axes(model)`, as a pass over the same batches kept them (see
            `observe`): then the float model does not run again. None: it does.
        weights: For each encodings the parameters, by name, that the quantized model has in place of `model`'s, which
            the mean errors are measured against all the same; the results have them.
    """
    if method not in (None, *_METHODS):
        raise ConfigError(f"method={method!r} is unknown; expected one of {', '.join(_METHODS)}, or None")
    check_not_quantized(model)
    for encodings in variants:
        check_tensors(model.graph, encodings)
    changed = [model.replace(params={**model.params, **each}) for each in weights or [{}] * len(variants)]
    found = [_find_layers(model, encodings) for encodings in variants]
    if method == "analytic" or (method is None and batches is None):
        every = zip(changed, variants, found, strict=True)
        return tuple(_analytic(model, own, encodings, *each) for own, encodings, each in every)
    parts = checked_parts(model.graph, batches)
    quantized = list(zip(changed, variants, strict=True))
    each = _mean_errors(model, quantized, [layers for layers, _ in found], parts, means)
    results = []
    for own, (layers, left_alone), errors in zip(changed, found, each, strict=True):
        corrected, records = _corrected_model(own, layers, errors)
        results.append((corrected, (*records, *left_alone)))
    return tuple(results)


def _analytic(
    model: Model, own: Model, encodings: Encodings, layers: tuple[_Layer, ...], left_alone: Report
) -> tuple[Model, Report]:
    errors, unknown = expected_errors(model, encodings, [layer.output for layer in layers], weights=own.params)
    corrected, records = _corrected_model(own, tuple(each for each in layers if each.output in errors), errors)
    return corrected, (*records, *left_alone, *(_left(output, reason) for output, reason in unknown.items()))


def _corrected_model(
    model: Model, layers: tuple[_Layer, ...], errors: Mapping[str, np.ndarray]
) -> tuple[Model, list[Record]]:
    params = dict(model.params)
    nodes = {node.output: node for node in model.graph.nodes}
    records = []
    for layer in layers:
        error = np.asarray(errors[layer.output])
        bias = layer.bias or fresh_name(model.graph, f"{layer.weight}.bias")
        bias = fresh_name(model.graph, f"{layer.output}.bias") if layer.bias is None and bias in params else bias
        if layer.bias is None:
            node = nodes[layer.node.output]
            attributes = tuple((key, 1.0 if key == "beta" else value) for key, value in node.attributes)
            nodes[node.output] = replace(node, inputs=(*node.inputs[:_BIAS_INPUT], bias), attributes=attributes)
            params[bias] = np.zeros(error.shape, np.asarray(params[layer.weight]).dtype)
        params[bias] = _shifted(np.asarray(params[bias]), error)
        records.append(_corrected(layer, bias, error))
    return rebuild(model, nodes=nodes.values(), params=params), records


def with_biases(model: Model, encodings: Encodings) -> Model:
    """Returns the model with a bias of zeros at each layer that could be corrected under these and has none."""
    layers = tuple(layer for layer in _find_layers(model, encodings)[0] if layer.bias is None)
    return _corrected_model(model, layers, {layer.output: _zeros(model, layer) for layer in layers})[0]


def _zeros(model: Model, layer: _Layer) -> np.ndarray:
    return np.zeros(linear_layers(model)[layer.output].num_outputs)


def _shifted(bias: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Returns `bias - error`; one number for all channels becomes one per channel."""
    shift = error.reshape(bias.shape) if bias.size == error.size else error
    return (bias.astype(np.float64) - shift).astype(bias.dtype)


def _corrected(layer: _Layer, bias: str, error: np.ndarray) -> Record:
    return Record(
        transform="correct_biases",
        done=True,
        what="mean output error subtracted from the bias",
        where=(layer.output, bias),
        before={"mean error, largest channel": float(np.max(np.abs(error), initial=0.0))},
    )


def _left(output: str, reason: str) -> Record:
    return Record(transform="correct_biases", done=False, what="left as it is", where=(output,), reason=reason)


def _find_layers(model: Model, encodings: Encodings) -> tuple[tuple[_Layer, ...], Report]:
    """Returns the layers to correct, in topological order, and records of those that are left alone."""
    layers: list[_Layer] = []
    left_alone: list[Record] = []
    for node in model.graph.nodes:
        if not _multiplies_a_weight(model, node) or node.inputs[1] not in encodings:
            continue
        layer = _layer_of(model, node)
        reason = _obstacle(model, layer)
        if layer is not None and not reason:
            layers.append(layer)
        else:
            left_alone.append(_left(node.output, reason))
    return tuple(layers), tuple(left_alone)


def _all_layers(model: Model) -> tuple[_Layer, ...]:
    """Returns the layers that could be corrected, whatever is quantized."""
    layers = (_layer_of(model, node) for node in model.graph.nodes if _multiplies_a_weight(model, node))
    return tuple(layer for layer in layers if layer is not None and not _obstacle(model, layer))


def layer_axes(model: Model) -> Axes:
    """Returns the tensors whose means the correction needs of the float model, each with the axis of its channels."""
    return tuple((layer.output, layer.axis) for layer in _all_layers(model))


def corrected_axes(model: Model, encodings: Encodings) -> Axes:
    """Returns the outputs of the layers that are corrected under these encodings, with the axes of their channels."""
    return tuple((layer.output, layer.axis) for layer in _find_layers(model, encodings)[0])


def _multiplies_a_weight(model: Model, node: Node) -> bool:
    linear = node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"} and not node.domain
    return linear and node.inputs[1] in model.params


def _layer_of(model: Model, node: Node) -> _Layer | None:
    if node.op_type == "MatMul":
        return _matmul_layer(model, node)
    bias = node.inputs[_BIAS_INPUT] if len(node.inputs) > _BIAS_INPUT and node.inputs[_BIAS_INPUT] else None
    return _Layer(output=node.output, node=node, weight=node.inputs[1], bias=bias, axis=1)


def _matmul_layer(model: Model, node: Node) -> _Layer | None:
    found = bias_behind(model, node)
    if found is None:
        return None
    add, bias = found
    return _Layer(output=add.output, node=add, weight=node.inputs[1], bias=bias, axis=-1)


def _obstacle(model: Model, layer: _Layer | None) -> str:
    """Returns why a layer cannot be corrected, or nothing."""
    if layer is None:
        return "a MatMul without an Add of one number per channel behind it has no bias"
    if layer.bias is None:
        return ""
    if layer.bias not in model.params:
        return f"its bias '{layer.bias}' is computed, not a parameter"
    shape = np.shape(model.params[layer.bias])
    obstacles = {
        f"its bias '{layer.bias}' is shared with another node": not is_private(model.graph, layer.bias),
        "its bias is scaled by beta, which is not 1": layer.node.attribute("beta", 1.0) != 1.0,
        f"its bias '{layer.bias}' of shape {shape} is not one value per channel": not is_one_per_output(
            shape, shape[-1] if shape else 1
        ),
    }
    return next((reason for reason, holds in obstacles.items() if holds), "")


def _mean_errors(
    model: Model,
    variants: Sequence[tuple[Model, Encodings]],
    corrected: Sequence[tuple[_Layer, ...]],
    batches: Iterable[Parts],
    means: Means | None,
) -> list[dict[str, np.ndarray]]:
    """Returns E[y_q - y] per channel and layer, each layer seeing corrected predecessors; float64 across batches."""
    totals = [{layer.output: np.zeros((), np.float64) for layer in layers} for layers in corrected]
    total_size = 0
    float_means = _FloatMeans(model, means)
    quantized = [
        QuantizedPass(own, encodings, tuple((layer.output, layer.axis) for layer in layers), biases=False)
        for (own, encodings), layers in zip(variants, corrected, strict=True)
    ]
    for index, parts in enumerate(batches):
        found = together(partial(_errors_of_parts, float_means, quantized, index, parts), is_shared=parts.is_shared)
        for _, size, errors in sorted((each for some in found for each in some), key=lambda each: int(each[0])):
            for total, error in zip(totals, errors, strict=True):
                total |= {name: value + int(size) * error[name].astype(np.float64) for name, value in total.items()}
            total_size += int(size)
    return [{name: value / total_size for name, value in total.items()} for total in totals]


class _FloatMeans:
    """The channel means of the float model's layers: as they were kept, or measured."""

    def __init__(self, model: Model, kept: Means | None) -> None:
        self.graph = model.graph
        self._kept = kept or {}
        self._measured = layer_axes(model)
        self._params = OnDevices(model.params)

    def of(self, index: int, part: Part, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the means of part of a batch, by tensor."""
        kept = self._kept.get((index, part.start))
        if kept is not None:
            return kept
        return _float_means(self.graph, self._measured, self._params.on(part.device), inputs)


def _errors_of_parts(
    float_means: _FloatMeans, quantized: Sequence[QuantizedPass], index: int, parts: Parts
) -> list[tuple[int, int, list[dict[str, np.ndarray]]]]:
    """Returns the first sample, the size and the errors under each variant, of each part of a batch."""
    running = []
    for part in parts.here:  # all devices work before the first is waited for
        inputs = jax.device_put(checked_part(float_means.graph, part), part.device)
        means = float_means.of(index, part, inputs)
        errors = [each.run(inputs, means, is_corrected=True, device=part.device).errors for each in quantized]
        running.append((part, num_samples(inputs), errors))
    found = [(part.start, size, jax.device_get(errors)) for part, size, errors in running]
    for (part, _, _), (_, _, errors) in zip(running, found, strict=True):
        for error in errors:
            _check_finite(error, part.place)
    return found


def _check_finite(errors: Mapping[str, np.ndarray], place: str) -> None:
    name = next((name for name, error in errors.items() if not np.isfinite(error).all()), None)
    if name is not None:
        raise DataError(
            f"tensor '{name}' is NaN or infinite in {place}; check the model in float on that batch, "
            "and that the encodings are those of this model"
        )


@partial(compiled, num_static=2, is_brief=True)
def _float_means(
    graph: Graph, axes: Axes, params: Mapping[str, Any], batch: Mapping[str, Any]
) -> dict[str, Float[Array, " _"]]:
    axis_of = dict(axes)

    def measure(name: str, value: Array, channel_axis: int | None) -> tuple[Array, Array | None]:
        return value, channel_means(value, axis_of[name], channel_axis) if name in axis_of else None

    return interpret(graph, params, batch, intercept=measure)[1]
