"""Functions and data in, metrics out: a file in ONNX Runtime or a function, batch by batch, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from ptqjax.data import checked_labels
from ptqjax.errors import DataError, ModelError
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
        model: A file (run in ONNX Runtime) or a function, such as `lambda x: simulate(params, encodings, x)`.
        batches: Inputs by name, samples along the first axis.
        labels: The index of the class of each sample, in the order of the batches. The classes are the elements of the
            first output, over all its axes but that of the samples.
        reference: The float model, to compare with: of the same inputs and outputs.
        device: Where ONNX Runtime computes: "cpu", "cuda" or "auto".

    Raises:
        DataError: The batches do not fit the model, there are none, one is empty, or there are not as many as labels;
            or the labels are not indices of classes; or the reference has other inputs or outputs.
        ModelError: A file cannot be run, or an output is not finite.
        ConfigError: onnxruntime is missing or has no such device.
    """
    subject = _runner(model, "the model", device)
    other = None if reference is None else _runner(reference, "the reference", device)
    num_samples = num_right = num_same = 0
    signal = noise = 0.0
    for index, batch in enumerate(batches):
        require_samples(batch, index)
        outputs = subject.outputs(batch, index)
        first = next(iter(outputs))
        classes = predicted(outputs[first])
        if labels is not None:
            labels = checked_labels(labels, num_classes=outputs[first][0].size, place="labels")
            num_right += _num_right(classes, labels[num_samples : num_samples + len(classes)])
        if other is not None:
            wanted = other.outputs(batch, index)
            require_alike(outputs, wanted, f"{other.label} and {subject.label}")
            num_same += int(np.count_nonzero(classes == predicted(wanted[first])))
            signal, noise = signal + energy(wanted), noise + energy(wanted, outputs)
        num_samples += len(classes)
    num_labels = num_samples if labels is None else len(labels)
    if not num_samples or num_labels != num_samples:
        raise DataError(
            f"there are {num_samples} samples and {num_labels} labels to evaluate on; "
            "expected at least one sample, and a label for each"
        )
    return Evaluation(
        num_samples=num_samples,
        top1=None if labels is None else num_right / num_samples,
        agreement=None if other is None else num_same / num_samples,
        sqnr=None if other is None else decibels(signal, noise),
    )


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

    def outputs(self, batch: Mapping[str, Any], index: int) -> dict[str, np.ndarray]:
        """Returns the outputs on batch number `index`, all of them finite."""
        try:
            found = {name: np.asarray(value) for name, value in self.function(batch).items()}
        except DataError as error:
            raise DataError(f"{self.label}, batch {index}: {error}") from error
        for name, value in found.items():
            require_finite(value, f"{self.label}: output '{name}' of batch {index}")
        return found


def _runner(model: Runnable, part: str, device: str) -> _Runner:
    if callable(model):
        return _Runner(label=part, function=model)
    runtime = session(model, device=device)
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
