"""Prints what it costs to keep sums of two products within 16 bits, for x86 without VNNI, as Markdown.

    python scripts/bench_saturation.py --job MobileNetV2 MODEL.onnx CALIBRATION.npz EVALUATION.npz
    python scripts/bench_saturation.py --job ... --job ... --runtime AVX2 FOLDER --json rows.jsonl

Each job is quantized once with the defaults, up to the grids; from there on each way goes on by itself, its biases
corrected against the float model. SQNR of all outputs, 10 log10(sum y^2 / sum (y - y_q)^2), against the float file, on
samples that took no part: in exact sums; and in the session that users open on a processor without VNNI, emulated in
integers to the bit (`transforms.saturation.without_vnni`). Milliseconds are of the processor, the median of a run of
one sample in one thread, the float file's and all ways' in turn. A `--runtime NAME FOLDER` is measured as well, and its
plain session in place of the emulation: a folder with another onnxruntime, such as one whose kernels for VNNI are off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_header import header

import ptqjax
from ptqjax.agreement import exact_function, may_saturate
from ptqjax.encodings.biases import guard_biases
from ptqjax.encodings.encoding import Encodings, make_encoding, quantize
from ptqjax.evaluation import evaluate_each
from ptqjax.fit import correct_biases, scale_as_configured
from ptqjax.ir import Model
from ptqjax.kernels.pair_sums import LARGEST_SUM, paired
from ptqjax.lowering import apply_few_times
from ptqjax.qdq.fuse_quantized import fuse_quantized
from ptqjax.ranges.calibrate import calibrate_and_measure
from ptqjax.ranges.headroom import widened
from ptqjax.ranges.pairs import fit_pairs, saturating_layers
from ptqjax.transforms import fold_batch_norms, prepare
from ptqjax.transforms.saturation import in_order_of_terms, without_vnni

Weights = Mapping[str, np.ndarray]
BATCH, SECONDS = 16, 8.0


def as_rounded(model: Model, encodings: Encodings, names: Sequence[str]) -> tuple[Weights, Encodings]:
    """Weights as they are rounded."""
    del model, names
    return {}, encodings


def fitted(model: Model, encodings: Encodings, names: Sequence[str]) -> tuple[Weights, Encodings]:
    """Scales raised or weights moved, whichever leaves less error: the default."""
    del names
    pairs = fit_pairs(model, encodings)
    return pairs.weights, pairs.encodings


def raised(model: Model, encodings: Encodings, names: Sequence[str]) -> tuple[Weights, Encodings]:
    """Scales raised, of the channels that need it, until nothing has to move."""
    grids = dict(encodings)
    nodes = {node.inputs[1]: node for node in model.graph.nodes if len(node.inputs) > 1}
    for name in names:
        for _ in range(9):  # each time by what the largest pair is beyond, and by one in 128 for rounding
            codes = np.asarray(quantize(np.asarray(model.params[name]), grids[name]))
            node = nodes[name]
            terms = in_order_of_terms(codes, node.op_type, is_turned=bool(node.attribute("transB", 0)))
            largest = np.abs(paired(terms).sum(-1)).max(1)
            scale = np.asarray(grids[name].scale)
            factor = np.where(largest > LARGEST_SUM, largest / LARGEST_SUM * (1 + 1 / 256), 1)
            factor = factor.max() if scale.ndim == 0 else factor.reshape(-1, scale.size).max(0)
            grids[name] = grids[name].replace(scale=(scale * factor).astype(np.float32))
    return {}, grids


def seven_bits(model: Model, encodings: Encodings, names: Sequence[str]) -> tuple[Weights, Encodings]:
    """7 bits for weights with a pair that may saturate."""
    del model
    ends = {"qmin": np.float32(-63), "qmax": np.float32(63)}
    coarse = {
        name: encodings[name].replace(scale=encodings[name].scale * np.float32(127 / 63), **ends) for name in names
    }
    return {}, encodings | coarse


def unsigned(model: Model, encodings: Encodings, names: Sequence[str]) -> tuple[Weights, Encodings]:
    """The same integers as uint8 with zero point 128, for weights with a pair that may saturate."""
    del model
    grids = {}
    for name in names:
        scale = np.asarray(encodings[name].scale)
        zero_point = np.full(scale.shape, 128, np.float32)
        grids[name] = make_encoding(scale, zero_point, dtype="uint8", axis=encodings[name].axis)
    return {}, encodings | grids


def signed_inputs(model: Model, encodings: Encodings, names: Sequence[str]) -> tuple[Weights, Encodings]:
    """int8 activations on the same grids."""
    del names
    offset = np.float32(128)
    return {}, {
        name: grid
        if name in model.params or grid.dtype != "uint8"
        else grid.replace(qmin=grid.qmin - offset, qmax=grid.qmax - offset, zero_point=grid.zero_point - offset)
        for name, grid in encodings.items()
    }


WAYS: Mapping[str, Callable[[Model, Encodings, Sequence[str]], tuple[Weights, Encodings]]] = {
    "int8 as rounded": as_rounded,
    "fitted (default)": fitted,
    "scales raised alone": raised,
    "7 bits where needed": seven_bits,
    "uint8 where needed": unsigned,
    "int8 activations": signed_inputs,
}


def batches(file: str, size: int) -> list[dict[str, np.ndarray]]:
    """The samples of a file in whole batches."""
    arrays = {name: value for name, value in np.load(file).items() if name != "labels"}
    count = len(next(iter(arrays.values())))
    return [{name: value[i : i + size] for name, value in arrays.items()} for i in range(0, count - count % size, size)]


def written(source: str, calibration: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Quantizes a model in every way; yields each way and its file."""
    config = ptqjax.QuantizationConfig()
    model = ptqjax.read(source)
    samples = batches(calibration, size_of(model))
    prepared, _ = prepare(fold_batch_norms(model)[0], config.absorb)
    choice = scale_as_configured(prepared, samples, config)
    found = calibrate_and_measure(choice.model, samples, [config], labels=[""])
    encodings = widened(choice.model, found.each[0][0], choice.headroom, config, found.num_values)
    names = saturating_layers(choice.model, encodings, config)
    for way, function in WAYS.items():
        weights, grids = function(choice.model, encodings, names)
        changed = choice.model.replace(params={**choice.model.params, **weights})
        if choice.correct != "none":
            changed, _ = correct_biases(choice.model, grids, samples, method=choice.correct, weights=weights)
        name = way.replace(" ", "_")
        ptqjax.export(changed, guard_biases(changed, grids)[0], folder, name)
        yield way, folder / f"{name}.onnx"


def size_of(model: Model) -> int:
    """The batch size of a model, or `BATCH`."""
    size = model.graph.inputs[0].shape and model.graph.inputs[0].shape[0]
    return size if isinstance(size, int) else BATCH


def emulated(file: Path) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """The file as a function of a batch, computed as on a processor without VNNI."""
    program = without_vnni(fuse_quantized(ptqjax.read(file))[0])
    return lambda batch: apply_few_times(program.graph, program.params, batch)


def measured(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds of the processor of each file, and the SQNR in its plain session, in this process's runtime."""
    import onnxruntime  # noqa: PLC0415 - of a folder of its own

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    sessions = {
        name: onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        for name, file in plan["files"].items()
    }
    samples = batches(plan["evaluation"], plan["size"])
    one = batches(plan["evaluation"], 1 if plan["is_open"] else plan["size"])[0]
    times: dict[str, list[float]] = {name: [] for name in sessions}
    begin = time.perf_counter()
    while time.perf_counter() < begin + SECONDS:
        for name, session in sessions.items():
            start = time.process_time()
            session.run(None, one)
            times[name].append(time.process_time() - start)
    sums = {name: [0.0, 0.0] for name in sessions}
    for batch in samples:
        wanted = sessions["float"].run(None, batch)
        for name, session in sessions.items():
            for y, y_q in zip(wanted, session.run(None, batch), strict=True):
                y64 = np.asarray(y, np.float64)
                sums[name][0] += float(np.square(y64).sum())
                sums[name][1] += float(np.square(y64 - np.asarray(y_q, np.float64)).sum())
    return {
        name: {"ms": 1e3 * float(np.median(times[name])), "sqnr": float(10 * np.log10(s / n)) if n else float("inf")}
        for name, (s, n) in sums.items()
    }


def in_runtime(folder: str, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What `measured` finds in a process whose onnxruntime is that of `folder`; "" for this one's."""
    paths = [folder, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [sys.executable, __file__, "--measure", json.dumps(plan)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def rows(job: Sequence[str], runtimes: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a job, the float file's first."""
    label, source, calibration, evaluation = job
    with tempfile.TemporaryDirectory() as folder:
        files = dict(written(source, calibration, Path(folder)))
        model = ptqjax.read(source)
        is_open = not isinstance(model.graph.inputs[0].shape and model.graph.inputs[0].shape[0], int)
        plan = {
            "files": {"float": source} | {way: str(file) for way, file in files.items()},
            "evaluation": evaluation,
            "size": size_of(model),
            "is_open": is_open,
        }
        times = {name: in_runtime(place, plan) for name, place in {"here": "", **runtimes}.items()}
        samples = batches(evaluation, size_of(model))
        exact = evaluate_each([exact_function(file) for file in files.values()], samples, reference=source)
        yield {"job": label, "way": "float", "ms": {name: each["float"]["ms"] for name, each in times.items()}}
        for (way, file), found in zip(files.items(), exact, strict=True):
            weights = may_saturate(file)
            plain = {name: times[name][way]["sqnr"] for name in runtimes}
            if weights and way != "int8 activations":
                other = evaluate_each([emulated(file)], samples, reference=source)[0]
                plain |= {"emulated": other.sqnr}
            yield {
                "job": label,
                "way": way,
                "kb": file.stat().st_size / 1e3,
                "weights": len(weights),
                "exact": found.sqnr,
                "plain": plain,
                "ms": {name: each[way]["ms"] for name, each in times.items()},
            }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown."""
    places = list(found[0]["ms"])
    headings = [
        "model",
        "way",
        "KB",
        "weights that may saturate",
        "SQNR in exact sums, dB",
        "plain session, no VNNI, dB",
    ]
    lines = ["| " + " | ".join([*headings, *(f"ms, {place}" for place in places)]) + " |"]
    lines.append("|" + " --- |" * (len(headings) + len(places)))
    for row in found:
        times = [f"{row['ms'][place]:.2f}" for place in places]
        if row["way"] == "float":
            cells = ["", "", "", ""]
        else:
            plain = sorted({f"{value:.1f}" for value in row["plain"].values()}) or [f"{row['exact']:.1f}"]
            cells = [f"{row['kb']:.0f}", str(row["weights"]), f"{row['exact']:.1f}", ", ".join(plain)]
        lines.append("| " + " | ".join([row["job"], row["way"], *cells, *times]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs=4, action="append", metavar=("NAME", "MODEL", "CALIBRATION", "EVALUATION"))
    parser.add_argument("--runtime", nargs=2, action="append", default=[], metavar=("NAME", "FOLDER"))
    parser.add_argument("--json", type=Path, help="where rows are kept, a line each; jobs that are there are not run")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measured(arguments.measure)))
        return
    kept = arguments.json.read_text().splitlines() if arguments.json and arguments.json.exists() else []
    found = [json.loads(line) for line in kept]
    for job in arguments.job or []:
        if job[0] not in {row["job"] for row in found}:
            new = list(rows(job, dict(arguments.runtime)))
            found += new
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
    print(header(), end="\n\n")
    print(table(found))


if __name__ == "__main__":
    main()
