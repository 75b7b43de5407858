"""Tells which quantizers of the digits network hurt, from one pass forward and back, and what widening them is worth.

    python examples/sensitivity.py

Per tensor and without equalization: so a few tensors bring nearly all of the noise. Those are widened to 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import ptqjax
from ptqjax.experiments.sensitivities import Sensitivity, ranking

FOLDER = Path(__file__).parent
CONFIG = ptqjax.QuantizationConfig(granularity="tensor", ranges="min-max")
NUM_WIDENED = 3
WIDTH = 40
"""Of the longest bar, in letters."""


def bars(found: Sequence[Sensitivity]) -> list[str]:
    """Returns a line for each group: its SQNR alone, and a bar longer the louder it is, in dB."""
    heard = [each.sqnr_db for each in found if each.noise > 0]  # what adds no noise has infinite SQNR, and no bar
    lines = []
    for each in found:
        length = round(WIDTH * (max(heard) - each.sqnr_db) / (max(heard) - min(heard) or 1)) if each.noise > 0 else 0
        lines.append(f"{each.name:22} {each.kind:10} {each.sqnr_db:6.1f} dB  {'#' * length}")
    return lines


def main() -> None:
    """Ranks the groups, prints them, and measures what widening the loudest is worth."""
    model, _ = ptqjax.fold_batch_norms(ptqjax.read(FOLDER / "digits.onnx"))
    samples = np.load(FOLDER / "digits_calibration.npz")["input"]
    batches = [{"input": samples[:64]}, {"input": samples[64:]}]
    encodings = ptqjax.calibrate(model, batches, CONFIG)

    found = ranking(ptqjax.sensitivity(model, batches, encodings))
    print("\n".join(bars(found)))

    loud = found[:NUM_WIDENED]
    rules = tuple(
        ptqjax.Rule(tensors=each.tensors, dtype="int16" if each.kind == "weight" else "uint16") for each in loud
    )
    widened = ptqjax.calibrate(model, batches, replace(CONFIG, rules=rules))
    for label, of in (("all at 8 bits", encodings), (f"{', '.join(each.name for each in loud)} at 16", widened)):
        print(f"{label}: {output_sqnr(model, of):.1f} dB on pictures that were not looked at")


def output_sqnr(model: ptqjax.Model, encodings: dict[str, ptqjax.Encoding]) -> float:
    """Returns the SQNR of the outputs on the evaluation pictures, in dB."""
    pictures = np.load(FOLDER / "digits_evaluation.npz")["input"]
    simulated = ptqjax.simulate(model, encodings)
    found = ptqjax.evaluate(
        lambda inputs: simulated(model.params, encodings, inputs),
        [{"input": pictures}],
        reference=lambda inputs: ptqjax.apply(model.graph, model.params, inputs),
    )
    assert found.sqnr is not None  # noqa: S101 - there is a reference
    return found.sqnr


if __name__ == "__main__":
    main()
