"""Times equalization of MobileNetV2: closed form against AIMET's single pass, least predicted noise, learned.

    python scripts/bench_equalization.py [--aimet-python /path/to/an/aimet/environment/bin/python] [--learned]

The closed form (folding, constant channels, absorption, scaling to convergence) runs in NumPy and compiles nothing;
runs of it and of AIMET's `equalize_model` alternate, from a model in memory each. Scales of least noise and learned
ones are timed in a second run in the same process, the first of which compiled; the first is printed beside it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from bench_header import header
from bench_simulation import SHARED, SIDE, answer_of, describe

import ptqjax
from ptqjax.fit import Learning, learn_scales
from ptqjax.transforms import fold_batch_norms, prepare
from ptqjax.transforms.noise import scale_for_noise

_SAMPLES = 32  # random pictures: what learning costs does not depend on what they show


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds of a call, and the processor's over all cores."""
    start, cpu_start = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - cpu_start


def against_aimet(model: ptqjax.Model, path: Path, python: Path, rounds: int) -> None:
    """Prints the closed form and AIMET's pass, in alternation."""
    command = [str(python), str(SIDE), "equalize", str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        versions = answer_of(process)
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(timed(lambda: ptqjax.equalize(model)))
            print(file=process.stdin, flush=True)
            answer = answer_of(process)
            theirs.append((answer["seconds"], answer["cpu_seconds"]))
        if process.stdin is not None:
            process.stdin.close()
    wall, cpu = (statistics.median(b[i] / a[i] for a, b in zip(ours, theirs, strict=True)) for i in (0, 1))
    print(f"ptqjax, closed form to convergence: {describe(ours)}")
    print(f"AIMET {versions['aimet_onnx']}, one pass: {describe(theirs)}")
    print(f"AIMET takes {wall:.2f} times as long (processor time: {cpu:.2f} times), median of {rounds} pairs")


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "mobilenet_v2_1.0_224.onnx")
    parser.add_argument("--aimet-python", type=Path, help="interpreter of an environment with aimet-onnx")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--learned", action="store_true", help="also learned scales (minutes)")
    arguments = parser.parse_args()
    print(header())
    model = ptqjax.read(arguments.model)
    ptqjax.equalize(model)
    if arguments.aimet_python:
        against_aimet(model, arguments.model, arguments.aimet_python, arguments.rounds)
    prepared, _ = prepare(fold_batch_norms(model)[0])
    first, second = (timed(lambda: scale_for_noise(prepared)) for _ in range(2))
    print(f"scales of least predicted noise: {second[0]:.1f} s; the first time, with compilation, {first[0]:.1f} s")
    if not arguments.learned:
        return
    spec = model.graph.inputs[0]
    shape = [size if isinstance(size, int) else _SAMPLES for size in spec.shape or ()]
    data = {spec.name: np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)}
    config, scaled = ptqjax.QuantizationConfig(granularity="tensor"), scale_for_noise(prepared)[0]
    short, long = (timed(lambda n=n: learn_scales(scaled, [data], config, Learning(num_steps=n))) for n in (10, 60))
    step, steps = (long[0] - short[0]) / 50, Learning().num_steps
    print(
        f"learned scales, {steps} steps of 8 samples: {steps * step:.0f} s, and {short[0] - 10 * step:.0f} s to compile"
    )


if __name__ == "__main__":
    main()
