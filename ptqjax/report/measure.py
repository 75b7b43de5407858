"""The table of a run: what each stage kept of the float model, computed in float and quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from ptqjax.agreement import run, session
from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import PtqjaxError
from ptqjax.evaluation import Evaluation, evaluate_each
from ptqjax.exporting import quantized_model
from ptqjax.ir import Model
from ptqjax.lowering import apply_few_times
from ptqjax.metrics.named import Asked
from ptqjax.outputs import strung_outputs
from ptqjax.report.depth import pieces
from ptqjax.report.facts import Row
from ptqjax.simulation import simulate

Function: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, Any]]

RUNTIME = "ONNX Runtime"
"""What computes the table where it can: what the user's file is worth, and nothing has to be compiled."""
SIMULATION = "the simulation"
"""What computes it elsewhere: on a GPU, without onnxruntime, and where that does not take one of the models."""

_IN_FLOAT = 8  # samples that show whether a stage keeps the function; float rounding is the same on all


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredStage:
    """A model on the way, with the grids to measure it under."""

    name: str
    """The stage's name in the table."""
    model: Model
    """The float model after the stage."""
    encodings: Encodings | None
    """Grids that were calibrated for it; None: it is not measured quantized."""
    is_plain: bool = False
    """Whether ONNX Runtime computes it with the sums of a session without options; else with exact ones. Such a stage
    has a row only where ONNX Runtime computes the table."""
    keeps_function: bool
    """Whether the stage promises the same function in float (a bias correction does not: it anticipates rounding)."""


class Measured(NamedTuple):
    """The table of a run."""

    rows: tuple[Row, ...]
    """"float" first, then the stages in order."""
    by: str
    """What computed it: `RUNTIME` or `SIMULATION`."""


def measure(
    source: Model,
    stages: Sequence[MeasuredStage],
    batches: Iterable[Mapping[str, Any]],
    labels: np.ndarray | None,
    metrics: Sequence[Asked] = (),
) -> Measured:
    """Returns the table, "float" first: that row agrees with itself by definition, so it is there without labels too.

    Computed in ONNX Runtime where that runs all of the models, else simulated; on `batches`, which they may have been
    calibrated on: a table to compare stages by, no estimate of what the exported file is worth (`evaluate` gives that).
    Whether stages keep the function is told by the first 8 samples, or one batch of a fixed size.

    Args:
        source: The float model as it was read, which all are compared with.
        stages: The models to measure.
        batches: Inputs by name, samples along the first axis; gone through twice.
        labels: The classes of the samples, or of their tokens, in the order of the batches; None where unknown.
        metrics: What to measure although no output looks so, see `evaluate`.
    """
    programs = _in_runtime(source, stages)
    if programs is None:
        stages = [stage for stage in stages if not stage.is_plain]  # sums of a simulation are exact
        programs = _simulated(source, stages)
    compared = list(programs.quantized)
    itself = [] if labels is None else [programs.reference]
    every = [*itself, *(programs.quantized[name] for name in compared)]
    reference = programs.reference if compared else None
    how = {"metrics": metrics if compared else (), "strung": strung_outputs(source)}
    found = evaluate_each(every, batches, labels=labels, reference=reference, **how) if every else ()
    of_float = {"float_sqnr_db": float("inf"), "sqnr_db": float("inf")}
    of_float |= {"agreement": 1.0} if any(each.agreement is not None for each in found) else {}
    of_float |= {"worst_sqnr_db": float("inf")} if any(each.worst for each in found) else {}
    of_float |= _metrics(next(iter(found))) if itself else {}
    quantized = dict(zip(compared, found[len(itself) :], strict=True))
    in_float = {}
    if programs.in_float:
        kept = evaluate_each(
            list(programs.in_float.values()),
            list(pieces(source.graph, batches, _IN_FLOAT)),
            reference=programs.reference,
        )
        in_float = dict(zip(programs.in_float, kept, strict=True))
    rows = [Row(stage="float", metrics=of_float)]
    for stage in stages:
        figures = _metrics(quantized[stage.name]) if stage.name in quantized else {}
        if stage.name in in_float:
            figures |= {"float_sqnr_db": _metrics(in_float[stage.name])["sqnr_db"]}
        outputs = quantized[stage.name].outputs if stage.name in quantized else {}
        rows.append(Row(stage=stage.name, metrics=figures, outputs=outputs if len(outputs) > 1 else {}))
    return Measured(rows=tuple(rows), by=programs.by)


class _Programs(NamedTuple):
    """The models as functions of a batch, by stage."""

    reference: Function
    """The float model as it was read."""
    in_float: Mapping[str, Function]
    """The stages that promise the same function, in float."""
    quantized: Mapping[str, Function]
    """The stages that have grids, quantized."""
    by: str
    """What computes them: `RUNTIME` or `SIMULATION`."""


def _in_runtime(source: Model, stages: Sequence[MeasuredStage]) -> _Programs | None:
    """Returns the models in ONNX Runtime; None where JAX computes on another device, or one of them does not run."""
    if jax.default_backend() != "cpu":
        return None
    try:
        return _Programs(
            reference=_session(source),
            in_float={stage.name: _session(stage.model) for stage in stages if stage.keeps_function},
            quantized={
                stage.name: _session(quantized_model(stage.model, stage.encodings), exact=not stage.is_plain)
                for stage in stages
                if stage.encodings is not None
            },
            by=RUNTIME,
        )
    except (PtqjaxError, ValueError):  # a ValueError: more than protobuf holds
        return None


def _session(model: Model, *, exact: bool = True) -> Function:
    runtime = session(model, exact=exact)
    return lambda batch: run(runtime, batch)


def _simulated(source: Model, stages: Sequence[MeasuredStage]) -> _Programs:
    return _Programs(
        reference=_applied(source),
        in_float={stage.name: _applied(stage.model) for stage in stages if stage.keeps_function},
        quantized={
            stage.name: _simulation(stage.model, stage.encodings) for stage in stages if stage.encodings is not None
        },
        by=SIMULATION,
    )


def _applied(model: Model) -> Function:
    return lambda batch: apply_few_times(model.graph, model.params, batch)


def _simulation(model: Model, encodings: Encodings) -> Function:
    program = simulate(model, encodings)
    return lambda batch: program(model.params, encodings, batch)


def _metrics(found: Evaluation) -> dict[str, float]:
    worst = None if found.worst is None else found.worst[1]
    figures = {"sqnr_db": found.sqnr, "worst_sqnr_db": worst, "agreement": found.agreement, "top1": found.top1}
    return {name: value for name, value in {**figures, **found.figures}.items() if value is not None}
