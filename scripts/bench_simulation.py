"""Times the simulated forward of MobileNetV2, ours against AIMET's, in alternation on the same machine.

    python scripts/bench_simulation.py [--aimet-python /path/to/an/aimet/environment/bin/python]

Both have batch norms folded, W8A8 per channel, and quantize the weights in every forward. Ours is compiled and warmed
up before, the time of which is printed apart; then pairs of runs alternate, so that both see the same machine, and the
median is reported. On a machine that is busy with other things, compare the processor's seconds, over all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from bench_header import header

import ptqjax

SHARED = Path(os.environ.get("PTQJAX_SHARED", Path(__file__).resolve().parents[2] / "shared"))
Forward: TypeAlias = Callable[[], tuple[float, float]]
"""Runs one simulated forward; returns its seconds, and the processor's seconds over all cores."""
SIDE = Path(__file__).with_name("aimet_side.py")


def our_forward(path: Path, samples: np.ndarray) -> tuple[Forward, float]:
    """Returns our forward, and the seconds of its first run."""
    model, _ = ptqjax.fold_batch_norms(ptqjax.read(path))
    batch = {model.graph.inputs[0].name: samples}
    encodings = ptqjax.calibrate(model, [batch], ptqjax.QuantizationConfig(ranges="min-max"))
    simulate = ptqjax.simulate(model, encodings)
    params, encodings, batch = jax.device_put((model.params, encodings, batch))

    def forward() -> tuple[float, float]:
        start, cpu_start = time.perf_counter(), time.process_time()
        jax.block_until_ready(simulate(params, encodings, batch))
        return time.perf_counter() - start, time.process_time() - cpu_start

    return forward, forward()[0]


@contextmanager
def aimet_forward(python: Path, model: Path, samples: np.ndarray) -> Iterator[tuple[Forward, str]]:
    """Yields AIMET's forward, in a process of its own, and its versions."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.npy"
        np.save(file, samples)
        command = [str(python), str(SIDE), "forward", str(model), str(file)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

            def forward() -> tuple[float, float]:
                print(file=process.stdin, flush=True)
                answer = answer_of(process)
                return answer["seconds"], answer["cpu_seconds"]

            versions = answer_of(process)
            yield forward, ", ".join(f"{name} {version}" for name, version in versions.items())
            if process.stdin is not None:
                process.stdin.close()


def answer_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Returns the next line of JSON that the other process writes."""
    for line in process.stdout or ():
        if line.startswith("{"):  # AIMET prints on stdout as well
            return json.loads(line)
    raise RuntimeError(f"{process.args} ended without an answer; its messages stand above")


def describe(runs: list[tuple[float, float]]) -> str:
    """Returns the median and the quartiles in milliseconds, and the median of the processor's time."""
    low, middle, high = (1000 * value for value in statistics.quantiles([seconds for seconds, _ in runs], n=4))
    cpu = 1000 * statistics.median(cpu for _, cpu in runs)
    return f"{middle:.0f} ms (quartiles {low:.0f} to {high:.0f}; processor {cpu:.0f} ms)"


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "mobilenet_v2_1.0_224.onnx")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10, help="pairs of runs; 2 or more")
    parser.add_argument("--aimet-python", type=Path, help="interpreter of an environment with aimet-onnx")
    arguments = parser.parse_args()
    shape = [size for size in ptqjax.read(arguments.model).graph.inputs[0].shape or () if isinstance(size, int)]
    samples = np.random.default_rng(0).uniform(-1, 1, (arguments.batch, *shape[-3:])).astype(np.float32)
    load = f"load average before {os.getloadavg()[0]:.1f}"
    ours, first = our_forward(arguments.model, samples)
    print(f"{arguments.model.name}, batch {arguments.batch}, simulated at W8A8; {arguments.repeats} runs each")
    if arguments.aimet_python is None:
        print(header(also=load))
        print_ours([ours() for _ in range(arguments.repeats)], first)
        return
    with aimet_forward(arguments.aimet_python, arguments.model, samples) as (theirs, versions):
        pairs = [(ours(), theirs()) for _ in range(arguments.repeats)]
    print(header(also=f"{versions}; {load}"))
    print_ours([pair[0] for pair in pairs], first)
    print(f"AIMET  {describe([pair[1] for pair in pairs])}")
    wall, cpu = (statistics.median(theirs[i] / ours[i] for ours, theirs in pairs) for i in range(2))
    print(f"AIMET / ptqjax: {wall:.2f} (median of pairs; processor {cpu:.2f})")


def print_ours(runs: list[tuple[float, float]], first: float) -> None:
    """Prints our line."""
    print(f"ptqjax {describe(runs)}, first run {first:.1f} s (compilation)")


if __name__ == "__main__":
    main()
