"""Mixed precision: agreement with the float model at a mean width, against the uniform configuration of that width."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bench_accuracy import BATCH, known_task

import ptqjax
from ptqjax.experiments.costs import cost_model
from ptqjax.experiments.engine import Variant, evaluate_variants

NETWORKS = ("mobilenet_v2_1.0_224", "resnet20_cifar10")
NARROWEST = 3  # bits of weights; activations have one more
BARE = {"equalize": False, "correct": "none"}
"""Batch norms folded, and nothing else: what tools call uniform quantization."""

Batches = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    """A uniform configuration, and what its widths are on average."""

    label: str
    """What it is called."""
    bits: int
    """The width of weights, and mean of those of mixed ones."""
    activations: int
    """The same of activations."""
    settings: Mapping[str, Any]
    """Settings besides."""
    widest: int = 8
    """The widest candidate."""

    def config(self, weights: int, activations: int) -> ptqjax.QuantizationConfig:
        """Returns the configuration with uniform widths."""
        widths = {"weights": f"int{weights}", "activations": f"uint{activations}"}
        return ptqjax.QuantizationConfig(**widths, **{"scaling": "noise", **self.settings})

    @property
    def budget(self) -> ptqjax.Budget:
        """What the mixed widths may be on average; activations of 8 bits stay so."""
        limits = {"mean_weight_bits": self.bits}
        if self.activations < 8:  # noqa: PLR2004 - those are not chosen
            limits["mean_activation_bits"] = self.activations
        return ptqjax.Budget(**limits)


CASES = (
    _Case(label="W6A8 per channel", bits=6, activations=8, settings={}),
    _Case(label="W6A8 per tensor", bits=6, activations=8, settings={"granularity": "tensor"}),
    _Case(label="W6A8 per tensor, folded only", bits=6, activations=8, settings={"granularity": "tensor", **BARE}),
    _Case(
        label="W6A8 per tensor, folded only, up to 10 bits",
        bits=6,
        activations=8,
        settings={"granularity": "tensor", **BARE},
        widest=10,
    ),
    _Case(label="W6A6 per channel, up to 10 bits", bits=6, activations=6, settings={}, widest=10),
    _Case(
        label="W6A6 per tensor, folded only, up to 10 bits",
        bits=6,
        activations=6,
        settings={"granularity": "tensor", **BARE},
        widest=10,
    ),
    _Case(label="W5A8 per channel", bits=5, activations=8, settings={}),
    _Case(label="W4A8 per channel", bits=4, activations=8, settings={}),
)
"""What is compared: with equalization (for noise) and bias correction, unless the label says otherwise."""


def lines(*, quick: bool) -> Iterator[str]:
    """Yields the table; `quick`: one case of the smaller network on a few samples."""
    yield "Agreement with the float model in % / SQNR in dB, on samples that took no part in choosing; widths are"
    yield "chosen on 128 calibration samples. Ceiling: the same settings, 8 bits for all. Seconds: the whole search."
    yield ""
    yield "| network | configuration | uniform | mixed | gain, points | ceiling | mean bits (W / A) | seconds |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in NETWORKS[1:] if quick else NETWORKS:
        task = known_task(name, (32, 64) if quick else (128, None))
        model = ptqjax.read(task.model)
        key = model.graph.inputs[0].name
        starts = range(0, len(task.calibration), BATCH)
        calibration = [{key: task.calibration[start : start + BATCH]} for start in starts]
        evaluation = [{key: batch} for batch in task.evaluation()]
        for case in CASES[4:5] if quick else CASES:
            yield _row(name, case, model, calibration, evaluation)


def _row(name: str, case: _Case, model: ptqjax.Model, calibration: Batches, evaluation: Batches) -> str:
    start = time.perf_counter()
    uniform = case.config(case.bits, case.activations)
    found = ptqjax.mixed_precision(
        model,
        calibration,
        uniform,
        budget=case.budget,
        widths=range(NARROWEST, case.widest + 1),
        activation_widths=range(NARROWEST + 1, case.widest + 1),
        points=0,
    )
    seconds = time.perf_counter() - start
    configs = {"uniform": uniform, "mixed": found.config, "ceiling": case.config(8, 8)}
    results = {label: ptqjax.quantize(model, calibration, config) for label, config in configs.items()}
    variants = [
        Variant(name=label, encodings=result.encodings, params=result.model.params, graph=result.model.graph)
        for label, result in results.items()
    ]
    values = dict(zip(results, evaluate_variants(model, variants, evaluation).values, strict=True))
    costs = cost_model(results["mixed"].model, calibration[0]).costs(results["mixed"].encodings)
    cells = {label: f"{100 * each['agreement']:.1f} / {each['sqnr_db']:.1f}" for label, each in values.items()}
    gain = 100 * (values["mixed"]["agreement"] - values["uniform"]["agreement"])
    means = f"{costs.mean_weight_bits:.3f} / {costs.mean_activation_bits:.3f}"
    return (
        f"| {name} | {case.label} | {cells['uniform']} | {cells['mixed']} | {gain:+.1f} | {cells['ceiling']} | {means} "
        f"| {seconds:.0f} |"
    )
