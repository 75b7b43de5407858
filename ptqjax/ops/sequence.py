"""Sequences of tensors and optionals. The length of a sequence is static; positions must be known while tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.registry import lowers, static_integers
from ptqjax.ops.values import EMPTY, Empty, TensorSequence


@lowers("SequenceEmpty", since=11)
def sequence_empty(*, dtype: int = 1) -> TensorSequence:
    """Returns a sequence without elements."""
    del dtype  # elements bring theirs
    return TensorSequence(())


@lowers("SequenceConstruct", since=11)
def sequence_construct(*elements: Any) -> TensorSequence:
    """Returns the sequence of the given tensors."""
    return TensorSequence(tuple(elements))


@lowers("SequenceLength", since=11)
def sequence_length(sequence: TensorSequence, /) -> np.ndarray:
    """Returns the number of elements, known while tracing."""
    return np.asarray(len(sequence.elements), np.int64)


@lowers("SequenceAt", since=11)
def sequence_at(sequence: TensorSequence, position: Any, /) -> Any:
    """Returns the element at `position`; a negative one counts from the end."""
    return sequence.elements[_position(sequence, position, "SequenceAt")]


@lowers("SequenceInsert", since=11)
def sequence_insert(sequence: TensorSequence, tensor: Any, position: Any = None, /) -> TensorSequence:
    """Returns the sequence with `tensor` before `position`; at the end where none is given."""
    elements = list(sequence.elements)
    at = len(elements)
    if position is not None:
        (at,) = static_integers(position, "the position of SequenceInsert")
        if not -len(elements) <= at <= len(elements):
            raise IndexError(f"position {at} is outside of the sequence of {len(elements)} elements")
    elements.insert(at, tensor)
    return TensorSequence(tuple(elements))


@lowers("SequenceErase", since=11)
def sequence_erase(sequence: TensorSequence, position: Any = None, /) -> TensorSequence:
    """Returns the sequence without the element at `position`; without the last one where none is given."""
    at = len(sequence.elements) - 1 if position is None else _position(sequence, position, "SequenceErase")
    return TensorSequence(sequence.elements[:at] + sequence.elements[at + 1 :])


@lowers("SequenceMap", since=17)
def sequence_map(
    sequence: TensorSequence, /, *others: Any, body: Callable[..., tuple[Any, ...]], num_node_outputs: int
) -> tuple[TensorSequence, ...]:
    """Returns a sequence for each output of `body`: what it gives for the elements; tensors are the same for all."""
    columns = [
        other.elements if isinstance(other, TensorSequence) else (other,) * len(sequence.elements) for other in others
    ]
    results = [body(*row) for row in zip(sequence.elements, *columns, strict=True)]
    if not results:
        return (TensorSequence(()),) * num_node_outputs
    return tuple(TensorSequence(tuple(column)) for column in zip(*results, strict=True))


@lowers("SplitToSequence", since=11)
def split_to_sequence(x: Any, split: Any = None, /, *, axis: int = 0, keepdims: int = 1) -> TensorSequence:
    """Returns the pieces of `x` along `axis`: of the sizes `split`, or of one size; single ones where none is given.

    Without `split` and `keepdims`, the pieces have no axis `axis`.
    """
    xp, size = array_namespace(x), x.shape[axis]
    if split is None:
        pieces = xp.split(x, size, axis=axis) if size else []
        return TensorSequence(tuple(piece if keepdims else xp.squeeze(piece, axis) for piece in pieces))
    sizes = static_integers(split, "the sizes of SplitToSequence")
    step = sizes[0]
    if np.ndim(split) and sum(sizes) != size:
        raise ValueError(f"sizes {list(sizes)} do not add up to {size}, the size of axis {axis}")
    bounds = list(range(step, size, step)) if np.ndim(split) == 0 else np.cumsum(sizes)[:-1].tolist()
    return TensorSequence(tuple(xp.split(x, bounds, axis=axis)))


@lowers("ConcatFromSequence", since=11)
def concat_from_sequence(sequence: TensorSequence, /, *, axis: int, new_axis: int = 0) -> Any:
    """Returns the elements joined along `axis`, which is a new one where `new_axis` is 1."""
    xp = array_namespace(*sequence.elements)
    return xp.stack(sequence.elements, axis=axis) if new_axis else xp.concatenate(sequence.elements, axis=axis)


@lowers("Optional", since=15)
def optional(value: Any = None, /, *, type: Any = None) -> Any:  # noqa: A002 (ONNX's name)
    """Returns the value itself; an empty optional where there is none."""
    del type  # the value has it
    return EMPTY if value is None else value


@lowers("OptionalHasElement", since=15)
def optional_has_element(value: Any = None, /) -> np.ndarray:
    """Returns whether the optional holds a value, known while tracing; one that is left out holds none."""
    return np.asarray(value is not None and not isinstance(value, Empty))


@lowers("OptionalGetElement", since=15)
def optional_get_element(value: Any, /) -> Any:
    """Returns what the optional holds.

    Raises:
        ValueError: It is empty.
    """
    if isinstance(value, Empty):
        raise ValueError("the optional is empty; ask OptionalHasElement first")  # noqa: TRY004 (its type is right)
    return value


def _position(sequence: TensorSequence, position: Any, operator: str) -> int:
    (at,) = static_integers(position, f"the position of {operator}")
    count = len(sequence.elements)
    if not -count <= at < count:
        raise IndexError(f"position {at} is outside of the sequence of {count} elements")
    return at % count
