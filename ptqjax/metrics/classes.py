"""Which outputs name classes, of samples or of the positions of sequences, and how often they name the right one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ptqjax.errors import ConfigError
from ptqjax.metrics.records import Metric, Outputs, Seen, added, fraction, output_named

_WORDS = re.compile("[a-z]+")
_BOXES = re.compile("b?box(es)?|coord(s|inates?)?|landmarks?|loc(ations?)?|offsets?|reg(ression)?")  # words of names
_FEATURES = re.compile("embed(s|ded|dings?)?|encod(ed|ings?)|features?|hidden|pool(ed|er)|representations?|states?")
_TOKENS = 3  # axes of an output that scores classes at every position: samples, positions, classes

Choice = Callable[[Seen], str | None]
"""Says which output of a batch is looked at; None: none."""


def predicted(logits: Float[np.ndarray, "n ..."]) -> Int[np.ndarray, " n"]:
    """Returns the index of the largest element of each sample, over all its axes."""
    return logits.reshape(len(logits), -1).argmax(-1)


def first_of(seen: Seen) -> str | None:
    """Returns the first output."""
    return next(iter(seen.wanted or seen.found))


def class_output(outputs: Outputs, inputs: Mapping[str, Any]) -> str | None:
    """Returns the first output that looks like classes: one number for each of several, of each sample.

    None looks so that has more axes than that (sizes of 1 do not count), has the shape of an input (a reconstruction),
    holds integers, or whose name speaks of boxes.
    """
    shapes = {np.shape(value) for value in inputs.values()}
    found = (name for name, value in outputs.items() if value.shape not in shapes and _has_classes(name, value))
    return next(found, None)


def token_output(outputs: Outputs, inputs: Mapping[str, Any]) -> str | None:
    """Returns the first output that scores classes at every position of a sequence of ids.

    It has the shape [N, T, C], where an input of integers has [N, T], and its name does not speak of features.
    """
    sequences = {np.shape(value) for value in inputs.values() if np.asarray(value).dtype.kind in "iu"}
    found = (
        name
        for name, value in outputs.items()
        if value.ndim == _TOKENS and value.dtype.kind == "f" and value.shape[:2] in sequences
        if not _speaks_of(_FEATURES, name)
    )
    return next(found, None)


def naming_output(seen: Seen) -> str | None:
    """Returns the output that the labels are of; without labels, one that looks like classes, of samples or tokens."""
    outputs = seen.wanted or seen.found
    if seen.labels is not None and seen.labels.ndim > 1:
        return labelled_tokens(outputs)
    if seen.labels is not None:
        return first_of(seen)
    return class_output(outputs, seen.inputs) or token_output(outputs, seen.inputs)


def token_scores(seen: Seen) -> str | None:
    """Returns the output that labels of tokens are of; without labels, one that scores classes at every position."""
    outputs = seen.wanted or seen.found
    if seen.labels is not None and seen.labels.ndim > 1:
        return labelled_tokens(outputs)
    return token_output(outputs, seen.inputs)


def labelled_tokens(outputs: Outputs) -> str | None:
    """Returns the output that labels of tokens are of: the first that is floating and has the axes [N, T, C]."""
    return next((name for name, value in outputs.items() if value.ndim == _TOKENS and value.dtype.kind == "f"), None)


def _has_classes(name: str, value: np.ndarray) -> bool:
    sizes = [size for size in value.shape[1:] if size != 1]
    return value.dtype.kind == "f" and len(sizes) == 1 and not _speaks_of(_BOXES, name)


def _speaks_of(words: re.Pattern[str], name: str) -> bool:
    return any(words.fullmatch(word) for word in _WORDS.findall(name.lower()))


def is_of_tokens(seen: Seen, name: str) -> bool:
    """Tells whether an output is judged position by position: there are labels for these, or ids of that shape."""
    value = seen.found[name]
    if value.ndim != _TOKENS:
        return False
    return (seen.labels is not None and seen.labels.ndim > 1) or token_output({name: value}, seen.inputs) is not None


def agreement(output: str | None = None, *, choose: Choice | None = None) -> Metric:
    """Returns the metric: fraction of samples whose largest element is the reference's.

    Of an output of tokens [N, T, C]: fraction of positions, of those with a label where there are labels [N, T].

    Args:
        output: The output; None: as `choose` says, or the first.
        choose: Says which output of a batch; where it says None, the batch is not counted.
    """
    name = f"agreement:{output}" if output else "agreement"

    def update(state: tuple[int, int], seen: Seen) -> tuple[int, int]:
        chosen = output or (choose or first_of)(seen)
        if chosen is None or not seen.wanted:
            return state
        found, wanted = (output_named(outputs, chosen, name) for outputs in (seen.found, seen.wanted))
        if not is_of_tokens(seen, chosen):
            return _counted(state, predicted(found) == predicted(wanted))
        return _counted(state, (found.argmax(-1) == wanted.argmax(-1))[counting(seen, found)])

    return Metric(name=name, init=lambda: (0, 0), update=update, finish=fraction, needs_reference=True, merge=added)


def top1(output: str | None = None) -> Metric:
    """Returns the metric: fraction of samples whose largest element, of the first output or of one, is the label."""
    name = f"top1:{output}" if output else "top1"

    def update(state: tuple[int, int], seen: Seen) -> tuple[int, int]:
        if seen.labels is not None and seen.labels.ndim > 1:
            raise ConfigError(f"metric '{name}' is of a label for each sample; of labels [N, T] take 'token_accuracy'")
        found = output_named(seen.found, output or next(iter(seen.found)), name)
        return _counted(state, predicted(found) == seen.labels)

    return Metric(name=name, init=lambda: (0, 0), update=update, finish=fraction, needs_labels=True, merge=added)


def counting(seen: Seen, value: np.ndarray) -> np.ndarray:
    """Returns which positions [N, T] of an output of tokens count: those with a label; all where there are none."""
    if seen.labels is None or seen.labels.shape != value.shape[:2]:
        return np.ones(value.shape[:2], bool)
    return seen.labels >= 0


def _counted(state: tuple[int, int], hits: np.ndarray) -> tuple[int, int]:
    return state[0] + int(np.count_nonzero(hits)), state[1] + hits.size
