"""Constants behind a linear layer are its own, spelled apart: CNTK writes biases so, Caffe's scale layers both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ptqjax.ir import Model, Node, Record, Report, is_private, only_reader, place_of, rebuild
from ptqjax.kernels.folding import fold_after
from ptqjax.kernels.precision import is_traced, widened
from ptqjax.transforms.linear import Edit, Linear, bias_of, edited, linear_layers, rewrite, weight_view

NAME = "fold_biases"
"""What reports call it."""
_SHIFTS, _FACTORS = frozenset(["Add", "Sub"]), frozenset(["Mul", "Div"])
_COMMUTES = frozenset(["Add", "Mul"])


def fold_constant_steps(model: Model) -> tuple[Model, Report]:
    """Returns the model in which layers do what constant Adds, Subs, Muls and Divs behind them did, and records of it.

    (W x + b) k + c = (k W) x + (k b + c), where k and c are one number, or one for each output channel, and nothing
    else reads the layer's result. The Add behind a MatMul is part of that layer already; what multiplies it is folded
    where it is one number, or a vector (the scale of a branch in ConvNeXt, of queries in OPT). Numbers are computed in
    float64 and stored in the weight's own type; the layer then produces what the step did. A step that raises the rank,
    or whose result that type cannot hold, stays. So does the Mul of a shared weight.
    """
    records: list[Record] = []
    while True:
        layers = linear_layers(model)
        edits: dict[str, Edit] = {}
        for step in (node for node in model.graph.nodes if node.op_type in _SHIFTS | _FACTORS and not node.domain):
            found = _edit(model, layers, step)
            if found is not None:
                layer, edits[layer.output] = found
                records.append(_record(layer, step))
        if not edits:
            return model, tuple(records)
        model = edited(model, list(edits.values()))


def fold_gemm_factors(model: Model) -> tuple[Model, Report]:
    """Returns the model with the alphas and betas of Gemms in their parameters, and a record for each that was.

    alpha A W + beta C = A (alpha W) + (beta C): runtimes compute a Gemm in integers where beta is 1. A beta of 0 leaves
    its parameter out. What other nodes read as well, or is computed, keeps its factor.
    """
    params, records, nodes = dict(model.params), list[Record](), list[Node]()
    for node in model.graph.nodes:
        changed = node
        if node.op_type == "Gemm" and not node.domain:
            for factor, at in (("alpha", 1), ("alpha", 0), ("beta", 2)):
                changed = _without_factor(model, changed, factor, at, params)
        nodes.append(changed)
        if changed is not node:
            what = "its alpha and beta were folded into its parameters"
            records.append(Record(transform=NAME, done=True, what=what, where=(node.output, *changed.inputs[1:])))
    return (rebuild(model, nodes=nodes, params=params) if records else model), tuple(records)


def _without_factor(model: Model, node: Node, factor: str, at: int, params: dict[str, Any]) -> Node:
    """Returns the Gemm without a factor, which goes into `params`; the node itself where it cannot."""
    name, value = dict(enumerate(node.inputs)).get(at, ""), node.attribute(factor, 1.0)
    if value == 1.0 or not name or not is_private(model.graph, name):
        return node
    scaled = (widened(params[name]) * value).astype(params[name].dtype)
    if not is_traced(scaled) and not np.all(np.isfinite(scaled)):
        return node
    params[name] = scaled
    attributes = tuple((key, 1.0 if key == factor else each) for key, each in node.attributes)
    is_gone = factor == "beta" and value == 0.0
    return replace(node, attributes=attributes, inputs=node.inputs[:2] if is_gone else node.inputs)


def _edit(model: Model, layers: Mapping[str, Linear], step: Node) -> tuple[Linear, Edit] | None:
    """Returns the layer that takes in the step's constant, and the changes; None where none does."""
    tensor, constant = _operands(model, step)
    layer = layers.get(tensor)
    if layer is None or only_reader(model.graph, tensor) is None:
        return None
    if layer.node.op_type == "MatMul" and (step.op_type in _SHIFTS or np.ndim(model.params[constant]) > 1):
        return None
    if layer.bias and not is_private(model.graph, layer.bias):
        return None
    value = _per_channel(layer, model.params[constant])
    is_multiplied = step.op_type in _FACTORS or layer.node.attribute("alpha", 1.0) != 1.0
    if value is None or (is_multiplied and not is_private(model.graph, layer.weight)):
        return None
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale, shift = _as_affine(step.op_type, value)
        view, bias = fold_after(weight_view(model, layer), bias_of(model, layer), scale, shift)
    largest = np.finfo(model.params[layer.weight].dtype).max
    if not all(is_traced(each) or np.all(np.abs(each) <= largest) for each in (view, bias)):
        return None
    needs_bias = bool(layer.bias) or step.op_type in _SHIFTS
    edit = rewrite(model, layer, view, bias if needs_bias else None, output=step.output)
    return layer, replace(edit, nodes={**edit.nodes, step.output: ()})


def _as_affine(op_type: str, value: Any) -> tuple[Any, Any]:
    """Returns the factor and the shift by which a step changes what it reads."""
    one, none = np.ones(value.shape), np.zeros(value.shape)
    return {"Add": (one, value), "Sub": (one, -value), "Mul": (value, none), "Div": (1.0 / value, none)}[op_type]


def _operands(model: Model, step: Node) -> tuple[str, str]:
    """Returns what is computed and what is constant; "" twice where it is not one of each, in a fitting order."""
    constant = [name for name in step.inputs if name in model.params]
    computed = [name for name in step.inputs if name not in model.params]
    fits = len(constant) == len(computed) == 1 and (step.op_type in _COMMUTES or step.inputs[0] == computed[0])
    return (computed[0], constant[0]) if fits else ("", "")


def _per_channel(layer: Linear, constant: Any) -> Any | None:
    """Returns a constant as one number per output channel; None where it is not that, or has another rank."""
    shape, rank = np.shape(constant), layer.kernel_rank + 2
    aligned = (1,) * (rank - len(shape)) + shape
    if len(shape) > rank or aligned not in {(1,) * rank, (1, layer.num_outputs, *(1,) * layer.kernel_rank)}:
        return None
    return widened(constant).reshape(-1) * np.ones(layer.num_outputs)


def _record(layer: Linear, step: Node) -> Record:
    place = place_of(layer.node)
    became = f"the bias of {place}" if step.op_type in _SHIFTS else f"part of the weight of {place}"
    return Record(transform=NAME, done=True, what=f"its constant became {became}", where=(step.output, layer.weight))
