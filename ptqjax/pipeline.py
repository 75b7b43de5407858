"""The whole flow as one function: for a configuration, or for many that share what is the same for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from ptqjax.config import RUN_TIME, QuantizationConfig
from ptqjax.config.checks import check_choice
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.errors import ConfigError
from ptqjax.fit import Choice, scale_each
from ptqjax.fit.adapting import adapt_each, check_data
from ptqjax.fit.bias_correction import layer_axes
from ptqjax.ir import Model, Report
from ptqjax.placement.own_reads import with_own_reads
from ptqjax.placement.rules import num_bits
from ptqjax.placement.tensors import check_not_quantized
from ptqjax.ranges.calibrate import calibrate_and_measure
from ptqjax.ranges.headroom import widened
from ptqjax.ranges.observing import Means
from ptqjax.transforms import fold_batch_norms, prepare, without_absorption

CHOICES = ("each", "shared")
"""Whether each of many configurations chooses its scales by itself."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The model as one transform left it."""

    name: str
    """The transform, in the words of the table that is printed: "fold", "equalize", "correct"."""
    model: Model
    """The float model after it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A quantized model, and how it came about."""

    model: Model
    """The float model after all transforms: what `encodings` belong to."""
    encodings: Encodings
    """The grid of every quantized tensor."""
    reports: Mapping[str, Report]
    """What each transform did and left alone, by transform."""
    stages: tuple[Stage, ...]
    """The model after each transform, in order."""


def quantize(
    model: Model,
    batches: Iterable[Mapping[str, Any]] | None,
    config: QuantizationConfig | None = None,
    *,
    frozen: Mapping[str, Encoding] | None = None,
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Result:
    """Returns the quantized model: folded, equalized, calibrated and corrected as `config` says.

    `export` writes it; where the target has weights written in float, `export` has to be told
    (`weights=load_target(config.target).exported_weights`).

    Args:
        model: A float model, as `read` returns it; it stays as it is.
        batches: Calibration data: arrays by input name, samples along the first axis. Gone through several times; an
            iterator, which can be gone through only once, is kept in memory. None: batch norms tell.
        config: What to do; None for the defaults.
        frozen: Encodings that are kept, by tensor of the model with folded batch norms; the others are found. Where a
            bias would not fit into int32 otherwise, its weight's scale is raised all the same.
        stage: Entered around each part of the work, with its name ("transform", "calibrate", "correct").

    Raises:
        DataError: The batches do not fit the model.
        ConfigError: A setting does not fit the model or the data; or encodings are frozen, and equalization, which
            scales what they are for, is on.
        ModelError: The model is quantized already, is not in float32, or its parameters are not finite.
    """
    config = config or QuantizationConfig()
    return next(_quantized(model, batches, [_Task(config, "", config)], frozen=frozen, stage=stage))[0]


def quantize_each(
    model: Model,
    batches: Iterable[Mapping[str, Any]] | None,
    configs: Sequence[QuantizationConfig],
    *,
    choose: str | Sequence[QuantizationConfig] = "each",
    names: Sequence[str] | None = None,
    frozen: Mapping[str, Encoding] | None = None,
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Result, ...]:
    """Returns what `quantize` returns for each configuration, in order; what several need is made once.

    The model is folded once, prepared once for each way to absorb biases, scaled once for each way that configurations
    ask for; one pass over the data calibrates all that have the same scaled model, and one corrects their biases.

    What `scaling` "auto" and "learned" choose depends on all settings, and takes a search each. With `choose="shared"`
    one search serves all configurations that are alike in `equalize`, `scaling`, `bounds`, `absorb`, `correct`,
    `headroom`, `effort`, `seed`, `target`, and in whether a weight has one scale or several: that for the middle one of
    them, by the bits of weights and activations together (of an even number the coarser of the two; equal ones in the
    order of their text), whatever order they are given in.

    Args:
        model: A float model, as `read` returns it.
        batches: Calibration data, as for `quantize`.
        configs: What to do.
        choose: "each": every configuration makes its own choice, as `quantize` does; "shared"; or for each of them the
            configuration whose choice it takes.
        names: What configurations are called in messages; None: by their position.
        frozen: As for `quantize`.
        stage: Entered around each part of the work, with its name ("transform", "calibrate", "correct").

    Raises:
        PtqjaxError: As `quantize` does; a ConfigError names the configuration that it is about.
        ConfigError: `choose` or `names` has not one element for each configuration.
    """
    parts = quantize_in_parts(
        model, batches, configs, size=len(configs), choose=choose, names=names, frozen=frozen, stage=stage
    )
    return tuple(result for part in parts for result in part)


def quantize_in_parts(
    model: Model,
    batches: Iterable[Mapping[str, Any]] | None,
    configs: Sequence[QuantizationConfig],
    *,
    size: int,
    choose: str | Sequence[QuantizationConfig] = "each",
    names: Sequence[str] | None = None,
    frozen: Mapping[str, Encoding] | None = None,
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[Result, ...]]:
    """Yields what `quantize_each` returns, `size` results at a time, which are made when they are asked for.

    Nothing is checked or done before the first is asked for. Results are the same whatever the size. Scaled models
    serve all parts; each part has its own passes over the data, to calibrate and to correct. The other arguments and
    the errors are those of `quantize_each`.
    """
    sources = _sources(configs, choose)
    for what, found in (("choose", sources), ("names", configs if names is None else names)):
        if len(found) != len(configs):
            raise ConfigError(f"{what} has {len(found)} elements; expected {len(configs)}: one for each configuration")
    called = [f"configuration {i}" for i in range(len(configs))] if names is None else [f"'{name}'" for name in names]
    tasks = [_Task(config, f"{who}: ", source) for config, who, source in zip(configs, called, sources, strict=True)]
    yield from _quantized(model, batches, tasks, size=size, frozen=frozen, stage=stage)


def _sources(
    configs: Sequence[QuantizationConfig], choose: str | Sequence[QuantizationConfig]
) -> Sequence[QuantizationConfig]:
    if not isinstance(choose, str):
        return choose
    check_choice("choose", choose, CHOICES)
    return configs if choose == "each" else [configs[position] for position in middle_ones(configs)]


class _Task(NamedTuple):
    """What is asked for."""

    config: QuantizationConfig
    """The configuration."""
    label: str
    """What messages about it begin with."""
    source: QuantizationConfig
    """The configuration that scales, headroom and correction are chosen for."""


def _quantized(
    model: Model,
    batches: Iterable[Mapping[str, Any]] | None,
    tasks: Sequence[_Task],
    *,
    size: int = 1,
    frozen: Mapping[str, Encoding] | None,
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[Result, ...]]:
    batches = tuple(batches) if isinstance(batches, Iterator) else batches
    check_not_quantized(model)
    for task in tasks:
        if frozen and task.config.equalize:
            raise ConfigError(
                f"{task.label}equalize=True: it scales the tensors that frozen encodings are for; choose equalize=False"
            )
        check_data(task.config, has_data=batches is not None, label=task.label)
    with stage("transform"):
        folded = fold_batch_norms(model)
    scaled = _scaled(folded, batches, tasks)
    for _ in range(0, len(tasks), max(size, 1)):
        with stage("transform"):
            drafts = list(islice(scaled, size))
        with stage("calibrate"):
            drafts = _calibrated(drafts, batches, frozen or {})
        with stage("correct"):
            drafts = _corrected(drafts, batches, frozen or {})
            results = tuple(_finished(folded, draft) for draft in drafts)
        yield results


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draft:
    """A result in the making."""

    config: QuantizationConfig
    label: str
    """What messages about it begin with."""
    prepare_report: Report
    choice: Choice
    corrected: Model
    """Adapted to the rounding; the model of the choice until it is, and where nothing is corrected."""
    encodings: Encodings = field(default_factory=dict)
    calibrate_report: Report = ()
    means: Means | None = None
    """Channel means of the float model's layers, as the pass that calibrated kept them."""
    correct_report: Report = ()


def _scaled(
    folded: tuple[Model, Report],
    batches: Iterable[Mapping[str, Any]] | None,
    tasks: Sequence[_Task],
) -> Iterator[_Draft]:
    """Yields a draft for each task, in order, each scaled when it is asked for; what they share is kept in between."""
    prepared: dict[str | None, tuple[Model, Report]] = {}
    plain: dict[str | None, tuple[Model, Report] | None] = {}
    choices: dict[str | None, Iterator[Choice]] = {}
    for absorb, positions in _alike(tasks, _absorbs).items():
        prepared[absorb] = (folded[0], ()) if absorb is None else prepare(folded[0], absorb)
        plain[absorb] = other = without_absorption(folded[0], prepared[absorb][1])
        some = [tasks[position] for position in positions]
        sources, labels = [task.source for task in some], [task.label for task in some]
        choices[absorb] = scale_each(prepared[absorb][0], batches, sources, labels=labels, plain=other and other[0])
    for task in tasks:
        absorb = _absorbs(task)
        choice, other = next(choices[absorb]), plain[absorb]
        report = prepared[absorb][1] if choice.absorbs or other is None else other[1]
        choice = replace(choice, model=with_own_reads(choice.model, task.config))
        yield _Draft(config=task.config, label=task.label, prepare_report=report, choice=choice, corrected=choice.model)


def _absorbs(task: _Task) -> str | None:
    """Returns how biases are absorbed; None where the model is not prepared at all."""
    return task.config.absorb if task.config.equalize else None


def _calibrated(
    drafts: Sequence[_Draft], batches: Iterable[Mapping[str, Any]] | None, frozen: Mapping[str, Encoding]
) -> list[_Draft]:
    found: dict[int, _Draft] = {}
    for positions in _alike(drafts, lambda draft: id(draft.choice.model)).values():
        some = [drafts[position] for position in positions]
        scaled = some[0].choice.model
        needs_means = any(draft.choice.correct == "empirical" for draft in some)
        calibrated = calibrate_and_measure(
            scaled,
            batches,
            [draft.config for draft in some],
            frozen=frozen,
            labels=[draft.label for draft in some],
            measured=layer_axes(scaled) if needs_means else (),
        )
        for position, draft, (encodings, report) in zip(positions, some, calibrated.each, strict=True):
            kept = {name: encodings[name] for name in frozen}
            wide = widened(scaled, encodings, draft.choice.headroom, draft.config) | kept
            found[position] = replace(draft, encodings=wide, calibrate_report=report, means=calibrated.means)
    return [found[position] for position in range(len(drafts))]


def _corrected(
    drafts: Sequence[_Draft], batches: Iterable[Mapping[str, Any]] | None, frozen: Mapping[str, Encoding]
) -> list[_Draft]:
    found = dict(enumerate(drafts))
    groups = _alike(drafts, lambda draft: (id(draft.choice.model), draft.choice.correct))
    for (_, method), positions in groups.items():
        some = [drafts[position] for position in positions]
        each = adapt_each(
            some[0].choice.model,
            [draft.encodings for draft in some],
            [draft.config for draft in some],
            batches,
            method=method,
            means=some[0].means,
            frozen=frozen,
        )
        for position, draft, adapted in zip(positions, some, each, strict=True):
            found[position] = replace(
                draft, corrected=adapted.model, encodings=adapted.encodings, correct_report=adapted.report
            )
    return [found[position] for position in range(len(drafts))]


def _finished(folded: tuple[Model, Report], draft: _Draft) -> Result:
    config, choice = draft.config, draft.choice
    reports = {"fold": folded[1], "equalize": (*draft.prepare_report, *choice.report)}
    reports |= {"calibrate": draft.calibrate_report, "correct": draft.correct_report}
    stages = {"fold": folded[0], "equalize": choice.model, "correct": draft.corrected}
    ran = {"equalize": config.equalize, "correct": draft.corrected is not choice.model}
    return Result(
        model=draft.corrected,
        encodings=draft.encodings,
        reports={name: report for name, report in reports.items() if ran.get(name, True)},
        stages=tuple(Stage(name=name, model=after) for name, after in stages.items() if ran.get(name, True)),
    )


def middle_ones(configs: Sequence[QuantizationConfig]) -> tuple[int, ...]:
    """Returns for each configuration the position of the one whose choice of scales it shares; see `quantize_each`."""
    found = {}
    for positions in _alike(configs, _what_choices_share).values():
        ranked = sorted(positions, key=lambda position: (_bits(configs[position]), repr(configs[position])))
        found |= dict.fromkeys(positions, ranked[(len(ranked) - 1) // 2])
    return tuple(found[position] for position in range(len(configs)))


def _what_choices_share(config: QuantizationConfig) -> Any:
    if not config.equalize or config.scaling not in {"auto", "learned"}:
        return config  # nothing is chosen: its own
    names = ("scaling", "bounds", "absorb", "correct", "headroom", "effort", "seed", "target")
    run_time = config.activations if config.activations in RUN_TIME else ""
    return (*(getattr(config, name) for name in names), config.granularity == "tensor", run_time)


def _bits(config: QuantizationConfig) -> int:
    return num_bits(config.weights) + num_bits(config.activation_steps)


def _alike(elements: Sequence[_T], key: Callable[[_T], Any]) -> dict[Any, list[int]]:
    """Returns the positions of the elements by what `key` says of them, in order of appearance."""
    found: dict[Any, list[int]] = {}
    for position, element in enumerate(elements):
        found.setdefault(key(element), []).append(position)
    return found
