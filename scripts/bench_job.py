"""Counts what a whole job costs: the processor's seconds of `ptqjax quantize`, beside its peers, process by process.

    python scripts/bench_job.py [--aimet-python /path/to/an/aimet/environment/bin/python] [--runs 3]

The job is a user's: 128 pictures and a network in, a quantized file out, W8A8. AIMET equalizes, calibrates and exports,
ONNX Runtime's `quantize_static` calibrates and exports (`shared/tools` has both); ours writes its report too, unless
told not to. All jobs of a network take turns in each round, so that they see the same machine, and a ratio is that of
one round; the median of the rounds is printed. "empty cache": nothing has been compiled before; "warm cache": the same
job was run once before. Files of two runs must have the same bytes, and are evaluated in ONNX Runtime on pictures that
took no part. Small networks, each by itself and with an empty cache, follow.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bench_header import header

import ptqjax

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from imagenet_folder import PREPROCESSINGS, batches, calibration_and_evaluation  # noqa: E402

SHARED = Path(os.environ.get("PTQJAX_SHARED", ROOT.parent / "shared"))
COMMAND = (sys.executable, "-c", "from ptqjax.commands.cli import main; main()", "quantize")
NETWORKS = ("mobilenet_v2_1.0_224", "mobilenet_v1_0.25_224", "efficientnet_lite0")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command, run as a whole process."""

    name: str
    command: tuple[str, ...]
    out: Path
    cache: str = ""
    """"empty", or "warm": the folder of the job before it is used again; "" for peers."""
    seconds: list[float] = field(default_factory=list)
    """Processor's seconds of each run."""
    digests: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The files of a network's samples."""

    calibration: Path
    evaluation: Sequence[Mapping[str, np.ndarray]]


def processor_seconds(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Returns the processor's seconds, of all cores, that a process takes from its beginning to its end.

    Raises:
        RuntimeError: It fails.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, **environment}, cwd=ROOT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{said.read().decode()[-2000:]}")
    return used.ru_utime + used.ru_stime


def jobs_of(model: Path, data: Path, folder: Path, granularity: str, aimet: Path | None) -> list[Job]:
    """Returns the jobs of a network, peers first."""
    found = []
    if aimet is not None:
        per_channel = ("per_channel",) if granularity == "channel" else ()
        out = folder / "aimet"
        command = (str(aimet), str(SHARED / "tools" / "aimet_job.py"), str(model), str(data), str(out), *per_channel)
        found.append(Job(name="AIMET", command=command, out=out / "m.onnx"))
    if granularity == "channel":
        out = folder / "ort"
        command = (sys.executable, str(SHARED / "tools" / "ort_job.py"), str(model), str(data), str(out))
        found.append(Job(name="ONNX Runtime", command=command, out=out / "q.onnx"))
    for name, cache in (("defaults", "empty"), ("defaults", "warm"), ("--effort fast --report none", "empty")):
        options = name.split() if name != "defaults" else ()
        out = folder / f"ours-{len(found)}"
        command = (*COMMAND, str(model), "--calibration", str(data), "--out", str(out), "--granularity", granularity)
        found.append(Job(name=name, command=(*command, *options), out=out / "model.onnx", cache=cache))
    return found


def one_round(jobs: Sequence[Job], index: int, folder: Path) -> None:
    """Runs each job once."""
    cache = folder / "cache"
    for job in jobs:
        if job.cache == "empty":
            cache = folder / f"cache-{index}-{job.out.parent.name}"
        environment = {"PTQJAX_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)} if job.cache else {}
        job.seconds.append(processor_seconds(job.command, environment))
        if job.cache:
            job.digests.add(hashlib.sha256(job.out.read_bytes()).hexdigest())
        print(f"  {job.name} {job.cache}: {job.seconds[-1]:.1f} s", file=sys.stderr, flush=True)


def rows(jobs: Sequence[Job], reference: Path, data: Data) -> Iterator[str]:
    """Yields a row of the table for each job."""
    aimet = next((job for job in jobs if job.name == "AIMET"), None)
    for job in jobs:
        ratio = ""
        if aimet is not None:
            ratios = [mine / theirs for mine, theirs in zip(job.seconds, aimet.seconds, strict=True)]
            ratio = f"{statistics.median(ratios):.2f}"
        figures = ""
        if job.cache or job.name == "ONNX Runtime":
            found = ptqjax.evaluate(job.out, data.evaluation, reference=reference)
            figures = f"{100 * (found.agreement or 0):.1f} | {found.sqnr or 0:.1f}"
        same = "yes" if len(job.digests) == 1 else "no" if job.digests else ""
        median = statistics.median(job.seconds)
        cache = f"{job.cache} cache" if job.cache else ""
        yield f"| {job.name} | {cache} | {median:.1f} | {ratio} | {figures or ' | '} | {same} |"


def samples_of(folder: Path, num_evaluation: int) -> Data:
    """Returns pictures to calibrate with, in a file, and others."""
    parts = calibration_and_evaluation(SHARED / "data" / "imagenet", num_calibration=128, num_evaluation=num_evaluation)
    calibration, evaluation = (list(batches(part, PREPROCESSINGS["tf"])) for part in parts)
    file = folder / "calibration.npz"
    np.savez(file, input=np.concatenate([batch["input"] for batch in calibration]))
    return Data(calibration=file, evaluation=evaluation)


def small_jobs(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields small networks with what follows `ptqjax quantize`; samples that there are none of are random numbers."""
    random = np.random.default_rng(0)
    other, digits = SHARED / "models" / "other", ROOT / "examples"
    yield "digits, per tensor", (
        str(digits / "digits.onnx"), "--calibration", str(digits / "digits_calibration.npz"), "--granularity", "tensor",
    )  # fmt: skip
    for name, model, shape, count in (
        ("mnist, 12 nodes", "mnist_cntk", (1, 28, 28), 64),
        ("super-resolution, 8 nodes", "superresolution_core_op18", (1, 72, 72), 32),
        ("dnsmos", "dnsmos_model_v8", (900, 120), 16),
        ("ultraface", "ultraface_rfb320_linzaer", (3, 240, 320), 32),
    ):
        path = other / f"{model}.onnx"
        key = ptqjax.read(path).graph.inputs[0].name
        file = folder / f"{model}.npz"
        arrays: dict[str, Any] = {key: random.normal(size=(count, *shape)).astype(np.float32)}
        np.savez(file, **arrays)
        yield name, (str(path), "--calibration", str(file))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aimet-python", type=Path, help="the interpreter of an environment with aimet-onnx")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--granularities", nargs="*", default=["channel", "tensor"])
    parser.add_argument("--num-evaluation", type=int, default=372)
    parser.add_argument("--no-small", action="store_true", help="leave the small networks out")
    arguments = parser.parse_args()
    print(header(also=f"median of {arguments.runs} rounds"))
    with tempfile.TemporaryDirectory() as temporary:
        for network in arguments.networks:
            data = samples_of(Path(temporary), arguments.num_evaluation)
            for granularity in arguments.granularities:
                folder = Path(temporary) / network / granularity
                model = SHARED / "models" / f"{network}.onnx"
                jobs = jobs_of(model, data.calibration, folder, granularity, arguments.aimet_python)
                for index in range(arguments.runs):
                    one_round(jobs, index, folder)
                print(f"\n**{network}**, per {granularity}\n")
                print("| job | | processor, s | of AIMET's | agreement, % | SQNR, dB | same bytes |")
                print("|---|---|---:|---:|---:|---:|---|")
                print("\n".join(rows(jobs, model, data)), flush=True)
        if not arguments.no_small:
            print("\n| small network, defaults, empty cache | processor, s |\n|---|---:|")
            for name, options in small_jobs(Path(temporary)):
                seconds = []
                for index in range(arguments.runs):
                    place = Path(temporary) / name / str(index)
                    environment = {"PTQJAX_CACHE_DIR": str(place / "cache"), "PYTHONPATH": str(ROOT)}
                    seconds.append(processor_seconds((*COMMAND, *options, "--out", str(place / "out")), environment))
                print(f"| {name} | {statistics.median(seconds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
