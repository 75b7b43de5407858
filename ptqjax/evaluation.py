"""Functions and data in, metrics out: a file in ONNX Runtime or a function, batch by batch, in bounded memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from ptqjax import onnx_io
from ptqjax.agreement import run, session
from ptqjax.agreement.runtime import model_file
from ptqjax.data.parts import Part, Parts, parts_of, together
from ptqjax.errors import DataError, ModelError
from ptqjax.metrics import Metric, Seen, Tally, decibels, find_metrics
from ptqjax.metrics.classes import agreement as agreement_metric
from ptqjax.metrics.classes import naming_output, predicted, token_scores
from ptqjax.metrics.classes import top1 as top1_metric
from ptqjax.metrics.labels import labels_of, padded_labels
from ptqjax.metrics.named import Asked
from ptqjax.metrics.records import added
from ptqjax.metrics.sequences import cross_entropy, kl, perplexity, token_accuracy
from ptqjax.metrics.sums import Energies, energies, sqnr_db
from ptqjax.outputs import UNLIKE, Strung, strung_outputs
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
    figures: Mapping[str, float] = field(default_factory=dict)
    """Every other metric, by name: those that were asked for, with labels [N, T] "token_accuracy", "cross_entropy" and
    "perplexity", and of an output of tokens with a reference "kl"."""

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
    labels: np.ndarray | Sequence[Any] | None = None,
    reference: Runnable | None = None,
    metrics: Sequence[Asked] = (),
    strung: Strung | None = None,
    device: str = "cpu",
) -> Evaluation:
    """Returns accuracy, and agreement with a reference, over all samples; one batch at a time is held.

    Args:
        model: A file (run in ONNX Runtime, in a session without options) or a function, such as
            `lambda x: simulate(params, encodings, x)`; `agreement.exact_function` has a file's sums exact on x86
            without VNNI as well.
        batches: Inputs by name, samples along the first axis. Of a batch that lies on several devices, each part goes
            through the function on its device; what the function reads besides is to lie on the host, or nowhere fixed.
        labels: In the order of the batches, the index of the class of each sample [N]: the classes are the elements of
            the first output, over all its axes but that of the samples. Or that of each position of its sequence
            [N, T], `IGNORED` (-100) where none counts: the classes are along the last axis of the first output
            [N, T, C]; a list of arrays [T] where sequences are of unlike length.
        reference: The float model, to compare with: of the same inputs and outputs.
        metrics: What to measure besides: names of `METRICS`, also with ":OUTPUT" for another output than the one that
            a metric picks itself; `Metric` records; or functions of `Seen`, whose mean is taken (`mean_of`).
        strung: The outputs that have parts; None: as the reference's file tells, if it is one.
        device: Where ONNX Runtime computes: "cpu", "cuda" or "auto".

    Raises:
        DataError: The batches do not fit the model, there are none, one is empty, or there are not as many as labels;
            or the labels are not indices of classes, or are not as long as sequences; or the reference has other inputs
            or outputs.
        ModelError: A file cannot be run, an output is not finite, or the first is a single number.
        ConfigError: onnxruntime is missing or has no such device; or a metric is unknown, or of no output, or of labels
            or a reference that there are not.
    """
    how = {"labels": labels, "reference": reference, "metrics": metrics, "strung": strung, "device": device}
    return evaluate_each([model], batches, **how)[0]


def evaluate_each(
    models: Sequence[Runnable],
    batches: Iterable[Mapping[str, Any]],
    *,
    labels: np.ndarray | Sequence[Any] | None = None,
    reference: Runnable | None = None,
    metrics: Sequence[Asked] = (),
    strung: Strung | None = None,
    device: str = "cpu",
) -> tuple[Evaluation, ...]:
    """Returns what `evaluate` returns for each model, from one pass over the data, in which the reference runs once."""
    subjects = [_runner(model, "the model", device) for model in models]
    other = None if reference is None else _runner(reference, "the reference", device)
    labels = None if labels is None else _labels(labels)
    measures = _measures(metrics, labels, strung or _strung(reference), has_reference=other is not None)
    comparison = _Comparison(subjects=subjects, reference=other, labels=labels)
    totals = [Tally.of(measures) for _ in models]
    num_samples = 0
    for index, batch in enumerate(batches):
        require_samples(batch, index)
        parts = parts_of(batch, f"batch {index}")
        totals, size = _counted(totals, comparison, parts, num_samples)
        num_samples += size
    num_labels = num_samples if labels is None else len(labels)
    if not num_samples or num_labels != num_samples:
        raise DataError(
            f"there are {num_samples} samples and {num_labels} labels to evaluate on; "
            "expected at least one sample, and a label for each"
        )
    return tuple(_evaluation(total, num_samples, metrics) for total in totals)


def _labels(labels: Any) -> np.ndarray:
    is_listed = isinstance(labels, list | tuple) and any(np.ndim(each) for each in labels)
    return padded_labels(labels, "labels") if is_listed else np.asarray(labels)


def _measures(
    asked: Sequence[Asked], labels: np.ndarray | None, strung: Strung | None, *, has_reference: bool
) -> tuple[Metric, ...]:
    """Returns what is measured: what is asked for, and whatever labels and a reference tell."""
    found = find_metrics(asked, has_labels=labels is not None, has_reference=has_reference)
    usual: list[Metric] = []
    if has_reference:
        usual += [sqnr_db(), _of_parts(strung), agreement_metric(choose=naming_output), kl(choose=token_scores)]
    if labels is not None:
        usual += [top1_metric()] if labels.ndim == 1 else [token_accuracy(), cross_entropy(), perplexity()]
    names = {metric.name for metric in found}
    return (*(metric for metric in usual if metric.name not in names), *found)


_FIELDS = ("sqnr_db", "agreement", "top1")
_PARTS = "parts"


def _evaluation(total: Tally, num_samples: int, asked: Sequence[Asked]) -> Evaluation:
    figures = {name: value for name, value in total.figures().items() if not math.isnan(value)}
    named = [name for name in asked if isinstance(name, str) and name.startswith("agreement")]
    return Evaluation(
        num_samples=num_samples,
        top1=figures.get("top1"),
        agreement=figures.get(named[-1] if named else "agreement"),
        sqnr=figures.get("sqnr_db"),
        outputs={name: decibels(*sums) for name, sums in _told_apart(total).items()},
        figures={name: value for name, value in figures.items() if name not in _FIELDS},
    )


def _told_apart(total: Tally) -> dict[str, tuple[float, float]]:
    """Returns the sums of each output; in place of those of one with unlike parts, those of each part."""
    states = {metric.name: state for metric, state in total.by_metric()}
    outputs: Energies = states.get("sqnr_db", {})
    every: _PartSums = states.get(_PARTS, {})
    found: dict[str, tuple[float, float]] = {}
    for output, sums in outputs.items():
        parts = {part: every[output, part] for name, part in every if name == output}
        powers = [signal / size for signal, _, size in parts.values() if signal > 0]
        if powers and max(powers) >= UNLIKE**2 * min(powers):
            found |= {f"{output}: {part}": (signal, noise) for part, (signal, noise, _) in parts.items()}
        else:
            found[output] = sums
    return found


_PartSums = Mapping[tuple[str, str], tuple[float, float, float]]
"""By output and part: sums of squares of the reference's elements, of their differences, and the number of elements."""


def _of_parts(strung: Strung | None) -> Metric:
    """Returns the metric whose state tells the parts of outputs apart; it has no figure of its own."""

    def update(state: _PartSums, seen: Seen) -> _PartSums:
        known = strung.parts(seen.inputs) if strung is not None else {}
        found = {
            (name, part): sums
            for name in known
            for part, sums in _by_part(seen.wanted[name], seen.found[name], known[name])
        }
        return added(state, found)

    return Metric(name=_PARTS, init=dict, update=update, finish=lambda _: math.nan, merge=added)


def _strung(reference: Runnable | None) -> Strung | None:
    if reference is None or callable(reference):
        return None
    return strung_outputs(onnx_io.read(model_file(reference)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Comparison:
    """What is compared with what."""

    subjects: Sequence[_Runner]
    """The models."""
    reference: _Runner | None
    """What they are compared with."""
    labels: np.ndarray | None
    """The labels of all samples; None without."""

    def seen(self, parts: Parts, before: int) -> Iterator[tuple[int, int, list[Seen]]]:
        """Yields the first sample, the size and what each model gives of each part of a batch that this process has.

        All devices work before the first is waited for. Where labels run out, the part is not given.

        Args:
            parts: The batch.
            before: How many samples came before the batch.
        """
        running = [
            (part, [each.started(part) for each in self.subjects], self.reference and self.reference.started(part))
            for part in parts.here
        ]
        for part, started, wanted in running:
            other = self.reference
            reached = {} if other is None or wanted is None else other.finished(wanted, part)
            each, size = [], 0
            for subject, outputs in zip(self.subjects, started, strict=True):
                found = subject.finished(outputs, part)
                size = len(found[first_output(found, f"{subject.label}, {part.place}")])
                taken = None if self.labels is None else labels_of(self.labels, found, before + part.start, part.place)
                if other is not None:
                    require_alike(found, reached, f"{other.label} and {subject.label}")
                each.append(Seen(found=found, wanted=reached, labels=taken, inputs=part.inputs))
            has_labels = all(seen.labels is None or len(seen.labels) == size for seen in each)
            yield part.start, size, each if has_labels else []


def _counted(totals: list[Tally], comparison: _Comparison, parts: Parts, before: int) -> tuple[list[Tally], int]:
    """Returns each model's tally with a batch more, and how many samples that has."""
    num_samples = 0
    if not parts.is_shared:
        for _, size, each in comparison.seen(parts, before):
            totals = [total.plus(seen) for total, seen in zip(totals, each, strict=True)] if each else totals
            num_samples += size
        return totals, num_samples

    def states() -> list[tuple[int, int, list[Any]]]:
        fresh = Tally.of(totals[0].metrics)
        return [
            (start, size, [fresh.plus(one).states for one in each])
            for start, size, each in comparison.seen(parts, before)
        ]

    found = [part for some in together(states, is_shared=True) for part in some]
    for _, size, each in sorted(found, key=lambda part: int(part[0])):
        totals = [total.merged(state) for total, state in zip(totals, each, strict=True)] if each else totals
        num_samples += int(size)
    return totals, num_samples


def _by_part(y: np.ndarray, quantized: np.ndarray, parts: OutputParts) -> list[tuple[str, tuple[float, float, float]]]:
    labels, y, quantized = parts.labels.ravel(), y.ravel().astype(np.float64), quantized.ravel().astype(np.float64)
    weights = (y**2, (y - quantized) ** 2, None)
    signal, noise, size = (np.bincount(labels, weights=each, minlength=len(parts.names)) for each in weights)
    return [(name, (float(signal[i]), float(noise[i]), float(size[i]))) for i, name in enumerate(parts.names)]


def top1(logits: Float[np.ndarray, "n ..."], labels: Int[np.ndarray, " n"]) -> float:
    """Returns the fraction of samples whose largest element is the labelled class."""
    return float(np.mean(predicted(logits) == labels))


def agreement(y: Float[np.ndarray, "n ..."], other: Float[np.ndarray, "n ..."]) -> float:
    """Returns the fraction of samples whose largest element is the same one in both."""
    return float(np.mean(predicted(y) == predicted(other)))


def sqnr(y: Shaped[np.ndarray, "..."], quantized: Shaped[np.ndarray, "..."]) -> float:
    """Returns 10 log10(sum y^2 / sum (y - quantized)^2) in dB: infinite where they are equal."""
    return decibels(*energies({"": y}, {"": quantized})[""])


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
    for name in [name for name, value in batch.items() if np.shape(value)[:1] == (0,)]:
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
