"""Prints, per network and batch size, how long the float forward pass takes here and in ONNX Runtime.

The two take turns in one process, on the same inputs and cores; the median counts. Compilation is timed apart.

    .venv/bin/python scripts/bench_lowering.py ../shared/models/*.onnx --batch 1 --batch 16
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

import ptqjax
from ptqjax.ir import Graph

_WARM_UPS = 2


def main() -> None:
    """Prints a line per network and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="ONNX files")
    parser.add_argument("--batch", action="append", type=int, help="batch size; may be given several times")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), {os.cpu_count()} cores, jax {jax.__version__}", end=", ")
    print(f"onnxruntime {onnxruntime.__version__} (CPU); medians of {options.repeats} runs in turn")
    print(
        f"{'network':34} {'batch':>5} {'compile s':>9} {'ptqjax ms':>9} {'ORT ms':>8} {'ratio':>6} {'difference':>10}"
    )
    for path in options.models:
        for batch in options.batch or [1, 16]:
            print(_line(path, batch, options.repeats), flush=True)


def _line(path: Path, batch: int, repeats: int) -> str:
    model = ptqjax.read(path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    inputs = _random_inputs(model.graph, batch)
    params = jax.device_put(model.params)

    def ours() -> Any:
        return jax.block_until_ready(ptqjax.apply(model.graph, params, inputs))

    def theirs() -> Any:
        return session.run(None, inputs)

    first, outputs = _timed(ours)
    for _ in range(_WARM_UPS):
        ours()
        theirs()
    times = [(_timed(ours)[0], _timed(theirs)[0]) for _ in range(repeats)]
    own, other = (statistics.median(column) for column in zip(*times, strict=True))
    name = model.graph.outputs[0].name
    expected = np.asarray(session.run([name], inputs)[0])
    difference = np.abs(np.asarray(outputs[name]) - expected).max() / np.abs(expected).max()
    compilation = first - own
    return (
        f"{path.stem:34} {batch:5} {compilation:9.2f} {1e3 * own:9.1f} {1e3 * other:8.1f} "
        f"{own / other:6.2f} {difference:10.1e}"
    )


def _random_inputs(graph: Graph, batch: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        spec.name: generator.normal(
            size=[size if isinstance(size, int) else batch for size in spec.shape or ()]
        ).astype(spec.dtype)
        for spec in graph.inputs
    }


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
