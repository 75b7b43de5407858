"""Prints, per network and batch size, how long the float forward pass takes here and in ONNX Runtime.

The two take turns in one process, on the same inputs and cores; medians count, and the ratio is the median of the
pairs' ratios. Compilation (the first run less a later one) is timed apart. Networks are ONNX files, or names of those
that `networks.py` builds with random weights:

    .venv/bin/python scripts/bench_lowering.py mobilenet_v2 resnet18 resnet50 ../shared/models/*.onnx --batch 16

On a machine that is busy with other things, compare the processor's seconds, over all cores: ONNX Runtime's threads do
not spin here while they wait.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnxruntime
from bench_header import header
from networks import NETWORKS

import ptqjax
from ptqjax.ir import Graph

_WARM_UPS = 2


def main() -> None:
    """Prints a line per network and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", help=f"ONNX files, or names of built ones: {', '.join(NETWORKS)}")
    parser.add_argument("--batch", action="append", type=int, help="batch size; may be given several times")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images of built networks")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each")
    options = parser.parse_args()
    print(header(also=f"load average before {os.getloadavg()[0]:.1f}"))
    print(f"medians of {options.repeats} runs in turn; in parentheses the processor's time; ratio: ptqjax / ORT")
    print("| network | batch | compile s | ptqjax ms | ORT ms | ratio | difference |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for network in options.networks:
        name, content = _content(network, options.size)
        for batch in options.batch or [1, 16]:
            print(f"| {name} | {batch} | {_columns(content, batch, options.repeats)} |", flush=True)


def _content(network: str, size: int) -> tuple[str, bytes]:
    """Returns the name and the bytes of an ONNX file, read or built."""
    if network in NETWORKS:
        return network, NETWORKS[network](size=size).SerializeToString()
    return Path(network).stem, Path(network).read_bytes()


def _columns(content: bytes, batch: int, repeats: int) -> str:
    model = ptqjax.read(content)
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    inputs = _random_inputs(model.graph, batch)
    params = jax.device_put(model.params)

    def ours() -> Any:
        return jax.block_until_ready(ptqjax.apply(model.graph, params, inputs))

    def theirs() -> Any:
        return session.run(None, inputs)

    (first, first_cpu), outputs = _timed(ours)
    for _ in range(_WARM_UPS):
        ours()
        theirs()
    pairs = [(_timed(ours)[0], _timed(theirs)[0]) for _ in range(repeats)]
    (own, own_cpu), (other, other_cpu) = (
        [1e3 * statistics.median(pair[side][clock] for pair in pairs) for clock in range(2)] for side in range(2)
    )
    ratio, ratio_cpu = (statistics.median(ours[clock] / theirs[clock] for ours, theirs in pairs) for clock in range(2))
    name = model.graph.outputs[0].name
    expected = np.asarray(session.run([name], inputs)[0])
    difference = np.abs(np.asarray(outputs[name]) - expected).max() / np.abs(expected).max()
    compilation = f"{first - own / 1e3:.1f} ({first_cpu - own_cpu / 1e3:.1f})"
    return (
        f"{compilation} | {own:.0f} ({own_cpu:.0f}) | {other:.0f} ({other_cpu:.0f}) | "
        f"{ratio:.2f} ({ratio_cpu:.2f}) | {difference:.0e}"
    )


def _random_inputs(graph: Graph, batch: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        spec.name: generator.normal(
            size=[size if isinstance(size, int) else batch for size in spec.shape or ()]
        ).astype(spec.dtype)
        for spec in graph.inputs
    }


def _timed(function: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Returns the seconds by the clock and of the processor, and what the function gave."""
    start, cpu_start = time.perf_counter(), time.process_time()
    result = function()
    return (time.perf_counter() - start, time.process_time() - cpu_start), result


if __name__ == "__main__":
    main()
