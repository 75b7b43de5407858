"""Sweeps: what 64 configurations of MobileNetV2 cost, against simulated forwards and against quantize and evaluate."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from bench_accuracy import BATCH, known_task

import ptqjax
from ptqjax.experiments.engine import Variant, evaluate_variants
from ptqjax.ranges.calibrate import calibrate_each

ALONE = slice(5, None, 10)  # which calls of quantize and evaluate are made: all schemes and types of
# activations, half of them per tensor
ROUNDS = 3

Batches = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    """What is measured."""

    name: str
    """The network's file."""
    model: ptqjax.Model
    """It, as it was read: the pipeline folds it."""
    calibration: Batches
    """Pictures that calibrate."""
    evaluation: Batches
    """Others, that are measured on."""
    configs: Mapping[str, ptqjax.QuantizationConfig]
    """The configurations."""


def configurations() -> dict[str, ptqjax.QuantizationConfig]:
    """Returns 64 of 8 types of weights, 4 of activations, 4 schemes, a scale per channel or per tensor.

    Per channel all else is the default, scaling "auto" included; per tensor that would learn the scales, for minutes
    each: there they are scaled for "ranges".
    """
    weights = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "uint8")
    activations, schemes = ("uint4", "uint6", "uint8", "uint16"), ("sqnr", "min-max", "mse", "percentile:99.99")
    found = {}
    for number, (granularity, a, w) in enumerate(itertools.product(("channel", "tensor"), activations, weights)):
        scheme = schemes[(number + number // len(weights)) % len(schemes)]
        scaling = "auto" if granularity == "channel" else "ranges"
        found[f"{w} {a} {scheme} {granularity}"] = ptqjax.QuantizationConfig(
            weights=w, activations=a, ranges=scheme, granularity=granularity, scaling=scaling
        )
    return found


def lines(*, quick: bool) -> Iterator[str]:
    """Yields the tables, a line at a time."""
    case = _case(quick=quick)
    yield f"## Sweeps: {case.name}, {len(case.configs)} configurations, {BATCH * len(case.evaluation)} pictures"
    yield ""
    yield "| | seconds |"
    yield "|---|---|"
    yield from _evaluation(case, rounds=1 if quick else ROUNDS)
    if not quick:  # one search takes minutes
        yield from _whole(case, "as listed", alone=ALONE)
    ranges = {name: replace(config, scaling="ranges") for name, config in case.configs.items()}
    alone = slice(None, None, 2) if quick else ALONE
    yield from _whole(replace(case, configs=ranges), "all scaled for ranges: nothing is chosen", alone=alone)


def _case(*, quick: bool) -> _Case:
    name, count = ("mobilenet_v1_0.25_224", BATCH) if quick else ("mobilenet_v2_1.0_224", 64)
    task = known_task(name, counts=(count, count))
    model = ptqjax.read(task.model)
    (spec,) = model.graph.inputs
    configs = configurations()
    chosen = list(configs)[:: 16 if quick else 1]
    return _Case(
        name=name,
        model=model,
        calibration=[{spec.name: task.calibration[i : i + BATCH]} for i in range(0, count, BATCH)],
        evaluation=[{spec.name: batch} for batch in task.evaluation()],
        configs={name: configs[name] for name in chosen},
    )


def _evaluation(case: _Case, *, rounds: int) -> Iterator[str]:
    """Yields evaluation by the engine, and as many simulated forwards over the same pictures, in turn."""
    folded, _ = ptqjax.fold_batch_norms(case.model)
    found = calibrate_each(folded, case.calibration, list(case.configs.values()))
    variants = [Variant(name=name, encodings=each) for name, (each, _) in zip(case.configs, found, strict=True)]
    params, batches = jax.device_put((dict(folded.params), list(case.evaluation)))
    runs = [(ptqjax.simulate(folded, v.encodings), jax.device_put(v.encodings)) for v in variants]

    def forwards() -> None:
        for run, encodings in runs:
            for batch in batches:
                jax.block_until_ready(run(params, encodings, batch))

    def engine() -> Any:
        return evaluate_variants(folded, variants, case.evaluation)

    first, _ = _seconds(engine)
    for run, encodings in runs:  # those that have another structure are compiled
        jax.block_until_ready(run(params, encodings, batches[0]))
    pairs = [(_seconds(engine), _seconds(forwards)[0]) for _ in range(rounds)]
    ours = [found[0] for found, _ in pairs]
    compiling = first - statistics.median(ours)
    ratios = [mine[0] / theirs for mine, theirs in pairs]
    programs = pairs[0][0][1].num_programs
    yield f"| evaluation, {programs} program(s) | {statistics.median(ours):.1f} |"
    yield f"| its compilation | {compiling:.1f} |"
    yield f"| {len(runs)} simulated forwards | {statistics.median(theirs for _, theirs in pairs):.1f} |"
    yield f"| **quotient** (median of {rounds}; at most 1.15) | **{statistics.median(ratios):.3f}** |"


def _whole(case: _Case, what: str, *, alone: slice) -> Iterator[str]:
    """Yields a sweep, all included, and calls of quantize and evaluate; of these some, `alone`, are made, twice.

    The first time they compile what all calls in one process would: that counts once. The second time tells what each
    of the others takes.
    """
    jax.clear_caches()
    swept, table = _seconds(
        lambda: ptqjax.sweep(case.model, case.calibration, case.configs, evaluation=case.evaluation)
    )
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in table.seconds.items())
    yield f"| sweep, {what}, all included ({parts}) | {swept:.1f} |"
    jax.clear_caches()
    some, count = list(case.configs.values())[alone], len(case.configs)
    cold, warm = ([_seconds(lambda config=config: _alone(case, config))[0] for config in some] for _ in range(2))
    whole = sum(cold) + statistics.mean(warm) * (count - len(some))
    how = f"{len(some)} made: {statistics.mean(cold):.1f} each at first, {statistics.mean(warm):.1f} the second time"
    yield f"| {count} calls of quantize and evaluate ({how}) | {whole:.1f} |"
    yield f"| **quotient** (at least 5) | **{whole / swept:.1f}** |"


def _alone(case: _Case, config: ptqjax.QuantizationConfig) -> Any:
    result = ptqjax.quantize(case.model, case.calibration, config)
    run = ptqjax.simulate(result.model, result.encodings)
    return ptqjax.evaluate(
        lambda x: run(result.model.params, result.encodings, x),
        case.evaluation,
        reference=lambda x: ptqjax.apply(case.model.graph, case.model.params, x),
    )


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found
