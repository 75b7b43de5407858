"""Labels: the class of each sample [N], or of each position of its sequence [N, T], and how they fit outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ptqjax.errors import DataError
from ptqjax.metrics.classes import labelled_tokens

IGNORED = -100
"""The label of a position that does not count: of padding, and of what a model is not asked for."""
_PER_TOKEN = 2  # axes of labels of sequences


def checked_labels(labels: Any, *, num_classes: int | None, place: str, may_be_tokens: bool = False) -> np.ndarray:
    """Returns the labels as int64, whole numbers in a floating type taken as such; sequences of unlike length padded.

    Args:
        labels: The index of the class of each sample; or, where they may be, of each token: an array [N, T], or a
            sequence of arrays [T] of unlike length, with `IGNORED` where none counts.
        num_classes: How many classes there are; None where unknown.
        place: What to call the labels in a message.
        may_be_tokens: Whether a label for each token is taken.

    Raises:
        DataError: They have other axes, or are not whole numbers in [0, num_classes).
    """
    array = padded_labels(labels, place) if may_be_tokens and isinstance(labels, list) else np.asarray(labels)
    is_of_tokens = may_be_tokens and array.ndim == _PER_TOKEN
    if array.ndim != 1 and not is_of_tokens:
        raise DataError(
            f"{place} has the shape {array.shape}; expected one class index per sample, in one dimension: "
            f"{_flattening(array, place)}"
        )
    if array.dtype.kind not in "iuf" or not np.all(array == np.floor(array)):  # NaN is not equal to itself
        raise DataError(
            f"{place} is of type {array.dtype} and holds {array.ravel()[:1].tolist()}, ...; expected whole numbers, "
            "the index of the class of each sample from 0; replace each name or score by the index of its class"
        )
    outside = (array < 0) | (array >= (np.inf if num_classes is None else num_classes))
    outside &= ~((array == IGNORED) & is_of_tokens)
    if outside.any():
        at = tuple(int(i) for i in np.argwhere(outside)[0])
        known = "0 or more" if num_classes is None else f"0 to {num_classes - 1}: the model has {num_classes} classes"
        where = f"sample {at[0]}" + (f", token {at[1]}" if is_of_tokens else "")
        raise DataError(
            f"{place} holds {array[at]} for {where}; expected {known}; number the classes from 0, in the "
            "order of the model's outputs" + (f", and give {IGNORED} where none counts" if is_of_tokens else "")
        )
    return array.astype(np.int64)


def padded_labels(labels: Sequence[Any], place: str) -> np.ndarray:
    """Returns labels of sequences of unlike length as one array [N, T], `IGNORED` behind the end of each.

    Raises:
        DataError: One of them is not [T] or [1, T].
    """
    rows = [np.asarray(each) for each in labels]
    rows = [row[0] if row.ndim == _PER_TOKEN and len(row) == 1 else row for row in rows]
    for index, row in enumerate(rows):
        if row.ndim != 1:
            raise DataError(
                f"{place} has for sample {index} the shape {row.shape}; expected a label for each token, in one "
                "dimension"
            )
    longest = max((len(row) for row in rows), default=0)
    return np.stack([np.pad(row, (0, longest - len(row)), constant_values=IGNORED) for row in rows])


def joined_labels(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Returns the labels of several parts of the data together, rows padded to the longest; None where there are none.

    Raises:
        DataError: Some parts have a label for each sample, and some for each token.
    """
    known = [part for part in parts if part is not None]
    if not known:
        return None
    if {part.ndim for part in known} == {1}:
        return np.concatenate(known)
    if {part.ndim for part in known} != {_PER_TOKEN}:
        raise DataError("some labels are one for each sample, and some one for each token; give all of one kind")
    return padded_labels([row for part in known for row in part], "labels")


def labels_of(labels: np.ndarray, outputs: Mapping[str, np.ndarray], start: int, place: str) -> np.ndarray:
    """Returns the labels of a batch that begins with sample number `start`, as far as there are any; they fit outputs.

    Labels [N] are of the first output, all whose elements are classes; labels [N, T] of the first that has the axes
    [N, T, C]. What stands behind its T positions is to be `IGNORED`.

    Raises:
        DataError: They do not fit: in values, in length, or no output has such axes.
    """
    name = next(iter(outputs)) if labels.ndim == 1 else labelled_tokens(outputs)
    if name is None:  # no output scores tokens: only a class for each sample can be meant
        return checked_labels(labels, num_classes=None, place="labels")
    value = outputs[name]
    size = value[0].size if labels.ndim == 1 else value.shape[-1]
    found = checked_labels(labels, num_classes=size, place="labels", may_be_tokens=True)[start : start + len(value)]
    if labels.ndim == 1:
        return found
    length = value.shape[1]
    if found.shape[1] < length or np.any(found[:, length:] != IGNORED):
        raise DataError(
            f"labels has {found.shape[1]} tokens a sample, and output '{name}' of {place} has {length}; expected as "
            f"many, [{len(value)}, {length}]: a label for each position, and {IGNORED} where none counts"
        )
    return found[:, :length]


def _flattening(array: np.ndarray, place: str) -> str:
    if array.ndim == 0:
        return f"{place} is a single value; give an array"
    if array.size == len(array):
        return "use labels.reshape(-1)"
    return "where each row marks or scores the classes, use labels.argmax(1)"
