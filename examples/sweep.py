"""Compare many ways to quantize a network, and see which of them no other beats.

    python examples/sweep.py [--out DIR]

Twenty-four configurations of the digits network: widths of weights and activations, one scale for a weight or one for
each channel. `ptqjax.sweep` calibrates all of them in one pass and measures them by one compiled program, on pictures
that were not calibrated with; each costs milliseconds more. The table has what each gives and costs, and its front:
those that give more than all that cost as little. With --out, table.csv, table.json and front.svg stay.

It takes about half a minute of processor time, most of it compilation.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np

import ptqjax

HERE = Path(__file__).parent
BATCH = 199  # three of the evaluation's 597 pictures
WEIGHTS, ACTIVATIONS, GRANULARITIES = (
    ("int3", "int4", "int6", "int8"),
    ("uint4", "uint6", "uint8"),
    ("tensor", "channel"),
)


def configurations() -> dict[str, ptqjax.QuantizationConfig]:
    """Returns the configurations by name, as in "W4A8 channel"."""
    found = {}
    for weights, activations, granularity in itertools.product(WEIGHTS, ACTIVATIONS, GRANULARITIES):
        name = f"W{weights.removeprefix('int')}A{activations.removeprefix('uint')} {granularity}"
        found[name] = ptqjax.QuantizationConfig(
            weights=weights, activations=activations, granularity=granularity, scaling="ranges"
        )
    return found


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(description="Compare ways to quantize the digits network.")
    parser.add_argument("--out", type=Path, help="directory to write into; default: nothing is written")
    run(parser.parse_args().out)


def run(out: Path | None) -> None:
    """Prints the table, the front marked in it; writes both into `out` if that is given."""
    model = ptqjax.read(HERE / "digits.onnx")
    calibration = [{"input": np.load(HERE / "digits_calibration.npz")["input"]}]
    data = np.load(HERE / "digits_evaluation.npz")
    pictures = data["input"]
    evaluation = [{"input": pictures[start : start + BATCH]} for start in range(0, len(pictures), BATCH)]
    table = ptqjax.sweep(
        model,
        calibration,
        configurations(),
        metrics=("sqnr_db", "agreement", "top1"),
        evaluation=evaluation,
        labels=data["labels"],
    )
    front = table.pareto("sqnr_db", "model_bytes")
    print(f"{'':14} {'SQNR, dB':>9} {'as float, %':>12} {'top-1, %':>9} {'bytes':>7} {'Mbit-ops':>9}")
    for row in sorted(table, key=lambda row: row.model_bytes):
        mark = "*" if row in front else ""
        figures = f"{row['sqnr_db']:9.1f} {100 * row['agreement']:12.1f} {100 * row['top1']:9.1f}"
        print(f"{row.name:14} {figures} {row.model_bytes:7} {row.bit_operations / 1e6:9.1f} {mark}".rstrip())
    print(
        f"{len(table)} configurations, {len(table.batching)} compiled program; *: no other has more dB in as few bytes"
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        table.to_csv(out / "table.csv")
        table.to_json(out / "table.json")
        table.to_svg("sqnr_db", "model_bytes", out / "front.svg")


if __name__ == "__main__":
    main()
