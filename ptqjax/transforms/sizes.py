"""How large each axis of a tensor is, as far as it follows from the graph: numbers, and products of unknown sizes.

Enough of shape inference to prove that a Reshape keeps channels apart where height, width or batch are not known: then
they are symbols, and what is asked of a size is whether another divides it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np

from ptqjax.ir import Model, Node
from ptqjax.transforms.rank import ranks_of

_SAME = frozenset({
    "BatchNormalization", "Cast", "Clip", "Dropout", "Elu", "Erf", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu",
    "Neg", "PRelu", "Relu", "Selu", "Sigmoid", "Softmax", "Sqrt", "Tanh",
})  # fmt: skip
_BROADCAST = frozenset({"Add", "Sub", "Mul", "Div", "Min", "Max", "Sum"})
_POOLS = frozenset({"AveragePool", "MaxPool"})


_SAME_TYPE = _SAME - {"Cast"} | _BROADCAST | _POOLS | {
    "Concat", "Conv", "ConvTranspose", "Flatten", "Gemm", "GlobalAveragePool", "GlobalMaxPool", "MatMul", "Reshape",
    "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "LayerNormalization", "Pad", "Gather", "Resize", "Upsample",
    "ReduceMean", "InstanceNormalization", "Exp", "Log", "Abs", "Softplus", "Expand", "Tile", "DepthToSpace",
    "SpaceToDepth", "LRN", "Mean", "Pow",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Size:
    """The product of a number and of sizes that are not known."""

    number: int
    """The part that is known; at least 1."""
    unknown: tuple[tuple[str, int], ...] = ()
    """The unknown factors, sorted: a name that the file gave with -1, or a tensor and its axis."""

    def __mul__(self, other: Size) -> Size:
        return Size(self.number * other.number, tuple(sorted(self.unknown + other.unknown)))

    def divided_by(self, other: Size) -> Size | None:
        """Returns the quotient; None where it cannot be proven to be whole."""
        rest = Counter(self.unknown)
        rest.subtract(other.unknown)
        if self.number % other.number or min(rest.values(), default=0) < 0:
            return None
        return Size(self.number // other.number, tuple(sorted(rest.elements())))


Shape: TypeAlias = tuple[Size, ...]
"""The size of each axis."""

ONE = Size(1)


def product(sizes: Iterable[Size]) -> Size:
    """Returns the product of the sizes; 1 for none."""
    return prod(sizes, start=ONE)


def shapes_of(model: Model) -> dict[str, Shape]:
    """Returns the shape of each tensor whose rank is known; tensors without elements have none."""
    shapes: dict[str, Shape] = {}
    ranks = ranks_of(model)
    declared = [(spec.name, spec.shape) for spec in model.graph.inputs if spec.shape is not None]
    declared += [(name, tuple(value.shape)) for name, value in model.params.items()]
    declared += [(name, value.shape) for name, value in model.graph.constant_values.items()]
    for name, shape in declared:
        if 0 not in shape:
            shapes[name] = tuple(_declared(name, axis, size) for axis, size in enumerate(shape))
    for node in model.graph.nodes:
        shape = None if node.domain else _shape(model, node, shapes)
        if shape is None and node.output in ranks:
            shape = _unknown(node, ranks[node.output])
        if shape is not None:
            shapes[node.output] = shape
    return shapes


def element_type(model: Model, tensor: str) -> np.dtype | None:
    """Returns the element type of a tensor, where it follows from the operators before it; None where it does not."""
    types = {spec.name: spec.dtype for spec in model.graph.inputs}
    while tensor not in types and tensor not in model.params:
        node = model.graph.producers.get(tensor)
        if node is None or node.domain or node.op_type not in _SAME_TYPE or not node.inputs:
            return None
        tensor = node.inputs[0]
    return np.dtype(types[tensor] if tensor in types else model.params[tensor].dtype)


def _declared(tensor: str, axis: int, size: int | str | None) -> Size:
    if isinstance(size, str):
        return Size(1, ((size, -1),))
    return Size(1, ((tensor, axis),)) if size is None else Size(int(size))


def _unknown(node: Node, rank: int) -> Shape:
    return tuple(Size(1, ((node.output, axis),)) for axis in range(rank))


def _shape(model: Model, node: Node, shapes: Mapping[str, Shape]) -> Shape | None:
    """Returns the shape of what the node produces; None where it is not known here."""
    known = [shapes.get(name) for name in node.inputs]
    if not known or known[0] is None:
        return None
    if node.op_type in _SAME:
        return known[0]
    if node.op_type in _BROADCAST:
        return _broadcast(node, [shape for shape in known if shape is not None]) if None not in known else None
    if node.op_type in {"Conv", "ConvTranspose"} | _POOLS:
        return _windows(node, known[0], known[1] if node.op_type not in _POOLS else None)
    if node.op_type in {"Gemm", "MatMul"}:
        return _product_of_matrices(node, known[0], known[1])
    return _rearranged(model, node, known[0])


def _broadcast(node: Node, shapes: list[Shape]) -> Shape:
    rank = max(map(len, shapes))
    rows = [(ONE,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(_common(node, axis, sizes) for axis, sizes in enumerate(zip(*rows, strict=True)))


def _common(node: Node, axis: int, sizes: tuple[Size, ...]) -> Size:
    wide = {size for size in sizes if size != ONE}
    numbers = {size for size in wide if not size.unknown}
    if len(wide) <= 1:
        return next(iter(wide), ONE)
    return next(iter(numbers)) if len(numbers) == 1 else Size(1, ((node.output, axis),))


def _windows(node: Node, x: Shape, weight: Shape | None) -> Shape | None:
    """Returns the shape behind a convolution or pooling: unknown along an axis that no simple rule gives."""
    is_transposed = node.op_type == "ConvTranspose"
    if node.op_type not in _POOLS and (weight is None or len(weight) != len(x) or any(size.unknown for size in weight)):
        return None
    rank = len(x) - 2
    kernel = [size.number for size in weight[2:]] if weight is not None else list(node.attribute("kernel_shape"))
    strides, dilations = (node.attribute(name) or (1,) * rank for name in ("strides", "dilations"))
    pads = node.attribute("pads") or (0,) * 2 * rank
    is_plain = node.attribute("auto_pad", "NOTSET") in {"NOTSET", "VALID"} and not node.attribute("ceil_mode", 0)
    is_plain &= not is_transposed
    spatial: list[Size] = []
    for axis, size in enumerate(x[2:]):
        wider = pads[axis] + pads[axis + rank] - dilations[axis] * (kernel[axis] - 1)
        counted = Size(1, ((node.output, axis + 2),))
        if is_plain and strides[axis] == 1 and wider == 0:
            counted = size
        elif is_plain and not size.unknown and size.number + wider > 0:
            counted = Size((size.number + wider - 1) // strides[axis] + 1)
        spatial.append(counted)
    channels = x[1]
    if weight is not None:
        channels = weight[1] * Size(node.attribute("group", 1)) if is_transposed else weight[0]
    return (x[0], channels, *spatial)


def _product_of_matrices(node: Node, x: Shape, weight: Shape | None) -> Shape | None:
    if weight is None or len(weight) != 2 or not x:  # noqa: PLR2004  a matrix
        return None
    if node.op_type == "MatMul":
        return (*x[:-1], weight[1])
    return (x[1] if node.attribute("transA", 0) else x[0], weight[0] if node.attribute("transB", 0) else weight[1])


def _rearranged(model: Model, node: Node, x: Shape) -> Shape | None:
    """Returns the shape of what has the same elements, or one for each channel."""
    if node.op_type in {"Flatten", "GlobalAveragePool", "GlobalMaxPool", "Transpose"}:
        return _by_attributes(node, x)
    second = next(iter(node.inputs[1:]), "")
    stated = model.graph.constant_values.get(second) if second else node.attribute("shape", node.attribute("axes"))
    if stated is None or node.op_type not in {"Squeeze", "Unsqueeze", "Reshape"}:
        return None
    if node.op_type == "Reshape":
        return None if node.attribute("allowzero", 0) else _reshaped(node, x, np.ravel(stated))
    rank = len(x) + (np.size(stated) if node.op_type == "Unsqueeze" else 0)
    axes, sizes = {int(axis) % rank for axis in np.ravel(stated)}, iter(x)
    if node.op_type == "Squeeze":
        return tuple(size for axis, size in enumerate(x) if axis not in axes)
    return tuple(ONE if axis in axes else next(sizes) for axis in range(rank))


def _by_attributes(node: Node, x: Shape) -> Shape:
    if node.op_type == "Transpose":
        return tuple(x[axis] for axis in node.attribute("perm") or tuple(range(len(x)))[::-1])
    if node.op_type == "Flatten":
        axis = node.attribute("axis", 1)
        axis += len(x) if axis < 0 else 0
        return product(x[:axis]), product(x[axis:])
    return (*x[:2], *(ONE,) * (len(x) - 2))


def _reshaped(node: Node, x: Shape, stated: np.ndarray) -> Shape | None:
    if any(size == 0 and axis >= len(x) for axis, size in enumerate(stated)) or min(stated, default=0) < -1:
        return None
    shape = [x[axis] if size == 0 else Size(max(int(size), 1)) for axis, size in enumerate(stated)]
    if -1 in stated:
        axis = list(stated).index(-1)
        rest = product(x).divided_by(product(shape))
        shape[axis] = Size(1, ((node.output, axis),)) if rest is None else rest
    return tuple(shape)
