"""Many configurations of one model, made, measured and compared."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ptqjax.config import QuantizationConfig
from ptqjax.config.checks import check_choice
from ptqjax.errors import ConfigError, DataError
from ptqjax.experiments.costs import CostModel, cost_model
from ptqjax.experiments.engine import BATCHINGS, Variant, evaluate_variants
from ptqjax.experiments.journal import append_rows, keys, read_rows
from ptqjax.experiments.metrics import Metric, find_metrics
from ptqjax.experiments.table import SweepRow, SweepTable
from ptqjax.export import fingerprint
from ptqjax.ir import Model
from ptqjax.pipeline import CHOICES, Result, middle_ones, quantize_each
from ptqjax.progress import Follow
from ptqjax.quantize.alignment import aligned
from ptqjax.quantize.encodings import Encodings

_TOGETHER = 16  # rows that are measured, then written to a journal: the float model runs again for each such group

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
            call that follows an interrupted one takes the rows that are there and makes the others. Metrics of one's
            own count by their names alone.

    Raises:
        DataError: The batches do not fit the model, or there are none; or labels are wrong.
        ConfigError: A configuration does not fit the model or the data (the message has its name), there is none, two
            are called alike, or a metric is unknown.
        ModelError: The model is quantized already, or an output is not finite.
        OutputError: The journal cannot be read or written.
    """
    check_choice("choose", choose, CHOICES)
    check_choice("batching", batching, BATCHINGS)
    measures = find_metrics(metrics, has_labels=labels is not None)
    batches = tuple(batches) if isinstance(batches, Iterator) else batches
    evaluation = tuple(evaluation) if isinstance(evaluation, Iterator) else evaluation
    data = batches if evaluation is None else evaluation
    first = next(iter(data or ()), None)
    if data is None or first is None:
        raise DataError("there are no samples to evaluate on; give evaluation=, batches of {input name: array}")
    chosen = _chosen(configurations, choose)
    shared = (fingerprint(model), batches, data, labels, [metric.name for metric in measures])
    ids = {} if journal is None else dict(zip(chosen, keys(shared, map(_text, chosen.values())), strict=True))
    kept = {} if journal is None else read_rows(journal)
    figures = {name: kept[key] for name, key in ids.items() if key in kept}
    clock, ran = _Clock(), []
    made = _made(model, batches, {n: c for n, c in chosen.items() if n not in figures}, first, clock)
    for some in _chunks(made, len(made) if journal is None else _TOGETHER):
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
        number = sum(other == name or other.startswith(f"{name} #") for other in named)
        named[f"{name} #{number + 1}" if number else name] = config
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


def _text(chosen: _Chosen) -> tuple[str, str, str]:
    return repr(chosen.config), repr(chosen.source), chosen.chosen_by


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
) -> list[_Made]:
    """Returns the quantized models; `first` is a batch, whose shapes tell what they cost."""
    results = quantize_each(
        model,
        batches,
        [each.config for each in chosen.values()],
        choose=[each.source for each in chosen.values()],
        names=list(chosen),
        stage=clock.stage,
    )
    with clock.stage("costs"):
        costs: dict[Any, CostModel] = {}
        for graph, result in {result.model.graph: result for result in results}.items():
            costs[graph] = cost_model(result.model, first)
        structured = _structured(results)
        return [
            _Made(
                variant=Variant(name=name, encodings=encodings, params=result.model.params, graph=result.model.graph),
                figures={
                    **costs[result.model.graph].costs(result.encodings).as_dict(),
                    "num_quantized": sum(bool(encoding.enabled) for encoding in result.encodings.values()),
                    "chosen_by": each.chosen_by,
                    "program": program,
                },
            )
            for (name, each), result, (encodings, program) in zip(chosen.items(), results, structured, strict=True)
        ]


def _structured(results: Sequence[Result]) -> list[tuple[Encodings, int]]:
    """Returns each result's encodings in a structure that it shares with as many as can be, and that one's number.

    Made for all at once, so that all groups that are measured one after another have the same programs.
    """
    found: dict[int, tuple[Encodings, Any]] = {}
    for graph in dict.fromkeys(result.model.graph for result in results):
        positions = [position for position, result in enumerate(results) if result.model.graph == graph]
        alike = aligned(results[positions[0]].model, [results[position].encodings for position in positions])
        for position, encodings, structure in zip(positions, alike.encodings, alike.structures, strict=True):
            shapes = tuple(np.shape(results[position].model.params[name]) for name in graph.parameters)
            found[position] = encodings, (graph, structure, shapes)
    ordered = [found[position] for position in range(len(results))]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(key for _, key in ordered))}
    return [(encodings, numbers[key]) for encodings, key in ordered]


def _chunks(made: Sequence[_Made], size: int) -> Iterator[Sequence[_Made]]:
    for start in range(0, len(made), max(size, 1)):
        yield made[start : start + size]
