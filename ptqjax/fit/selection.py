"""Picks how to scale, how much headroom to leave and how to correct: by the closed form, and by what trials measure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ptqjax.config import QuantizationConfig
from ptqjax.errors import ConfigError
from ptqjax.fit.learned_scales import Learning, learn_scales
from ptqjax.fit.trials import HEADROOMS, Judge, Trial, best_of, fixed_headroom, judged, record_of
from ptqjax.fit.ways import BATCH, BEHAVIOUR_SHAPES, POLICIES, TRIAL_SHAPES, Policy, Ways, bounds_of, steps_of, without
from ptqjax.ir import Model, Record, Report
from ptqjax.placement.own_reads import with_own_reads
from ptqjax.placement.place import place
from ptqjax.placement.tensors import is_floating
from ptqjax.ranges.calibrate import Calibrated
from ptqjax.transforms.behaviour import Behaviour, implied_behaviour
from ptqjax.transforms.equalize import unscaled
from ptqjax.transforms.noise import covers_noise, scale_for_noise, unscaled_decibels
from ptqjax.transforms.rescale import with_free_bounds
from ptqjax.transforms.scaling import scale_channels

_NAME = "choose"
_PREDICTED = 1.5  # dB that scales must be predicted to gain where nothing can be measured

# dB that scales must be predicted to gain before they are tried. With a scale per channel the MobileNets, ResNet-20 and
# EfficientNet-Lite0 are predicted to gain 0.6 to 1.8, and lose when they are scaled; SqueezeNet (4) and a network for
# super-resolution (10) gain 5 and 13. From 8 dB on, no scaling at all has never won, and is tried once.
_MAY_WIN, _WINS = 3.0, 8.0
_ABSORBS = (
    0.5  # dB that absorbed biases must be predicted to gain (MobileNetV2 0.05, EfficientNet 0.02, MobileNetV1 -0.9)
)
_OF_SCALED = 1.2  # without a trial: scales of least noise make channels reach equally far, and clip most on new data
_PLACED = (
    *("weights", "weights_symmetric", "weight_ranges", "granularity"),
    *("activations", "activations_symmetric", "activation_ranges", "power_of_two"),
    *("target", "compatibility", "exclude", "exclude_nodes", "rules", "supergroups"),
)
"""The settings by which `place` decides what is rounded, and which tensors share a grid."""


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
    absorbs: bool = True
    """Whether the model is the prepared one; False: the one that `plain` gave, whose biases were not absorbed."""
    scaling: str | None = None
    """The value of `QuantizationConfig.scaling` that gives the same model again, where one was chosen and does."""
    calibrated: tuple[QuantizationConfig, Calibrated] | None = None
    """What calibrating on all samples gave under a configuration, where that was done on the way."""
    key: Hashable = None
    """Choices of one prepared model with equal keys have the same scaled model."""


def scale_as_configured(
    model: Model,
    batches: Iterable[Mapping[str, Any]] | None,
    config: QuantizationConfig,
    *,
    plain: Model | None = None,
) -> Choice:
    """Returns `model` scaled as `config.scaling` says, with the headroom and the correction that were chosen.

    "auto" asks the closed form of predicted noise first what scales may gain. Where that is enough, nothing, "ranges"
    and "noise" are tried, each with and without headroom, on one half of some samples against the other; the best,
    which is none that nothing beats, is returned as it was judged. Where a weight has one scale for all channels,
    "thorough" goes on with it by learning, which judges itself on samples held back. Of batches that cannot be
    regrouped, such as text of unlike lengths, trials look at four shapes and predictions at two, which the report says.
    `effort` "fast" tries and learns nothing: the prediction decides; "thorough" tries all. The correction of biases,
    and equalization as a whole, are kept only where they are no worse on the samples held back than the same without
    them; absorbed biases that are predicted to gain nothing are left out without a trial, where nothing else is to be
    tried.
    Without data the scales of least predicted noise are taken, where the prediction is clearly better.

    Args:
        model: The model, prepared: folded, constant channels removed, biases absorbed.
        batches: Calibration data; None where there are none.
        config: The settings.
        plain: The model prepared without absorbing biases, where that is another; None: absorption is not judged.

    Raises:
        ConfigError: The scaling needs data, and there are none.
        DataError: The batches do not fit the model.
    """
    return reading_apart(next(scale_each(model, batches, [config], plain=plain)), config)


def reading_apart(choice: Choice, config: QuantizationConfig) -> Choice:
    """Returns the choice with the own reads of products that find grids at run time under `config`.

    What calibrating gave is gone with them: it was of the model without these reads.
    """
    own = with_own_reads(choice.model, config)
    return choice if own is choice.model else replace(choice, model=own, calibrated=None, key=(choice.key, config))


def scale_each(
    model: Model,
    batches: Iterable[Mapping[str, Any]] | None,
    configs: Sequence[QuantizationConfig],
    *,
    labels: Sequence[str] | None = None,
    plain: Model | None = None,
) -> Iterator[Choice]:
    """Yields what `scale_as_configured` returns for each configuration, in order, each made when it is asked for.

    Products that find grids at run time have no reads of their own yet (`reading_apart`).
    What several ask for is made once: configurations that ask for the same scaling share one model, and one `key`.

    Args:
        model: The model, prepared.
        batches: Calibration data; None where there are none.
        configs: The settings.
        labels: What the message of a ConfigError about each of them begins with; None: nothing.
        plain: As `scale_as_configured` takes it.

    Raises:
        PtqjaxError: As `scale_as_configured` does.
    """
    ways = None if batches is None else Ways(model, batches)
    made: dict[Any, Choice] = {}
    for given, label in zip(configs, labels or [""] * len(configs), strict=True):
        config = given if given.equalize else replace(given, scaling="off")
        key = _dependence(config)
        if key not in made:
            try:
                _check_names(model, given)
                made[key] = _without_data(model, config) if ways is None else _with_data(ways, config, plain)
            except ConfigError as error:
                if not label:
                    raise
                raise ConfigError(f"{label}{error}") from error
        own = {} if _is_chosen(config) else _as_asked(config, has_data=batches is not None)
        yield replace(made[key], **own, key=key)


def _check_names(model: Model, config: QuantizationConfig) -> None:
    """Checks before anything slow that what is said of single tensors and layers is of tensors and layers there are.

    Scaling may make a Relu and a Min of a Clip, so that names and operators are those of either form.

    Raises:
        ConfigError: A pattern or a rule matches nothing in both.
    """
    if not (config.exclude or config.exclude_nodes or config.rules):
        return
    try:
        place(model, config)
    except ConfigError:
        if not config.equalize:
            raise
        place(with_free_bounds(model), config)


def _is_chosen(config: QuantizationConfig) -> bool:
    """Tells whether the scaling is one that depends on all that is set."""
    return config.scaling in {"auto", "learned"}


def _dependence(config: QuantizationConfig) -> Hashable:
    """Returns what the scaled model depends on."""
    if _is_chosen(config):
        return config
    effort = config.effort if config.scaling in {"ranges", "noise"} else None  # decides how many samples are looked at
    common = config.scaling, bounds_of(config), config.seed, effort
    if config.scaling != "noise":
        return common
    return *common, steps_of(config), *(getattr(config, name) for name in _PLACED)


def _as_asked(config: QuantizationConfig, *, has_data: bool) -> dict[str, Any]:
    """Returns headroom and correction as they are set, where nothing is chosen."""
    correct = "analytic" if config.correct == "empirical" and not has_data else config.correct
    return {"headroom": config.headroom or 1.0, "correct": correct}


def _with_data(ways: Ways, config: QuantizationConfig, plain: Model | None) -> Choice:
    model, asked = ways.model, _as_asked(config, has_data=True)
    policy = POLICIES[config.effort]
    if config.scaling != "auto":
        if config.scaling in {"ranges", "noise"} and policy.trial_samples:  # what was chosen is what its name gives
            ways = ways.on_half(policy.trial_samples)
        scaled, report = ways.scaled(config.scaling, config)
        return Choice(model=scaled, report=report, **asked)
    if not any(is_floating(spec.dtype) for spec in model.graph.outputs):
        report = unscaled(model, "no output holds floating numbers, by which ways could be compared")
        return Choice(model=model, report=report, **asked)
    learns = config.granularity == "tensor" and policy.learning_steps > 0
    expected = _expected_gain(ways, config, asks_absorption=plain is not None)
    candidates = _candidates(policy, expected.gain)
    left_out = () if plain is None or len(candidates) > 1 else _absorption_left_out(plain, expected, config)
    absorbs = not left_out
    if plain is not None and not absorbs:
        ways = Ways(plain, ways.batches)
    if not policy.trial_samples:
        found = _by_prediction(ways, config, expected, "off" if len(candidates) == 1 else "noise")
        return replace(found, absorbs=absorbs, report=(*left_out, *found.report))
    # No scaling at all is then only what is to be beaten.
    is_clear = len(candidates) > 1 and expected.gain >= _WINS and not policy.tries_all
    headrooms = HEADROOMS if len(candidates) > 1 else HEADROOMS[:1]  # it is for scaled channels, see _OF_SCALED
    free_plain = plain if absorbs and not is_clear else None
    if (learns or len(candidates) > 1) and bounds_of(config) == "exact":
        ways = Ways(with_free_bounds(ways.model), ways.batches)  # one structure, and so one set of programs, for all
        free_plain = None if free_plain is None else with_free_bounds(free_plain)
    is_of_correction = len(candidates) == 1 and free_plain is None and len(headrooms) == 1
    judge = (Judge.of_correction if is_of_correction else Judge.of)(ways, config, policy.trial_samples, absorbs=absorbs)
    tried = {name: HEADROOMS[:1] if is_clear and name == "off" else headrooms for name in candidates}
    trials = [trial for name, factors in tried.items() for trial in judge.trials(name, factors)]
    corrected = judged("correct", (best := best_of(trials)), judge.corrections(best))
    best = best_of([corrected.kept, *judge.headrooms(corrected.kept, best)])
    equalized = judged("equalize", best, _without_equalization(judge, best, free_plain))
    best = equalized.kept
    less = without(judge.left_out, TRIAL_SHAPES)
    records = (expected.record, *left_out, *(record_of(trial, less, is_chosen=trial is best) for trial in judge.tried))
    records = (*records, *corrected.records, *equalized.records)
    scaled, report = best.model, best.report
    is_scaled = best.name != "off"
    if learns:
        samples = judge.used + judge.held
        learning = Learning(seed=config.seed, num_steps=policy.learning_steps)
        scaled, learned = learn_scales(scaled, samples, config, learning, bounds=bounds_of(config))
        is_scaled |= any(record.done for record in learned)
        report = (*report, *learned)
    left = plain if plain is not None and not best.absorbs else model
    chosen = scaled if is_scaled else left
    known = judge.found_for(chosen)
    return Choice(
        model=chosen,
        calibrated=None if known is None else (config, known),
        headroom=best.headroom,
        correct=best.correct,
        report=(*records, *report),
        absorbs=best.absorbs,
        scaling=None if learns else best.name,
    )


def _without_equalization(judge: Judge, best: Trial, plain: Model | None) -> list[Trial]:
    """Returns what there is without equalization, with the correction of the best way too; nothing where it is that."""
    if plain is not None:
        unequalized = judge.unequalized(best, plain)
        return unequalized if best.name == "off" else [*_unscaled(judge, best), *unequalized]
    return [] if best.name == "off" else _unscaled(judge, best)


def _unscaled(judge: Judge, best: Trial) -> list[Trial]:
    found = [trial for trial in judge.tried if trial.name == "off"]
    return found if any(trial.correct == best.correct for trial in found) else [*found, *judge.corrections(found[0])]


def _absorption_left_out(plain: Model, expected: _Expected, config: QuantizationConfig) -> Report:
    """Returns the record that absorbed biases are left out; nothing where they may be worth it, or nobody can tell."""
    known = implied_behaviour(plain) if expected.is_implied else {}
    without = unscaled_decibels(plain, known, steps_of(config))
    if without is None or expected.unscaled is None or expected.unscaled - without >= _ABSORBS:
        return ()
    gain = expected.unscaled - without
    reason = f"left out: by the closed form, from batch norms, less than {_ABSORBS:g} dB are to be gained"
    after = {"predicted gain, dB": float(gain)}
    return (Record(transform=_NAME, done=False, what="absorbed biases", where=(), reason=reason, after=after),)


def _candidates(policy: Policy, gain: float) -> tuple[str, ...]:
    """Returns the ways that are tried, the simplest first."""
    return ("off", "ranges", "noise") if policy.tries_all or gain >= _MAY_WIN else ("off",)


class _Expected(NamedTuple):
    """What the closed form says of scales."""

    gain: float
    """How many dB less noise the best ones are predicted to leave; 0 where nothing is known."""
    record: Record
    """The gain as a record for the report."""
    unscaled: float | None
    """The predicted noise of the model as it is, in dB below the output's power; None where not known or not asked."""
    is_implied: bool
    """Whether batch norms tell it."""


def _expected_gain(ways: Ways, config: QuantizationConfig, *, asks_absorption: bool) -> _Expected:
    """Returns what scales of least predicted noise are predicted to gain, from as little data as tells it.

    Args:
        ways: The ways.
        config: The settings.
        asks_absorption: Whether the noise of the model as it is matters: it is what absorption is decided by.
    """
    implied: Mapping[str, Behaviour] = implied_behaviour(ways.model) if ways.model.statistics else {}
    is_implied = covers_noise(ways.model, implied, per_channel=steps_of(config).per_channel)
    try:
        _, report = ways.of_least_noise(config, BATCH, is_implied=is_implied, bounds=bounds_of(config))
    except ConfigError:
        report = ()
    whole = next((record for record in report if "predicted SQNR, dB" in record.after), None)
    gain = whole.after["predicted SQNR, dB"] - whole.before["predicted SQNR, dB"] if whole else 0.0
    source = "batch norms" if is_implied else f"{BATCH} samples{without(ways.left_out(BATCH), BEHAVIOUR_SHAPES)}"
    record = Record(
        transform=_NAME,
        done=False,
        what="predicted gain of scales between layers",
        where=(),
        reason=f"by the closed form, from {source}: tried from {_MAY_WIN:g} dB on",
        after={"predicted gain, dB": float(gain)},
    )
    if not asks_absorption:
        return _Expected(float(gain), record, None, is_implied)
    behaviour = implied if is_implied else ways.behaviour(config.seed, BATCH)
    return _Expected(float(gain), record, unscaled_decibels(ways.model, behaviour, steps_of(config)), is_implied)


def _by_prediction(ways: Ways, config: QuantizationConfig, expected: _Expected, name: str) -> Choice:
    """Returns the choice of a way without a trial."""
    scaled, report = ways.scaled(name, config)
    headroom = fixed_headroom(config) or (1.0 if name == "off" else _OF_SCALED)
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
        bounds = bounds_of(config)
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
        scaled, report = scale_for_noise(model, steps=steps_of(config), bounds=bounds_of(config))
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
