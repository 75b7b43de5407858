"""Picks how to scale, how much headroom to leave and how to correct, by what measures best on samples held back.

Half of the samples stand for calibration data, the others for data to come: what is chosen is chosen on calibration
data alone, and judged on samples that neither ranges nor corrections have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ptqjax.config import FLOAT_DTYPES, QuantizationConfig, load_target
from ptqjax.errors import ConfigError
from ptqjax.fit.behaviour import observe_behaviour, observe_shares_beyond
from ptqjax.fit.bias_correction import correct_biases
from ptqjax.fit.learned_scales import Learning, learn_scales
from ptqjax.fit.samples import Batch, can_be_regrouped, first_samples, grouped, joined
from ptqjax.ir import Model, Record, Report
from ptqjax.kernels.grid import integer_range
from ptqjax.lowering import apply
from ptqjax.quantize import Encodings, calibrate
from ptqjax.quantize.headroom import widened
from ptqjax.quantize.rules import num_bits
from ptqjax.quantize.tensors import is_floating
from ptqjax.simulate import simulate
from ptqjax.transforms.behaviour import Behaviour
from ptqjax.transforms.equalize import unscaled
from ptqjax.transforms.noise import Steps, scale_for_noise
from ptqjax.transforms.scaling import scale_channels

_NAME = "choose"
_MOST_SAMPLES = 128  # looked at: enough to tell ways apart that differ by half a decibel
_BATCH = 16
_HEADROOMS = (1.0, 1.2)  # tried; beyond, a coarser step costs more than clipping did (MobileNetV2: 1.3 as good as 1.2)
_CLEARLY = 0.25  # dB by which something must be better than what is simpler
_PREDICTED = 1.5  # dB that scales must be predicted to gain where nothing can be measured

# How far a channel may reach above the median one: chosen on calibration pictures alone (MobileNetV1-0.25: 15.7 dB from
# statistics at 2, 17.8 from data at 1.5; MobileNetV2: 17.4 both).
_LIMIT = 1.5


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen."""

    model: Model
    """The scaled model."""
    headroom: float
    """How much wider than the data the ranges of activations are to be."""
    correct: str
    """How biases are to be corrected."""
    report: Report
    """What was tried, what it gave, and what the scaling that was chosen did."""
    scaling: str | None = None
    """The value of `QuantizationConfig.scaling` that gives the same model again, where one was chosen and does."""


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A candidate and what it gave."""

    name: str
    model: Model
    report: Report
    headroom: float
    correct: str
    decibels: float = -np.inf


def steps_of(config: QuantizationConfig) -> Steps:
    """Returns how fine the grids of `config` are."""
    return Steps(
        weights=_steps_of_type(config.weights) // 2,
        activations=_steps_of_type(config.activations),
        per_channel=config.granularity != "tensor",
    )


def _steps_of_type(dtype: str) -> int:
    """Returns how many steps a grid of `dtype` has from end to end; floating-point codes count as integers as wide."""
    low, high = integer_range(f"int{num_bits(dtype)}" if dtype in FLOAT_DTYPES else dtype)
    return high - low


def scale_as_configured(
    model: Model, batches: Iterable[Mapping[str, Any]] | None, config: QuantizationConfig
) -> Choice:
    """Returns `model` scaled as `config.scaling` says, and how to go on.

    "auto" tries nothing, "ranges" and "noise", each with and without headroom, on one half of the samples against the
    other, repeats the best on all of them and, where a weight has one scale for all channels, goes on by learning,
    which judges itself on samples held back. Without data it takes the scales of least predicted noise, where
    the prediction is clearly better.

    Args:
        model: The model, prepared: folded, constant channels removed, biases absorbed.
        batches: Calibration data; None where there are none.
        config: The settings.

    Raises:
        ConfigError: The scaling needs data, and there are none.
        DataError: The batches do not fit the model.
    """
    return next(scale_each(model, batches, [config]))


def scale_each(
    model: Model,
    batches: Iterable[Mapping[str, Any]] | None,
    configs: Sequence[QuantizationConfig],
    *,
    labels: Sequence[str] | None = None,
) -> Iterator[Choice]:
    """Yields what `scale_as_configured` returns for each configuration, in order, each made when it is asked for.

    What several ask for is made once: configurations that ask for the same scaling share one model, the same object.

    Args:
        model: The model, prepared.
        batches: Calibration data; None where there are none.
        configs: The settings.
        labels: What the message of a ConfigError about each of them begins with; None: nothing.

    Raises:
        PtqjaxError: As `scale_as_configured` does.
    """
    ways = None if batches is None else _Ways(model, batches)
    made: dict[Any, Choice] = {}
    for given, label in zip(configs, labels or [""] * len(configs), strict=True):
        config = given if given.equalize else replace(given, scaling="off")
        key = _dependence(config)
        if key not in made:
            try:
                made[key] = _without_data(model, config) if ways is None else _with_data(ways, config)
            except ConfigError as error:
                if not label:
                    raise
                raise ConfigError(f"{label}{error}") from error
        own = {} if _is_chosen(config) else _as_asked(config, has_data=batches is not None)
        yield replace(made[key], **own)


def _is_chosen(config: QuantizationConfig) -> bool:
    """Tells whether the scaling is one that depends on all that is set."""
    return config.scaling in {"auto", "learned"}


def _dependence(config: QuantizationConfig) -> Any:
    """Returns what the scaled model depends on."""
    if _is_chosen(config):
        return config
    steps = steps_of(config) if config.scaling == "noise" else None
    return config.scaling, _bounds(config), config.seed, steps


def _as_asked(config: QuantizationConfig, *, has_data: bool) -> dict[str, Any]:
    """Returns headroom and correction as they are set, where nothing is chosen."""
    correct = "analytic" if config.correct == "empirical" and not has_data else config.correct
    return {"headroom": config.headroom or 1.0, "correct": correct}


def _with_data(ways: _Ways, config: QuantizationConfig) -> Choice:
    model, batches, asked = ways.model, ways.batches, _as_asked(config, has_data=True)
    if config.scaling != "auto":
        scaled, report = ways.scaled(config.scaling, config)
        return Choice(model=scaled, report=report, **asked)
    if not any(is_floating(spec.dtype) for spec in model.graph.outputs):
        report = unscaled(model, "no output holds floating numbers, by which ways could be compared")
        return Choice(model=model, report=report, **asked)
    judge = _Judge.of(model, batches, config)
    half = _Ways(model, judge.used)
    best = _best(
        [trial for name in ("off", "ranges", "noise") for trial in judge.trials(name, *half.scaled(name, config))]
    )
    best = _best([best, *judge.corrections(best)])
    records = tuple(_tried(trial, is_chosen=trial is best) for trial in judge.tried)
    scaled, report = ways.scaled(best.name, config)
    if config.granularity == "tensor":
        scaled, learned = learn_scales(
            scaled, judge.used + judge.held, config, Learning(seed=config.seed), bounds=_bounds(config)
        )
        report = (*report, *learned)
    return Choice(
        model=scaled,
        headroom=best.headroom,
        correct=best.correct,
        report=(*records, *report),
        scaling=None if config.granularity == "tensor" else best.name,
    )


def _without_data(model: Model, config: QuantizationConfig) -> Choice:
    asked = _as_asked(config, has_data=False)
    if config.scaling == "learned":
        raise ConfigError(
            "scaling='learned' needs calibration data, and there are none; give samples, or scale for 'noise'"
        )
    if config.scaling in {"off", "weights", "ranges"}:
        limit = 2.0 if config.scaling == "ranges" else None
        bounds = _bounds(config)
        if config.scaling == "off":
            scaled, report = model, unscaled(model, "scaling is switched off")
        else:
            scaled, report = scale_channels(model, limit=limit, bounds=bounds)
        return Choice(model=scaled, report=report, **asked)
    if config.scaling == "auto" and config.granularity != "tensor":
        # What is left to gain is less than the prediction is wrong (MobileNetV2: 18.5 dB unscaled, 14.2 scaled).
        report = unscaled(model, "without data, channels are scaled only where a weight has one scale")
        return Choice(model=model, report=report, **asked)
    try:
        scaled, report = scale_for_noise(model, steps=steps_of(config), bounds=_bounds(config))
    except ConfigError:
        if config.scaling != "auto":
            raise
        report = unscaled(model, "without data and batch norms, nothing is known of the activations")
        return Choice(model=model, report=report, **asked)
    whole = next((record for record in report if "predicted SQNR, dB" in record.after), None)
    gain = whole.after["predicted SQNR, dB"] - whole.before["predicted SQNR, dB"] if whole else 0.0
    if config.scaling == "auto" and gain < _PREDICTED:
        reason = f"without data: scales are predicted to gain {gain:.1f} dB, less than {_PREDICTED:g}"
        return Choice(model=model, report=unscaled(model, reason), **asked)
    return Choice(model=scaled, report=report, **asked)


def _bounds(config: QuantizationConfig) -> str:
    """Returns what becomes of bounds: "exact" needs a target that takes them per channel."""
    if config.bounds in {"exact", "auto"}:
        return "exact" if load_target(config.target).bounds_per_channel else "auto"
    return config.bounds


class _Ways:
    """The ways to scale a model; what they need to know of the data is measured once, when one first asks."""

    def __init__(self, model: Model, batches: Iterable[Mapping[str, Any]]) -> None:
        self.model = model
        self.batches = batches
        self._behaviour: dict[int, dict[str, Behaviour]] = {}
        self._beyond: dict[str, float] | None = None

    def scaled(self, name: str, config: QuantizationConfig) -> tuple[Model, Report]:
        """Returns the model scaled in one of the ways, and what that did."""
        if name == "off":
            return self.model, unscaled(self.model, "left as they are")
        bounds = _bounds(config)
        how = {"bounds": bounds, "beyond": self._shares_beyond() if bounds == "auto" else None}
        if name == "weights":
            return scale_channels(self.model, limit=None, **how)
        behaviour = self._observed(config.seed)
        if name == "ranges":
            reach = {tensor: np.maximum(abs(found.low), abs(found.high)) for tensor, found in behaviour.items()}
            return scale_channels(self.model, limit=_LIMIT, magnitudes=reach, **how)
        scaled, report = scale_for_noise(self.model, behaviour, steps=steps_of(config), **how)
        if name == "noise":
            return scaled, report
        learned, more = learn_scales(scaled, self.batches, config, Learning(seed=config.seed), bounds=bounds)
        return learned, (*report, *more)

    def _observed(self, seed: int) -> dict[str, Behaviour]:
        if seed not in self._behaviour:
            self._behaviour[seed] = observe_behaviour(self.model, self.batches, seed=seed)
        return self._behaviour[seed]

    def _shares_beyond(self) -> dict[str, float]:
        if self._beyond is None:
            self._beyond = observe_shares_beyond(self.model, self.batches)
        return self._beyond


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Samples divided into those that calibrate and those that judge, and all that was tried on them."""

    config: QuantizationConfig
    used: list[Batch]
    held: list[Batch]
    wanted: list[dict[str, Any]]
    tried: list[_Trial]

    @staticmethod
    def of(model: Model, batches: Iterable[Mapping[str, Any]], config: QuantizationConfig) -> _Judge:
        used, held = divided(model, batches)
        wanted = [apply(model.graph, model.params, batch) for batch in held]
        return _Judge(config=config, used=used, held=held, wanted=wanted, tried=[])

    def trials(self, name: str, model: Model, report: Report) -> list[_Trial]:
        """Returns what a model gives with each headroom."""
        headrooms = _HEADROOMS if self.config.headroom is None else (self.config.headroom,)
        trial = _Trial(name=name, model=model, report=report, headroom=1.0, correct=self.config.correct)
        return self._measured([replace(trial, headroom=headroom) for headroom in headrooms])

    def corrections(self, best: _Trial) -> list[_Trial]:
        """Returns what the best way gives with simpler corrections than the one asked for."""
        return self._measured([replace(best, correct="none")] if best.correct != "none" else [])

    def _measured(self, trials: Sequence[_Trial]) -> list[_Trial]:
        """Returns the trials, all of the same model, with what they gave."""
        if not trials:
            return []
        encodings = calibrate(trials[0].model, self.used, self.config)
        found = [replace(trial, decibels=self._outcome(trial, encodings)) for trial in trials]
        self.tried.extend(found)
        return found

    def _outcome(self, trial: _Trial, encodings: Encodings) -> float:
        encodings = widened(trial.model, encodings, trial.headroom, self.config)
        data = self.used if trial.correct == "empirical" else None
        if trial.correct == "none":
            return self._decibels(trial.model, encodings)
        return self._decibels(correct_biases(trial.model, encodings, data, method=trial.correct)[0], encodings)

    def _decibels(self, model: Model, encodings: Encodings) -> float:
        run = simulate(model, encodings)
        signal = dict.fromkeys(self.wanted[0], 0.0)
        noise = dict(signal)
        for batch, wanted in zip(self.held, self.wanted, strict=True):
            outputs = run(model.params, encodings, batch)
            for name, value in wanted.items():
                if not is_floating(np.asarray(value).dtype):
                    continue
                exact, rounded = np.asarray(value, np.float64), np.asarray(outputs[name], np.float64)
                signal[name], noise[name] = (
                    signal[name] + np.sum(exact**2),
                    noise[name] + np.sum((exact - rounded) ** 2),
                )
        ratios = [noise[name] / power for name, power in signal.items() if power > 0]
        ratio = float(np.mean(ratios)) if ratios else np.inf
        return -np.inf if np.isnan(ratio) else float(-10 * np.log10(max(ratio, np.finfo(float).tiny)))


def divided(model: Model, batches: Iterable[Mapping[str, Any]]) -> tuple[list[Batch], list[Batch]]:
    """Returns two halves of the first `_MOST_SAMPLES` samples, batches of one size; a single sample is in both."""
    found = first_samples(model.graph, batches, _MOST_SAMPLES)
    if not can_be_regrouped(model.graph, found):
        return (found[::2], found[1::2]) if len(found) > 1 else (found, found)
    samples = joined(found)
    count = min(len(next(iter(samples.values()))), _MOST_SAMPLES)
    if count == 1:
        return found, found
    size = min(_BATCH, count // 2)
    return grouped(samples, np.arange(0, count, 2), size), grouped(samples, np.arange(1, count, 2), size)


def _best(trials: Sequence[_Trial]) -> _Trial:
    """Returns the first trial that none of the later ones clearly beats."""
    best = trials[0]
    for trial in trials[1:]:
        if trial.decibels > best.decibels + _CLEARLY:
            best = trial
    return best


def _tried(trial: _Trial, *, is_chosen: bool) -> Record:
    return Record(
        transform=_NAME,
        done=is_chosen,
        what=f"scaling {trial.name}, headroom {trial.headroom:g}, correction {trial.correct}",
        where=(),
        reason="chosen: best on calibration samples held back" if is_chosen else "tried, and not clearly better",
        after={"SQNR on samples held back, dB": float(trial.decibels)},
    )
