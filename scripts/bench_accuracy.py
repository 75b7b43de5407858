"""Prints accuracy after quantization, step by step, measured on the exported files in ONNX Runtime, as Markdown.

    python scripts/bench_accuracy.py                                     the networks of docs/accuracy.md
    python scripts/bench_accuracy.py --models resnet20_cifar10 --rows fold defaults --columns W4A8
    python scripts/bench_accuracy.py --ort --aimet-python AIMET_ENVIRONMENT/bin/python --json cells.jsonl
    python scripts/bench_accuracy.py --from-json cells.jsonl
    python scripts/bench_accuracy.py --model MODEL.onnx --images IMAGENET --preprocessing torch

A cell holds top-1 in % with the standard error of its difference to the float file's on the same samples, agreement
with the float file's top-1 in %, and the SQNR of the logits, 10 log10(sum y^2 / sum (y - y_q)^2), in dB; where the
samples have no labels, the last two. Processor seconds, of all cores together, are those of reading, quantizing and
exporting in the first column, compilation included (columns behind it find programs compiled). Calibration samples
carry no labels; evaluation samples are shown to finished files alone, so they influence nothing. Nothing is kept
between runs but what --json asks for: a line for each cell, once it is measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from bench_header import header
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import ptqjax
from ptqjax.data.pictures import to_unit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from imagenet_folder import (  # noqa: E402
    PREPROCESSINGS,
    Preprocessing,
    calibration_and_evaluation,
    decode,
    labels,
    to_input,
)

SHARED = Path(os.environ.get("PTQJAX_SHARED", ROOT.parent / "shared"))
BATCH = 16
NETWORKS = (
    "mobilenet_v2_1.0_224",
    "mobilenet_v1_0.25_224",
    "resnet20_cifar10",
    "mlperf_vww_mobilenet_v1_0.25_96",
    "squeezenet_v1.1",
    "efficientnet_lite0",
    "tiny_vit_cifar10",
)
"""Networks that come with data to measure them on."""
COLUMNS = {
    "W8A8 per tensor": {"weights": "int8", "granularity": "tensor"},
    "W8A8 per channel": {"weights": "int8", "granularity": "channel"},
    "W6A8 per channel": {"weights": "int6", "granularity": "channel"},
    "W4A8 per channel": {"weights": "int4", "granularity": "channel"},
    "W4A8 blocks of 32": {"weights": "int4", "granularity": "block:32"},
    "W3A8 per channel": {"weights": "int3", "granularity": "channel"},
    "W4A4 per channel": {"weights": "int4", "granularity": "channel", "activations": "uint4"},
}
"""Columns: label, and the settings that they stand for."""
FLOAT = "float"
ADAROUND_STEPS = 300
"""Of AIMET's AdaRound for each layer; its default, 10,000, takes hours on a CPU."""

Settings = Mapping[str, Any]
Way = Callable[["Task", Path, Settings], Path]
"""A way to quantize: writes a file for a task into a folder, with a column's settings."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network and what it is measured on."""

    model: Path
    """The float file."""
    calibration: np.ndarray
    """Network inputs to calibrate with, without labels."""
    evaluation: Callable[[], Iterator[np.ndarray]]
    """Makes the batches of network inputs to evaluate on."""
    num_evaluation: int
    """How many they are."""
    labels: np.ndarray | None
    """The class of each sample that is evaluated; None where unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What one file is worth: a cell of a table, and a line of the JSON file."""

    network: str
    """The network."""
    row: str
    """How it was quantized."""
    column: str
    """To which widths; "" for the float file."""
    num_evaluation: int
    """Samples that were evaluated."""
    num_calibration: int
    """Samples to calibrate with."""
    measured: str
    """Date, device and versions."""
    seconds: float | None = None
    """Processor seconds that it took to make the file, of all cores and of child processes."""
    top1: float | None = None
    """Share of samples whose class is right."""
    top1_error: float | None = None
    """Standard error of the difference of top-1 to the float file's, paired by sample."""
    agreement: float | None = None
    """Share of samples on which the file and the float file name the same class."""
    sqnr_db: float | None = None
    """SQNR of all logits."""
    failure: str = ""
    """Why there are no figures."""


def pictures_task(model: Path, root: Path, preprocessing: Preprocessing, *, counts: Sequence[int | None]) -> Task:
    """Returns the task of a network that takes pictures; `counts`: to calibrate with, to evaluate (None: the rest)."""
    calibration, evaluation = calibration_and_evaluation(root, num_calibration=counts[0] or 0, num_evaluation=counts[1])
    crop, short_side = preprocessing.crop, preprocessing.short_side
    decoded = [
        np.stack([decode(picture.path, crop=crop, short_side=short_side) for picture in part])
        for part in (calibration, evaluation)
    ]

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(evaluation), BATCH):
            yield to_input(decoded[1][start : start + BATCH], preprocessing)

    return Task(
        model=model,
        calibration=to_input(decoded[0], preprocessing),
        evaluation=batches,
        num_evaluation=len(evaluation),
        labels=labels(evaluation),
    )


def arrays_task(model: Path, root: Path, *, counts: Sequence[int | None]) -> Task:
    """Returns the task of a network whose samples are arrays: `calibration.npz` and `evaluation.npz` under `root`."""
    calibration, evaluation = (dict(np.load(root / f"{part}.npz")) for part in ("calibration", "evaluation"))
    samples = evaluation["input"][: counts[1]]
    return Task(
        model=model,
        calibration=calibration["input"][: counts[0]],
        evaluation=lambda: (samples[start : start + BATCH] for start in range(0, len(samples), BATCH)),
        num_evaluation=len(samples),
        labels=evaluation["labels"][: len(samples)],
    )


def known_task(name: str, counts: Sequence[int | None]) -> Task:
    """Returns the task of one of `NETWORKS`."""
    model = SHARED / "models" / f"{name}.onnx"
    if name.endswith("cifar10"):
        return arrays_task(model, SHARED / "data" / "cifar10", counts=counts)
    pictures = SHARED / "data" / "imagenet"
    if "vww" in name:  # person or no person: ImageNet's pictures serve as inputs, their classes do not
        preprocessing = Preprocessing(crop=96, short_side=96, normalize=to_unit)
        return replace(pictures_task(model, pictures, preprocessing, counts=counts), labels=None)
    return pictures_task(
        model, pictures, PREPROCESSINGS["caffe" if name.startswith("squeezenet") else "tf"], counts=counts
    )


def run(path: Path, task: Task) -> np.ndarray:
    """Returns the file's logits of the evaluation samples, from ONNX Runtime on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")  # else uint8 x int8 saturates without VNNI
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([np.asarray(session.run(None, {name: batch})[0]) for batch in task.evaluation()])


def unfolded(task: Task, folder: Path, settings: Settings) -> Path:
    """Quantizes the graph as it was read: batch norms are operators, computed in float; returns the file."""
    model = ptqjax.read(task.model)
    encodings = ptqjax.calibrate(model, _batches(model, task), ptqjax.QuantizationConfig(**settings))
    ptqjax.export(model, encodings, folder, "model")
    return folder / "model.onnx"


def with_ptqjax(task: Task, folder: Path, settings: Settings, *, has_data: bool = True, **more: Any) -> Path:
    """Quantizes with ptqjax's pipeline, `more` settings besides the column's; returns the exported file."""
    model = ptqjax.read(task.model)
    config = ptqjax.QuantizationConfig(**{**settings, **more})
    result = ptqjax.quantize(model, _batches(model, task) if has_data else None, config)
    ptqjax.export(result.model, result.encodings, folder, "model")
    return folder / "model.onnx"


def _batches(model: ptqjax.Model, task: Task) -> list[dict[str, np.ndarray]]:
    name = model.graph.inputs[0].name
    return [{name: task.calibration[i : i + BATCH]} for i in range(0, len(task.calibration), BATCH)]


class _Reader(CalibrationDataReader):
    def __init__(self, name: str, samples: np.ndarray) -> None:
        self._batches = iter([{name: samples[i : i + BATCH]} for i in range(0, len(samples), BATCH)])

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return next(self._batches, None)


def with_onnxruntime(task: Task, folder: Path, settings: Settings) -> Path:
    """Quantizes with ONNX Runtime's own tool, min-max ranges; returns the file.

    Raises:
        ValueError: It has no weights of that width.
    """
    types = {"int8": QuantType.QInt8, "int4": QuantType.QInt4}
    if settings["weights"] not in types:
        raise ValueError(f"ONNX Runtime's tool has no {settings['weights']}")
    if settings["granularity"] not in ("tensor", "channel") or "activations" in settings:
        raise ValueError("ONNX Runtime's tool has no blocks in convolutions, and no activations of 4 bits")
    prepared, out = folder / "prepared.onnx", folder / "model.onnx"
    with chdir(folder):  # it leaves files where it runs
        quant_pre_process(str(task.model.resolve()), str(prepared))
    name = ort.InferenceSession(str(prepared), providers=["CPUExecutionProvider"]).get_inputs()[0].name
    quantize_static(
        str(prepared),
        str(out),
        _Reader(name, task.calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=settings["granularity"] == "channel",
        weight_type=types[settings["weights"]],
        activation_type=QuantType.QUInt8,
    )
    return out


def with_aimet(task: Task, folder: Path, settings: Settings, *, python: Path, options: tuple[str, ...]) -> Path:
    """Quantizes with AIMET, in its own environment; returns the file.

    Raises:
        RuntimeError: AIMET failed; the message is the last line that it wrote.
        ValueError: It has no such grid.
    """
    samples, out = folder / "samples.npy", folder / "model.onnx"
    np.save(samples, task.calibration)
    side = Path(__file__).with_name("aimet_side.py")
    command = [str(python), str(side), "quantize", str(task.model), str(samples), str(out), *options]
    if settings["granularity"] not in ("tensor", "channel"):
        raise ValueError("blocks are not compared with AIMET's, which exports them for other runtimes")
    command += ["--weights", settings["weights"]]
    command += ["--activations", settings["activations"].removeprefix("u")] if "activations" in settings else []
    command += ["--per-channel"] if settings["granularity"] == "channel" else []
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(([line for line in done.stderr.splitlines() if line.strip()] or ["AIMET failed"])[-1])
    return out


def ways(*, scaling: str, onnxruntime: bool, aimet_python: Path | None) -> dict[str, Way]:
    """Returns the ways to quantize, by the labels of their rows; `scaling`: what the rows after scaling build on."""

    def ours(**settings: Any) -> Way:
        return partial(with_ptqjax, **settings)

    nearest = partial(ours, rounding="nearest")

    def after_scaling(**settings: Any) -> Way:
        return nearest(**{"scaling": scaling, "absorb": "exact", "correct": "none", **settings})

    chosen: dict[str, Way] = {
        "none (batch norms not folded)": unfolded,
        "fold": nearest(equalize=False, correct="none"),
    }
    for objective in ("weights", "ranges", "noise"):
        chosen[f"fold, scaling ({objective})"] = nearest(scaling=objective, absorb="off", correct="none")
    chosen |= {
        f"fold, scaling ({scaling}), absorption (exact)": after_scaling(),
        f"fold, scaling ({scaling}), absorption (statistics)": after_scaling(absorb="statistics"),
        f"fold, scaling ({scaling}), absorption (exact), correction (analytic)": after_scaling(correct="analytic"),
        f"fold, scaling ({scaling}), absorption (exact), correction (empirical)": after_scaling(correct="empirical"),
        "learned scaling, rounding to nearest": nearest(scaling="learned"),
        "defaults, rounding to nearest": nearest(),
        "defaults, rounding solved": ours(rounding="solved"),
        "defaults, rounding learned": ours(rounding="learned"),
        "defaults, rounding solved, whole ranges": ours(rounding="solved", weight_ranges="min-max"),
        "defaults": ours(),
        "defaults, no data at all": ours(has_data=False),
    }
    if onnxruntime:
        chosen["ONNX Runtime's quantize_static"] = with_onnxruntime
    if aimet_python is not None:
        aimet = partial(with_aimet, python=aimet_python)
        chosen["AIMET, folded"] = partial(aimet, options=())
        chosen["AIMET, equalized"] = partial(aimet, options=("--equalize",))
        chosen["AIMET, sequential MSE"] = partial(aimet, options=("--rounding", "seq-mse"))
        steps = ("--rounding", "adaround", "--iterations", str(ADAROUND_STEPS))
        chosen[f"AIMET, AdaRound of {ADAROUND_STEPS} steps"] = partial(aimet, options=steps)
    return chosen


def figures(logits: np.ndarray, reference: np.ndarray, classes: np.ndarray | None) -> dict[str, float]:
    """Returns the figures of a `Cell`, by its fields, from the logits of the file and of the float file."""
    y, error = reference.astype(np.float64), reference.astype(np.float64) - logits
    signal, noise = np.sum(y**2), np.sum(error**2)
    found = {
        "agreement": float(np.mean(logits.argmax(1) == reference.argmax(1))),
        "sqnr_db": float(10 * np.log10(signal / noise)) if noise > 0 else float("inf"),
    }
    if classes is not None:
        right, right_in_float = (each.argmax(1) == classes for each in (logits, reference))
        difference = right.astype(np.float64) - right_in_float
        found["top1"] = float(right.mean())
        found["top1_error"] = float(difference.std(ddof=1) / np.sqrt(len(difference)))
    return found


def processor_seconds() -> float:
    """Returns the processor time of this process and of the children that it has waited for, in seconds."""
    return sum(os.times()[:4])


def measured(cell: Cell, task: Task, reference: np.ndarray, quantize: Way) -> Cell:
    """Returns the cell with its figures, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        start = processor_seconds()
        try:
            file = quantize(task, Path(folder), COLUMNS[cell.column])
            seconds = processor_seconds() - start
            logits = run(file, task)
        except Exception as error:  # noqa: BLE001 - a way that fails is a result, and the others are still wanted
            return replace(cell, failure=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return replace(cell, seconds=seconds, **figures(logits, reference, task.labels))


def cells(task: Task, chosen: Mapping[str, Way], columns: Sequence[str]) -> Iterator[Cell]:
    """Measures one network, a cell at a time; the float file's comes first."""
    empty = Cell(
        network=task.model.stem,
        row=FLOAT,
        column="",
        num_evaluation=task.num_evaluation,
        num_calibration=len(task.calibration),
        measured=header(),
    )
    reference = run(task.model, task)
    top1 = None if task.labels is None else float(np.mean(reference.argmax(1) == task.labels))
    yield replace(empty, top1=top1)
    for row, quantize in chosen.items():
        for column in columns:
            yield measured(replace(empty, row=row, column=column), task, reference, quantize)


def markdown(found: Iterable[Cell]) -> str:
    """Returns a table for each network; of cells that were measured twice, the later ones."""
    latest = {(cell.network, cell.row, cell.column): cell for cell in found}
    return "\n\n".join(
        _table([cell for key, cell in latest.items() if key[0] == network])
        for network in dict.fromkeys(key[0] for key in latest)
    )


def _table(found: Sequence[Cell]) -> str:
    present = {cell.column for cell in found}
    columns = [column for column in COLUMNS if column in present]
    by_place = {(cell.row, cell.column): cell for cell in found}
    one, failures = found[0], []
    lines = [
        f"**{one.network}**, {one.num_evaluation} samples, calibrated on {one.num_calibration}",
        "",
        f"| | {' | '.join(columns)} | processor s |",
        f"|---|{'---|' * len(columns)}---|",
    ]
    for row in _in_order(cell.row for cell in found):
        alone = by_place.get((row, ""))
        if alone is not None:
            lines.append(f"| {row} | {_text(alone, failures)} |{' |' * len(columns)}")
            continue
        places = [by_place.get((row, column)) for column in columns]
        seconds = next((f"{cell.seconds:.0f}" for cell in places if cell and cell.seconds is not None), "")
        lines.append(f"| {row} | {' | '.join(_text(cell, failures) for cell in places)} | {seconds} |")
    notes = [f"[{i + 1}] {reason}" for i, reason in enumerate(dict.fromkeys(failures))]
    return "\n".join(lines + ([""] if notes else []) + ["  \n".join(notes)] * bool(notes))


def _in_order(rows: Iterable[str]) -> list[str]:
    """Returns each row once: float first, then as they were measured."""
    return sorted(dict.fromkeys(rows), key=lambda row: row != FLOAT)


def _text(cell: Cell | None, failures: list[str]) -> str:
    if cell is None:
        return ""
    if cell.failure:
        failures.append(cell.failure)
        return f"- [{list(dict.fromkeys(failures)).index(cell.failure) + 1}]"
    error = "" if cell.top1_error is None else f" ± {100 * cell.top1_error:.1f}"
    parts = [] if cell.top1 is None else [f"{100 * cell.top1:.1f}{error}"]
    parts += [] if cell.agreement is None else [f"{100 * cell.agreement:.1f}"]
    parts += [] if cell.sqnr_db is None else [f"{cell.sqnr_db:.1f}"]
    return " / ".join(parts)


def as_line(cell: Cell) -> str:
    """Returns a cell as a line of JSON."""
    return json.dumps({name: getattr(cell, name) for name in Cell.__dataclass_fields__}) + "\n"


def from_lines(text: str) -> list[Cell]:
    """Returns the cells of a JSON file; a last line that was cut off is left out."""
    return [Cell(**json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def matching(names: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
    """Returns the names that are one of the wanted texts, or contain one that is no name; all where none is wanted."""
    known = list(names)
    return [name for name in known if not wanted or any(_matches(text, name, known) for text in wanted)]


def _matches(text: str, name: str, known: Sequence[str]) -> bool:
    return text == name if text in known else text in name


def parse() -> argparse.Namespace:
    """Returns what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NETWORKS, help="which of ../shared/models (default: all)")
    parser.add_argument("--model", type=Path, help="a classifier of your own, with --images")
    parser.add_argument("--images", type=Path, help="folder with val/<class>/<picture>")
    parser.add_argument("--preprocessing", choices=PREPROCESSINGS, default="torch", help="for --model")
    parser.add_argument("--crop", type=int, help="for --model: height and width of its input (default: 224 or 227)")
    parser.add_argument("--num-calibration", type=int, default=128)
    parser.add_argument("--num-evaluation", type=int, help="samples to evaluate on (default: all that are left)")
    parser.add_argument("--rows", nargs="+", help="only the rows whose label is or contains one of these")
    parser.add_argument("--columns", nargs="+", help="only the columns whose label contains one of these")
    parser.add_argument(
        "--scaling", default="noise", help="what the rows with absorption and correction scale for (default: noise)"
    )
    parser.add_argument("--ort", action="store_true", help="also ONNX Runtime's own quantize_static")
    parser.add_argument("--aimet-python", type=Path, help="also AIMET: interpreter of an environment with aimet-onnx")
    parser.add_argument("--json", type=Path, help="append each cell to this file as soon as it is measured")
    parser.add_argument("--from-json", type=Path, help="measure nothing: print the tables of such a file")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.images is None):
        parser.error("--model and --images belong together")
    return arguments


def tasks(arguments: argparse.Namespace) -> Iterator[Task]:
    """Yields what is to be measured; pictures of one network at a time are in memory."""
    counts = [arguments.num_calibration, arguments.num_evaluation]
    if not arguments.model:
        yield from (known_task(name, counts) for name in arguments.models or NETWORKS)
        return
    preprocessing = PREPROCESSINGS[arguments.preprocessing]
    if arguments.crop:
        short_side = round(arguments.crop * preprocessing.short_side / preprocessing.crop)
        preprocessing = replace(preprocessing, crop=arguments.crop, short_side=short_side)
    yield pictures_task(arguments.model, arguments.images, preprocessing, counts=counts)


def main() -> None:
    """Measures and prints what the command line asks for."""
    arguments = parse()
    if arguments.from_json:
        found = from_lines(arguments.from_json.read_text(encoding="utf-8"))
        print("  \n".join(dict.fromkeys(cell.measured for cell in found)), markdown(found), sep="\n\n")
        return
    logging.disable(logging.WARNING)  # onnxruntime.quantization reports its every step
    chosen = ways(scaling=arguments.scaling, onnxruntime=arguments.ort, aimet_python=arguments.aimet_python)
    chosen = {row: chosen[row] for row in matching(chosen, arguments.rows)}
    columns = matching(COLUMNS, arguments.columns)
    print(header(), flush=True)
    for task in tasks(arguments):
        found = []
        for cell in cells(task, chosen, columns):
            found.append(cell)
            print(f"{cell.network}, {cell.row}, {cell.column}: {_text(cell, [])} {cell.failure}", file=sys.stderr)
            if arguments.json:
                with arguments.json.open("a", encoding="utf-8") as file:
                    file.write(as_line(cell))
        print(f"\n{markdown(found)}", flush=True)


if __name__ == "__main__":
    main()
