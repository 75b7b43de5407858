"""Tensors that are scaled for the layers that read them alone: where what makes them cannot take scales.

Behind a GELU, or where a residual sum reads a normalization's result as well, channels of very unlike size would share
one grid. A product by a factor per channel in front of the layers, whose weights undo it, gives each channel the steps
that it needs; the tensor itself then stays as it is for all others that read it, who compute in float. In place of a
product behind a LayerNormalization stands a second one, whose factors and shifts are the layers' alone.
Source: Xiao et al., SmoothQuant (ICML 2023), section 4, where the factors go into the normalization or are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from ptqjax.ir import Graph, Model, Node, fresh_name, only_reader, rebuild, scalar_of, value_of
from ptqjax.transforms.linear import Linear, linear_layers, why_not_rewritable
from ptqjax.transforms.rank import ranks_of
from ptqjax.transforms.ties import Ties


@dataclass(frozen=True, kw_only=True, slots=True)
class Fork:
    """Layers that are to read a tensor through a factor per channel of their own."""

    tensor: str
    """The tensor."""
    result: str
    """What the layers read in its place."""
    layers: tuple[Linear, ...]
    """The layers."""
    merged: Node | None
    """The product by a number that makes the tensor for these layers alone, and takes the factors; None: none does."""


def find_forks(model: Model, ties: Ties) -> tuple[Fork, ...]:
    """Returns the tensors of fixed or unknown scales that matrices multiply, in graph order; at most one for each.

    All layers that read a tensor have to be rewritable. Graph inputs are left out: their grid is that of the data.
    """
    by_tensor: dict[str, list[Linear]] = {}
    for layer in linear_layers(model).values():
        by_tensor.setdefault(layer.input, []).append(layer)
    found = (_fork(model, ties, tensor, layers) for tensor, layers in by_tensor.items())
    ranks = ranks_of(model)
    return tuple(fork for fork in found if fork is not None and ranks.get(fork.tensor) is not None)


def with_forks(model: Model, forks: Iterable[Fork]) -> Model:
    """Returns the model in which layers read tensors through factors of their own, all of them one: nothing changes."""
    params, changed, made = dict(model.params), dict[str, Node](), dict[str, Node]()
    for fork in forks:
        factors = f"{fork.result}_factors"
        ones = np.ones(fork.layers[0].num_inputs, model.params[fork.layers[0].weight].dtype)
        producer = model.graph.producers[fork.tensor]
        if _is_normalization(model, producer):
            copies = tuple(f"{fork.result}_{what}" for what in ("factors", "shifts"))
            given = [model.params[name] for name in producer.inputs[1:] if name]
            params |= dict(zip(copies, [*given, np.zeros_like(given[0])], strict=False))
            inputs = (producer.inputs[0], *copies)
            made[fork.tensor] = replace(producer, inputs=inputs, outputs=(fork.result,), name="")
        elif fork.merged is None:
            made[fork.tensor] = Node(op_type="Mul", inputs=(fork.tensor, factors), outputs=(fork.result,))
            params[factors] = ones
        else:
            number = next(name for name in fork.merged.inputs if scalar_of(model, name) is not None)
            given = np.asarray(value_of(model, number))
            params[factors] = (
                (ones * given.reshape(())).astype(ones.dtype).reshape((1,) * (given.ndim - 1) + ones.shape)
            )
            inputs = tuple(factors if name == number else name for name in fork.merged.inputs)
            changed[fork.tensor] = replace(fork.merged, inputs=inputs, outputs=(fork.result,))
        for layer in fork.layers:
            changed[layer.node.output] = replace(layer.node, inputs=(fork.result, *layer.node.inputs[1:]))
    nodes = [
        new for node in model.graph.nodes
        for new in (changed.get(node.output, node), made.get(node.output)) if new is not None
    ]  # fmt: skip
    return rebuild(model, nodes=nodes, params=params)


def _fork(model: Model, ties: Ties, tensor: str, layers: list[Linear]) -> Fork | None:
    graph, known = model.graph, ties.channels.get(tensor)
    is_scaled = known is not None and known.scales.any()
    is_matrix = all(layer.node.op_type in ("Gemm", "MatMul") and layer.input_axis != 0 for layer in layers)
    if is_scaled or not is_matrix or tensor not in graph.producers or tensor in graph.output_names:
        return None
    if any(why_not_rewritable(graph, layer) for layer in layers):
        return None
    product = graph.producers[tensor]
    return Fork(
        tensor=tensor,
        result=fresh_name(graph, f"{tensor}_scaled"),
        layers=tuple(layers),
        merged=product if _takes_factors(model, graph, product, layers) else None,
    )


def _is_normalization(model: Model, node: Node) -> bool:
    """Tells whether a node is a LayerNormalization over the last axis, with factors and perhaps shifts per channel."""
    params = [model.params[name] for name in node.inputs[1:] if name in model.params]
    vectors = len(params) == len(list(filter(None, node.inputs[1:]))) > 0 and all(np.ndim(each) == 1 for each in params)
    return node.op_type == "LayerNormalization" and not node.domain and vectors and not any(node.outputs[1:])


def _takes_factors(model: Model, graph: Graph, product: Node, layers: list[Linear]) -> bool:
    """Tells whether a product by one number makes the tensor for one layer alone."""
    is_alone = len(layers) == 1 and only_reader(graph, product.output) is layers[0].node
    numbers = [name for name in product.inputs if scalar_of(model, name) is not None]
    return is_alone and product.op_type == "Mul" and not product.domain and len(numbers) == 1 == len(set(numbers))
