"""Picks how to scale, how much headroom to leave and how to correct, by what measures best on samples held back.

Half of the samples stand for calibration data, the others for data to come: what is chosen is chosen on calibration
data alone, and judged on samples that neither ranges nor corrections have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ptqjax.config import FLOAT_DTYPES, QuantizationConfig, load_target
from ptqjax.errors import ConfigError
from ptqjax.fit.behaviour import observe_behaviour, observe_shares_beyond
from ptqjax.fit.bias_correction import correct_each, corrected_axes, layer_axes
from ptqjax.fit.learned_scales import Learning, learn_scales
from ptqjax.fit.quantized_pass import QuantizedPass
from ptqjax.fit.samples import Batch, can_be_regrouped, first_samples, grouped, joined, of_few_shapes
from ptqjax.ir import Model, Record, Report
from ptqjax.kernels.grid import integer_range
from ptqjax.lowering import apply
from ptqjax.quantize import Encodings
from ptqjax.quantize.calibrate import Calibrated, calibrate_and_measure
from ptqjax.quantize.headroom import widened
from ptqjax.quantize.rules import num_bits
from ptqjax.quantize.tensors import is_floating
from ptqjax.transforms.behaviour import Behaviour, implied_behaviour
from ptqjax.transforms.equalize import unscaled
from ptqjax.transforms.noise import Steps, covers_noise, scale_for_noise
from ptqjax.transforms.rescale import with_free_bounds
from ptqjax.transforms.scaling import scale_channels

_NAME = "choose"
_CLEARLY = 0.25  # dB by which something must be better than what is simpler
_PREDICTED = 1.5  # dB that scales must be predicted to gain where nothing can be measured
_BATCH = 8  # samples a backward pass holds

# Shapes of batches that cannot be regrouped (text of unlike lengths): each is compiled for. A program that measures
# behaviour takes four times as long to compile as one that runs the model, and what it predicts is off by 1 to 3 dB.
_BEHAVIOUR_SHAPES, _TRIAL_SHAPES = 2, 4

# dB that scales must be predicted to gain before they are tried. With a scale per channel the MobileNets, ResNet-20 and
# EfficientNet-Lite0 are predicted to gain 0.6 to 1.8, and lose when they are scaled; SqueezeNet (4) and a network for
# super-resolution (10) gain 5 and 13. From 8 dB on, no scaling at all has never won.
_MAY_WIN, _WINS = 3.0, 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Policy:
    """What an effort buys."""

    trial_samples: int
    """Samples that ways are tried on, half of them held back; 0: nothing is tried."""
    behaviour_samples: int
    """Samples that channels' behaviour is measured on."""
    tries_all: bool
    """Whether also what is not predicted to win is tried."""
    learning_steps: int
    """Steps of learning, where a weight has one scale for all channels; 0: nothing is learned."""


_POLICIES = {
    "fast": _Policy(trial_samples=0, behaviour_samples=16, tries_all=False, learning_steps=0),
    "balanced": _Policy(trial_samples=64, behaviour_samples=64, tries_all=False, learning_steps=60),
    "thorough": _Policy(trial_samples=128, behaviour_samples=128, tries_all=True, learning_steps=100),
}
_HEADROOMS = (1.0, 1.2)  # tried; beyond, a coarser step costs more than clipping did (MobileNetV2: 1.3 as good as 1.2)
_OF_SCALED = 1.2  # without a trial: scales of least noise make channels reach equally far, and clip most on new data

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

    "auto" asks the closed form of predicted noise first what scales may gain. What may win of nothing, "ranges" and
    "noise" is tried, each with and without headroom, on one half of some samples against the other; the best is
    repeated on more of them and, where a weight has one scale for all channels, gone on with by learning, which judges
    itself on samples held back. Of batches that cannot be regrouped, such as text of unlike lengths, trials look at
    four shapes and predictions at two, which the report says. `effort` "fast" tries and learns nothing: the prediction
    decides; "thorough" tries all.
    Without data the scales of least predicted noise are taken, where the prediction is clearly better.

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
    model, asked = ways.model, _as_asked(config, has_data=True)
    if config.scaling != "auto":
        scaled, report = ways.scaled(config.scaling, config)
        return Choice(model=scaled, report=report, **asked)
    if not any(is_floating(spec.dtype) for spec in model.graph.outputs):
        report = unscaled(model, "no output holds floating numbers, by which ways could be compared")
        return Choice(model=model, report=report, **asked)
    policy = _POLICIES[config.effort]
    learns = config.granularity == "tensor" and policy.learning_steps > 0
    expected = _expected_gain(ways, config)
    if not policy.trial_samples:
        return _by_prediction(ways, config, expected)
    candidates = _candidates(policy, expected.gain)
    if (learns or len(candidates) > 1) and _bounds(config) == "exact":
        ways = _Ways(with_free_bounds(model), ways.batches)  # one structure, and so one set of programs, for all
    judge = _Judge.of(ways, config, policy.trial_samples)
    best = _best([trial for name in candidates for trial in judge.trials(name)])
    best = _best([best, *judge.corrections(best)])
    less = _less(judge.left_out, _TRIAL_SHAPES)
    records = (expected.record, *(_tried(trial, less, is_chosen=trial is best) for trial in judge.tried))
    scaled, report = ways.scaled(best.name, config)
    is_scaled = best.name != "off"
    if learns:
        samples = judge.used + judge.held
        learning = Learning(seed=config.seed, num_steps=policy.learning_steps)
        scaled, learned = learn_scales(scaled, samples, config, learning, bounds=_bounds(config))
        is_scaled |= any(record.done for record in learned)
        report = (*report, *learned)
    return Choice(
        model=scaled if is_scaled else model,
        headroom=best.headroom,
        correct=best.correct,
        report=(*records, *report),
        scaling=None if learns else best.name,
    )


def _candidates(policy: _Policy, gain: float) -> tuple[str, ...]:
    """Returns the ways that are tried, the simplest first."""
    if not policy.tries_all and gain < _MAY_WIN:
        return ("off",)
    return ("ranges", "noise") if not policy.tries_all and gain >= _WINS else ("off", "ranges", "noise")


class _Expected(NamedTuple):
    """What the closed form says of scales."""

    gain: float
    """How many dB less noise the best ones are predicted to leave; 0 where nothing is known."""
    record: Record
    """The same for the report."""


def _expected_gain(ways: _Ways, config: QuantizationConfig) -> _Expected:
    """Returns what scales of least predicted noise are predicted to gain, from as little data as tells it."""
    steps, bounds = steps_of(config), _bounds(config)
    source = "batch norms"
    behaviour = implied_behaviour(ways.model) if ways.model.statistics else {}
    if not covers_noise(ways.model, behaviour, per_channel=steps.per_channel):
        behaviour = ways.behaviour(config.seed, _BATCH)
        source = f"{_BATCH} samples{_less(ways.left_out(_BATCH), _BEHAVIOUR_SHAPES)}"
    try:
        _, report = scale_for_noise(ways.model, behaviour, steps=steps, bounds=bounds)
    except ConfigError:
        report = ()
    whole = next((record for record in report if "predicted SQNR, dB" in record.after), None)
    gain = whole.after["predicted SQNR, dB"] - whole.before["predicted SQNR, dB"] if whole else 0.0
    record = Record(
        transform=_NAME,
        done=False,
        what="predicted gain of scales between layers",
        where=(),
        reason=f"by the closed form, from {source}: tried from {_MAY_WIN:g} dB on",
        after={"predicted gain, dB": float(gain)},
    )
    return _Expected(float(gain), record)


def _by_prediction(ways: _Ways, config: QuantizationConfig, expected: _Expected) -> Choice:
    """Returns the choice without a trial."""
    name = "noise" if expected.gain >= _MAY_WIN else "off"
    scaled, report = ways.scaled(name, config)
    headroom = config.headroom or (1.0 if name == "off" else _OF_SCALED)
    return Choice(
        model=scaled,
        headroom=headroom,
        correct=config.correct,
        report=(expected.record, *report),
        scaling=name,
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
        self._behaviour: dict[tuple[int, int | None], dict[str, Behaviour]] = {}
        self._left_out: dict[int, int] = {}
        self._beyond: dict[str, float] | None = None

    def scaled(self, name: str, config: QuantizationConfig) -> tuple[Model, Report]:
        """Returns the model scaled in one of the ways, and what that did."""
        if name == "off":
            return self.model, unscaled(self.model, "left as they are")
        bounds = _bounds(config)
        how = {"bounds": bounds, "beyond": self._shares_beyond() if bounds == "auto" else None}
        if name == "weights":
            return scale_channels(self.model, limit=None, **how)
        behaviour = self.behaviour(config.seed, _POLICIES[config.effort].behaviour_samples)
        if name == "ranges":
            reach = {tensor: np.maximum(abs(found.low), abs(found.high)) for tensor, found in behaviour.items()}
            return scale_channels(self.model, limit=_LIMIT, magnitudes=reach, **how)
        scaled, report = scale_for_noise(self.model, behaviour, steps=steps_of(config), **how)
        if name == "noise":
            return scaled, report
        learned, more = learn_scales(scaled, self.batches, config, Learning(seed=config.seed), bounds=bounds)
        return learned, (*report, *more)

    def behaviour(self, seed: int, num_samples: int) -> dict[str, Behaviour]:
        """Returns how channels behave on the first samples, a few at a time: a backward pass holds much.

        Of batches of unlike shapes, those of the two shapes that hold most of the first samples.
        """
        if (seed, num_samples) not in self._behaviour:
            found = first_samples(self.model.graph, self.batches, num_samples)
            if can_be_regrouped(self.model.graph, found):
                samples = joined(found)
                count = min(len(next(iter(samples.values()))), num_samples)
                found = grouped(samples, np.arange(count), min(_BATCH, count))
            else:
                few = of_few_shapes(found, _BEHAVIOUR_SHAPES)
                self._left_out[num_samples], found = len(found) - len(few), few
            self._behaviour[seed, num_samples] = observe_behaviour(self.model, found, seed=seed)
        return self._behaviour[seed, num_samples]

    def left_out(self, num_samples: int) -> int:
        """Returns how many of the batches of the first samples `behaviour` did not look at, for their shapes."""
        return self._left_out.get(num_samples, 0)

    def _shares_beyond(self) -> dict[str, float]:
        if self._beyond is None:
            self._beyond = observe_shares_beyond(self.model, self.batches)
        return self._beyond


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Samples divided into those that calibrate and those that judge, and all that was tried on them."""

    ways: _Ways
    """The ways, on the samples that calibrate."""
    config: QuantizationConfig
    used: list[Batch]
    held: list[Batch]
    left_out: int
    """How many batches are in neither, for their shapes."""
    tried: list[_Trial]
    wanted: list[dict[str, Any]]
    """The float model's outputs on the samples held back, once there are any."""

    @staticmethod
    def of(ways: _Ways, config: QuantizationConfig, num_samples: int) -> _Judge:
        """Returns a judge on so many of the samples."""
        used, held, left_out = divided(ways.model, ways.batches, num_samples)
        half = _Ways(ways.model, used)
        return _Judge(ways=half, config=config, used=used, held=held, left_out=left_out, tried=[], wanted=[])

    def trials(self, name: str) -> list[_Trial]:
        """Returns what a way gives with each headroom."""
        model, report = self.ways.scaled(name, self.config)
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
        model = trials[0].model
        found = calibrate_and_measure(model, self.used, [self.config], labels=[""], measured=layer_axes(model))
        measured = [replace(trial, decibels=self._outcome(trial, found)) for trial in trials]
        self.tried.extend(measured)
        return measured

    def _outcome(self, trial: _Trial, found: Calibrated) -> float:
        encodings = widened(trial.model, found.each[0][0], trial.headroom, self.config)
        model = trial.model
        if trial.correct != "none":
            data = self.used if trial.correct == "empirical" else None
            ((model, _),) = correct_each(model, (encodings,), data, method=trial.correct, means=found.means)
        return self._decibels(model, encodings, next(iter((found.means or {}).values()), {}))

    def _decibels(self, model: Model, encodings: Encodings, means: Mapping[str, Any]) -> float:
        """Returns the mean over outputs of noise over signal on the samples held back, by the program that corrects."""
        axes = corrected_axes(model, encodings) if means else ()

        def outputs(encodings: Encodings) -> list[dict[str, Any]]:
            quantized = QuantizedPass(model, encodings, axes, biases=True)
            return [quantized.run(batch, means, is_corrected=False).outputs for batch in self.held]

        if not self.wanted and _bounds(self.config) == "exact":  # scaling keeps the function
            off = {name: encoding.replace(enabled=np.asarray(False)) for name, encoding in encodings.items()}
            self.wanted.extend(outputs(off))
        elif not self.wanted:
            self.wanted.extend(apply(self.ways.model.graph, self.ways.model.params, batch) for batch in self.held)
        return _signal_to_noise(self.wanted, outputs(encodings))


def _signal_to_noise(wanted: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> float:
    """Returns the signal of the outputs over their noise in dB, of the mean over outputs of noise over signal."""
    ratios = []
    for name in (name for name, value in wanted[0].items() if is_floating(np.asarray(value).dtype)):
        exact, rounded = ([np.asarray(batch[name], np.float64) for batch in batches] for batches in (wanted, found))
        power = sum(np.sum(each**2) for each in exact)
        noise = sum(np.sum((one - other) ** 2) for one, other in zip(exact, rounded, strict=True))
        ratios.extend([noise / power] if power > 0 else [])
    ratio = float(np.mean(ratios)) if ratios else np.inf
    return -np.inf if np.isnan(ratio) else float(-10 * np.log10(max(ratio, np.finfo(float).tiny)))


class _Divided(NamedTuple):
    """Samples in two parts."""

    used: list[Batch]
    """Those to work with."""
    held: list[Batch]
    """Those held back."""
    left_out: int
    """How many batches are in neither."""


def divided(model: Model, batches: Iterable[Mapping[str, Any]], num_samples: int) -> _Divided:
    """Returns two halves of the first `num_samples` samples; a single sample is in both.

    In batches as large as those given where there are enough samples, since programs are compiled for a size. Of
    batches of unlike shapes, which stay whole, those of the four shapes that hold most of these samples.
    """
    found = first_samples(model.graph, batches, num_samples)
    if not can_be_regrouped(model.graph, found):
        few = of_few_shapes(found, _TRIAL_SHAPES)
        return _Divided(few[::2], few[1::2] or few, len(found) - len(few))
    samples = joined(found)
    count = min(len(next(iter(samples.values()))), num_samples)
    if count == 1:
        return _Divided(found, found, 0)
    size = min(max(len(next(iter(batch.values()))) for batch in found), count // 2)
    used, held = (grouped(samples, np.arange(start, count, 2), size) for start in range(2))
    return _Divided(used, held, 0)


def _best(trials: Sequence[_Trial]) -> _Trial:
    """Returns the first trial that none of the later ones clearly beats."""
    best = trials[0]
    for trial in trials[1:]:
        if trial.decibels > best.decibels + _CLEARLY:
            best = trial
    return best


def _less(left_out: int, num_shapes: int) -> str:
    """Returns what is said of batches that were left out."""
    return f", without {left_out} batches of other shapes than the {num_shapes} that hold most" if left_out else ""


def _tried(trial: _Trial, less: str, *, is_chosen: bool) -> Record:
    return Record(
        transform=_NAME,
        done=is_chosen,
        what=f"scaling {trial.name}, headroom {trial.headroom:g}, correction {trial.correct}",
        where=(),
        reason=("chosen: best on calibration samples held back" if is_chosen else "tried, and not clearly better")
        + less,
        after={"SQNR on samples held back, dB": float(trial.decibels)},
    )
