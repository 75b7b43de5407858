"""Functions and data in, metrics out: a file in ONNX Runtime or a function, batch by batch, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from ptqjax.errors import DataError
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
    labels: Int[np.ndarray, " n"] | None = None,
    reference: Runnable | None = None,
    device: str = "cpu",
) -> Evaluation:
    """Returns accuracy, and agreement with a reference, over all samples; one batch at a time is held.

    Args:
        model: A file (run in ONNX Runtime) or a function, such as `lambda x: simulate(params, encodings, x)`.
        batches: Inputs by name, samples along the first axis.
        labels: The class of each sample, in the order of the batches. Classes are along the first output's last axis.
        reference: The float model, to compare with.
        device: Where ONNX Runtime computes: "cpu", "cuda" or "auto".

    Raises:
        DataError: The batches do not fit the model, there are none, or not as many as labels.
        ModelError: A file cannot be run.
        ConfigError: onnxruntime is missing or has no such device.
    """
    function = _function(model, device)
    compared = None if reference is None else _function(reference, device)
    num_samples = num_right = num_same = 0
    signal = noise = 0.0
    for batch in batches:
        outputs = function(batch)
        classes = predicted(_first(outputs))
        if labels is not None:
            num_right += _num_right(classes, labels[num_samples : num_samples + len(classes)])
        if compared is not None:
            wanted = compared(batch)
            num_same += int(np.count_nonzero(classes == predicted(_first(wanted))))
            signal, noise = signal + _energy(wanted), noise + _energy(wanted, outputs)
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
        agreement=None if compared is None else num_same / num_samples,
        sqnr=None if compared is None else decibels(signal, noise),
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
    return decibels(_energy({"": y}), _energy({"": y}, {"": quantized}))


def _function(model: Runnable, device: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    if callable(model):
        return model
    runtime = session(model, device=device)
    return lambda batch: run(runtime, batch)


def _first(outputs: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(next(iter(outputs.values())))


def _num_right(classes: np.ndarray, labels: np.ndarray) -> int:
    return int(np.count_nonzero(classes[: len(labels)] == labels))


def _energy(outputs: Mapping[str, Any], others: Mapping[str, Any] | None = None) -> float:
    """Returns the sum of squares of all outputs, or of their differences from `others`."""
    total = 0.0
    for name, value in outputs.items():
        array = np.asarray(value, np.float64)
        total += float(np.sum((array if others is None else array - np.asarray(others[name], np.float64)) ** 2))
    return total
