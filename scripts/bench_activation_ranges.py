"""Prints how well activations of few bits do with each scheme of ranges, on calibration samples that were held back.

    python scripts/bench_activation_ranges.py [--models resnet20_cifar10 mobilenet_v1_0.25_224]

Weights have 8 bits a channel, rounded to nearest, nothing is scaled. Of 128 calibration samples the even ones give
ranges and corrections; a cell is SQNR of the logits in dB / agreement with the float file in %, of the exported file in
ONNX Runtime, on the odd ones: evaluation samples take no part, so that a default may be chosen by it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from bench_accuracy import BATCH, NETWORKS, Task, figures, known_task, run
from bench_header import header

import ptqjax

SCHEMES = ("min-max", "sqnr", "mse", "percentile:99.9")
WIDTHS = (4, 6)


def cell(task: Task, held: Task, activations: str, ranges: str) -> str:
    """Returns what one file gives on the samples held back."""
    model = ptqjax.read(task.model)
    name = model.graph.inputs[0].name
    batches = [{name: task.calibration[i : i + BATCH]} for i in range(0, len(task.calibration), BATCH)]
    config = ptqjax.QuantizationConfig(
        activations=activations, activation_ranges=ranges, equalize=False, rounding="nearest"
    )
    result = ptqjax.quantize(model, batches, config)
    with tempfile.TemporaryDirectory() as folder:
        ptqjax.export(result.model, result.encodings, folder, "model")
        found = figures(run(Path(folder) / "model.onnx", held), run(task.model, held), None)
    return f"{found['sqnr_db']:.1f} / {100 * found['agreement']:.1f}"


def halves(name: str) -> tuple[Task, Task]:
    """Returns the task with the even calibration samples, and one whose samples to evaluate on are the odd ones."""
    task = known_task(name, [128, BATCH])
    odd = task.calibration[1::2]

    def batches() -> Iterator[np.ndarray]:
        return (odd[start : start + BATCH] for start in range(0, len(odd), BATCH))

    return replace(task, calibration=task.calibration[::2]), replace(task, evaluation=batches)


def main() -> None:
    """Measures and prints what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=["resnet20_cifar10", "mobilenet_v1_0.25_224"])
    arguments = parser.parse_args()
    print(header(), f"| network, activations | {' | '.join(SCHEMES)} |", f"|---|{'---|' * len(SCHEMES)}", sep="\n")
    for name in arguments.models:
        task, held = halves(name)
        for width in WIDTHS:
            cells = " | ".join(cell(task, held, f"uint{width}", scheme) for scheme in SCHEMES)
            print(f"| {name}, {width} bits | {cells} |", flush=True)


if __name__ == "__main__":
    main()
