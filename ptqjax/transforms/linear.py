"""Finds the linear layers of a graph, and rewrites one: what all transforms of weights share.

A linear layer is a node that multiplies its input by a parameter of its own and adds a bias of its own: Conv,
ConvTranspose, Gemm, MatMul, and MatMul with the Add behind it. What a transform changes is `weight_view` and
`bias_of`; `rewrite` turns these back into a node and parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ptqjax.ir import Graph, Model, Node, Statistics, bias_behind, fresh_name, is_one_per_output, is_private, rebuild
from ptqjax.kernels.grouped import grouped_view, ungrouped_view
from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.precision import widened
from ptqjax.transforms.rank import ranks_of

HOSTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that are linear layers, or part of one, where their weight is a parameter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A linear layer and what must be known to rewrite it."""

    node: Node
    """The node that multiplies."""
    bias_node: Node | None
    """The Add behind a MatMul; None where the node itself adds the bias."""
    input: str
    """The tensor that is multiplied by the weight."""
    output: str
    """The tensor that the layer produces, bias included."""
    weight: str
    """The parameter that multiplies."""
    bias: str
    """The parameter that is added; "" where there is none."""
    num_outputs: int
    """Output channels in all groups."""
    num_inputs: int
    """Input channels in all groups."""
    groups: int
    """Number of groups; 1 for a Gemm or MatMul."""
    inputs_first: bool
    """Whether the weight's first axis counts inputs."""
    pads: bool
    """Whether some outputs see fewer taps than others, so that a constant input need not give a constant output."""
    kernel_rank: int
    """Number of spatial axes; 0 for a Gemm or MatMul."""
    channels_at_1: bool
    """Whether axis 1 of input and output counts the channels that the weight connects."""
    input_axis: int
    """The axis of the input that counts its channels; -1 for the last."""
    output_axis: int
    """The axis of the output that counts its channels; -1 for the last."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What becomes of some nodes and parameters; edits of different layers merge without conflict."""

    nodes: Mapping[str, tuple[Node, ...]] = field(default_factory=dict)
    """The nodes in the place of old ones, by the tensor that the old node produces; none where it goes."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """New values of parameters, and new parameters."""


def edited_nodes(graph: Graph, edits: Iterable[Edit]) -> tuple[Node, ...]:
    """Returns the graph's nodes after the edits."""
    changes = {output: nodes for edit in edits for output, nodes in edit.nodes.items()}
    return tuple(new for node in graph.nodes for new in changes.get(node.output, (node,)))


def edited(model: Model, edits: Sequence[Edit], statistics: Mapping[str, Statistics] | None = None) -> Model:
    """Returns the model after the edits, sorted and verified, with `statistics` in place of the old where given."""
    params = {name: value for edit in edits for name, value in edit.params.items()}
    statistics = {**model.statistics, **(statistics or {})}
    nodes = edited_nodes(model.graph, edits)
    return rebuild(model, nodes=nodes, params=model.params | params, statistics=statistics)


def linear_layers(model: Model) -> dict[str, Linear]:
    """Returns the linear layers with a weight among the parameters, by the tensor that they produce, in graph order."""
    ranks = ranks_of(model)
    found = (_linear_at(model, node, ranks) for node in model.graph.nodes if node.op_type in HOSTS and not node.domain)
    return {layer.output: layer for layer in found if layer is not None}


def why_not_rewritable(graph: Graph, layer: Linear) -> str:
    """Returns why weight and bias may not be changed for this layer alone; "" where they may."""
    for name in (layer.weight, layer.bias):
        if name and not is_private(graph, name):
            return f"'{name}' is shared with another node or is a graph output"
    return ""


def weight_view(model: Model, layer: Linear) -> Any:
    """Returns the weight that the layer applies (a Gemm's alpha included), wide, as [groups, outputs, inputs, taps]."""
    view = grouped_view(widened(model.params[layer.weight]), groups=layer.groups, inputs_first=layer.inputs_first)
    alpha = layer.node.attribute("alpha", 1.0)
    return view if alpha == 1.0 else view * alpha


def bias_of(model: Model, layer: Linear) -> Any:
    """Returns the bias that the layer adds (a Gemm's beta included), wide, one number per output; zeros for none."""
    if not layer.bias:
        weight = model.params[layer.weight]
        return array_namespace(weight).zeros_like(widened(weight), shape=(layer.num_outputs,))
    bias = widened(model.params[layer.bias]).reshape(-1) * layer.node.attribute("beta", 1.0)
    return array_namespace(bias).broadcast_to(bias, (layer.num_outputs,))


def rewrite(model: Model, layer: Linear, view: Any, bias: Any | None = None, *, output: str = "") -> Edit:
    """Returns the edit that gives the layer another weight and bias, in the weight's element type.

    Args:
        model: Where the layer is.
        layer: The layer; must be rewritable. A MatMul without a bias that gets one becomes a Gemm where it reads a
            matrix, else an Add follows it.
        view: The new weight, as `weight_view` returns it.
        bias: The new bias, as `bias_of` returns it; None where it stays as it is.
        output: The tensor to produce; "" for the present one.
    """
    old = model.params[layer.weight]
    params = {layer.weight: ungrouped_view(view, old.shape, inputs_first=layer.inputs_first)}
    name = layer.bias
    if bias is not None:
        name = name or fresh_name(model.graph, f"{layer.output}_bias")
        params[name] = bias
    with np.errstate(over="ignore"):  # infinities are found by those who can make them: `fold`
        params = {name: value.astype(old.dtype) for name, value in params.items()}
    output = output or layer.output
    if layer.bias_node is not None:
        return Edit(params=params, nodes={layer.output: (replace(layer.bias_node, outputs=(output,)),)})
    if layer.node.op_type == "MatMul" and name and not layer.channels_at_1:
        product = layer.output if output != layer.output else fresh_name(model.graph, f"{layer.output}_product")
        add = Node(op_type="Add", inputs=(product, name), outputs=(output,))
        return Edit(params=params, nodes={layer.output: (replace(layer.node, outputs=(product,)), add)})
    return Edit(params=params, nodes={layer.output: (_adding(layer.node, name, bias is not None, output),)})


def _adding(node: Node, bias: str, is_new: bool, output: str) -> Node:  # noqa: FBT001
    inputs = (*node.inputs[:2], bias) if bias else node.inputs[:2]
    if node.op_type not in {"Gemm", "MatMul"}:
        return replace(node, inputs=inputs, outputs=(output,))
    if node.op_type == "MatMul" and not bias:
        return replace(node, outputs=(output,))
    beta = 1.0 if is_new else node.attribute("beta", 1.0)
    transpositions = (("transA", node.attribute("transA", 0)), ("transB", node.attribute("transB", 0)))
    attributes = (("alpha", 1.0), ("beta", beta), *transpositions)
    return replace(node, op_type="Gemm", inputs=inputs, outputs=(output,), attributes=attributes)


def _input(node: Node, index: int) -> str:
    """Returns the name of an input; "" where it is left out."""
    return dict(enumerate(node.inputs)).get(index, "")


def _linear_at(model: Model, node: Node, ranks: Mapping[str, int]) -> Linear | None:
    weight = model.params.get(_input(node, 1))
    if weight is None or 0 in weight.shape:
        return None
    if node.op_type in {"Conv", "ConvTranspose"}:
        return _convolution(model, node, weight.shape)
    if len(weight.shape) != 2:  # noqa: PLR2004  a matrix
        return None
    return _gemm(model, node, weight.shape) if node.op_type == "Gemm" else _matmul(model, node, weight.shape, ranks)


def _convolution(model: Model, node: Node, shape: tuple[int, ...]) -> Linear | None:
    is_transposed = node.op_type == "ConvTranspose"
    groups = node.attribute("group", 1)
    bias = _input(node, 2)
    if bias and bias not in model.params:
        return None
    return Linear(
        node=node,
        bias_node=None,
        input=node.inputs[0],
        output=node.output,
        weight=node.inputs[1],
        bias=bias,
        num_outputs=shape[1] * groups if is_transposed else shape[0],
        num_inputs=shape[0] if is_transposed else shape[1] * groups,
        groups=groups,
        inputs_first=is_transposed,
        pads=_some_outputs_see_less(node, shape[2:]),
        kernel_rank=len(shape) - 2,
        channels_at_1=True,
        input_axis=1,
        output_axis=1,
    )


def _some_outputs_see_less(node: Node, kernel: tuple[int, ...]) -> bool:
    if node.op_type == "ConvTranspose":
        plain = set(kernel) == {1} and set(node.attribute("strides", (1,))) == {1}
        return not (plain and not any(node.attribute("pads", ())) and not any(node.attribute("output_padding", ())))
    if node.attribute("auto_pad", "NOTSET") in {"SAME_UPPER", "SAME_LOWER"}:
        return set(kernel) != {1}
    return node.attribute("auto_pad", "NOTSET") == "NOTSET" and any(node.attribute("pads", ()))


def _gemm(model: Model, node: Node, shape: tuple[int, ...]) -> Linear | None:
    inputs_first = not node.attribute("transB", 0)
    num_inputs, num_outputs = shape if inputs_first else shape[::-1]
    bias = _input(node, 2) if node.attribute("beta", 1.0) else ""
    if bias and (bias not in model.params or not is_one_per_output(model.params[bias].shape, num_outputs)):
        return None
    return Linear(
        node=node,
        bias_node=None,
        input=node.inputs[0],
        output=node.output,
        weight=node.inputs[1],
        bias=bias,
        num_outputs=num_outputs,
        num_inputs=num_inputs,
        groups=1,
        inputs_first=inputs_first,
        pads=False,
        kernel_rank=0,
        channels_at_1=not node.attribute("transA", 0),
        input_axis=0 if node.attribute("transA", 0) else 1,
        output_axis=1,
    )


def _matmul(model: Model, node: Node, shape: tuple[int, ...], ranks: Mapping[str, int]) -> Linear:
    add, bias = bias_behind(model, node) or (None, "")
    if bias and len(model.params[bias].shape) > 2:  # noqa: PLR2004  it may raise the rank of what it is added to
        add, bias = None, ""
    return Linear(
        node=node,
        bias_node=add,
        input=node.inputs[0],
        output=add.output if add is not None else node.output,
        weight=node.inputs[1],
        bias=bias,
        num_outputs=shape[1],
        num_inputs=shape[0],
        groups=1,
        inputs_first=True,
        pads=False,
        kernel_rank=0,
        channels_at_1=ranks.get(node.inputs[0]) == 2,  # noqa: PLR2004  a matrix
        input_axis=-1,
        output_axis=-1,
    )
