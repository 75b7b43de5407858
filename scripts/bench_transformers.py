"""Weights alone and activations at run time: what language models lose in ONNX Runtime, and how long a run takes.

Prints the table of docs/transformers.md, "Dynamic and weight-only": a small Llama (stories260k) by perplexity, an
encoder (MiniLM) by SQNR of its logits and agreement, on data that took no part; beside files of ONNX Runtime's own
tools. Times are processor time on one thread, the files in turns. Run as
`python scripts/bench_transformers.py SHARED [--texts N]`, SHARED the folder with models/ and data/.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench_header import header

from ptqjax import QuantizationConfig, export, quantize, read
from ptqjax.agreement import milliseconds, plain_session

_BATCH = 20
_TOKENS = 64  # of the text that is timed

ROWS = {
    "dynamic": QuantizationConfig(activations="dynamic", equalize=False),
    "int8, weights alone": QuantizationConfig(activations="float", weights="int8", equalize=False),
    "int4, blocks of 32": QuantizationConfig(
        activations="float", weights="int4", granularity="block:32", equalize=False
    ),
    "int4, blocks of 32, level 4": QuantizationConfig(
        activations="dynamic", weights="int4", granularity="block:32", equalize=False
    ),
    "int4, a scale per channel": QuantizationConfig(activations="float", weights="int4", equalize=False),
    "int3, blocks of 32": QuantizationConfig(
        activations="float", weights="int3", granularity="block:32", equalize=False
    ),
}
"""What is measured of ours, by its name in the table."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--texts", type=int, default=300)
    options = parser.parse_args()
    print(header(also="one thread, exported files in ONNX Runtime") + "\n")
    print("| network | form | of | measure | ms a run | MB |\n| --- | --- | --- | --- | --- | --- |")
    for name, data, metric, rows in (
        ("stories260k", "stories/stories260k", perplexity, tuple(ROWS)),
        ("minilm_l6_sentiment", "text/minilm_l6_sentiment", likeness, ("dynamic", "int8, weights alone")),
    ):
        network(name, options.shared, data, metric=metric, rows=rows, texts=options.texts)


def network(name: str, shared: Path, data: str, *, metric: Any, rows: tuple[str, ...], texts: int) -> None:
    """Prints the rows of one network."""
    source = shared / "models" / f"{name}.onnx"
    calibration, evaluation = (
        np.load(shared / "data" / f"{data}_{which}.npz") for which in ("calibration", "evaluation")
    )
    with tempfile.TemporaryDirectory() as folder:
        files = {("float", "-"): source}
        for row in rows:
            files[row, "ptqjax"] = ours(source, Path(folder), row, list(batches(calibration)))
            tool = Path(folder) / f"{row} of the tool.onnx"
            if runtimes_own(source, tool, row):
                files[row, "ONNX Runtime"] = tool
        timed = dict(zip(files, times(files.values(), evaluation), strict=True))
        wanted = outputs(source, evaluation, texts)
        for (row, who), file in files.items():
            measured = metric(outputs(file, evaluation, texts), wanted, evaluation["labels"][:texts])
            print(f"| {name} | {row} | {who} | {measured} | {timed[row, who]:.2f} | {size(file):.2f} |", flush=True)


def batches(data: Mapping[str, Any], most: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the inputs of a file of samples, a few samples at a time."""
    inputs = {key: data[key][:most] for key in data if key != "labels"}
    count = len(next(iter(inputs.values())))
    return ({key: value[i : i + _BATCH] for key, value in inputs.items()} for i in range(0, count, _BATCH))


def ours(source: Path, folder: Path, row: str, calibration: list[dict[str, Any]]) -> Path:
    """Returns the file that ptqjax makes."""
    result = quantize(read(source), calibration, ROWS[row])
    export(result.model, result.encodings, folder, row, weights="matmul-nbits")
    return folder / f"{row}.onnx"


def runtimes_own(source: Path, tool: Path, row: str) -> bool:
    """Writes the file that ONNX Runtime's own tools make; returns whether they have the form."""
    if row == "dynamic":
        from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - an extra

        quantize_dynamic(source, tool, weight_type=QuantType.QInt8)
        return True
    if not row.startswith(("int4, blocks", "int8")):
        return False
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # noqa: PLC0415 - an extra

    quantizer = MatMulNBitsQuantizer(
        onnx.load(source),
        bits=8 if row.startswith("int8") else 4,
        block_size=32,
        is_symmetric=False,
        accuracy_level=4 if row.endswith("level 4") else None,
    )
    quantizer.process()
    made: Any = quantizer.model
    onnx.save(made.model, tool)
    return True


def outputs(file: Path, data: Mapping[str, Any], texts: int) -> np.ndarray:
    """Returns the first output on the first texts, in the session that users open."""
    session = plain_session(file)
    return np.concatenate([session.run(None, batch)[0] for batch in batches(data, texts)])


def times(files: Iterable[Path], data: Mapping[str, Any]) -> list[float]:
    """Returns the processor time of a run on one text, in milliseconds, the files in turns."""
    sample = {key: data[key][:1, :_TOKENS] for key in data if key != "labels"}
    sessions = [plain_session(file) for file in files]
    return milliseconds([lambda run=session.run: run(None, sample) for session in sessions], seconds=20)


def size(file: Path) -> float:
    """Returns the size of a file in MB."""
    return file.stat().st_size / 2**20


def perplexity(logits: np.ndarray, wanted: np.ndarray, labels: np.ndarray) -> str:
    """Returns the exponential of the mean cross-entropy, and that over the float model's."""
    found, others = (_perplexity(each, labels) for each in (logits, wanted))
    return f"perplexity {found:.3f}, {found / others:.4f} x float"


def _perplexity(logits: np.ndarray, labels: np.ndarray) -> float:
    total = count = 0.0
    for text, wanted in zip(logits.astype(np.float64), labels, strict=True):
        shifted = text - text.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(shifted, np.maximum(wanted, 0)[:, None], axis=-1)[:, 0]
        counts = wanted >= 0
        total += float(np.sum((np.log(np.exp(shifted).sum(axis=-1)) - chosen)[counts]))
        count += int(counts.sum())
    return float(np.exp(total / count))


def likeness(logits: np.ndarray, wanted: np.ndarray, labels: np.ndarray) -> str:
    """Returns SQNR, agreement with float and accuracy."""
    noise = np.sum((wanted - logits) ** 2)
    sqnr = 10 * np.log10(np.sum(wanted**2) / noise) if noise else np.inf
    same = np.mean(wanted.argmax(-1) == logits.argmax(-1))
    return f"{sqnr:.1f} dB, agreement {100 * same:.1f} %, accuracy {100 * np.mean(logits.argmax(-1) == labels):.1f} %"


if __name__ == "__main__":
    main()
