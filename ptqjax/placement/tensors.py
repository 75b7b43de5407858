"""Which tensors of a graph hold floating-point numbers, and whether they can be rounded, without running it."""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from ptqjax.errors import ModelError
from ptqjax.ir import Constant, Model, Node, first_quantized_node, place_of

_INTEGER_RESULTS = frozenset(
    [
        "ArgMax",
        "ArgMin",
        "NonMaxSuppression",
        "NonZero",
        "QuantizeLinear",
        "Shape",
        "Size",
        "StringNormalizer",
        "TfIdfVectorizer",
        "ConvInteger",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
    ]
)
_BOOLEAN_RESULTS = frozenset(
    ["And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor"]
)
_FLOAT_RESULTS = frozenset(["DequantizeLinear", "RandomNormal", "RandomUniform"])
_DATA_INPUT = {"Where": 1, "OneHot": 2}
_SECOND_IS_INTEGER = frozenset(["MaxPool", "TopK", "Dropout", "DynamicQuantizeLinear"])
_ONNX_FLOATS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}  # TensorProto's numbers


def floating_tensors(model: Model) -> tuple[str, ...]:
    """Returns the floating tensors: parameters by name, graph inputs, then results in the order of the nodes.

    Element types are followed from inputs and parameters through the operators of ONNX; an operator that is unknown
    here is taken to return the type of its first input.
    """
    graph = model.graph
    floating = dict.fromkeys(name for name in graph.parameters if is_floating(model.params[name].dtype))
    floating |= dict.fromkeys(spec.name for spec in graph.inputs if is_floating(spec.dtype))
    for node in graph.nodes:
        if _returns_floats(node, floating):
            names = node.outputs[:1] if node.op_type in _SECOND_IS_INTEGER else node.outputs
            floating |= dict.fromkeys(name for name in names if name)
    return tuple(floating)


def check_not_quantized(model: Model) -> None:
    """Checks that the model is one in float.

    Raises:
        ModelError: It holds a node that only a quantized model has.
    """
    node = first_quantized_node(model.graph)
    if node is not None:
        raise ModelError(
            f"the model is quantized already: it holds {place_of(node)}; expected a float model: quantize its source"
        )


def check_types(model: Model, tensors: Iterable[str]) -> None:
    """Checks that `tensors` are float32, as far as the graph declares it: ends of the graph, parameters and casts.

    Raises:
        ModelError: One is of another type: scales and simulation are in float32.
    """
    graph = model.graph
    types = {spec.name: spec.dtype.name for spec in (*graph.inputs, *graph.outputs)}
    types |= {name: value.dtype.name for name, value in model.params.items()}
    casts = (node for node in graph.nodes if node.op_type == "Cast")
    types |= {node.output: _ONNX_FLOATS.get(node.attribute("to"), "float32") for node in casts}
    wrong = next((name for name in tensors if types.get(name, "float32") != "float32"), None)
    if wrong is not None:
        raise ModelError(
            f"tensor '{wrong}' has the type {types[wrong]}, and only float32 can be quantized; "
            "convert the model to float32, or exclude the tensor"
        )


def is_floating(dtype: np.dtype) -> bool:
    """Tells whether `dtype` is a floating type, those of `ml_dtypes` included."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _returns_floats(node: Node, floating: dict[str, None]) -> bool:
    if node.op_type in _INTEGER_RESULTS or node.op_type in _BOOLEAN_RESULTS:
        return False
    if node.op_type in _FLOAT_RESULTS:
        return True
    if node.op_type == "Cast":
        return node.attribute("to") in _ONNX_FLOATS
    if node.op_type in ("ConstantOfShape", "Constant"):
        value = node.attribute("value")
        return not isinstance(value, Constant) or is_floating(value.value.dtype)
    position = _DATA_INPUT.get(node.op_type, 0)
    return len(node.inputs) > position and node.inputs[position] in floating
