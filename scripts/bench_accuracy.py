"""Prints accuracy before and after quantization, measured on the exported files in ONNX Runtime.

    python scripts/bench_accuracy.py                                     the three networks of the README, as Markdown
    python scripts/bench_accuracy.py --models mobilenet_v2_1.0_224 --ort --aimet-python AIMET_ENVIRONMENT/bin/python
    python scripts/bench_accuracy.py --model MODEL.onnx --images IMAGENET --preprocessing torch

Rows add one step at a time, the last of each granularity being the default. Top-1 is over the evaluation samples,
agreement counts equal top-1 with the float file, SQNR is 10 log10(sum y^2 / sum (y - y_q)^2) over all logits; seconds
are those of quantizing and exporting, compilation included. Calibration samples carry no labels and are not evaluated.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
from bench_header import header
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import ptqjax

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from imagenet_folder import (  # noqa: E402
    PREPROCESSINGS,
    Picture,
    Preprocessing,
    calibration_and_evaluation,
    decode,
    labels,
    to_input,
)

SHARED = Path(os.environ.get("PTQJAX_SHARED", ROOT.parent / "shared"))
BATCH = 16
PLAIN = {"equalize": False, "correct": "none"}
NETWORKS = ("resnet20_cifar10", "mobilenet_v2_1.0_224", "mobilenet_v1_0.25_224", "squeezenet_v1.1")
"""Networks that come with data to measure them on."""
OURS = {
    "per tensor, folded": {"granularity": "tensor", **PLAIN},
    "per tensor, + equalized": {"granularity": "tensor", "correct": "none"},
    "per tensor, + corrected (default)": {"granularity": "tensor"},
    "per channel, folded": PLAIN,
    "per channel, + equalized, corrected (default)": {},
}
"""Our rows: label, and the settings in which it differs from the default."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network and what it is measured on."""

    model: Path
    """The float file."""
    calibration: np.ndarray
    """Network inputs to calibrate with, without labels."""
    evaluation: Callable[[], Iterator[np.ndarray]]
    """Makes the batches of network inputs to evaluate on."""
    labels: np.ndarray
    """The class of each sample that is evaluated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    label: str
    """What was measured."""
    logits: np.ndarray
    """The file's answer to the evaluation samples."""
    seconds: float | None = None
    """What it took to make the file; None where there was nothing to do."""


def pictures_task(model: Path, root: Path, preprocessing: Preprocessing, cache: Path, *, counts: list[int]) -> Task:
    """Returns the task of a network that takes pictures; decoded once, kept as bytes under `cache`."""
    calibration, evaluation = calibration_and_evaluation(root, num_calibration=counts[0], num_evaluation=counts[1])
    decoded = [_decoded(part, preprocessing, cache) for part in (calibration, evaluation)]

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(evaluation), BATCH):
            yield to_input(decoded[1][start : start + BATCH], preprocessing)

    return Task(
        model=model, calibration=to_input(decoded[0], preprocessing), evaluation=batches, labels=labels(evaluation)
    )


def _decoded(pictures: tuple[Picture, ...], preprocessing: Preprocessing, cache: Path) -> np.ndarray:
    crop, short_side = preprocessing.crop, preprocessing.short_side
    key = repr(
        (crop, short_side, [(str(picture.path.resolve()), picture.path.stat().st_mtime) for picture in pictures])
    )
    file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if not file.is_file():
        np.save(file, np.stack([decode(picture.path, crop=crop, short_side=short_side) for picture in pictures]))
    return np.load(file, mmap_mode="r")


def arrays_task(model: Path, root: Path, *, num_calibration: int) -> Task:
    """Returns the task of a network whose samples are arrays: `calibration.npz` and `evaluation.npz` under `root`."""
    calibration, evaluation = (dict(np.load(root / f"{part}.npz")) for part in ("calibration", "evaluation"))
    samples = evaluation["input"]
    return Task(
        model=model,
        calibration=calibration["input"][:num_calibration],
        evaluation=lambda: (samples[start : start + BATCH] for start in range(0, len(samples), BATCH)),
        labels=evaluation["labels"],
    )


def known_task(name: str, cache: Path, counts: list[int]) -> Task:
    """Returns the task of one of `NETWORKS`."""
    model = SHARED / "models" / f"{name}.onnx"
    if name.endswith("cifar10"):
        return arrays_task(model, SHARED / "data" / "cifar10", num_calibration=counts[0])
    preprocessing = PREPROCESSINGS["caffe" if name.startswith("squeezenet") else "tf"]
    return pictures_task(model, SHARED / "data" / "imagenet", preprocessing, cache, counts=counts)


def run(path: Path, task: Task) -> np.ndarray:
    """Returns the file's logits of the evaluation samples, from ONNX Runtime on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")  # else uint8 x int8 saturates without VNNI
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([np.asarray(session.run(None, {name: batch})[0]) for batch in task.evaluation()])


def with_ptqjax(task: Task, folder: Path, **settings: str | bool) -> Path:
    """Quantizes with ptqjax; returns the exported file."""
    model = ptqjax.read(task.model)
    name = model.graph.inputs[0].name
    batches = [{name: task.calibration[i : i + BATCH]} for i in range(0, len(task.calibration), BATCH)]
    result = ptqjax.quantize(model, batches, ptqjax.QuantizationConfig(**settings))  # pyright: ignore[reportArgumentType]
    ptqjax.export(result.model, result.encodings, folder, "model")
    return folder / "model.onnx"


class _Reader(CalibrationDataReader):
    def __init__(self, name: str, samples: np.ndarray) -> None:
        self._batches = iter([{name: samples[i : i + BATCH]} for i in range(0, len(samples), BATCH)])

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return next(self._batches, None)


def with_onnxruntime(task: Task, folder: Path, *, per_channel: bool) -> Path:
    """Quantizes with ONNX Runtime's own tool, min-max ranges; returns the file."""
    prepared, out = folder / "prepared.onnx", folder / "model.onnx"
    quant_pre_process(str(task.model), str(prepared))
    name = ort.InferenceSession(str(prepared), providers=["CPUExecutionProvider"]).get_inputs()[0].name
    quantize_static(
        str(prepared),
        str(out),
        _Reader(name, task.calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )
    return out


def with_aimet(task: Task, folder: Path, *, python: Path, options: tuple[str, ...]) -> Path:
    """Quantizes with AIMET, in its own environment; returns the file."""
    samples, out = folder / "samples.npy", folder / "model.onnx"
    np.save(samples, task.calibration)
    side = Path(__file__).with_name("aimet_side.py")
    command = [str(python), str(side), "quantize", str(task.model), str(samples), str(out), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out


def measured(label: str, task: Task, quantize: Callable[[Task, Path], Path]) -> Row:
    """Returns the row of one way to quantize."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        file = quantize(task, Path(folder))
        seconds = time.perf_counter() - start
        return Row(label=label, logits=run(file, task), seconds=seconds)


def ways(arguments: argparse.Namespace) -> dict[str, Callable[[Task, Path], Path]]:
    """Returns the ways to quantize that the command line asks for, by label."""
    chosen: dict[str, Callable[[Task, Path], Path]] = {
        f"ptqjax, {label}": partial(with_ptqjax, **settings) for label, settings in OURS.items()
    }
    if arguments.ort:
        chosen |= {
            "ONNX Runtime, per tensor": partial(with_onnxruntime, per_channel=False),
            "ONNX Runtime, per channel": partial(with_onnxruntime, per_channel=True),
        }
    if arguments.aimet_python:
        aimet = partial(with_aimet, python=arguments.aimet_python)
        chosen |= {
            "AIMET, per tensor, folded": partial(aimet, options=()),
            "AIMET, per tensor, equalized": partial(aimet, options=("--equalize",)),
            "AIMET, per channel, folded": partial(aimet, options=("--per-channel",)),
        }
    return chosen


def line(row: Row, reference: np.ndarray, task: Task) -> str:
    """Returns a row of the table as Markdown."""
    top1 = 100 * np.mean(row.logits.argmax(1) == task.labels)
    if row.seconds is None:
        return f"| {row.label} | {top1:.1f} | | | |"
    agreement = 100 * np.mean(row.logits.argmax(1) == reference.argmax(1))
    y, error = reference.astype(np.float64), reference.astype(np.float64) - row.logits
    sqnr = 10 * np.log10(np.sum(y**2) / max(np.sum(error**2), np.finfo(np.float64).tiny))
    return f"| {row.label} | {top1:.1f} | {agreement:.1f} | {sqnr:.1f} | {row.seconds:.0f} |"


def print_table(task: Task, chosen: dict[str, Callable[[Task, Path], Path]]) -> None:
    """Measures and prints one network's table, row by row."""
    print(f"\n**{task.model.stem}**, {len(task.labels)} samples, calibrated on {len(task.calibration)}\n")
    print("| W8A8 | top-1 % | agreement % | SQNR dB | seconds |\n|---|---|---|---|---|")
    reference = run(task.model, task)
    print(line(Row(label="float", logits=reference), reference, task), flush=True)
    for label, quantize in chosen.items():
        print(line(measured(label, task, quantize), reference, task), flush=True)


def parse() -> argparse.Namespace:
    """Returns what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=NETWORKS, help="which of ../shared/models (default: the first three)"
    )
    parser.add_argument("--model", type=Path, help="a classifier of your own, with --images")
    parser.add_argument("--images", type=Path, help="folder with val/<class>/<picture>")
    parser.add_argument("--preprocessing", choices=PREPROCESSINGS, default="torch", help="for --model")
    parser.add_argument("--num-calibration", type=int, default=128)
    parser.add_argument("--num-evaluation", type=int, help="pictures to evaluate on (default: all that are left)")
    parser.add_argument("--rows", help="only the rows whose label contains this")
    parser.add_argument("--ort", action="store_true", help="also ONNX Runtime's own quantize_static")
    parser.add_argument("--aimet-python", type=Path, help="also AIMET: interpreter of an environment with aimet-onnx")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.images is None):
        parser.error("--model and --images belong together")
    return arguments


def main() -> None:
    """Measures and prints what the command line asks for."""
    logging.disable(logging.WARNING)  # onnxruntime.quantization reports its every step
    arguments = parse()
    cache = Path(tempfile.gettempdir()) / "ptqjax-bench"
    cache.mkdir(exist_ok=True)
    counts = [arguments.num_calibration, arguments.num_evaluation]
    if arguments.model:
        preprocessing = PREPROCESSINGS[arguments.preprocessing]
        tasks = [partial(pictures_task, arguments.model, arguments.images, preprocessing, cache, counts=counts)]
    else:
        tasks = [partial(known_task, name, cache, counts) for name in arguments.models or NETWORKS[:3]]
    chosen = {label: way for label, way in ways(arguments).items() if not arguments.rows or arguments.rows in label}
    print(header())
    for make in tasks:
        print_table(make(), chosen)


if __name__ == "__main__":
    main()
