"""Prints what static W8A8 gives on transformers, step by step, on exported files in ONNX Runtime, as Markdown.

    python scripts/bench_transformers_static.py
    python scripts/bench_transformers_static.py --models minilm_l6_sentiment --rows unscaled defaults

Rows: ONNX Runtime's quantize_static (minimum and maximum, a scale per channel, after its own preprocessing); ours
without scales; with scales, shifts and factors for the least predicted noise; and our defaults, which choose between
them on calibration samples held back. A cell holds the SQNR of the first output in dB, the agreement of its largest
element with the float file's in %, and accuracy in % or perplexity with the float file's in brackets. Evaluation
samples are shown to finished files alone. Models and data are those of the folder PTQJAX_SHARED.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from bench_header import header
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from runtime_samples import SHARED

import ptqjax

_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model of the folder, and where its samples lie."""

    data: str
    """What the names of its files of samples begin with."""
    num_evaluation: int
    """How many samples are evaluated."""
    is_language: bool = False
    """Whether labels are next tokens."""


NETWORKS = {
    "minilm_l6_sentiment": Network(data="text/minilm_l6_sentiment_", num_evaluation=300),
    "tiny_vit_cifar10": Network(data="cifar10/", num_evaluation=1000),
    "stories260k": Network(data="stories/stories260k_", num_evaluation=100, is_language=True),
}
ROWS: dict[str, dict[str, Any] | None] = {
    "onnxruntime": None,
    "unscaled": {"equalize": False},
    "noise": {"scaling": "noise", "headroom": 1.2, "correct": "none"},
    "defaults": {},
}
"""By name: what differs from the default settings; None: ONNX Runtime's own tool."""


class _Reader(CalibrationDataReader):
    def __init__(self, batches: Iterable[Mapping[str, np.ndarray]]) -> None:
        self.left = iter(batches)

    def get_next(self) -> Any:
        return next(self.left, None)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    arguments = parser.parse_args()
    print(header(also="64 calibration samples"))
    print("\n| network | how | SQNR, dB | agreement, % | accuracy, % or perplexity | processor seconds |")
    print("|---|---|---|---|---|---|")
    for name in arguments.models:
        calibration, _ = _samples(NETWORKS[name], "calibration", 64)
        evaluation, labels = _samples(NETWORKS[name], "evaluation", NETWORKS[name].num_evaluation)
        model = SHARED / "models" / f"{name}.onnx"
        wanted = _outputs(model, evaluation)
        for row in arguments.rows:
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                path = _quantized(model, calibration, ROWS[row], Path(folder))
                seconds = time.process_time() - start
                cells = _cells(NETWORKS[name], wanted, _outputs(path, evaluation), labels)
            print(f"| {name} | {row} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def _samples(network: Network, part: str, count: int) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    with np.load(SHARED / "data" / f"{network.data}{part}.npz") as file:
        arrays = {name: file[name][:count] for name in file.files}
    labels = arrays.pop("labels", None)
    return arrays, labels


def _batches(arrays: Mapping[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    count = len(next(iter(arrays.values())))
    return [{name: value[i : i + size] for name, value in arrays.items()} for i in range(0, count, size)]


def _quantized(
    model: Path, calibration: Mapping[str, np.ndarray], settings: dict[str, Any] | None, folder: Path
) -> Path:
    if settings is not None:
        config = ptqjax.QuantizationConfig(**settings)
        result = ptqjax.quantize(ptqjax.read(model), _batches(calibration, 16), config)
        ptqjax.export(result.model, result.encodings, folder, "model")
        return next(folder.glob("*.onnx"))
    prepared, path = folder / "prepared.onnx", folder / "quantized.onnx"
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(path), _Reader(_batches(calibration, 16)), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return path


def _outputs(path: Path, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_outputs()[0].name
    return np.concatenate([np.asarray(session.run([name], batch)[0]) for batch in _batches(arrays, _BATCH)])


def _cells(network: Network, wanted: np.ndarray, found: np.ndarray, labels: np.ndarray | None) -> tuple[str, str, str]:
    sqnr = 10 * np.log10(np.sum(np.float64(wanted) ** 2) / np.sum((np.float64(wanted) - found) ** 2))
    agreement = 100 * np.mean(wanted.argmax(-1) == found.argmax(-1))
    last = "-"
    if labels is not None:
        measure = _perplexity if network.is_language else _accuracy
        last = f"{measure(found, labels):.4g} ({measure(wanted, labels):.4g})"
    return f"{sqnr:.1f}", f"{agreement:.2f}", last


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float(np.mean(logits.argmax(-1) == labels))


def _perplexity(logits: np.ndarray, labels: np.ndarray) -> float:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    is_counted = labels >= 0
    chosen = np.take_along_axis(logs, np.where(is_counted, labels, 0)[..., None], -1)[..., 0]
    return float(np.exp(-chosen[is_counted].mean()))


if __name__ == "__main__":
    main()
