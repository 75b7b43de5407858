"""The stages of a recipe: each reads what earlier ones stored, and writes its own results into a folder.

They are those of `pipeline.quantize`, cut where something can be kept, and read back to the bit: a run that was killed
and goes on computes what an undisturbed one does. Exported files are those of `ptqjax quantize`, byte for byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import safetensors.numpy

from ptqjax import onnx_io, pipeline, report
from ptqjax.drafts import Draft, Result, Stage, drafted
from ptqjax.encoding_files import write_whole
from ptqjax.encoding_files.tensors import encodings_of_tensors, tensors_of_encodings
from ptqjax.encodings.encoding import Encodings, concrete
from ptqjax.evaluation import Evaluation, evaluate
from ptqjax.exportable import check_exportable
from ptqjax.exporting import export, fingerprint
from ptqjax.ir import Model, Record, Report
from ptqjax.ir.graph import Statistics
from ptqjax.metrics.named import metric_named
from ptqjax.placement.own_reads import with_own_reads
from ptqjax.progress import Follow
from ptqjax.publish import write_text
from ptqjax.recipes.data import Data
from ptqjax.recipes.recipe import Recipe
from ptqjax.report.explanation import explain

_MODEL, _STATISTICS, _ENCODINGS = "float.onnx", "statistics.safetensors", "encodings.safetensors"
_RECORDS, _CHOICE, _CHANGED, _METRICS = "records.json", "choice.json", "changed.json", "metrics.json"
_LARGEST = 2**31 - 2**24  # bytes of a model in one file


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a run works on."""

    recipe: Recipe
    """What to do."""
    model: Model
    """The float model as it was read."""
    calibration: Data | None
    """Samples to calibrate with; None: batch norms tell."""
    evaluation: Data | None
    """Samples to measure on; None: nothing is measured."""
    device: str
    """What computes, as reports call it."""
    follow: Follow
    """Shows how far passes over samples are."""
    place: Callable[[Iterable[Any]], Iterable[Any]]
    """Puts calibration batches where ranges and mean errors are computed, such as over a mesh of devices."""

    def batches(self, label: str) -> Iterable[Any] | None:
        """Returns the calibration batches, passes over which are shown under `label`; None where there are none."""
        return None if self.calibration is None else self.follow(self.calibration.batches, label)

    def placed(self, label: str) -> Iterable[Any] | None:
        """Returns the calibration batches in their place."""
        batches = self.batches(label)
        return None if batches is None else self.place(batches)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as results state them: a target's file by its name alone, wherever it lies."""
        settings, target = asdict(self.recipe.config), self.recipe.config.target
        return settings | {"target": Path(target).name if target.endswith(".toml") else target}


def _drafted(task: Task, model: Model) -> Draft:
    return drafted(model, task.recipe.config, has_data=task.calibration is not None)


def _fold(task: Task, _: Path, folder: Path) -> None:
    check_exportable(task.model, task.recipe.config)
    (draft,) = pipeline.folded([_drafted(task, task.model)], None)
    write_model(folder, draft.model)
    _write_records(folder, draft.reports["fold"])


def _equalize(task: Task, root: Path, folder: Path) -> None:
    (draft,) = pipeline.equalized([_drafted(task, read_model(root / "fold"))], task.batches("equalize"))
    write_model(folder, draft.model)
    _write_records(folder, draft.reports.get("equalize", ()))
    _write_json(folder / _CHOICE, {"headroom": draft.headroom, "correct": draft.correct})


def _scaled(task: Task, root: Path) -> Draft:
    """Returns the draft as the stage "equalize" left it."""
    return replace(_drafted(task, _model_of(task, root / "equalize")), **_read_json(root / "equalize" / _CHOICE))


def _model_of(task: Task, folder: Path) -> Model:
    """Returns the model that a stage from "equalize" on wrote, with its own reads, which reading takes out."""
    return with_own_reads(read_model(folder), task.recipe.config)


def _calibrate(task: Task, root: Path, folder: Path) -> None:
    (draft,) = pipeline.calibrated([_scaled(task, root)], task.placed("calibrate"))
    _write_encodings(folder, draft.encodings)
    _write_records(folder, draft.reports["calibrate"])


def _correct(task: Task, root: Path, folder: Path) -> None:
    draft = replace(_scaled(task, root), encodings=read_encodings(root / "calibrate"))
    (after,) = pipeline.corrected([draft], task.placed("correct"))
    write_model(folder, after.model)
    _write_encodings(folder, after.encodings)
    _write_records(folder, after.reports.get("correct", ()))
    _write_json(folder / _CHANGED, bool(after.stages))


def _export(task: Task, root: Path, folder: Path) -> None:
    model, encodings = _model_of(task, root / "correct"), read_encodings(root / "correct")
    export(model, encodings, folder, "model", settings=task.settings, target=task.recipe.config.target)


def _evaluate(task: Task, root: Path, folder: Path) -> None:
    """Measures the exported file in ONNX Runtime against the float one."""
    found, data, asked = {}, task.evaluation, task.recipe.metrics
    if data is not None:
        labels = data.labels if any(metric_named(name).needs_labels for name in asked) else None
        result = evaluate(
            root / "export" / "model.onnx",
            task.follow(data.batches, "evaluate"),
            labels=labels,
            reference=task.recipe.model,
            metrics=[name for name in asked if _is_of_its_own(name, labels)],
            device=task.recipe.device,
        )
        found = {"num_samples": result.num_samples} | _asked(result, asked) | _of_outputs(result, asked)
    _write_json(folder / _METRICS, found)


def _is_of_its_own(name: str, labels: np.ndarray | None) -> bool:
    """Tells whether a metric has to be asked for; others are measured anyway where labels and outputs allow it."""
    if metric_named(name).needs_labels:
        return ":" in name and labels is not None
    return ":" in name or name in ("agreement", "cosine")


def _asked(result: Evaluation, metrics: Iterable[str]) -> dict[str, float | str]:
    values = {"sqnr_db": result.sqnr, "agreement": result.agreement, "top1": result.top1} | dict(result.figures)
    known = {name: value for name in metrics if (value := values.get(name)) is not None}
    return {name: _told(value) for name, value in known.items()}


def _of_outputs(result: Evaluation, metrics: Container[str]) -> dict[str, Any]:
    """Returns the SQNR of each of several outputs or parts in dB, and the least, where SQNR is asked for."""
    if result.worst is None or "sqnr_db" not in metrics:
        return {}
    outputs = {name: _told(value) for name, value in result.outputs.items()}
    return {"outputs": outputs, "worst_output": result.worst[0], "worst_sqnr_db": _told(result.worst[1])}


def _told(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no infinity


def _report(task: Task, root: Path, folder: Path) -> None:
    """Explains the run on its calibration samples; figures that say how long something took have no place in it."""
    if task.recipe.report == "none":
        return
    origin = {"model": task.model.graph.name, "model_sha256": fingerprint(task.model)}  # no names of files: they move
    if task.calibration is not None:
        origin |= {"data_sha256": task.calibration.digest}
    facts = explain(
        task.model,
        result_of(root, task),
        task.calibration and task.calibration.batches,
        task.recipe.config,
        labels=task.calibration.labels if task.calibration else None,
        origin=origin,
        device=task.device,
        file=root / "export" / "model.onnx",
        full=task.recipe.report == "full",
        follow=task.follow,
    )
    facts |= {"settings": task.settings, "evaluation": _read_json(root / "evaluate" / _METRICS)}
    write_text(folder / "report.json", report.to_json(facts))
    write_text(folder / "report.html", report.page(facts))


STAGES: Mapping[str, Callable[[Task, Path, Path], None]] = MappingProxyType(
    {
        "fold": _fold,
        "equalize": _equalize,
        "calibrate": _calibrate,
        "correct": _correct,
        "export": _export,
        "evaluate": _evaluate,
        "report": _report,
    }
)
"""By name, in order: each takes the task, the folder with the stages before it, and the folder to write into."""


def result_of(root: Path, task: Task) -> Result:
    """Returns what `pipeline.quantize` would have returned, from what its stages stored."""
    corrects = _read_json(root / "correct" / _CHANGED)
    done = {"fold": True, "equalize": task.recipe.config.equalize, "calibrate": True, "correct": corrects}
    names = [name for name, is_done in done.items() if is_done]
    models = {name: _model_of(task, root / name) for name in names if name in ("equalize", "correct")}
    models = {"fold": read_model(root / "fold")} | models
    return Result(
        model=_model_of(task, root / "correct"),
        encodings=read_encodings(root / "correct"),
        reports={name: _read_records(root / name) for name in names},
        stages=tuple(Stage(name=name, model=model) for name, model in models.items()),
    )


def metrics_of(root: Path) -> Mapping[str, Any]:
    """Returns what the evaluation measured; nothing where it had no data."""
    return _read_json(root / "evaluate" / _METRICS)


def write_model(folder: Path, model: Model) -> None:
    """Writes a model with all that is known of it; `read_model` is the inverse, to the bit, but for Identity nodes."""
    if sum(np.asarray(value).nbytes for value in model.params.values()) < _LARGEST:
        write_whole(folder / _MODEL, onnx_io.to_proto(model).SerializeToString())
    else:
        onnx_io.write(model, folder / _MODEL)
    arrays = {
        f"{name}/{field}": np.asarray(getattr(known, field))
        for name, known in sorted(model.statistics.items())
        for field in ("mean", "std")
    }
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    write_whole(folder / _STATISTICS, safetensors.numpy.save(contiguous))


def read_model(folder: Path) -> Model:
    """Returns the model that `write_model` wrote, without Identity nodes."""
    model = onnx_io.read(folder / _MODEL)
    arrays = safetensors.numpy.load_file(folder / _STATISTICS)
    names = sorted({name.rpartition("/")[0] for name in arrays})
    found = {name: Statistics(mean=arrays[f"{name}/mean"], std=arrays[f"{name}/std"]) for name in names}
    return model.replace(statistics=found)


def _write_encodings(folder: Path, encodings: Encodings) -> None:
    held = {name: concrete(encoding) for name, encoding in encodings.items()}
    write_whole(folder / _ENCODINGS, tensors_of_encodings(held))


def read_encodings(folder: Path) -> Encodings:
    """Returns the encodings that a stage stored."""
    return encodings_of_tensors(folder / _ENCODINGS)


def _write_records(folder: Path, records: Report) -> None:
    _write_json(folder / _RECORDS, [record.as_dict() for record in records])


def _read_records(folder: Path) -> Report:
    return tuple(Record(**{**fields, "where": tuple(fields["where"])}) for fields in _read_json(folder / _RECORDS))


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=_as_plain) + "\n")


def _as_plain(value: Any) -> Any:
    """Returns a NumPy number as Python's, which JSON has."""
    return value.item()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
