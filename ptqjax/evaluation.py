"""Functions and data in, metrics out: a file in ONNX Runtime or a function, batch by batch, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int, Shaped

from ptqjax import onnx_io
from ptqjax.agreement import decibels, run, session
from ptqjax.agreement.runtime import model_file
from ptqjax.config import near_names
from ptqjax.data.files import checked_labels
from ptqjax.data.parts import Part, Parts, parts_of, together
from ptqjax.errors import ConfigError, DataError, ModelError
from ptqjax.outputs import UNLIKE, Strung, class_output, strung_outputs
from ptqjax.outputs import Parts as OutputParts

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
    """Fraction of samples whose largest output is the reference's; None without a reference, and where no output looks
    like classes and it was not asked for."""
    sqnr: float | None
    """10 log10(sum y^2 / sum (y - y_q)^2) over all outputs, y the reference's, in dB; None without a reference."""
    outputs: Mapping[str, float] = field(default_factory=dict)
    """The figures of each output by itself, by name; of an output that strings unlike parts together, of each part:
    "output: part". Empty without a reference."""

    @property
    def worst(self) -> tuple[str, float] | None:
        """Which of several outputs or parts has the least SQNR, and that in dB; None where there is but one."""
        return min(self.outputs.items(), key=lambda found: found[1]) if len(self.outputs) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as plain data, for JSON."""
        return asdict(self)


def evaluate(
    model: Runnable,
    batches: Iterable[Mapping[str, Any]],
    *,
    labels: np.ndarray | None = None,
    reference: Runnable | None = None,
    metrics: Sequence[str] = (),
    strung: Strung | None = None,
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
        metrics: What to measure although it does not look so: "agreement" of the first output, or "agreement:OUTPUT".
        strung: The outputs that have parts; None: as the reference's file tells, if it is one.
        device: Where ONNX Runtime computes: "cpu", "cuda" or "auto".

    Raises:
        DataError: The batches do not fit the model, there are none, one is empty, or there are not as many as labels;
            or the labels are not indices of classes; or the reference has other inputs or outputs.
        ModelError: A file cannot be run, an output is not finite, or the first is a single number.
        ConfigError: onnxruntime is missing or has no such device; or a metric is unknown, or of no output.
    """
    how = {"labels": labels, "reference": reference, "metrics": metrics, "strung": strung, "device": device}
    return evaluate_each([model], batches, **how)[0]


def evaluate_each(
    models: Sequence[Runnable],
    batches: Iterable[Mapping[str, Any]],
    *,
    labels: np.ndarray | None = None,
    reference: Runnable | None = None,
    metrics: Sequence[str] = (),
    strung: Strung | None = None,
    device: str = "cpu",
) -> tuple[Evaluation, ...]:
    """Returns what `evaluate` returns for each model, from one pass over the data, in which the reference runs once."""
    subjects = [_runner(model, "the model", device) for model in models]
    other = None if reference is None else _runner(reference, "the reference", device)
    counting = _Counting(metrics=tuple(metrics), strung=strung or _strung(reference), labels=labels)
    totals = [_Counts() for _ in models]
    num_samples = 0
    for index, batch in enumerate(batches):
        require_samples(batch, index)
        parts = parts_of(batch, f"batch {index}")
        measured = partial(_measured, subjects, other, parts, counting, num_samples)
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
    return tuple(_evaluation(total, num_samples, labels is not None, other is not None) for total in totals)


def _evaluation(total: _Counts, num_samples: int, has_labels: bool, is_compared: bool) -> Evaluation:  # noqa: FBT001
    return Evaluation(
        num_samples=num_samples,
        top1=total.num_right / num_samples if has_labels else None,
        agreement=total.num_same / total.num_named if total.num_named else None,
        sqnr=decibels(*np.sum(list(total.outputs.values()), axis=0)) if is_compared else None,
        outputs={name: decibels(*sums) for name, sums in _told_apart(total).items()},
    )


def _told_apart(total: _Counts) -> dict[str, _Sums]:
    """Returns the sums of each output; in place of those of one with unlike parts, those of each part."""
    found: dict[str, _Sums] = {}
    for output, sums in total.outputs.items():
        parts = {part: total.parts[output, part] for name, part in total.parts if name == output}
        powers = [signal / size for signal, _, size in parts.values() if signal > 0]
        if powers and max(powers) >= UNLIKE**2 * min(powers):
            found |= {f"{output}: {part}": (signal, noise) for part, (signal, noise, _) in parts.items()}
        else:
            found[output] = sums
    return found


_Sums: TypeAlias = tuple[float, float]
"""Sums of squares of the reference's elements, and of their differences."""
_SumsAndSize: TypeAlias = tuple[float, float, float]
"""The same, and the number of elements."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counting:
    """What is counted."""

    metrics: tuple[str, ...]
    strung: Strung | None
    labels: np.ndarray | None

    def named(self, outputs: Mapping[str, np.ndarray], inputs: Mapping[str, Any]) -> str | None:
        """Returns the output whose largest elements are compared: one that is asked for, or one of classes."""
        if not self.metrics:
            return next(iter(outputs)) if self.labels is not None else class_output(outputs, inputs)
        kind, _, name = self.metrics[-1].partition(":")
        if kind != "agreement":
            raise ConfigError(f"metric {self.metrics[-1]!r} is unknown; expected 'agreement' or 'agreement:OUTPUT'")
        name = name or next(iter(outputs))
        if name not in outputs:
            raise ConfigError(f"metric {self.metrics[-1]!r}: the model has no such output{near_names(name, outputs)}")
        return name


def _strung(reference: Runnable | None) -> Strung | None:
    if reference is None or callable(reference):
        return None
    return strung_outputs(onnx_io.read(model_file(reference)))


class _Counts(NamedTuple):
    """What is counted of some samples."""

    num_right: int = 0
    num_same: int = 0
    num_named: int = 0
    """How many samples `num_same` is of."""
    outputs: Mapping[str, _Sums] = {}
    """The sums of each output, by its name."""
    parts: Mapping[tuple[str, str], _SumsAndSize] = {}
    """The sums of each part of an output, by output and part."""

    def plus(self, other: _Counts) -> _Counts:
        """Returns the counts of both."""
        return _Counts(
            num_right=self.num_right + int(other.num_right),
            num_same=self.num_same + int(other.num_same),
            num_named=self.num_named + int(other.num_named),
            outputs=_added(self.outputs, other.outputs),
            parts=_added(self.parts, other.parts),
        )


def _added(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns the sums of both by key."""
    zero = np.zeros(())
    return {key: tuple(np.add(one.get(key, zero), other.get(key, zero)).tolist()) for key in {**one, **other}}


def _measured(
    subjects: Sequence[_Runner], other: _Runner | None, parts: Parts, counting: _Counting, before: int
) -> list[tuple[int, int, list[_Counts]]]:
    """Returns the first sample, the size and each model's counts of each part of a batch that this process has.

    All devices work before the first is waited for.

    Args:
        subjects: The models.
        other: The reference.
        parts: The batch.
        counting: What is counted.
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
            if counting.labels is not None:
                labels = checked_labels(counting.labels, num_classes=found[first][0].size, place="labels")
                begin = before + part.start
                num_right = _num_right(predicted(found[first]), labels[begin : begin + size])
            if other is not None and reached is not None:
                require_alike(found, reached, f"{other.label} and {subject.label}")
            counts.append(_counts(found, reached, part.inputs, counting, num_right))
        counted.append((part.start, size, counts))
    return counted


def _counts(
    found: Mapping[str, np.ndarray],
    reached: Mapping[str, np.ndarray] | None,
    inputs: Mapping[str, Any],
    counting: _Counting,
    num_right: int,
) -> _Counts:
    if reached is None:
        return _Counts(num_right)
    named = counting.named(reached, inputs)
    same = None if named is None else predicted(found[named]) == predicted(reached[named])
    parts = counting.strung.parts(inputs) if counting.strung is not None else {}
    return _Counts(
        num_right=num_right,
        num_same=0 if same is None else int(np.count_nonzero(same)),
        num_named=0 if same is None else len(same),
        outputs={name: (energy({name: y}), energy({name: y}, found)) for name, y in reached.items()},
        parts={
            (name, part): sums for name in parts for part, sums in _by_part(reached[name], found[name], parts[name])
        },
    )


def _by_part(y: np.ndarray, quantized: np.ndarray, parts: OutputParts) -> list[tuple[str, _SumsAndSize]]:
    labels, y, quantized = parts.labels.ravel(), y.ravel().astype(np.float64), quantized.ravel().astype(np.float64)
    weights = (y**2, (y - quantized) ** 2, None)
    signal, noise, size = (np.bincount(labels, weights=each, minlength=len(parts.names)) for each in weights)
    return [(name, (float(signal[i]), float(noise[i]), float(size[i]))) for i, name in enumerate(parts.names)]


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
