"""What a quantized model costs: bit-operations, bytes and mean widths, from shapes and encodings alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from ptqjax.data.batches import num_samples
from ptqjax.encodings.biases import bias_encoding, bias_sites
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.ir import Model, Node
from ptqjax.lowering import checked_inputs, interpret, precision
from ptqjax.placement.granularity import weight_uses
from ptqjax.placement.rules import num_bits
from ptqjax.qdq.stored_grids import stored_grid

FLOAT_BITS = 32
"""What a tensor in float counts."""

_BYTE = 8  # bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What a model costs under some encodings; all but the bytes are of one sample."""

    bit_operations: float
    """The sum over all products of multiplications x bits of one operand x bits of the other; float has 32."""
    model_bytes: int
    """Bytes of all parameters, each at its own width and packed (six bits are 6/8 byte): codes, scales as float32, zero
    points as codes; biases as int32; what stays in float as it is; and a scale and a zero point per activation."""
    stored_bytes: int
    """Bytes of the arrays that the exported file holds: 5 to 7 bits are held in 8 there, 2 and 3 in 4, and biases have
    scales and zero points of their own. Names and nodes, which the file has besides, are not in it."""
    mean_weight_bits: float
    """Mean width of the weights, each element counted once; 0 where there are none."""
    mean_activation_bits: float
    """Mean width of the activations that have an encoding, each element counted once; 0 where there are none."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """An operator that multiplies and sums: Conv, ConvTranspose, Gemm or MatMul."""

    output: str
    """The tensor that it produces."""
    operands: tuple[str, str]
    """What is multiplied: an activation and a weight, or two activations."""
    multiplications: float
    """How many for one sample; those of a ConvTranspose count what its pads cut off, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """What costs depend on besides the encodings; made once per model by `cost_model`."""

    model: Model
    """The model, of which names and shapes count."""
    products: tuple[Product, ...]
    """Its products, in the order of the nodes. Those inside the subgraphs of If, Loop and Scan, and those of recurrent
    operators, are not among them."""
    weights: Mapping[str, int]
    """The number of elements of each weight."""
    activations: Mapping[str, float]
    """The number of elements, for one sample, of each floating tensor that is no parameter."""

    def costs(self, encodings: Encodings) -> Costs:
        """Returns what the model costs under concrete encodings; those that are not enabled count as float."""
        bits = {name: _bits(encoding) for name, encoding in encodings.items()}
        operations = (
            product.multiplications * math.prod(bits.get(name, FLOAT_BITS) for name in product.operands)
            for product in self.products
        )
        flowing = {name: self.activations[name] for name in encodings if name in self.activations}
        rounded = {name: encoding for name, encoding in encodings.items() if encoding.enabled}
        packed, stored = _bytes(self.model, rounded, encodings)
        return Costs(
            bit_operations=float(sum(operations)),
            model_bytes=packed,
            stored_bytes=stored,
            mean_weight_bits=_mean(self.weights, bits),
            mean_activation_bits=_mean(flowing, bits),
        )


def cost_model(model: Model, inputs: Mapping[str, Any]) -> CostModel:
    """Returns what the model's costs depend on, by tracing it once; nothing is computed.

    Args:
        model: The model.
        inputs: A batch, of which shapes and types count; operations are divided by its number of samples.

    Raises:
        DataError: The batch does not fit the model.
        DataDependentError: A shape depends on values.
        UnsupportedOperatorError: A node has no lowering.
    """
    shapes = _shapes(model, inputs)
    samples = num_samples(
        {name: value if hasattr(value, "shape") else np.asarray(value) for name, value in inputs.items()}
    )
    flowing = {name: math.prod(shape) / samples for name, shape in shapes.items() if name not in model.params}
    return CostModel(
        model=model,
        products=tuple(_products(model, shapes, samples)),
        weights={name: int(np.size(model.params[name])) for name in weight_uses(model)},
        activations=flowing,
    )


def _shapes(model: Model, inputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all floating tensors, as ONNX has them."""
    graph, params = model.graph, dict(model.params)
    inputs = checked_inputs(graph, inputs)

    def observed(params: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        # Not as on a CPU, where channels would lie last.
        seen = interpret(graph, params, inputs, intercept=lambda _, value, __: (value, value), platform="any")
        return seen[1]

    with precision(graph, params, inputs):
        found = jax.eval_shape(observed, params, dict(inputs))
    return {name: tuple(value.shape) for name, value in found.items()}


def _products(model: Model, shapes: Mapping[str, tuple[int, ...]], samples: int) -> Iterator[Product]:
    for node in model.graph.nodes:
        count = _multiplications(node, shapes) if not node.domain else None
        if count is not None:
            first, second = node.inputs[:2]
            yield Product(output=node.output, operands=(first, second), multiplications=count / samples)


def _multiplications(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Returns how many products of two numbers the node sums; None where it is no product of floats."""
    if not {*node.inputs[:2], node.output} <= shapes.keys():
        return None
    if node.op_type == "Conv":  # each output sums over the inputs of its group and the kernel
        return math.prod(shapes[node.output]) * math.prod(shapes[node.inputs[1]][1:])
    if node.op_type == "ConvTranspose":  # each input goes to the outputs of its group, at each place of the kernel
        return math.prod(shapes[node.inputs[0]]) * math.prod(shapes[node.inputs[1]][1:])
    if node.op_type == "Gemm":
        return math.prod(shapes[node.output]) * shapes[node.inputs[0]][0 if node.attribute("transA", 0) else 1]
    if node.op_type == "MatMul":
        return math.prod(shapes[node.output]) * shapes[node.inputs[0]][-1]
    return None


def _bits(encoding: Encoding) -> int:
    return encoding.num_bits if encoding.enabled else FLOAT_BITS


def _mean(sizes: Mapping[str, int] | Mapping[str, float], bits: Mapping[str, int]) -> float:
    total = sum(sizes.values())
    return sum(size * bits.get(name, FLOAT_BITS) for name, size in sizes.items()) / total if total else 0.0


def _bytes(model: Model, rounded: Encodings, encodings: Encodings) -> tuple[int, int]:
    """Returns the bytes of all parameters and grids, packed, and as a file holds them."""
    packed = stored = 0
    for name, value in model.params.items():
        if name not in rounded:
            packed, stored = packed + value.nbytes, stored + value.nbytes
    for name, encoding in rounded.items():
        count = int(np.size(model.params[name])) if name in model.params else 0
        scales = int(np.size(encoding.scale))
        width = _file_bits(encoding, is_activation=name not in model.params)
        packed += _whole_bytes(count * encoding.num_bits) + 4 * scales + _whole_bytes(scales * encoding.num_bits)
        stored += _whole_bytes(count * width) + 4 * scales + _whole_bytes(scales * width)
    return packed, stored + _bytes_of_biases(model, encodings)


def _bytes_of_biases(model: Model, encodings: Encodings) -> int:
    """Returns the bytes of the scales and zero points that a file has for its int32 biases."""
    found = (bias_encoding(encodings, site) for site in bias_sites(model))
    return sum(2 * 4 * int(np.size(bias.scale)) for bias in found if bias is not None and bias.enabled)


def _file_bits(encoding: Encoding, *, is_activation: bool) -> int:
    return num_bits(stored_grid(encoding, is_activation=is_activation).dtype)


def _whole_bytes(bits: int) -> int:
    return -(-bits // _BYTE)
