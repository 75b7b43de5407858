"""A quantization explained: what was done, where the noise comes from, what the runtime makes of it, what to do."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ptqjax import onnx_io, report
from ptqjax.agreement import Group, Validation, decibels, execution, saturates_here, validate
from ptqjax.config import QuantizationConfig, load_target
from ptqjax.data.batches import num_samples
from ptqjax.drafts import Result
from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import ConfigError, DataDependentError, DataError, ModelError, UnsupportedOperatorError
from ptqjax.experiments.sensitivities import sensitivity
from ptqjax.exporting import export
from ptqjax.ir import Graph, Model
from ptqjax.metrics.named import Asked
from ptqjax.placement.names import matches_name, nodes_named
from ptqjax.placement.never import find_nevers
from ptqjax.progress import Follow
from ptqjax.ranges.calibrate import calibrate
from ptqjax.ranges.pairs import saturating_layers
from ptqjax.report.depth import Depth, Sums, measure_depth, pieces
from ptqjax.report.histograms import histogram_facts, weight_histogram

_SAMPLES = {"fast": 8, "balanced": 8, "thorough": 32}
_TABLE_SAMPLES = {"fast": 64.0, "balanced": 64.0, "thorough": math.inf}  # that stages are compared on, without labels
_RUNTIME_SAMPLES = {"fast": 4, "balanced": 4, "thorough": 16}  # that all of ONNX Runtime's integers are compared on
_SECONDS = {"fast": 0.2, "balanced": 0.5, "thorough": 1.0}  # that runs are timed
_WORST_GROUPS = 10  # of the runtime's that are told one by one
_SCALE = ("scale_channels", "learn_scales")  # the transforms after which a model has other grids
_CANNOT = (ConfigError, DataDependentError, DataError, ModelError, UnsupportedOperatorError)


def explain(
    source: Model,
    result: Result,
    batches: Iterable[Mapping[str, Any]] | None,
    config: QuantizationConfig | None = None,
    *,
    labels: np.ndarray | None = None,
    metrics: Sequence[Asked] = (),
    samples: int | None = None,
    origin: Mapping[str, Any] | None = None,
    device: str | None = None,
    file: str | Path | None = None,
    float_file: str | Path | None = None,
    full: bool = True,
    follow: Follow | None = None,
) -> dict[str, Any]:
    """Returns all that is to be said of a quantization, as plain data: what `report.page` makes a page from.

    Beside what `report.facts` has: the table of stages, and on which samples ("measured_on"): without labels the first
    64, unless `config.effort` is "thorough"; "tensors", how far each tensor is from the float model's and
    what its own rounding adds; "histograms", what meets each grid; "sensitivity", the share of each group of tensors in
    the noise of the output; "execution", what runs in integers, size and time of `file` beside `float_file`, where
    the target tells its kernels; "runtime", how ONNX Runtime's integers compare with the integer program
    (`config.effort` "thorough"), or with the file's operators as ONNX defines them, or why they were not compared;
    "never", tensors with values that mean never; "recommendations". Without batches only the first and the last two.

    Args:
        source: The float model as it was read.
        result: What `quantize` made of it.
        batches: The samples that it was calibrated on; gone through several times.
        config: What `quantize` was told.
        labels: The classes of the samples, or of their tokens, in the order of the batches; None where unknown.
        metrics: What to measure although no output looks so, see `evaluate`.
        samples: How many samples, at most, the parts look at that come after the table of stages; None: as many as
            `config.effort` says, 8, 16 or 32.
        origin: Where model and data come from, as the page is to say it: "model", "num_samples" and the like.
        device: What computed, as the page is to say it; None: JAX's first device.
        file: The exported model; None: it is exported, to compare it with ONNX Runtime, and removed.
        float_file: The float model's file; None: what runs in integers, and how long it takes, is not looked at.
        full: Whether to look for more than the table of stages; that takes a few compilations.
        follow: What shows how far each pass over samples is; None: nothing does.

    Raises:
        DataError: The batches do not fit the model, or there are not as many as labels.
    """
    config, follow = config or QuantizationConfig(), follow or _unseen
    batches = tuple(batches) if isinstance(batches, Iterator) else batches
    compared = batches if batches is None or labels is not None else _first(batches, _TABLE_SAMPLES[config.effort])
    table = None
    if batches is not None and compared is not None:
        shown = follow(compared, "measuring")
        table = measured(source, result, shown, labels, config, metrics=metrics, calibration=batches)
    facts = report.facts(
        source={"num_samples": 0 if batches is None else sum(map(num_samples, batches))} | dict(origin or {}),
        settings=asdict(config),
        device=device or str(jax.devices()[0]),
        rows=() if table is None else table.rows,
        measured_in="" if table is None else table.by,
        records=[record for records in result.reports.values() for record in records],
        encodings=result.encodings,
        before=result.stages[0].model,
        after=result.model,
    )
    facts |= {"measured_on": _measured_on(batches or (), compared or ())}
    if file and float_file and batches is not None and load_target(config.target).products:
        facts |= {"execution": _execution_facts(float_file, file, batches, config)}
    if full and batches is not None:
        first = tuple(pieces(result.model.graph, batches, samples or _SAMPLES[config.effort]))
        facts |= _depth_facts(result, follow(first, "explaining"))
        facts |= {"sensitivity": _sensitivity_facts(result, first, follow)}
        facts |= {"runtime": _runtime_facts(result, config, file, first)}
    facts |= {"saturating": list(saturating_layers(result.model, result.encodings, config))}
    facts |= {"never": _never_facts(result, config)}
    return facts | {"recommendations": report.as_facts(report.recommendations(facts))}


def _never_facts(result: Result, config: QuantizationConfig) -> list[dict[str, Any]]:
    """Returns the tensors with values that mean "never", the reason, and whether these count as data in its range."""
    nevers = find_nevers(result.model)
    is_heeded = config.compatibility is None
    return [
        {"tensor": name, "reason": reason, "counts": name in result.encodings and not is_heeded}
        for name, reason in sorted({**nevers.in_float, **nevers.reasons}.items())
    ]


def _unseen(collection: Iterable[Any], _: str) -> Iterable[Any]:
    return collection


def _first(batches: Iterable[Mapping[str, Any]], most: float) -> list[Mapping[str, Any]]:
    """Returns batches until they hold `most` samples."""
    found, count = [], 0
    for batch in batches:
        if count >= most:
            break
        found.append(batch)
        count += num_samples(batch)
    return found


def _measured_on(batches: Iterable[Mapping[str, Any]], compared: Iterable[Mapping[str, Any]]) -> str:
    """Returns what the table of stages was measured on, in words."""
    total, count = (sum(map(num_samples, some)) for some in (batches, compared))
    return "the calibration samples" if count == total else f"{count} of the {total} calibration samples"


def measured(
    source: Model,
    result: Result,
    batches: Iterable[Mapping[str, Any]],
    labels: np.ndarray | None,
    config: QuantizationConfig,
    *,
    metrics: Sequence[Asked] = (),
    calibration: Iterable[Mapping[str, Any]],
) -> report.Measured:
    """Returns the table of the run, on `batches`.

    Where channels were scaled, the model before gets grids of its own, to show what that gained: from `calibration`, on
    which those of the others were found. Else, what is before is measured in float alone.
    """
    folded = result.stages[0].model
    encodings: dict[str, Encodings | None] = {stage.name: result.encodings for stage in result.stages}
    if config.equalize:
        is_scaled = any(record.done and record.transform in _SCALE for record in result.reports["equalize"])
        encodings["fold"] = calibrate(folded, calibration, _fitting(config, folded)) if is_scaled else None
    stages = [
        report.MeasuredStage(
            name=stage.name,
            model=stage.model,
            encodings=encodings[stage.name],
            keeps_function=stage.name != "correct",
        )
        for stage in result.stages
    ]
    return report.measure(source, [*stages, *_plain_session(result, config)], batches, labels, metrics)


def _plain_session(result: Result, config: QuantizationConfig) -> list[report.MeasuredStage]:
    """Returns the last model as a user's session computes it, where that differs on this machine."""
    if not saturating_layers(result.model, result.encodings, config) or not saturates_here():
        return []
    plain = report.MeasuredStage(
        name=report.PLAIN_SESSION,
        model=result.model,
        encodings=result.encodings,
        is_plain=True,
        keeps_function=False,
    )
    return [plain]


def _fitting(config: QuantizationConfig, model: Model) -> QuantizationConfig:
    """Returns `config` without what is for tensors that `model` has not: they are for what equalization adds."""
    inputs = [spec.name for spec in model.graph.inputs]
    names = [*model.graph.parameters, *inputs, *(name for node in model.graph.nodes for name in node.outputs)]
    return replace(
        config,
        exclude=tuple(pattern for pattern in config.exclude if any(matches_name(pattern, name) for name in names)),
        exclude_nodes=tuple(pattern for pattern in config.exclude_nodes if nodes_named(model.graph, [pattern])),
        rules=tuple(replace(rule, optional=True) for rule in config.rules),
    )


def _in_float(result: Result) -> Model:
    """Returns the last model that has the float function; corrected biases anticipate the rounding."""
    return next(stage.model for stage in reversed(result.stages) if stage.name != "correct")


def _solved_weights(result: Result) -> dict[str, Any]:
    """Returns the weights whose integers are not those next to the float model's."""
    before, after = _in_float(result).params, result.model.params
    return {
        name: after[name]
        for name in result.encodings
        if name in after and name in before and not np.array_equal(before[name], after[name])
    }


def _depth_facts(result: Result, batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what `measure_depth` finds: the corrected model against the one that has the float function."""
    found = measure_depth(_in_float(result), result.model, result.encodings, batches)
    return {
        "measured_samples": found.num_samples,
        "tensors": [_tensor(name, sums, result.model.graph) for name, sums in found.sums.items()],
        "histograms": _histograms(found, _in_float(result), result.encodings),
    }


def _tensor(name: str, sums: Sums, graph: Graph) -> dict[str, Any]:
    producer = graph.producers.get(name)
    is_weight = name in graph.parameters
    reader = next((node for node in graph.nodes if name in node.inputs), None) if is_weight else producer
    return {
        "name": name,
        "kind": "weight" if is_weight else "activation",
        "operator": "graph input" if reader is None else reader.op_type,
        "sqnr_db": decibels(float(sums.signal), float(sums.noise)),
        "own_sqnr_db": decibels(float(sums.signal), float(sums.own_noise)),
        "clipped": float(sums.num_clipped / sums.num_values),
        "clip_share": float(sums.clip_noise / sums.own_noise) if sums.own_noise else 0.0,
    }


def _histograms(found: Depth, model: Model, encodings: Encodings) -> dict[str, Any]:
    pictures = {}
    for name in (name for name in found.sums if name in encodings and np.all(encodings[name].enabled)):
        if name in found.histograms:
            pictures[name] = histogram_facts(found.histograms[name], encodings[name])
        elif name in model.params:
            pictures[name] = weight_histogram(np.asarray(model.params[name]), encodings[name])
    return pictures


def _sensitivity_facts(result: Result, batches: Iterable[Mapping[str, Any]], follow: Follow) -> dict[str, Any]:
    """Returns the share of each group in the noise of the output; or why it cannot be told."""
    batches, solved = tuple(batches), _solved_weights(result)
    try:
        found = sensitivity(_in_float(result), batches, result.encodings, follow=follow, solved=solved)
    except _CANNOT as error:
        return {"samples": 0, "groups": [], "reason": str(error)}
    groups = [
        {"name": each.name, "kind": each.kind, "tensors": list(each.tensors)}
        | {"noise": float(each.noise), "sqnr_db": float(each.sqnr_db)}
        for each in found
    ]
    return {"samples": sum(map(num_samples, batches)), "groups": groups}


def _runtime_facts(
    result: Result, config: QuantizationConfig, file: str | Path | None, batches: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns how the exported file in ONNX Runtime compares with what is simulated, or why that cannot be told."""
    chosen = list(pieces(result.model.graph, batches, _RUNTIME_SAMPLES[config.effort]))
    with tempfile.TemporaryDirectory() as folder:
        try:
            if file is None:
                export(result.model, result.encodings, folder, "model", target=config.target)
            return _compared_somehow(file or Path(folder) / "model.onnx", chosen, config)
        except _CANNOT as error:
            return {"compared": False, "reason": str(error)}


def _compared_somehow(
    file: str | Path, batches: Sequence[Mapping[str, Any]], config: QuantizationConfig
) -> dict[str, Any]:
    """Returns how the file compares with the integer program; with less effort, with what nothing is compiled for.

    Raises:
        PtqjaxError: As `validate` does, where neither can be.
    """
    if config.effort != "thorough":
        with suppress(*_CANNOT):
            return _compared(validate(file, batches, in_float=False, by="definition"), by="definition")
    return _compared(validate(file, batches, in_float=False), by="simulation")


def _execution_facts(
    reference: str | Path, file: str | Path, batches: Iterable[Mapping[str, Any]], config: QuantizationConfig
) -> dict[str, Any]:
    """Returns what a session makes of the file, timed on the first sample; or why that cannot be told."""
    try:
        graph = onnx_io.read(file).graph
        sample = next(iter(pieces(graph, batches, 1)))
        return {"measured": True} | execution(file, reference, sample, seconds=_SECONDS[config.effort]).as_dict()
    except _CANNOT as error:
        return {"measured": False, "reason": str(error)}


def _compared(found: Validation, by: str) -> dict[str, Any]:
    worst = sorted(found.groups, key=lambda group: (group.end_to_end.equal, group.equal))
    return {
        "compared": True,
        "by": by,
        "num_samples": found.num_samples,
        "num_groups": len(found.groups),
        "lowest_equal": found.equal,
        "largest": found.largest,
        "integer": asdict(found.integer),
        "groups": [_group(group) for group in worst[:_WORST_GROUPS]],
        "unverified": list(found.unverified),
        "warnings": list(found.warnings),
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "tensor": group.tensor,
        "operator": group.operator,
        "alone": asdict(group.alone),
        "end_to_end": asdict(group.end_to_end),
    }
