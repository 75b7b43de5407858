"""Prints how the simulation agrees with ONNX Runtime on the real models, tensor by tensor, as Markdown.

    python scripts/bench_validation.py > table.md                        all models, per tensor and per channel
    python scripts/bench_validation.py --models resnet20_cifar10 --granularities tensor --num-samples 16
    python scripts/bench_validation.py --json findings.jsonl             each finding as a line as well, in full

Each model is folded, equalized (in closed form), calibrated by min-max, exported, passed through ONNX's checker with
full type and shape inference, and validated on samples that took no part in calibration: pictures where there are
some, else random inputs of the sizes that the file declares. "Alone" is a tensor recomputed from ONNX Runtime's own
integers before it, "end to end" one computed from the inputs; each counts the integers that are equal. The process ends
with 1 where a bar is missed or a model fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench_accuracy import NETWORKS, ROOT, SHARED, arrays_task, known_task
from bench_header import header

import ptqjax
from ptqjax.agreement import OperatorSummary, Validation
from ptqjax.transforms.saturation import Saturation

sys.path.insert(0, str(ROOT))
from tests.real_files import FILES, batches_of, random_inputs

GRANULARITIES = ("tensor", "channel")
CLASSIFIERS = (
    "mobilenet_v2_1.0_224",
    "mobilenet_v1_0.25_224",
    "squeezenet_v1.1",
    "resnet20_cifar10",
    "mlperf_resnet8_cifar10",
    "mlperf_vww_mobilenet_v1_0.25_96",
)
"""Fully convolutional classifiers: every tensor is held to `LOWEST_END_TO_END`."""
LARGEST_ALONE = 1
"""The largest distance that a group alone may have, in steps."""
LOWEST_ALONE = 0.9999
"""The lowest fraction of equal integers that a group alone may have."""
LOWEST_END_TO_END = 0.99
"""The lowest fraction of equal integers that a tensor of `CLASSIFIERS` may have, computed from the inputs."""

Batch = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What came of one model, quantized in one way."""

    model: str
    """The file's name under ../shared/models."""
    granularity: str
    """What shares a scale in a weight."""
    opset: int
    """Of the file as it was read."""
    exported_opset: int
    """Of the file that was written."""
    found: Validation
    """What `validate` found."""


def samples(name: str, model: ptqjax.Model, num: int) -> tuple[list[Batch], list[Batch]]:
    """Returns `num` samples to calibrate a model with and `num` others to validate it on, in batches."""
    if name == "mlperf_resnet8_cifar10":
        task = arrays_task(SHARED / "models", SHARED / "data" / "cifar10", counts=(num, num))
        return [{"input": _rgb(task.calibration)}], [{"input": _rgb(batch)} for batch in task.evaluation()]
    if name in NETWORKS or name.endswith("cifar10"):
        task = known_task(name, (num, num))
        return [{"input": task.calibration}], [{"input": batch} for batch in task.evaluation()]
    inputs = random_inputs(model.graph, FILES[name])
    if len(batches_of(model.graph)) > 1:
        return [inputs(num)], [inputs(num + 1)]
    return [inputs(seed) for seed in range(num)], [inputs(seed) for seed in range(num, 2 * num)]


def _rgb(standardized: np.ndarray) -> np.ndarray:
    """Returns the pictures in 0..255 from those less ImageNet's mean, over its standard deviation."""
    mean, std = (np.array(each, np.float32).reshape(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return np.rint((standardized * std + mean) * 255)


def validated(name: str, settings: Mapping[str, Any], num: int) -> Finding:
    """Quantizes a model, exports and checks it, and returns how it agrees with ONNX Runtime.

    Raises:
        PtqjaxError: The model cannot be quantized so, or not run.
        onnx.checker.ValidationError: The exported file is not valid ONNX.
    """
    model = ptqjax.read(SHARED / "models" / f"{name}.onnx")
    calibration, evaluation = samples(name, model, num)
    result = ptqjax.quantize(model, calibration, ptqjax.QuantizationConfig(**settings))
    with tempfile.TemporaryDirectory() as folder:
        ptqjax.export(result.model, result.encodings, folder, "model")
        path = Path(folder) / "model.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        exported = ptqjax.read(path)
        found = ptqjax.validate(path, evaluation)
    return Finding(
        model=name,
        granularity=settings["granularity"],
        opset=model.graph.opset(),
        exported_opset=exported.graph.opset(),
        found=found,
    )


def missed(finding: Finding) -> list[str]:
    """Returns the bars that a finding misses, in words."""
    found = finding.found
    bars = [
        f"'{group.tensor}' ({group.operator}) alone: {group.largest} steps, {_percent(group.equal)} % equal"
        for group in found.groups
        if group.largest > LARGEST_ALONE or group.equal < LOWEST_ALONE
    ]
    if finding.model in CLASSIFIERS:
        bars += [
            f"'{group.tensor}' ({group.operator}) end to end: {_percent(group.end_to_end.equal)} % equal"
            for group in found.groups
            if group.end_to_end.equal < LOWEST_END_TO_END
        ]
    return bars


HEADINGS = (
    "model",
    "per",
    "opset",
    "tensors",
    "in integers",
    "alone: largest, steps",
    "alone: lowest equal, %",
    "end to end: largest, steps",
    "end to end: lowest equal, %",
    "where",
    "outputs equal, %",
    "SQNR, dB",
    "float program: SQNR, dB",
    "weights that may saturate without VNNI",
)
"""The columns of the table."""


def row(finding: Finding) -> list[str]:
    """Returns a finding as a row under `HEADINGS`."""
    found, farthest = finding.found, finding.found.farthest
    is_exact = farthest.end_to_end.equal == 1
    return [
        finding.model,
        finding.granularity,
        f"{finding.opset} -> {finding.exported_opset}"
        if finding.opset != finding.exported_opset
        else f"{finding.opset}",
        f"{len(found.groups)}",
        f"{sum(group.integer for group in found.groups)}",
        f"{found.largest}",
        _percent(found.equal),
        f"{max(group.end_to_end.largest for group in found.groups)}",
        _percent(farthest.end_to_end.equal),
        "" if is_exact else f"{farthest.tensor} ({farthest.operator})",
        _percent(found.integer.equal),
        _decibels(found.integer.sqnr),
        "" if found.float is None else _decibels(found.float.sqnr),
        _saturating(found.saturating),
    ]


def operator_rows(findings: Sequence[Finding]) -> list[list[str]]:
    """Returns what all models together say of each operator, most frequent first."""
    by_operator: dict[str, list[OperatorSummary]] = {}
    for summary in (summary for finding in findings for summary in finding.found.operators):
        by_operator.setdefault(summary.operator, []).append(summary)
    rows = [
        [
            operator,
            f"{sum(each.num_groups for each in summaries)}",
            f"{sum(each.num_integer for each in summaries)}",
            f"{sum(each.alone.num_elements for each in summaries):,}",
            f"{max(each.alone.largest for each in summaries)}",
            f"{sum(each.alone.num_elements - each.alone.num_equal for each in summaries):,}",
            _percent(min(each.lowest_equal_alone for each in summaries)),
            f"{sum(each.end_to_end.num_elements - each.end_to_end.num_equal for each in summaries):,}",
            _percent(min(each.lowest_equal_end_to_end for each in summaries)),
        ]
        for operator, summaries in by_operator.items()
    ]
    return sorted(rows, key=lambda cells: (-int(cells[1]), cells[0]))


OPERATOR_HEADINGS = (
    "operator",
    "tensors",
    "in integers",
    "elements",
    "alone: largest, steps",
    "alone: differing",
    "alone: lowest equal, %",
    "end to end: differing",
    "end to end: lowest equal, %",
)
"""The columns of the table by operator."""


def _percent(fraction: float) -> str:
    """Returns a fraction in percent; 100 stands for all, without exception."""
    return "100" if fraction == 1 else f"{min(100 * fraction, 99.9999):.4f}"


def _decibels(value: float) -> str:
    return "equal" if value == float("inf") else f"{value:.1f}"


def _saturating(weights: Sequence[Saturation]) -> str:
    """Returns how many weights may saturate, and how many of their pairs of products."""
    if not weights:
        return "none"
    share = sum(each.num_saturating for each in weights) / sum(each.num_pairs for each in weights)
    return f"{len(weights)} ({100 * share:.2g} % of their pairs)"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=FILES, default=list(FILES), help="which of ../shared/models")
    parser.add_argument("--granularities", nargs="+", choices=GRANULARITIES, default=GRANULARITIES)
    parser.add_argument("--num-samples", type=int, default=4, help="to calibrate with, and as many to validate on")
    parser.add_argument("--scaling", default="weights", help="what channels are scaled for (default: weights)")
    parser.add_argument("--ranges", default="min-max")
    parser.add_argument("--activations", default="uint8")
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--json", type=Path, help="append each finding to this file, every tensor of it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and returns 1 where a bar is missed or a model fails."""
    options = _parsed(arguments)
    findings, failures = [], []
    for name in options.models:
        for granularity in options.granularities:
            settings = {
                "granularity": granularity,
                "scaling": options.scaling,
                "ranges": options.ranges,
                "activations": options.activations,
                "target": options.target,
                "correct": "none",
            }
            print(f"{name}, per {granularity}", file=sys.stderr, flush=True)
            try:
                finding = validated(name, settings, options.num_samples)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other models are measured
                traceback.print_exc()
                failures.append(f"{name}, per {granularity}: {type(error).__name__}: {error}")
                continue
            findings.append(finding)
            if options.json:
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(_plain(finding), default=str) + "\n")
    _print(findings, failures)
    return 1 if failures or any(missed(finding) for finding in findings) else 0


def _plain(finding: Finding) -> dict[str, Any]:
    return {
        "model": finding.model,
        "granularity": finding.granularity,
        "measured": header(),
        "missed": missed(finding),
        **finding.found.as_dict(),
    }


def _print(findings: Sequence[Finding], failures: Sequence[str]) -> None:
    print(header() + "\n")
    print(_table(HEADINGS, [row(finding) for finding in findings]))
    print("Of all these models together, by operator:\n")
    print(_table(OPERATOR_HEADINGS, operator_rows(findings)))
    notes = [
        f"{finding.model}, per {finding.granularity}: misses {text}" for finding in findings for text in missed(finding)
    ]
    notes += [
        f"{finding.model}, per {finding.granularity}: {warning}"
        for finding in findings
        for warning in finding.found.warnings
        if "VNNI" not in warning
    ]
    for note in (*failures, *notes):
        print(f"- {note}")


if __name__ == "__main__":
    sys.exit(main())
