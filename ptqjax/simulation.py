"""A model and its encodings as the function that the quantized model computes.

Two programs: *float*, fake quantization, differentiable and one trace for all bit widths; *integer*, the runtime's own
arithmetic, equal to ONNX Runtime group by group. Both have the placement that is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from ptqjax.encodings.activations import Switches, fake_quantize_activation
from ptqjax.encodings.biases import bias_encoding, bias_sites
from ptqjax.encodings.encoding import Encoding, Encodings, concrete, fake_quantize
from ptqjax.errors import ConfigError
from ptqjax.ir import Graph, Model
from ptqjax.lowering import Intercept, checked_inputs, compiled_in_two_parts, interpret_by_samples, precision
from ptqjax.qdq.dynamic_products import with_dynamic_products
from ptqjax.qdq.fuse_quantized import fuse_quantized
from ptqjax.qdq.insert import check_tensors, insert_qdq, with_own_biases
from ptqjax.qdq.stored_grids import StoredGrid, stored_grids

Simulation: TypeAlias = Callable[[Mapping[str, Any], Encodings, Mapping[str, Any]], dict[str, jax.Array]]
"""The quantized model: (params, encodings, inputs) -> outputs by name."""


def simulate(model: Model, encodings: Encodings, *, arithmetic: str = "float") -> Simulation:
    """Returns the function that the quantized model computes, of parameters, encodings and inputs.

    The function is pure; `jit`, `vmap` and `grad` work through it. Called on concrete arrays, it is compiled once for
    a graph and shapes, whichever `simulate` it came from.

    Args:
        model: The float model.
        encodings: The grids by tensor. Their names, axes and block sizes decide what is quantized; the values that
            count are those of the call.
        arithmetic: "float": weights and activations are rounded to their grids and computed with in float32, biases
            lie on the grid s_x s_w. Gradients pass straight through. Types and switches are values: one program
            serves them all. "integer": integer operands, exact sums, and ONNX Runtime's order of roundings. Types,
            switches and which groups are integer are decided here, from the concrete values of `model` and `encodings`.

    Raises:
        ConfigError: `arithmetic` is neither, or an encoding is for a tensor that the model has not.
    """
    check_tensors(model.graph, encodings)
    if arithmetic == "float":
        return _with_checks(model.graph, _float_function(model.graph))
    if arithmetic == "integer":
        grids = tuple(sorted(stored_grids(model, encodings).items()))
        fused, _ = fuse_quantized(with_dynamic_products(insert_qdq(model, encodings, grids=dict(grids)))[0])
        return _with_checks(model.graph, partial(_integer_program, _IntegerGraphs(model.graph, fused.graph, grids)))
    raise ConfigError(f"arithmetic={arithmetic!r} is unknown; expected float or integer")


def apply_quantized(
    graph: Graph,
    params: Mapping[str, Any],
    encodings: Encodings,
    inputs: Mapping[str, Any],
    *,
    arithmetic: str = "float",
) -> dict[str, jax.Array]:
    """Returns the outputs of the quantized model by name: `apply` with the roundings of `encodings`.

    Pure: `jit`, `vmap` and `grad` work through it (with "integer" arithmetic, parameters and encodings are concrete).
    Compiled once for a graph and shapes.

    Args:
        graph: The float model's graph.
        params: Its parameters by name.
        encodings: The grids by tensor.
        inputs: The inputs by name, in ONNX's layout.
        arithmetic: "float" or "integer", as `simulate` takes it.

    Raises:
        ConfigError: `arithmetic` is neither, or an encoding is for a tensor that the model has not.
        DataError: An input is missing, unknown, or of another type or shape than the graph declares.
    """
    model = Model(graph=graph, params=dict(params))
    return simulate(model, encodings, arithmetic=arithmetic)(params, encodings, inputs)


def fake_quantization(model: Model, encodings: Encodings, *, are_on: bool = False) -> Intercept:
    """Returns what `interpret` calls to run `model` as the float program: each tensor and bias rounded to its grid.

    A bias that several layers read has a grid for each of them; it stays as it is, where they have no copies.

    Args:
        model: The model.
        encodings: The grids by tensor.
        are_on: Whether all encodings are known to be enabled, with 0 on their grids: programs for GPUs need not ask.
    """
    graph, grids = model.graph, _with_biases(model, encodings)
    positive = {node.output for node in graph.nodes if are_on and (node.domain, node.op_type) == ("", "Relu")}

    def intercept(name: str, value: jax.Array, channel_axis: int | None) -> tuple[jax.Array, None]:
        if name not in grids:
            return value, None
        if name in graph.parameters:
            return _rounded_parameter(value, grids[name]), None
        grid = _in_layout(grids[name], value.ndim, channel_axis)
        return fake_quantize_activation(value, grid, is_on=are_on, has_negatives=name not in positive), None

    return intercept


def round_parameters(model: Model, encodings: Encodings, *, biases: bool = True) -> tuple[Model, Encodings]:
    """Returns the model with its parameters on their grids, and the encodings that are left: those of activations.

    Both together compute what `model` and `encodings` do, to the bit where they are compiled alike. Their program
    rounds nothing that no input decides, and compiles in two thirds of the time: for what runs a few times only.

    Args:
        model: The float model, its arrays concrete.
        encodings: The grids by tensor, concrete.
        biases: Whether biases are rounded as well, to the grids s_x s_w; each layer then has its own copy.
    """
    model = with_own_biases(model, encodings) if biases else model
    grids = _with_biases(model, encodings) if biases else encodings
    rounded = {
        name: np.asarray(fake_quantize(np.asarray(value), concrete(grids[name])))
        for name, value in model.params.items()
        if name in grids
    }
    left = {name: encoding for name, encoding in encodings.items() if name not in model.params}
    return model.replace(params={**model.params, **rounded}), left


def _rounded_parameter(parameter: jax.Array, encoding: Encoding) -> jax.Array:
    """Returns `parameter` rounded to its grid, in a branch of its own, which nothing is fused into.

    Otherwise XLA rounds a depthwise kernel again for each element of the output (MobileNetV2: 0.45 s against 0.29 s);
    it drops optimization barriers before it fuses.
    """
    return jax.lax.cond(encoding.enabled, lambda: fake_quantize(parameter, encoding), lambda: parameter)


def _with_checks(graph: Graph, program: Simulation) -> Simulation:
    """Returns `program`, on inputs that fit the graph.

    Raises:
        DataError: An input is missing, unknown, or of another type or shape than the graph declares.
    """

    def run(params: Mapping[str, Any], encodings: Encodings, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
        inputs = checked_inputs(graph, inputs)
        with precision(graph, params, inputs):
            outputs = program(params, encodings, inputs)
        return {spec.name: outputs[spec.name] for spec in graph.outputs}  # compiled, they come sorted by name

    return run


class _FloatGraph(NamedTuple):
    """What is static in the float program."""

    source: Graph
    """The model's graph."""
    are_on: bool
    """Whether all encodings are known to be enabled."""


def _float_function(graph: Graph) -> Simulation:
    switches = Switches()

    def run(params: Mapping[str, Any], encodings: Encodings, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
        return _float_program(_FloatGraph(graph, switches.are_on(encodings)), params, encodings, inputs)

    return run


@compiled_in_two_parts
def _float_program(
    static: _FloatGraph, params: Mapping[str, Any], encodings: Encodings, inputs: Mapping[str, Any]
) -> dict[str, jax.Array]:
    model = with_own_biases(Model(graph=static.source, params=dict(params)), encodings)
    rounded = fake_quantization(model, encodings, are_on=static.are_on)
    return interpret_by_samples(model.graph, model.params, inputs, intercept=rounded)


class _IntegerGraphs(NamedTuple):
    """What is static in the integer program."""

    source: Graph
    """The float model's graph."""
    fused: Graph
    """The quantized model's, with integer operators."""
    grids: tuple[tuple[str, StoredGrid], ...]
    """How a file holds each quantized tensor, by name."""


@compiled_in_two_parts
def _integer_program(
    graphs: _IntegerGraphs, params: Mapping[str, Any], encodings: Encodings, inputs: Mapping[str, Any]
) -> dict[str, jax.Array]:
    model = Model(graph=graphs.source, params=dict(params))
    quantized, _ = with_dynamic_products(insert_qdq(model, encodings, grids=dict(graphs.grids)))
    params = {name: quantized.params[name] for name in graphs.fused.parameters}
    return interpret_by_samples(graphs.fused, params, inputs)


def _with_biases(model: Model, encodings: Encodings) -> Encodings:
    """Returns the encodings with those of the biases, which follow from input and weight."""
    biases = ((site.bias, bias_encoding(encodings, site)) for site in bias_sites(model))
    return encodings | {name: encoding for name, encoding in biases if encoding is not None}


def _in_layout(encoding: Encoding, rank: int, channel_axis: int | None) -> Encoding:
    """Returns the encoding with its axis, if it is ONNX's axis 1, where that lies in a value of this layout."""
    if encoding.axis is None or channel_axis is None or encoding.axis % rank != 1:
        return encoding
    return encoding.replace(axis=channel_axis)
