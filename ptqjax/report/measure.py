"""The table of a run: what each stage kept of the float model, computed in float and quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ptqjax.evaluate import Evaluation, evaluate
from ptqjax.ir import Model
from ptqjax.lowering import apply
from ptqjax.quantize import Encodings
from ptqjax.report.facts import Row
from ptqjax.simulate import simulate

Function: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredStage:
    """A model on the way, with the grids to measure it under."""

    name: str
    """As the table has it."""
    model: Model
    """The float model after the stage."""
    encodings: Encodings
    """Grids that were calibrated for it."""
    keeps_function: bool
    """Whether the stage promises the same function in float (a bias correction does not: it anticipates rounding)."""


def measure(
    source: Model, stages: Iterable[MeasuredStage], batches: Iterable[Mapping[str, Any]], labels: np.ndarray | None
) -> tuple[Row, ...]:
    """Returns the table, "float" first: that row agrees with itself by definition, so it is there without labels too.

    The quantized models are simulated, and on `batches`, which they may have been calibrated on: a table to compare
    stages by, no estimate of what the exported file is worth (`evaluate` gives that).

    Args:
        source: The float model as it was read, which all are compared with.
        stages: The models to measure.
        batches: Inputs by name, samples along the first axis; gone through once or twice for each row.
        labels: The classes of the samples, in the order of the batches; None where unknown.
    """
    reference = _in_float(source)
    itself = {"float_sqnr_db": float("inf"), "sqnr_db": float("inf"), "agreement": 1.0}
    known = {} if labels is None else _metrics(evaluate(reference, batches, labels=labels))
    rows = [Row(stage="float", metrics=itself | known)]
    for stage in stages:
        metrics = _metrics(evaluate(_quantized(stage), batches, labels=labels, reference=reference))
        if stage.keeps_function:
            in_float = evaluate(_in_float(stage.model), batches, reference=reference)
            metrics |= {"float_sqnr_db": _metrics(in_float)["sqnr_db"]}
        rows.append(Row(stage=stage.name, metrics=metrics))
    return tuple(rows)


def _in_float(model: Model) -> Function:
    return lambda batch: _in_order(model, apply(model.graph, model.params, batch))


def _quantized(stage: MeasuredStage) -> Function:
    program = simulate(stage.model, stage.encodings)
    return lambda batch: _in_order(stage.model, program(stage.model.params, stage.encodings, batch))


def _in_order(model: Model, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the outputs in the order of the graph, the first of which has the classes; jit sorts them by name."""
    return {spec.name: outputs[spec.name] for spec in model.graph.outputs}


def _metrics(found: Evaluation) -> dict[str, float]:
    figures = {"sqnr_db": found.sqnr, "agreement": found.agreement, "top1": found.top1}
    return {name: value for name, value in figures.items() if value is not None}
