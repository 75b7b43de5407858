"""Which tensors of a graph hold floating-point numbers, without running it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ptqjax.ir import Constant, Model, Node

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
_ONNX_FLOATS = frozenset([1, 10, 11, 16])  # TensorProto: FLOAT, FLOAT16, DOUBLE, BFLOAT16


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
