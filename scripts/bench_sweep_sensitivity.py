"""Sensitivity: the rankings of one pass beside the exact ones, and what each takes; a part of `bench_sweep.py`.

Encodings are calibrated on the first samples for calibration, after folding; sensitivities are measured on the ones
behind them. No sample for evaluation is looked at. Each method runs twice: seconds of the second run are those without
compiling, the difference is compiling.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr

import ptqjax
from ptqjax.experiments.sensitivities import Sensitivity

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from imagenet_folder import PREPROCESSINGS, calibration_and_evaluation, decode, to_input  # noqa: E402

SHARED = Path(os.environ.get("PTQJAX_SHARED", ROOT.parent / "shared"))
BATCH = 16
NUM_CALIBRATION = 64
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "W8A8 per channel": {"weights": "int8", "granularity": "channel"},
    "W4A8 per channel": {"weights": "int4", "granularity": "channel"},
    "W8A8 per tensor": {"weights": "int8", "granularity": "tensor"},
}
"""By label: what is quantized how."""
QUESTIONS = (("one-pass", "on-only"), ("one-pass-off", "off-only"))
"""Estimates, each with the exact method of the same question."""

Batches = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A network, and on how many samples it is looked at."""

    name: str
    """The network's file."""
    num_exact: int
    """Samples of the exact methods."""
    num_estimated: int
    """Samples of the estimates: the first ones of these."""


CASES = (
    Case(name="resnet20_cifar10", num_exact=64, num_estimated=32),
    Case(name="mobilenet_v2_1.0_224", num_exact=32, num_estimated=16),
)


def lines(*, quick: bool) -> Iterator[str]:
    """Yields a table with a row for each network, setting and question; `quick`: one network and setting."""
    yield "### Sensitivity"
    yield ""
    yield (
        "| network | settings | estimate, samples | exact, samples | groups | Spearman | of the exact halves | "
        "seconds, estimate | seconds, exact | times faster | compiling, s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for case in CASES[:1] if quick else CASES:
        model, calibration, samples = load(case)
        for label in list(SETTINGS)[:1] if quick else SETTINGS:
            encodings = ptqjax.calibrate(model, calibration, ptqjax.QuantizationConfig(**SETTINGS[label]))
            for methods in QUESTIONS:
                yield f"| {case.name} | {label} | {row(case, model, samples, encodings, methods)} |"
        jax.clear_caches()


def row(case: Case, model: ptqjax.Model, samples: Batches, encodings: Any, methods: tuple[str, str]) -> str:
    """Returns the cells of one question behind the first two."""
    run = partial(ptqjax.sensitivity, model, encodings=encodings)
    few = samples[: case.num_estimated // BATCH]
    estimate, first, second = timed(partial(run, few, method=methods[0]))
    exact, first_exact, second_exact = timed(partial(run, samples, method=methods[1]))
    half = len(samples) // 2
    halves = [run(part, method=methods[1]) for part in (samples[:half], samples[half:])]
    cells = (
        f"{methods[0]}, {case.num_estimated}",
        f"{methods[1]}, {case.num_exact}",
        len(exact),
        f"{correlation(estimate, exact):.2f}",
        f"{correlation(*halves):.2f}",
        f"{second:.2f}",
        f"{second_exact:.1f}",
        f"{second_exact / second:.0f}",
        f"{first - second:.0f}, {max(first_exact - second_exact, 0):.0f}",
    )
    return " | ".join(map(str, cells))


def timed(run: Any) -> tuple[tuple[Sensitivity, ...], float, float]:
    """Returns what `run` gives, and the seconds of its first and its second call."""
    start = time.perf_counter()
    run()
    between = time.perf_counter()
    found = run()
    return found, between - start, time.perf_counter() - between


def correlation(one: Sequence[Sensitivity], other: Sequence[Sensitivity]) -> float:
    """Returns Spearman's correlation of the noises."""
    found: Any = spearmanr([each.noise for each in one], [each.noise for each in other])
    return float(found.statistic)


def load(case: Case) -> tuple[ptqjax.Model, Batches, Batches]:
    """Returns the folded network, the batches to calibrate with, and the ones behind them."""
    model, _ = ptqjax.fold_batch_norms(ptqjax.read(SHARED / "models" / f"{case.name}.onnx"))
    count = NUM_CALIBRATION + case.num_exact
    if case.name.endswith("cifar10"):
        samples = np.load(SHARED / "data" / "cifar10" / "calibration.npz")["input"][:count]
    else:
        samples = pictures(count)
    batches = [{"input": samples[start : start + BATCH]} for start in range(0, count, BATCH)]
    return model, batches[: NUM_CALIBRATION // BATCH], batches[NUM_CALIBRATION // BATCH :]


def pictures(count: int) -> np.ndarray:
    """Returns the first pictures of ImageNet for calibration, as networks of TensorFlow take them."""
    preprocessing = PREPROCESSINGS["tf"]
    found, _ = calibration_and_evaluation(SHARED / "data" / "imagenet", num_calibration=count, num_evaluation=1)
    crop, short_side = preprocessing.crop, preprocessing.short_side
    return to_input(
        np.stack([decode(picture.path, crop=crop, short_side=short_side) for picture in found]), preprocessing
    )
