"""Functions and data in, metrics out: a file in ONNX Runtime or a function, batch by batch, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from ptqjax.data import checked_labels
from ptqjax.errors import DataError, ModelError
from ptqjax.quantize.parts import Part, Parts, parts_of, together
from ptqjax.validate import decibels, run, session

Runnable = str | os.PathLike[str] | bytes | Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A model that can be run: an ONNX file or its bytes, or a function of inputs by name to outputs by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How good a model is."""

    num_samples: int
    """How many samples it was evaluated on."""
    top1: float | None
    """Fraction of samples whose largest output is the labelled class; None without labels."""
    agreement: float | None
    """Fraction of samples whose largest output is the reference's; None without a reference."""
    sqnr: float | None
    """10 log10(sum y^2 / sum (y - y_q)^2) over all outputs, y the reference's, in dB; None without a reference."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as plain data, for JSON."""
        return asdict(self)


def evaluate(
    model: Runnable,
    batches: Iterable[Mapping[str, Any]],
    *,
    labels: np.ndarray | None = None,
    reference: Runnable | None = None,
    device: str = "cpu",
) -> Evaluation:
    """Returns accuracy, and agreement with a reference, over all samples; one batch at a time is held.

    Args:
        model: A file (run in ONNX Runtime, in a session without options) or a function, such as
            `lambda x: simulate(params, encodings, x)`; `validate.exact_function` has a file's sums exact on x86 without
            VNNI as well.
        batches: Inputs by name, samples along the first axis. Of a batch that lies on several devices, each part goes
            through the function on its device; what the function reads besides is to lie on the host, or nowhere fixed.
        labels: The index of the class of each sample, in the order of the batches. The classes are the elements of the
            first output, over all its axes but that of the samples.
        reference: The float model, to compare with: of the same inputs and outputs.
        device: Where ONNX Runtime computes: "cpu", "cuda" or "auto".

    Raises:
        DataError: The batches do not fit the model, there are none, one is empty, or there are not as many as labels;
            or the labels are not indices of classes; or the reference has other inputs or outputs.
        ModelError: A file cannot be run, an output is not finite, or the first is a single number.
        ConfigError: onnxruntime is missing or has no such device.
    """
    return evaluate_each([model], batches, labels=labels, reference=reference, device=device)[0]


def evaluate_each(
    models: Sequence[Runnable],
    batches: Iterable[Mapping[str, Any]],
    *,
    labels: np.ndarray | None = None,
    reference: Runnable | None = None,
    device: str = "cpu",
) -> tuple[Evaluation, ...]:
    """Returns what `evaluate` returns for each model, from one pass over the data, in which the reference runs once."""
    subjects = [_runner(model, "the model", device) for model in models]
    other = None if reference is None else _runner(reference, "the reference", device)
    totals = [_Counts() for _ in models]
    num_samples = 0
    for index, batch in enumerate(batches):
        require_samples(batch, index)
        parts = parts_of(batch, f"batch {index}")
        measured = partial(_measured, subjects, other, parts, labels, num_samples)
        found = [each for some in together(measured, is_shared=parts.is_shared) for each in some]
        for _, size, each in sorted(found, key=lambda part: int(part[0])):
            totals = [total.plus(counts) for total, counts in zip(totals, each, strict=True)]
            num_samples += int(size)
    num_labels = num_samples if labels is None else len(labels)
    if not num_samples or num_labels != num_samples:
        raise DataError(
            f"there are {num_samples} samples and {num_labels} labels to evaluate on; "
            "expected at least one sample, and a label for each"
        )
    return tuple(
        Evaluation(
            num_samples=num_samples,
            top1=None if labels is None else total.num_right / num_samples,
            agreement=None if other is None else total.num_same / num_samples,
            sqnr=None if other is None else decibels(total.signal, total.noise),
        )
        for total in totals
    )


class _Counts(NamedTuple):
    """What is counted of some samples."""

    num_right: int = 0
    num_same: int = 0
    signal: float = 0.0
    noise: float = 0.0

    def plus(self, other: _Counts) -> _Counts:
        """Returns the counts of both."""
        return _Counts(
            num_right=self.num_right + int(other.num_right),
            num_same=self.num_same + int(other.num_same),
            signal=self.signal + float(other.signal),
            noise=self.noise + float(other.noise),
        )


def _measured(
    subjects: Sequence[_Runner], other: _Runner | None, parts: Parts, labels: np.ndarray | None, before: int
) -> list[tuple[int, int, list[_Counts]]]:
    """Returns the first sample, the size and each model's counts of each part of a batch that this process has.

    All devices work before the first is waited for.

    Args:
        subjects: The models.
        other: The reference.
        parts: The batch.
        labels: Of all samples.
        before: How many samples came before the batch.
    """
    running = [
        (part, [subject.started(part) for subject in subjects], other and other.started(part)) for part in parts.here
    ]
    counted = []
    for part, started, wanted in running:
        reached = None if other is None or wanted is None else other.finished(wanted, part)
        counts, size = [], 0
        for subject, outputs in zip(subjects, started, strict=True):
            found = subject.finished(outputs, part)
            first = first_output(found, f"{subject.label}, {part.place}")
            size, num_right = len(found[first]), 0
            if labels is not None:
                labels = checked_labels(labels, num_classes=found[first][0].size, place="labels")
                begin = before + part.start
                num_right = _num_right(predicted(found[first]), labels[begin : begin + size])
            if other is not None and reached is not None:
                require_alike(found, reached, f"{other.label} and {subject.label}")
            counts.append(_counts(found, reached, first, num_right))
        counted.append((part.start, size, counts))
    return counted


def _counts(
    found: Mapping[str, np.ndarray], reached: Mapping[str, np.ndarray] | None, first: str, num_right: int
) -> _Counts:
    if reached is None:
        return _Counts(num_right)
    num_same = int(np.count_nonzero(predicted(found[first]) == predicted(reached[first])))
    return _Counts(num_right, num_same, energy(reached), energy(reached, found))


def predicted(logits: Float[np.ndarray, "n ..."]) -> Int[np.ndarray, " n"]:
    """Returns the index of the largest element of each sample, over all its axes."""
    return logits.reshape(len(logits), -1).argmax(-1)


def top1(logits: Float[np.ndarray, "n ..."], labels: Int[np.ndarray, " n"]) -> float:
    """Returns the fraction of samples whose largest element is the labelled class."""
    return float(np.mean(predicted(logits) == labels))


def agreement(y: Float[np.ndarray, "n ..."], other: Float[np.ndarray, "n ..."]) -> float:
    """Returns the fraction of samples whose largest element is the same one in both."""
    return float(np.mean(predicted(y) == predicted(other)))


def sqnr(y: Shaped[np.ndarray, "..."], quantized: Shaped[np.ndarray, "..."]) -> float:
    """Returns 10 log10(sum y^2 / sum (y - quantized)^2) in dB: infinite where they are equal."""
    return decibels(energy({"": y}), energy({"": y}, {"": quantized}))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Runner:
    """A model that runs, and what to call it in a message."""

    label: str
    """Its part in the comparison, and its file where it is one."""
    function: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    """Inputs by name to outputs by name."""

    def started(self, part: Part) -> Mapping[str, Any]:
        """Returns the outputs on part of a batch, which may still be computed."""
        try:
            return self.function(part.inputs)
        except DataError as error:
            raise DataError(f"{self.label}, {part.place}: {error}") from error

    def finished(self, outputs: Mapping[str, Any], part: Part) -> dict[str, np.ndarray]:
        """Returns outputs that were started, all of them finite."""
        found = {name: np.asarray(value) for name, value in outputs.items()}
        for name, value in found.items():
            require_finite(value, f"{self.label}: output '{name}' of {part.place}")
        return found


def _runner(model: Runnable, part: str, device: str) -> _Runner:
    if callable(model):
        return _Runner(label=part, function=model)
    runtime = session(model, device=device, exact=False)  # the one that users open
    label = part if isinstance(model, bytes) else f"{part} '{os.fspath(model)}'"
    return _Runner(label=label, function=lambda batch: run(runtime, batch))


def require_samples(batch: Mapping[str, Any], index: int) -> None:
    """Checks that batch number `index` has samples.

    Raises:
        DataError: An input has none.
    """
    for name in [name for name, value in batch.items() if 0 in np.shape(value)]:
        raise DataError(
            f"batch {index}: input '{name}' has no samples (shape {np.shape(batch[name])}); leave the batch out"
        )


def require_finite(value: np.ndarray, place: str) -> None:
    """Checks that an output, called `place` in a message, holds finite numbers.

    Raises:
        ModelError: It holds NaN or infinity.
    """
    if value.dtype.kind in "iubOSUT":
        return
    finite = np.isfinite(value)
    if not finite.all():
        at = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ModelError(
            f"{place} holds {value[at]} at {at}; expected finite numbers: look for NaN or infinity in the batch, and "
            "for an overflow in the model"
        )


def first_output(outputs: Mapping[str, np.ndarray], who: str) -> str:
    """Returns the name of a model's first output, which has samples along its first axis; `who`: in a message.

    Raises:
        ModelError: It is a single number.
    """
    name = next(iter(outputs))
    if not outputs[name].ndim:
        raise ModelError(
            f"{who}: output '{name}' is a single number; expected samples along its first axis: end the model before "
            "samples are reduced to one number, or name another output first"
        )
    return name


def require_alike(outputs: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], who: str) -> None:
    """Checks that two models, called `who` in a message, have outputs of the same names and shapes.

    Raises:
        DataError: They have not.
    """
    shapes = ({name: value.shape for name, value in found.items()} for found in (wanted, outputs))
    theirs, ours = shapes
    if theirs != ours:
        raise DataError(
            f"{who} have different outputs, {theirs} and {ours}; expected the same names and shapes: compare with the "
            "model that this one was made from"
        )


def _num_right(classes: np.ndarray, labels: np.ndarray) -> int:
    return int(np.count_nonzero(classes[: len(labels)] == labels))


def energy(outputs: Mapping[str, Any], others: Mapping[str, Any] | None = None) -> float:
    """Returns the sum of squares of all outputs, or of their differences from `others`."""
    total = 0.0
    for name, value in outputs.items():
        array = np.asarray(value, np.float64)
        total += float(np.sum((array if others is None else array - np.asarray(others[name], np.float64)) ** 2))
    return total
