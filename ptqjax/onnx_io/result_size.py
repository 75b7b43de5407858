"""How large the result of an operator can become, told from its inputs without computing it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx.helper

from ptqjax.ir import Constant, Node

_Inputs: TypeAlias = Sequence[np.ndarray | None]

# Element by element, on inputs that are broadcast to one shape.
_ARITHMETIC = {"Abs", "Add", "Ceil", "Cos", "Div", "Exp", "Floor", "Log", "Max", "Mean", "Min", "Mod", "Mul", "Neg"}
_ARITHMETIC |= {"Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Sqrt", "Sub", "Sum", "Tanh", "Clip"}
_ARITHMETIC |= {"BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Identity"}
_LOGIC = {"And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor"}
_ELEMENTWISE = _ARITHMETIC | _LOGIC | {"Cast", "CastLike", "Where"}

# No more elements than the inputs have together.
_REDUCTIONS = {f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum")}
_WITHIN = {"ArgMax", "ArgMin", "Concat", "CumSum", "EyeLike", "Flatten", "GatherElements", "ReduceSumSquare", "Reshape"}
_WITHIN |= {"ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "Transpose", "Trilu", "Unsqueeze"}
_WITHIN |= _REDUCTIONS

_SHAPES = {"Shape", "Size"}
_TYPE_OF = {"CastLike": 1, "OneHot": 2, "Where": 1}  # which input's type the result has, where it is not the first's
_INDICES = {"ArgMax", "ArgMin", "NonZero", *_SHAPES}  # their results are int64


# ONNX's evaluator computes these element by element in Python: each element counts as so many, for the time it takes.
_LOOPS = {"GatherElements", "GatherND", "ScatterElements", "ScatterND", "Sigmoid"}
_SLOW = 64


def is_bounded(op_type: str) -> bool:
    """Tells whether the size of the operator's result can be foretold."""
    return op_type in _ELEMENTWISE or op_type in _WITHIN or op_type in _SHAPES or op_type in _FROM_VALUES


def largest_result(node: Node, inputs: _Inputs) -> int | None:
    """Returns a bound, in bytes, of all results of a node of ONNX's own domain; None where it cannot be told.

    What is slow to compute counts as larger. None as well where results are not the same everywhere: an integer divided
    by 0, text turned into numbers.
    """
    found = [value for value in inputs if value is not None]
    if not found or _is_undefined(node, found):
        return None
    try:
        with np.errstate(all="raise"):
            elements = _num_elements(node, inputs)
        return elements * _item_size(node, found) * (_SLOW if node.op_type in _LOOPS else 1)
    except (ValueError, IndexError, TypeError, ArithmeticError, KeyError, AttributeError):
        return None  # inputs that do not fit the operator


def _is_undefined(node: Node, inputs: list[np.ndarray]) -> bool:
    if node.op_type in {"Div", "Mod"}:
        return inputs[-1].dtype.kind in "iu" and not inputs[-1].all()
    if any(value.dtype == object for value in inputs):
        return node.op_type not in _WITHIN | _SHAPES | {"Identity", "Gather"}
    return node.op_type == "Cast" and node.attribute("to") == onnx.TensorProto.STRING


def _num_elements(node: Node, inputs: _Inputs) -> int:
    found = [value for value in inputs if value is not None]
    if node.op_type in _SHAPES:
        return found[0].ndim + 1
    if node.op_type in _FROM_VALUES:
        return _FROM_VALUES[node.op_type](node, *inputs)
    if node.op_type in _WITHIN:
        return sum(value.size for value in found)
    return _broadcast([value.shape for value in found])


def _item_size(node: Node, inputs: list[np.ndarray]) -> int:
    if node.op_type in _INDICES:
        return 8
    kind = node.attribute("to", node.attribute("dtype"))
    if node.op_type in {"Cast", "EyeLike"} and kind is not None:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize
    value = node.attribute("value")
    if node.op_type == "ConstantOfShape":
        return value.value.itemsize if isinstance(value, Constant) else 4
    return inputs[_TYPE_OF.get(node.op_type, 0)].itemsize


def _broadcast(shapes: Sequence[Sequence[int]]) -> int:
    """Returns the number of elements that all shapes are broadcast to, at most."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return math.prod(max(sizes) for sizes in zip(*padded, strict=True))


def _integers(value: np.ndarray) -> list[int]:
    """Returns the elements of a shape; a negative one is refused.

    Raises:
        ValueError: An element is negative, or there are more than a shape has.
    """
    if value.size > np.iinfo(np.int8).max or (value < 0).any():
        raise ValueError
    return [int(element) for element in value.ravel()]


def _of_range(_: Node, start: np.ndarray, limit: np.ndarray, delta: np.ndarray) -> int:
    steps = (limit.astype(np.float64) - start.astype(np.float64)) / delta.astype(np.float64)
    return max(0, math.ceil(float(steps.reshape(())))) + 1


def _of_pad(node: Node, x: np.ndarray, pads: np.ndarray | None = None, *_: Any) -> int:
    given = node.attribute("pads", ()) if pads is None else pads.ravel().tolist()
    added = sum(max(0, int(pad)) for pad in given)
    return math.prod(size + added for size in x.shape)


def _of_gather(node: Node, x: np.ndarray, indices: np.ndarray) -> int:
    return x.size // max(1, x.shape[node.attribute("axis", 0)]) * indices.size


def _of_gather_nd(_: Node, x: np.ndarray, indices: np.ndarray) -> int:
    return x.size * indices.size


def _of_one_hot(_: Node, indices: np.ndarray, depth: np.ndarray, __: np.ndarray) -> int:
    return indices.size * int(depth.reshape(()))


def _of_matmul(_: Node, a: np.ndarray, b: np.ndarray) -> int:
    """The number of products, which bounds the time as well."""
    if a.dtype.kind != "f" or not b.ndim:
        raise ValueError
    return a.size * max(b.shape[-1] if b.ndim > 1 else 1, 1) * math.prod(b.shape[:-2])


_FROM_VALUES: dict[str, Callable[..., int]] = {
    "ConstantOfShape": lambda _, shape: math.prod(_integers(shape)),
    "Expand": lambda _, x, shape: _broadcast([x.shape, _integers(shape)]),
    "Gather": _of_gather,
    "GatherND": _of_gather_nd,
    "MatMul": _of_matmul,
    "NonZero": lambda _, x: x.size * max(1, x.ndim),
    "OneHot": _of_one_hot,
    "Pad": _of_pad,
    "Range": _of_range,
    "Tile": lambda _, x, repeats: x.size * math.prod(_integers(repeats)),
}
