"""How a tensor lies in memory while a graph runs on a CPU or a GPU: in ONNX's layout, or with its channels last.

Values flow with their channels last from the first operator that is fast so to the first one that needs ONNX's
layout; each value says which layout it has. On other devices all have ONNX's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ptqjax.ir import Node
from ptqjax.ops import Lowering
from ptqjax.ops.layout import to_channels_last, to_onnx, with_rank

CHANNELS_LAST = frozenset({"cpu", "gpu"})
"""The kinds of devices on which values have their channels last where that is fast."""

_FIRST_WITH_LAYOUT = 3  # a tensor of rank 2 is the same in both layouts
_FIRST_RELABELLED = 4  # matrices [n, a, b] are transposed for products, not for a layout


class Value(NamedTuple):
    """A tensor as the interpreter holds it; a NumPy array is static."""

    array: Any
    channels_last: bool = False


def stays_channels_last(lowering: Lowering, inputs: Sequence[Value | None], attributes: Mapping[str, Any]) -> bool:
    """Tells whether the operator is to be computed on channels-last values."""
    variant = lowering.channels_last
    if variant is None or not variant.applies(attributes):
        return False
    values = [value for value in inputs[: variant.num_values] if value is not None]
    if not all(hasattr(value.array, "ndim") for value in values):
        return False  # sequences and optionals
    rank = max(value.array.ndim for value in values)
    if any(value.channels_last and value.array.ndim < rank for value in values):
        return False  # broadcasting puts axes in front of the batch
    return any(value.channels_last for value in values) or (variant.starts and rank >= _FIRST_WITH_LAYOUT)


def relabelled(node: Node, inputs: Sequence[Value | None]) -> Value | None:
    """Returns the result of a Transpose that exchanges the two layouts: the array stays, its label changes.

    So the transpositions that converters write around the layers of a model whose channels are last leave no trace.
    None for other nodes.
    """
    value = inputs[0] if inputs else None
    if (node.domain, node.op_type) != ("", "Transpose") or value is None or not hasattr(value.array, "ndim"):
        return None
    rank, axes = value.array.ndim, node.attribute("perm")
    if rank < _FIRST_RELABELLED:
        return None
    wanted = (0, *range(2, rank), 1) if value.channels_last else (0, rank - 1, *range(1, rank - 1))
    return Value(value.array, channels_last=not value.channels_last) if axes == wanted else None


def channels_last_inputs(lowering: Lowering, inputs: Sequence[Value | None]) -> list[Any]:
    """Returns the arrays that the channels-last function of the operator takes."""
    variant = lowering.channels_last
    assert variant is not None  # noqa: S101 (the caller asked `stays_channels_last`)
    num_values = len(inputs) if variant.num_values is None else variant.num_values
    rank = max(value.array.ndim for value in inputs[:num_values] if value is not None)
    return [
        None
        if value is None
        else _in_channels_last_layout(value, rank)
        if position < num_values
        else in_onnx_layout(value)
        for position, value in enumerate(inputs)
    ]


def channels_last_value(array: Any) -> Value:
    """Returns what a channels-last function gave, with its layout."""
    return Value(array, channels_last=array.ndim >= _FIRST_WITH_LAYOUT)


def in_onnx_layout(value: Value) -> Any:
    """Returns the array of a value in ONNX's layout."""
    return to_onnx(value.array) if value.channels_last else value.array


def channel_axis(value: Value) -> int | None:
    """Returns where ONNX's axis 1 lies in the array of a value; None where the rank is below 2."""
    if value.array.ndim < 2:  # noqa: PLR2004 (no axis 1)
        return None
    return value.array.ndim - 1 if value.channels_last else 1


def _in_channels_last_layout(value: Value, rank: int) -> Any:
    if value.channels_last or value.array.ndim == 0:
        return value.array
    return to_channels_last(with_rank(value.array, rank))


def axis_in_layout(axis: int, channel_axis: int | None) -> int:
    """Returns where an axis of ONNX's layout lies in a value whose axis 1 lies at `channel_axis`."""
    if channel_axis in {None, 1} or axis == 0:
        return axis
    return channel_axis if axis == 1 else axis - 1  # pyright: ignore[reportReturnType]
