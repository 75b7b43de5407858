"""Weights alone and activations at run time: what language models lose in ONNX Runtime, and how long a run takes.

Prints the table of docs/transformers.md, "Dynamic and weight-only": a small Llama (stories260k) by perplexity, an
encoder (MiniLM) by SQNR of its logits and agreement, on data that took no part; beside files of ONNX Runtime's own
tools. Rows whose name ends in "unscaled" leave the scales of channels as they are, the others are our defaults. Times
are processor time on one thread, the files in turns. Run as `python scripts/bench_transformers.py SHARED`, SHARED the
folder with models/ and data/. Files and measured rows are kept in --folder: what is there is not made again, so that a
run that was interrupted goes on, and --rows adds to what there is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench_header import header

from ptqjax import QuantizationConfig, export, quantize, read
from ptqjax.agreement import milliseconds, plain_session

_BATCH = 20
_TOKENS = 64  # of the text that is timed
_PARTS = ("calibration", "evaluation")
_ROWS = "rows.json"

_FORMS: dict[str, dict[str, Any]] = {
    "dynamic": {"activations": "dynamic"},
    "int8, weights alone": {"activations": "float"},
    "int4, blocks of 32": {"activations": "float", "weights": "int4", "granularity": "block:32"},
    "int4, blocks of 32, level 4": {"activations": "dynamic", "weights": "int4", "granularity": "block:32"},
    "int4, a scale per channel": {"activations": "float", "weights": "int4"},
    "int3, blocks of 32": {"activations": "float", "weights": "int3", "granularity": "block:32"},
}
ROWS = {f"{form}, unscaled": {**settings, "equalize": False} for form, settings in _FORMS.items()} | _FORMS
"""The settings of what is measured of ours, by its name in the table."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model of the folder, its samples, and what of it is measured."""

    data: str
    """What the names of its files of samples begin with."""
    metric: Callable[[np.ndarray, np.ndarray, np.ndarray], str]
    """A function of outputs, those of float, and labels."""
    forms: tuple[str, ...]
    """The forms that it is measured in."""
    texts: int
    """How many texts it is measured on."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ptqjax-bench-transformers")
    options = parser.parse_args()
    for name in options.models:
        rows = [row for row in options.rows if row.removesuffix(", unscaled") in NETWORKS[name].forms]
        folder = options.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            measure(options.shared, name, row, folder)
    print(header(also="one thread, exported files in ONNX Runtime") + "\n")
    print("| network | form | of | measure | ms a run | MB |\n| --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        print_rows(options.shared, name, options.folder / name)


def measure(shared: Path, name: str, row: str, folder: Path) -> None:
    """Writes the files of a row, and measures them, as far as that was not done; each result is kept at once."""
    network, source = NETWORKS[name], shared / "models" / f"{name}.onnx"
    calibration, evaluation = (np.load(shared / "data" / f"{network.data}_{part}.npz") for part in _PARTS)
    makers = {"ptqjax": lambda: ours(source, folder, row, list(batches(calibration)))}
    if not row.endswith("unscaled"):
        makers["ONNX Runtime"] = lambda: runtimes_own(source, folder / f"{row} of ONNX Runtime.onnx", row)
    kept = _kept(folder)
    for who, make in makers.items():
        file = folder / (f"{row}.onnx" if who == "ptqjax" else f"{row} of ONNX Runtime.onnx")
        if [row, who] in [entry[:2] for entry in kept] or not make():
            continue
        wanted = outputs(source, evaluation, network.texts)
        found = network.metric(outputs(file, evaluation, network.texts), wanted, evaluation["labels"][: network.texts])
        kept.append([row, who, str(file), found])
        (folder / _ROWS).write_text(json.dumps(kept, indent=1))
        print(f"{name}, {row}, {who}: {found}", file=sys.stderr, flush=True)


def print_rows(shared: Path, name: str, folder: Path) -> None:
    """Prints the rows of one network that were measured so far, each with its time."""
    network, source = NETWORKS[name], shared / "models" / f"{name}.onnx"
    evaluation = np.load(shared / "data" / f"{network.data}_{_PARTS[1]}.npz")
    wanted = outputs(source, evaluation, network.texts)
    itself = network.metric(wanted, wanted, evaluation["labels"][: network.texts])
    rows = [["float", "-", str(source), itself], *_kept(folder)]
    for (row, who, file, found), time in zip(rows, times([Path(row[2]) for row in rows], evaluation), strict=True):
        print(f"| {name} | {row} | {who} | {found} | {time:.2f} | {size(Path(file)):.2f} |", flush=True)


def _kept(folder: Path) -> list[list[str]]:
    file = folder / _ROWS
    return json.loads(file.read_text()) if file.exists() else []


def batches(data: Mapping[str, Any], most: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the inputs of a file of samples, a few samples at a time."""
    inputs = {key: data[key][:most] for key in data if key != "labels"}
    count = len(next(iter(inputs.values())))
    return ({key: value[i : i + _BATCH] for key, value in inputs.items()} for i in range(0, count, _BATCH))


def ours(source: Path, folder: Path, row: str, calibration: list[dict[str, Any]]) -> bool:
    """Writes the file that ptqjax makes."""
    result = quantize(read(source), calibration, QuantizationConfig(**ROWS[row]))
    export(result.model, result.encodings, folder, row, weights="matmul-nbits")
    return True


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


NETWORKS = {
    "stories260k": Network(data="stories/stories260k", metric=perplexity, forms=tuple(_FORMS), texts=100),
    "minilm_l6_sentiment": Network(
        data="text/minilm_l6_sentiment",
        metric=likeness,
        forms=("dynamic", "int8, weights alone"),
        texts=300,
    ),
}


if __name__ == "__main__":
    main()
