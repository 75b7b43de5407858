"""Ways to scale, headrooms and corrections, tried on some calibration samples and judged on others.

Half of the samples stand for calibration data, the others for data to come: what is chosen is chosen on calibration
data alone, and judged on samples that neither scales, ranges nor corrections have seen. What was judged is what is
chosen: that model, with its own reads, headroom and correction as the pipeline gives them. Grids are then found on all
samples, and roundings of weights are solved for where the settings say so; trials round to nearest. Where nothing but
the correction is to be judged, ranges are those of all samples on both sides, and with them the pass that calibrates is
the result's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ptqjax.config import RUN_TIME, QuantizationConfig
from ptqjax.data.regroup import Batch
from ptqjax.encodings.biases import guard_biases, sums_in_fixed_point
from ptqjax.encodings.encoding import Encodings
from ptqjax.fit.bias_correction import correct_each, corrected_axes, layer_axes
from ptqjax.fit.quantized_pass import QuantizedPass
from ptqjax.fit.ways import Ways, bounds_of, divided
from ptqjax.ir import Model, Record, Report
from ptqjax.lowering import apply
from ptqjax.metrics.records import added
from ptqjax.metrics.sums import Energies, decibels_of_mean, energies
from ptqjax.placement.own_reads import with_own_reads
from ptqjax.placement.tensors import is_floating
from ptqjax.ranges.calibrate import Calibrated, calibrate_and_measure
from ptqjax.ranges.headroom import widened
from ptqjax.ranges.observing import Means
from ptqjax.transforms.equalize import unscaled

JUDGED = "stage "
"""What the record of a stage that was judged by itself begins with."""
_CLEARLY = 0.25  # dB by which something must be better than what is simpler
_MUCH = 1.0  # dB by which correction has to hurt, before headrooms are tried again without it
HEADROOMS = (1.0, 1.2)
"""Headrooms that are tried; beyond, a coarser step costs more than clipping did (MobileNetV2: 1.3 as good as 1.2)."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate and what it gave."""

    name: str
    """The way of scaling, one of `config.settings.SCALINGS` that a search tries, such as "noise"; or "off"."""
    model: Model
    """The float model, scaled this way."""
    report: Report
    """What the way of scaling did and left alone."""
    headroom: float
    """The factor by which ranges of activations are widened."""
    correct: str
    """How biases are corrected, one of `config.settings.CORRECTIONS`."""
    absorbs: bool = True
    """Whether biases are absorbed, where that is asked for."""
    decibels: float = -np.inf
    """The SQNR on samples held back, in dB; minus infinity until it is measured."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Samples divided into those that calibrate and those that judge, and all that was tried on them."""

    ways: Ways
    """The ways, on the samples that calibrate."""
    config: QuantizationConfig
    """The settings that candidates are quantized under."""
    used: list[Batch]
    """The samples that calibrate."""
    held: list[Batch]
    """The samples held back, which judge."""
    left_out: int
    """How many batches are in neither, for their shapes."""
    tried: list[Trial]
    """All candidates that were measured, in order."""
    wanted: list[dict[str, Any]]
    """The float model's outputs on the samples held back, once there are any."""
    calibrated: list[tuple[Model, Calibrated]]
    """Models that have been calibrated, and what that gave."""
    absorbs: bool = True
    """Whether the ways start from the model whose biases were absorbed, where that is asked for."""
    ranging: Iterable[Batch] | None = None
    """Samples that ranges are found on; None: those that calibrate."""

    @staticmethod
    def of(ways: Ways, config: QuantizationConfig, num_samples: int, *, absorbs: bool = True) -> Judge:
        """Returns a judge on so many of the samples."""
        used, held, left_out = divided(ways.model, ways.batches, num_samples)
        return Judge(
            ways=Ways(ways.model, used),
            config=config,
            used=used,
            held=held,
            left_out=left_out,
            tried=[],
            wanted=[],
            calibrated=[],
            absorbs=absorbs,
        )

    @staticmethod
    def of_correction(ways: Ways, config: QuantizationConfig, num_samples: int, *, absorbs: bool) -> Judge:
        """Returns a judge of corrections alone: ranges are of all samples, as the result will have them.

        Corrections are measured on the first batch and judged on the second; where there are no two that hold half of
        `num_samples` each, on two halves of so many samples, as `of` has it.
        """
        first, second = (*islice(iter(ways.batches), 2), {}, {})[:2]
        sizes = {len(next(iter(batch.values()), ())) for batch in (first, second)}
        judge = Judge.of(ways, config, num_samples, absorbs=absorbs)
        if sizes != {num_samples // 2}:
            return judge
        used, held = ([{name: np.asarray(value) for name, value in batch.items()}] for batch in (first, second))
        return replace(judge, used=used, held=held, ranging=ways.batches)

    def found_for(self, model: Model) -> Calibrated | None:
        """Returns what calibrating on all samples gave for a model; None where that was not done."""
        if self.ranging is None:
            return None
        return next((found for each, found in self.calibrated if each is model), None)

    def trials(self, name: str, headrooms: Sequence[float] = HEADROOMS) -> list[Trial]:
        """Returns what a way gives with each headroom, or with the one that is set."""
        model, report = self.ways.scaled(name, self.config)
        fixed = fixed_headroom(self.config)
        chosen = headrooms if fixed is None else (fixed,)
        trial = Trial(
            name=name, model=model, report=report, headroom=1.0, correct=self.config.correct, absorbs=self.absorbs
        )
        return self._measured([replace(trial, headroom=headroom) for headroom in chosen])

    def corrections(self, best: Trial) -> list[Trial]:
        """Returns what the best way gives with simpler corrections than the one asked for."""
        return self._measured([replace(best, correct="none")] if best.correct != "none" else [])

    def headrooms(self, best: Trial, corrected: Trial) -> list[Trial]:
        """Returns what the best way gives with other headrooms, where leaving its correction out was much better.

        The headroom was chosen with the correction on: what clipping an outlier takes off a mean is added everywhere.
        """
        is_decided = fixed_headroom(self.config) is not None or self.ranging is not None  # all samples: nothing clipped
        if is_decided or best.decibels < corrected.decibels + _MUCH:
            return []
        return self._measured([replace(best, headroom=each) for each in HEADROOMS if each != best.headroom])

    def unequalized(self, best: Trial, model: Model) -> list[Trial]:
        """Returns what the rest of the best way gives for `model`, whose biases were not absorbed, without scaling."""
        report = unscaled(model, "neither this nor absorption was better on samples held back")
        return self._measured([replace(best, name="off", model=model, report=report, absorbs=False)])

    def _calibrated(self, model: Model) -> Calibrated:
        """Returns what calibrating gives the model with the reads of its own, from one pass for each model."""
        known = next((found for each, found in self.calibrated if each is model), None)
        if known is not None:
            return known
        samples = self.used if self.ranging is None else self.ranging
        own = with_own_reads(model, self.config)
        found = calibrate_and_measure(own, samples, [self.config], labels=[""], measured=layer_axes(own))
        self.calibrated.append((model, found))
        return found

    def _measured(self, trials: Sequence[Trial]) -> list[Trial]:
        """Returns the trials, all of the same model, with what they gave."""
        if not trials:
            return []
        found = self._calibrated(trials[0].model)
        measured = [replace(trial, decibels=self._outcome(trial, found)) for trial in trials]
        self.tried.extend(measured)
        return measured

    def _outcome(self, trial: Trial, found: Calibrated) -> float:
        own = model = with_own_reads(trial.model, self.config)
        encodings = widened(own, found.each[0][0], trial.headroom, self.config, found.num_values)
        if trial.correct != "none":
            data = self.used if trial.correct == "empirical" else None
            ((model, _),) = correct_each(model, (encodings,), data, method=trial.correct, means=found.means)
        encodings, _ = guard_biases(model, encodings, fixed_point=sums_in_fixed_point(self.config))
        return self._decibels(model, _uncorrected(model, own), encodings, found.means)

    def _decibels(self, model: Model, exact: Model, encodings: Encodings, means: Means | None) -> float:
        """Returns the mean over outputs of noise over signal on the samples held back, by the program that corrects.

        Args:
            model: What is judged.
            exact: The same before its biases were corrected, which is what it is held against.
            encodings: Of both.
            means: As a pass over the samples kept them: the program takes some, and does nothing with them here.
        """
        kept = next(iter((means or {}).values()), {})
        axes = corrected_axes(model, encodings) if kept else ()

        def outputs(model: Model, encodings: Encodings) -> list[dict[str, Any]]:
            quantized = QuantizedPass(model, encodings, axes, biases=True)
            return [quantized.run(batch, kept, is_corrected=False).outputs for batch in self.held]

        if not self.wanted and bounds_of(self.config) == "exact":  # scaling keeps the function
            off = {name: encoding.replace(enabled=np.asarray(False)) for name, encoding in encodings.items()}
            self.wanted.extend(outputs(exact, off))
        elif not self.wanted:
            self.wanted.extend(apply(self.ways.model.graph, self.ways.model.params, batch) for batch in self.held)
        sums: Energies = {}
        for wanted, rounded in zip(self.wanted, outputs(model, encodings), strict=True):
            floating = {name: value for name, value in wanted.items() if is_floating(np.asarray(value).dtype)}
            sums = added(sums, energies(floating, rounded))
        return decibels_of_mean(sums)


def _uncorrected(corrected: Model, model: Model) -> Model:
    """Returns `model` in the graph of its corrected form, in which some layers have got a bias: of zeros."""
    params = {name: model.params.get(name, np.zeros_like(value)) for name, value in corrected.params.items()}
    return corrected.replace(params=params)


def fixed_headroom(config: QuantizationConfig) -> float | None:
    """Returns the headroom where there is none to choose: the one that is set, or 1 where no range is found before."""
    return 1.0 if config.activations in RUN_TIME else config.headroom


def best_of(trials: Sequence[Trial]) -> Trial:
    """Returns the first trial that none of the later ones clearly beats."""
    best = trials[0]
    for trial in trials[1:]:
        if trial.decibels > best.decibels + _CLEARLY:
            best = trial
    return best


class Verdict(NamedTuple):
    """Which of two trials goes on, and the same for the report."""

    kept: Trial
    """The one that goes on."""
    records: Report
    """What is said of the stage; nothing where there was no second."""


def judged(stage: str, best: Trial, without: Sequence[Trial]) -> Verdict:
    """Returns the trial with a stage, unless it is worse than one without it on the samples held back.

    Args:
        stage: The stage, as the table of stages calls it.
        best: What went on so far, with the stage.
        without: The same without it; the best of them is compared.
    """
    if not without:
        return Verdict(best, ())
    other = max(without, key=lambda trial: trial.decibels)
    is_kept = best.decibels >= other.decibels
    figures = f"{best.decibels:.1f} dB with it, {other.decibels:.1f} without"
    record = Record(
        transform="choose",
        done=is_kept,
        what=f"{JUDGED}{stage}",
        where=(),
        reason=f"{'kept' if is_kept else 'left out'}: on samples held back {figures}",
        after={"gain on samples held back, dB": float(best.decibels - other.decibels)},
    )
    return Verdict(best if is_kept else other, (record,))


def verdicts(records: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Returns what was kept or left out because of samples held back, in sentences.

    Args:
        records: What and why of each record of a report.
    """
    return tuple(f"{what} was {why}" for what, why in records if what.startswith(JUDGED))


def record_of(trial: Trial, less: str, *, is_chosen: bool) -> Record:
    """Returns what a trial gave, for the report; `less`: what is said of batches that were left out."""
    return Record(
        transform="choose",
        done=is_chosen,
        what=f"scaling {trial.name}, {'' if trial.absorbs else 'nothing absorbed, '}headroom {trial.headroom:g}, "
        f"correction {trial.correct}",
        where=(),
        reason=("chosen: best on calibration samples held back" if is_chosen else "tried, and not clearly better")
        + less,
        after={"SQNR on samples held back, dB": float(trial.decibels)},
    )
