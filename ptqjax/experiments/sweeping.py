"""Many configurations of one model, made, measured and compared."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

from ptqjax.config import QuantizationConfig, load_target
from ptqjax.config.checks import check_choice
from ptqjax.data.batches import checked_part, checked_parts
from ptqjax.drafts import Result
from ptqjax.encodings.alignment import aligned
from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import ConfigError, DataError
from ptqjax.experiments.costs import CostModel, cost_model
from ptqjax.experiments.engine import BATCHINGS, Variant, evaluate_variants
from ptqjax.experiments.journal import append_rows, keys, read_rows
from ptqjax.experiments.many import CHOICES, middle_ones, quantize_in_parts
from ptqjax.experiments.metrics import Metric, find_metrics
from ptqjax.experiments.table import SweepRow, SweepTable, check_columns
from ptqjax.exporting import fingerprint
from ptqjax.ir import Graph, Model
from ptqjax.progress import Follow

_TOGETHER = 16  # rows that are made, measured and written to a journal before the next ones: each group has its passes

Configurations = Sequence[QuantizationConfig] | Mapping[str, QuantizationConfig]
"""Configurations, by name if they are to be called so."""


def sweep(
    model: Model,
    batches: Iterable[Mapping[str, Any]] | None,
    configurations: Configurations,
    *,
    metrics: Sequence[str | Metric] = ("sqnr_db", "agreement"),
    evaluation: Iterable[Mapping[str, Any]] | None = None,
    labels: np.ndarray | None = None,
    choose: str = "shared",
    batching: str = "auto",
    follow: Follow | None = None,
    journal: str | os.PathLike[str] | None = None,
) -> SweepTable:
    """Returns what each configuration gives and costs, as a table.

    A row is what `quantize` with that configuration and `evaluate` of its simulation give, the float model being the
    reference; but what several configurations need is made once, and one compiled program runs all that have one
    structure, whatever their widths, ranges, schemes, switches, and scales per tensor or channel. With
    `choose="shared"`, so does the search of `scaling` "auto" and "learned", see `quantize_each`; then, and only for
    these two, a row may differ from what `quantize` gives.

    Args:
        model: A float model, as `read` returns it.
        batches: Calibration data: arrays by input name, samples along the first axis. None: batch norms tell.
        configurations: What to compare: a mapping by name, or a sequence, whose members are called by what of them
            differs from the defaults.
        metrics: What to measure: "sqnr_db", "agreement" (of the largest output with the float model's), "top1" (with
            `labels`), or `Metric` records.
        evaluation: Samples to measure on; None: the calibration samples, on which a configuration looks better than
            on others.
        labels: The index of the class of each sample of `evaluation`.
        choose: "shared", or "each": every configuration chooses its scales by itself.
        batching: How variants are run, see `evaluate_variants`.
        follow: Shows how far evaluation is.
        journal: A file to which finished rows are appended; with the same model, data, configurations and metrics, a
            call that follows an interrupted one takes the rows that are there and makes the others. Rows are then made
            and measured sixteen at a time: an interrupt loses those under way, and the scales that were found. Metrics
            of one's own count by their names alone.

    Raises:
        DataError: The batches do not fit the model, or there are none; or labels are wrong.
        ConfigError: A configuration does not fit the model or the data (the message has its name), there is none, or
            a metric is unknown, or called as another column is.
        ModelError: The model is quantized already, or an output is not finite.
        OutputError: The journal cannot be read or written.
    """
    check_choice("choose", choose, CHOICES)
    check_choice("batching", batching, BATCHINGS)
    measures = find_metrics(metrics, has_labels=labels is not None)
    check_columns([metric.name for metric in measures])
    batches = tuple(batches) if isinstance(batches, Iterator) else batches
    evaluation = tuple(evaluation) if isinstance(evaluation, Iterator) else evaluation
    data = batches if evaluation is None else evaluation
    if data is None:
        raise DataError("there are no samples to evaluate on; give evaluation=, batches of {input name: array}")
    first = _first(model, data, "batches" if evaluation is None else "evaluation")
    chosen = _chosen(configurations, choose)
    shared = (fingerprint(model), batches, data, labels, [metric.name for metric in measures])
    ids = {} if journal is None else dict(zip(chosen, keys(shared, map(_text, chosen.values())), strict=True))
    kept = {} if journal is None else read_rows(journal)
    figures = {name: kept[key] for name, key in ids.items() if key in kept}
    missing = {name: each for name, each in chosen.items() if name not in figures}
    if journal is not None and missing:
        append_rows(journal, {})  # one that cannot be written is found now
    clock, ran = _Clock(), []
    for some in _made(model, batches, missing, first, clock, size=len(missing) if journal is None else _TOGETHER):
        found = evaluate_variants(
            model,
            [each.variant for each in some],
            data,
            metrics=measures,
            labels=labels,
            batching=batching,
            follow=follow,
        )
        clock.add(found.seconds)
        ran.extend(found.batching)
        rows = {
            each.variant.name: {"metrics": values, **each.figures}
            for each, values in zip(some, found.values, strict=True)
        }
        figures |= rows
        if journal is not None:
            append_rows(journal, {ids[name]: row for name, row in rows.items()})
    return SweepTable(
        rows=tuple(SweepRow(name=name, config=each.config, **figures[name]) for name, each in chosen.items()),
        higher_is_better={metric.name: metric.higher_is_better for metric in measures},
        seconds=clock.seconds,
        batching=tuple(ran),
    )


def _first(model: Model, data: Iterable[Mapping[str, Any]], called: str) -> Mapping[str, Any]:
    """Returns the first batch of what is measured on; it fits the model.

    Raises:
        DataError: It does not, or there is none.
    """
    try:
        for part in next(checked_parts(model.graph, data)).here:
            checked_part(model.graph, part)
    except DataError as error:
        raise DataError(f"{called}: {error}") from error
    return next(iter(data))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen:
    """A configuration to be made."""

    config: QuantizationConfig
    """The configuration."""
    source: QuantizationConfig
    """The one whose choice of scales it takes."""
    chosen_by: str
    """The name of that."""


def _chosen(configurations: Configurations, choose: str) -> dict[str, _Chosen]:
    """Returns the configurations by name, each with the one whose choice it takes."""
    if isinstance(configurations, QuantizationConfig):
        raise ConfigError("configurations is a single QuantizationConfig; expected a sequence of them, as in [config]")
    named = dict(configurations) if isinstance(configurations, Mapping) else _named(configurations)
    if not named:
        raise ConfigError("configurations is empty; expected at least one QuantizationConfig")
    for name, config in named.items():
        if not isinstance(config, QuantizationConfig):
            raise ConfigError(f"configuration '{name}' is a {type(config).__name__}; expected a QuantizationConfig")
    names, configs = list(named), list(named.values())
    sources = middle_ones(configs) if choose == "shared" else range(len(configs))
    return {
        name: _Chosen(config=config, source=configs[source], chosen_by=names[source])
        for name, config, source in zip(names, configs, sources, strict=True)
    }


def _named(configs: Sequence[QuantizationConfig]) -> dict[str, QuantizationConfig]:
    """Returns the configurations by what of them differs from the defaults; a number follows where that is taken."""
    named: dict[str, QuantizationConfig] = {}
    for config in configs:
        name = _difference(config)
        numbered = (f"{name} #{number}" for number in itertools.count(2))
        named[next(each for each in itertools.chain([name], numbered) if each not in named)] = config
    return named


def _difference(config: Any) -> str:
    if not isinstance(config, QuantizationConfig):
        return type(config).__name__
    changed = {each.name: getattr(config, each.name) for each in fields(config)}
    changed = {each.name: changed[each.name] for each in fields(config) if changed[each.name] != each.default}
    return " ".join(f"{name}={_brief(value)}" for name, value in changed.items()) or "defaults"


def _brief(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ",".join(value) if all(isinstance(each, str) for each in value) else f"{len(value)} of them"


def _text(chosen: _Chosen) -> tuple[str, ...]:
    """Returns what a row depends on of its own; a target may be a file, whose content counts."""
    return repr(chosen.config), repr(chosen.source), repr(load_target(chosen.config.target)), chosen.chosen_by


class _Clock:
    """Seconds by stage, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what passes inside."""
        start = time.perf_counter()
        yield
        self.add({name: time.perf_counter() - start})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Counts what was measured elsewhere."""
        self.seconds |= {name: self.seconds.get(name, 0.0) + value for name, value in seconds.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """A quantized model, ready to be measured."""

    variant: Variant
    """It, in the structure that it shares with others."""
    figures: Mapping[str, Any]
    """What its row says besides the metrics."""


def _made(
    model: Model,
    batches: Iterable[Mapping[str, Any]] | None,
    chosen: Mapping[str, _Chosen],
    first: Mapping[str, Any],
    clock: _Clock,
    *,
    size: int,
) -> Iterator[list[_Made]]:
    """Yields the quantized models, `size` at a time; `first` is a batch, whose shapes tell what they cost."""
    parts = quantize_in_parts(
        model,
        batches,
        [each.config for each in chosen.values()],
        size=size,
        choose=[each.source for each in chosen.values()],
        names=list(chosen),
        stage=clock.stage,
    )
    structures, costs, asked = _Structures(), _CostModels(first), iter(chosen.items())
    for results in parts:
        with clock.stage("costs"):
            structured = structures.of(results)
            some = [
                _Made(
                    variant=Variant(
                        name=name, encodings=encodings, params=result.model.params, graph=result.model.graph
                    ),
                    figures={
                        **costs.of(result.model).costs(result.encodings).as_dict(),
                        "num_quantized": sum(bool(encoding.enabled) for encoding in result.encodings.values()),
                        "chosen_by": each.chosen_by,
                        "program": program,
                    },
                )
                for result, (encodings, program), (name, each) in zip(results, structured, asked, strict=False)
            ]
        yield some


class _CostModels:
    """What costs depend on, made once for models of the same operators and shapes."""

    def __init__(self, first: Mapping[str, Any]) -> None:
        self._first = first
        self._met: dict[Any, CostModel] = {}

    def of(self, model: Model) -> CostModel:
        """Returns what the costs of a model depend on."""
        key = model.graph, _shapes(model)
        if key not in self._met:
            self._met[key] = cost_model(model, self._first)
        return self._met[key]


class _Structures:
    """The structures of encodings that were met, so that parts made one after another have the same programs."""

    def __init__(self) -> None:
        self._met: dict[Graph, list[Encodings]] = {}  # one of each structure
        self._numbers: dict[Any, int] = {}

    def of(self, results: Sequence[Result]) -> list[tuple[Encodings, int]]:
        """Returns each result's encodings in a structure that it shares with as many as can be, and its program."""
        found: dict[int, Encodings] = {}
        for graph in dict.fromkeys(result.model.graph for result in results):
            positions = [position for position, result in enumerate(results) if result.model.graph == graph]
            met = self._met.get(graph, [])
            own = [results[position].encodings for position in positions]
            alike = aligned(results[positions[0]].model, [*met, *own])
            self._met[graph] = list(dict(zip(alike.structures, alike.encodings, strict=True)).values())
            found |= dict(zip(positions, alike.encodings[len(met) :], strict=True))
        return [
            (found[position], self._program(result.model, found[position])) for position, result in enumerate(results)
        ]

    def _program(self, model: Model, encodings: Encodings) -> int:
        scales = tuple(np.shape(encoding.scale) for encoding in encodings.values())
        key = model.graph, _shapes(model), jax.tree.structure(encodings), scales
        return self._numbers.setdefault(key, len(self._numbers))


def _shapes(model: Model) -> tuple[tuple[int, ...], ...]:
    return tuple(np.shape(model.params[name]) for name in model.graph.parameters)
