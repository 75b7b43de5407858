"""Compares quantized files where they run: ours, ONNX Runtime's own and the float one, in one process.

    python scripts/bench_runtime.py [--effort fast | --plain] [--networks NAME ...] [--document docs/runtime.md]

Ours is made with the defaults of `ptqjax.quantize`, the peer's by `onnxruntime.quantization.quantize_static` (QDQ,
uint8 activations, int8 weights per channel, MinMax) after its own preprocessing, from the same 32 samples. Of 64
others: SQNR against the float file over all outputs, in a session without options ("plain") and with exact sums
(`session.x64quantprecision`). Times are those of one thread's processor, the files in turns, medians. Rows are printed
as they come, and with `--document` put into its table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench_header import header
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from runtime_samples import NETWORKS, NUM_CALIBRATION, NUM_EVALUATION, Batch, Samples, path_of, samples_of

import ptqjax
from ptqjax.agreement import decibels, milliseconds, plain_session

_OLDEST = 13  # with scales per channel
_RAISED_TO = 17
_RESIZE_INPUTS = 4
SLACK_DB, SLACK_TIME = 0.5, 1.05
"""What ours may be less accurate in a plain session than the peer's in exact sums, and slower."""
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"
HEADINGS = (
    "network", "SQNR plain: ours", "ORT", "exact: ours", "ORT", "ms: float", "ours", "ORT", "ours / ORT", "KB: float",
    "ours", "ORT", "misses",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a file is worth."""

    plain: float
    exact: float
    milliseconds: float
    num_bytes: int


class _Reader(CalibrationDataReader):
    """Hands samples to ONNX Runtime's tool."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.left = iter(batches)

    def get_next(self) -> Any:
        """Returns the next sample, or None."""
        return next(self.left, None)


def own_file(network: str, samples: Samples, folder: Path, settings: Mapping[str, Any]) -> Path:
    """Writes our file."""
    model, config = ptqjax.read(path_of(network)), ptqjax.QuantizationConfig(**settings)
    result = ptqjax.quantize(model, samples.calibration, config)
    ptqjax.export(result.model, result.encodings, folder, "ours")
    return folder / "ours.onnx"


def peer_file(network: str, samples: Samples, folder: Path) -> Path | None:
    """Writes the file of ONNX Runtime's tool; None where it cannot."""
    prepared, quantized = folder / "prepared.onnx", folder / "peer.onnx"
    try:
        source = folder / "source.onnx"
        onnx.save(_raised(onnx.load(path_of(network))), source)
        if not _preprocessed(source, prepared):
            prepared = source
        quantize_static(
            prepared,
            quantized,
            _Reader(samples.calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        plain_session(quantized)
    except Exception as error:  # noqa: BLE001 - whatever its reason is: there is no such file
        print(f"{network}: no file of ONNX Runtime's tool: {error}", file=sys.stderr)
        return None
    return quantized


def _preprocessed(source: Path, prepared: Path) -> bool:
    for skips in (False, True):
        try:
            with chdir(prepared.parent):  # it leaves files where it runs
                quant_pre_process(source.resolve(), prepared.resolve(), skip_symbolic_shape=skips)
        except Exception as error:  # noqa: BLE001 - as above
            print(f"{source}: {error}", file=sys.stderr)
        else:
            return True
    return False


def _raised(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model as the tool takes it: weights that are no inputs, an opset with scales per channel."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for entry in [entry for entry in model.graph.input if entry.name in weights]:
        model.graph.input.remove(entry)
    if model.opset_import[0].version < _OLDEST:
        model = onnx.version_converter.convert_version(model, _RAISED_TO)
    for node in model.graph.node:  # the converter leaves an empty tensor of scales beside sizes
        if node.op_type == "Resize" and len(node.input) == _RESIZE_INPUTS and node.input[3]:
            node.input[2] = ""
    return model


def figures(files: dict[str, Path], samples: Samples, *, seconds: float) -> dict[str, Figures]:
    """Returns what each file is worth; "float" is what the others are compared with."""
    sessions = {name: plain_session(file) for name, file in files.items()}
    wanted = [sessions["float"].run(None, batch) for batch in samples.evaluation]
    sample = samples.evaluation[0]
    times = milliseconds(
        [lambda session=session: session.run(None, sample) for session in sessions.values()], seconds=seconds
    )
    found = {}
    for (name, file), time in zip(files.items(), times, strict=True):
        plain = _sqnr(sessions[name], samples.evaluation, wanted)
        exact = _sqnr(plain_session(file, exact=True), samples.evaluation, wanted)
        found[name] = Figures(plain=plain, exact=exact, milliseconds=time, num_bytes=file.stat().st_size)
    return found


def _sqnr(session: Any, batches: Sequence[Batch], wanted: Sequence[Sequence[np.ndarray]]) -> float:
    signal = noise = 0.0
    for batch, expected in zip(batches, wanted, strict=True):
        for one, other in zip(expected, session.run(None, batch), strict=True):
            signal += float(np.sum(np.square(one, dtype=np.float64)))
            noise += float(np.sum(np.square(one.astype(np.float64) - other)))
    return decibels(signal, noise)


def misses(found: dict[str, Figures]) -> list[str]:
    """Returns the bars that ours misses against the peer's; none where there is no such file."""
    ours, peer = found["ours"], found.get("ORT")
    if peer is None:
        return []
    checks = {
        "SQNR": ours.plain >= peer.exact - SLACK_DB,
        "ms": ours.milliseconds <= SLACK_TIME * peer.milliseconds,
    }
    return [name for name, holds in checks.items() if not holds]


def row(network: str, found: dict[str, Figures]) -> str:
    """Returns a line of the table."""
    reference, ours, peer = found["float"], found["ours"], found.get("ORT")

    def texts(name: str, form: str, *figures: Figures | None) -> list[str]:
        return ["-" if each is None else form.format(getattr(each, name)) for each in figures]

    ratio = "-" if peer is None else f"{ours.milliseconds / peer.milliseconds:.2f}"
    cells = [
        network.removeprefix("other/"),
        *texts("plain", "{:.1f}", ours, peer),
        *texts("exact", "{:.1f}", ours, peer),
        *texts("milliseconds", "{:.3g}", reference, ours, peer),
        ratio,
        *("-" if each is None else f"{each.num_bytes / 1024:,.0f}" for each in (reference, ours, peer)),
        ", ".join(misses(found)),
    ]
    return f"| {' | '.join(cells)} |"


def table_head() -> str:
    """Returns the first two lines of the table."""
    return f"| {' | '.join(HEADINGS)} |\n|---|{'---:|' * (len(HEADINGS) - 2)}---|"


def put_into(document: Path, text: str) -> None:
    """Puts a text between the two marks of a document.

    Raises:
        ValueError: The document lacks a mark.
    """
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"'{document}' lacks the marks {BEGIN} and {END}")
    document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Measures, prints, and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--effort", default="balanced", choices=("fast", "balanced", "thorough"))
    parser.add_argument("--plain", action="store_true", help="ranges alone: no equalization, no corrected biases")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long runs of a network are timed")
    parser.add_argument("--document", type=Path)
    parser.add_argument("--files", type=Path, help="a folder for the files, which are made where they are missing")
    arguments = parser.parse_args()
    settings = {"equalize": False, "correct": "none"} if arguments.plain else {"effort": arguments.effort}
    told = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    head = header(also=f"ours with {told}; {NUM_CALIBRATION} samples to calibrate, {NUM_EVALUATION} to evaluate")
    print(f"{head}\n\n{table_head()}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for network in arguments.networks:
            folder = (arguments.files or Path(temporary)) / network.replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            samples = samples_of(network)
            peer = folder / "peer.onnx"
            peer = peer if peer.is_file() else peer_file(network, samples, folder)
            ours = folder / "ours.onnx"
            ours = ours if ours.is_file() else own_file(network, samples, folder, settings)
            files = {"float": path_of(network), "ours": ours} | ({} if peer is None else {"ORT": peer})
            found = figures(files, samples, seconds=arguments.seconds)
            rows.append(row(network, found))
            print(rows[-1], flush=True)
            if arguments.document:
                put_into(arguments.document, "\n".join((f"{head}.", "", table_head(), *rows)))


if __name__ == "__main__":
    main()
