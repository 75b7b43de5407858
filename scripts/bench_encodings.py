"""Prints what choosing encodings costs and gives, beside AIMET and ONNX Runtime's own calibrator, as Markdown.

    python scripts/bench_encodings.py --aimet-python AIMET_ENVIRONMENT/bin/python
    python scripts/bench_encodings.py --parts weights calibration --images 32 --rounds 2
    python scripts/bench_encodings.py --parts accuracy --networks resnet20_cifar10

Times are of MobileNetV2 at 224x224, in batches of 16 pictures of noise (what they show costs nothing). Runs of ours and
of AIMET's alternate; ratios are of the fastest runs of each. Compilation is the first run less the fastest. Memory is
the largest that a process of its own ever held (ru_maxrss), runtime and libraries included. Accuracy is that of the
simulation, on samples that calibration did not see, with encodings chosen without labels.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from bench_accuracy import BATCH, SHARED, Task, figures, known_task
from bench_header import header
from bench_simulation import SIDE, answer_of
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator
from onnxruntime.quantization.shape_inference import quant_pre_process

import ptqjax
from ptqjax.placement.place import place
from ptqjax.ranges.schemes import find_scheme
from ptqjax.ranges.search import encode_constants

PARTS = ("weights", "calibration", "schemes", "accuracy")
SCHEMES = ("min-max", "moving-average", "sqnr", "mse", "percentile:99.9", "percentile:99.99", "entropy")
NETWORKS = ("mobilenet_v2_1.0_224", "mobilenet_v1_0.25_224", "resnet20_cifar10", "squeezenet_v1.1")
GRANULARITIES = ("tensor", "channel")
_SHAPE = (3, 224, 224)


def folded(path: Path) -> ptqjax.Model:
    """Returns the model with its batch norms folded."""
    return ptqjax.fold_batch_norms(ptqjax.read(path))[0]


def pictures(count: int, folder: Path) -> Path:
    """Writes pictures of noise, smooth over some pixels, and returns the file."""
    path = folder / f"pictures{count}.npy"
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, *_SHAPE))
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = rng.uniform(-1, 1, size=(_SHAPE[0], *(size // 4 for size in _SHAPE[1:])))
        out[index] = coarse.repeat(4, axis=1).repeat(4, axis=2)
    out.flush()
    return path


def batches_of(path: Path, name: str) -> Iterator[dict[str, np.ndarray]]:
    """Yields the file's samples in batches, read as they are needed."""
    size = len(np.load(path, mmap_mode="r"))
    for start in range(0, size, BATCH):
        yield {name: np.array(np.load(path, mmap_mode="r")[start : start + BATCH])}


def seconds_of(function: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# What a process of its own measures


class _Reader(CalibrationDataReader):
    def __init__(self, path: Path, name: str) -> None:
        self._batches = batches_of(path, name)

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return next(self._batches, None)


def calibrate_here(model: Path, samples: Path, scheme: str, rounds: int) -> dict[str, Any]:
    """Returns the seconds of each of our calibrations, and the memory they took, in MB."""
    network = folded(model)
    name, config = network.graph.inputs[0].name, ptqjax.QuantizationConfig(ranges=scheme)
    seconds = [seconds_of(lambda: ptqjax.calibrate(network, batches_of(samples, name), config)) for _ in range(rounds)]
    return {"seconds": seconds, "peak_mb": _peak()}


def calibrate_with_ort(model: Path, samples: Path, folder: Path) -> dict[str, Any]:
    """Returns the seconds of ONNX Runtime's calibrator with percentiles, and the memory it took, in MB."""
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(model), str(prepared))
    name = ort.InferenceSession(str(prepared), providers=["CPUExecutionProvider"]).get_inputs()[0].name
    start = time.perf_counter()
    calibrator = create_calibrator(
        str(prepared),
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=CalibrationMethod.Percentile,
    )
    calibrator.set_execution_providers(["CPUExecutionProvider"])
    calibrator.collect_data(_Reader(samples, name))
    calibrator.compute_data()
    return {"seconds": [time.perf_counter() - start], "peak_mb": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_child(*arguments: object) -> dict[str, Any]:
    """Returns what this script measures in a new process.

    Raises:
        RuntimeError: It ended without an answer.
    """
    command = [sys.executable, str(Path(__file__)), "--child", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return json.loads(lines[-1])


def child(arguments: list[str]) -> None:
    """Measures what `in_child` asks for and writes it as JSON."""
    what, model, samples = arguments[0], Path(arguments[1]), Path(arguments[2])
    if what == "ours":
        found = calibrate_here(model, samples, arguments[3], int(arguments[4]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = calibrate_with_ort(model, samples, Path(folder))
    print(json.dumps(found), flush=True)


# The parts


def _opened(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


class Aimet:
    """AIMET in its own environment, asked line by line; nothing where there is none."""

    def __init__(self, python: Path | None, model: Path, samples: Path) -> None:
        command = [str(python), str(SIDE), "encodings", str(model), str(samples), "--scheme", "tf_enhanced"]
        self._process = _opened(command) if python else None
        self.version = answer_of(self._process)["aimet_onnx"] if self._process else ""

    def ask(self, what: str) -> dict[str, Any] | None:
        """Returns the seconds of encodings of "weights" or "all"."""
        if self._process is None:
            return None
        print(what, file=self._process.stdin, flush=True)
        return answer_of(self._process)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


def weights_part(model: Path, aimet: Aimet, rounds: int) -> list[str]:
    """Returns the lines on the search of all weights per channel."""
    network = folded(model)
    sites = [site for site in place(network).sites if site.kind == "weight"]
    search = find_scheme("sqnr")
    ours = [seconds_of(lambda: encode_constants(sites, network.params, search))]
    theirs = []
    for _ in range(rounds):
        ours.append(seconds_of(lambda: encode_constants(sites, network.params, search)))
        answer = aimet.ask("weights")
        theirs += [answer["seconds"]] if answer else []
    fastest = min(ours[1:])
    lines = ["## Weights, per channel, scheme sqnr", ""]
    lines.append(f"- ptqjax: {fastest:.2f} s, and {ours[0] - fastest:.1f} s to compile")
    if theirs:
        times = f"{min(theirs):.2f} s, {min(theirs) / fastest:.1f} times as long"
        lines.append(f"- AIMET {aimet.version}, tf_enhanced, with a forward of one picture: {times}")
    return lines


def calibration_part(model: Path, samples: Path, aimet: Aimet, *, rounds: int, with_ort: bool) -> list[str]:
    """Returns the lines on whole calibrations: weights and activations."""
    ours = in_child("ours", model, samples, "sqnr", rounds + 1)
    first, fastest = ours["seconds"][0], min(ours["seconds"][1:])
    lines = [
        "",
        f"## Whole calibration, {len(np.load(samples, mmap_mode='r'))} pictures",
        "",
        "| | seconds | times as long as ptqjax's sqnr | largest memory, MB |",
        "|---|---|---|---|",
    ]

    def add(label: str, seconds: float, peak: float) -> None:
        lines.append(f"| {label} | {seconds:.2f} | {seconds / fastest:.1f} | {peak:.0f} |")

    add(f"ptqjax, sqnr ({first - fastest:.1f} s more the first time, to compile)", fastest, ours["peak_mb"])
    theirs = [answer for answer in (aimet.ask("all") for _ in range(rounds)) if answer]
    if theirs:
        least = min(answer["seconds"] for answer in theirs)
        add(f"AIMET {aimet.version}, tf_enhanced", least, theirs[-1]["peak_mb"])
    if with_ort:
        found = in_child("ort", model, samples)
        add(f"ONNX Runtime {ort.__version__}, percentile", min(found["seconds"]), found["peak_mb"])
    return lines


def memory_part(model: Path, samples: Path, more: Path) -> list[str]:
    """Returns the line on how memory grows with the number of pictures."""
    small, large = (in_child("ours", model, path, "sqnr", 1)["peak_mb"] for path in (samples, more))
    counts = [len(np.load(path, mmap_mode="r")) for path in (samples, more)]
    growth = f"{100 * (large / small - 1):+.1f} %"
    return ["", f"Memory: {small:.0f} MB with {counts[0]} pictures, {large:.0f} MB with {counts[1]} ({growth})."]


def schemes_part(model: Path, samples: Path, rounds: int) -> list[str]:
    """Returns the table of what each scheme costs."""
    network = folded(model)
    name = network.graph.inputs[0].name
    sites = [site for site in place(network).sites if site.kind == "weight"]
    batches = list(batches_of(samples, name))
    lines = ["", f"## Seconds of every scheme, {sum(len(batch[name]) for batch in batches)} pictures", ""]
    lines += ["| scheme | whole calibration | of it weights | the first time |", "|---|---|---|---|"]
    for scheme in SCHEMES:
        config = ptqjax.QuantizationConfig(ranges=scheme)
        calibrated = partial(ptqjax.calibrate, network, batches, config)
        whole = [seconds_of(calibrated) for _ in range(rounds + 1)]
        in_hand = find_scheme(scheme)
        weights = [seconds_of(lambda s=in_hand: encode_constants(sites, network.params, s)) for _ in range(rounds)]
        lines.append(f"| {scheme} | {min(whole[1:]):.2f} | {min(weights):.2f} | {whole[0]:.1f} |")
    return [*lines, "", "Schemes in this order in one process: those that share a compiled step begin with it."]


def accuracy_part(networks: list[str], counts: tuple[int, int]) -> list[str]:
    """Returns the table of what each scheme gives: SQNR in dB and agreement with float in %, 8 bits."""
    columns = [f"{network}, {granularity}" for network in networks for granularity in GRANULARITIES]
    lines = ["", f"## What each scheme gives, {counts[0]} samples to calibrate, {counts[1]} to evaluate", ""]
    lines += ["SQNR of the logits in dB / agreement with the float model's top-1 in %; W8A8.", ""]
    lines += ["| scheme | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    cells = {network: _cells(network, counts) for network in networks}
    for scheme in SCHEMES:
        row = [cells[network][scheme, granularity] for network in networks for granularity in GRANULARITIES]
        lines.append(f"| {scheme} | " + " | ".join(row) + " |")
    return lines


def _cells(network: str, counts: tuple[int, int]) -> dict[tuple[str, str], str]:
    task = known_task(network, counts)
    model = folded(task.model)
    reference = _logits(lambda inputs: ptqjax.apply(model.graph, model.params, inputs), model, task)
    name = model.graph.inputs[0].name
    batches = [{name: task.calibration[i : i + BATCH]} for i in range(0, len(task.calibration), BATCH)]
    cells: dict[tuple[str, str], str] = {}
    for granularity in GRANULARITIES:
        for scheme in SCHEMES:
            config = ptqjax.QuantizationConfig(ranges=scheme, granularity=granularity)
            encodings = ptqjax.calibrate(model, batches, config)
            run = ptqjax.simulate(model, encodings)
            logits = _logits(lambda inputs, run=run, e=encodings: run(model.params, e, inputs), model, task)
            found = figures(logits, reference, None)
            cells[scheme, granularity] = f"{found['sqnr_db']:.1f} / {100 * found['agreement']:.1f}"
    return cells


def _logits(run: Callable[[dict[str, np.ndarray]], dict[str, Any]], model: ptqjax.Model, task: Task) -> np.ndarray:
    name, out = model.graph.inputs[0].name, model.graph.outputs[0].name
    return np.concatenate([np.asarray(run({name: batch})[out]) for batch in task.evaluation()])


def main() -> None:
    """Reads the command line, measures, prints."""
    if "--child" in sys.argv[1:2]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "mobilenet_v2_1.0_224.onnx")
    parser.add_argument("--aimet-python", type=Path, help="interpreter of an environment with aimet-onnx")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--no-ort", action="store_true", help="without ONNX Runtime's calibrator (minutes, 9 GB)")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--more-images", type=int, default=1024, help="to see that memory does not grow; 0: do not")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--samples", nargs=2, type=int, default=(64, 512), help="to calibrate with, to evaluate")
    arguments = parser.parse_args()
    print(f"# Encodings\n\n{header()}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        samples = pictures(arguments.images, Path(folder))
        aimet = Aimet(arguments.aimet_python, arguments.model, samples)
        if "weights" in arguments.parts:
            print("\n".join(weights_part(arguments.model, aimet, arguments.rounds)), flush=True)
        if "calibration" in arguments.parts:
            settings = {"rounds": arguments.rounds, "with_ort": not arguments.no_ort}
            print("\n".join(calibration_part(arguments.model, samples, aimet, **settings)), flush=True)
            if arguments.more_images > arguments.images:
                more = pictures(arguments.more_images, Path(folder))
                print("\n".join(memory_part(arguments.model, samples, more)), flush=True)
        aimet.close()
        if "schemes" in arguments.parts:
            print("\n".join(schemes_part(arguments.model, samples, arguments.rounds)), flush=True)
    if "accuracy" in arguments.parts:
        print("\n".join(accuracy_part(list(arguments.networks), tuple(arguments.samples))), flush=True)


if __name__ == "__main__":
    main()
