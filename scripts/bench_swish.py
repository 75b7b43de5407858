"""Compares x * sigmoid(x) between convolutions as one function, in float, with a rounding at each of its pieces.

    python scripts/bench_swish.py

Five convolutions of random weights, each with the function behind it: for `ort-cpu` as it is, and with no
`integer_pieces`. SQNR of the output in a plain session on samples that were not calibrated on; milliseconds of one
thread's processor, the files in turns, medians.
"""

from __future__ import annotations

import tempfile
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
from bench_header import header
from onnx import TensorProto, helper, numpy_helper

import ptqjax
from ptqjax.agreement import decibels, milliseconds, plain_session

_LAYERS, _SIDE, _SECONDS = 5, 28, 3.0
_GAIN = 2.4  # of the variance: what keeps activations of one size from layer to layer


def network(kernel: int, channels: int) -> onnx.ModelProto:
    """Returns the float model."""
    random = np.random.default_rng(0)
    nodes, tensors, before = [], [], "x"
    for i in range(_LAYERS):
        shape = (channels, channels if i else 3, kernel, kernel)
        weight = random.normal(size=shape) * np.sqrt(_GAIN / np.prod(shape[1:]))
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Conv", [before, f"w{i}"], [f"c{i}"], pads=[kernel // 2] * 4))
        nodes.append(helper.make_node("Sigmoid", [f"c{i}"], [f"s{i}"]))
        nodes.append(helper.make_node("Mul", [f"c{i}", f"s{i}"], [f"y{i}"]))
        before = f"y{i}"
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, _SIDE, _SIDE])
    graph = helper.make_graph(nodes, "g", [source], [helper.make_tensor_value_info(before, 1, None)], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def targets(folder: Path) -> dict[str, str]:
    """Returns the targets that are compared."""
    text = (resources.files("ptqjax.targets") / "ort-cpu.toml").read_text(encoding="utf-8")
    whole = folder / "whole.toml"
    whole.write_text("\n".join(line for line in text.splitlines() if not line.startswith("integer_pieces")), "utf-8")
    return {"in one, float": str(whole), "pieces, integers": "ort-cpu"}


def rows(kernel: int, channels: int, folder: Path) -> list[str]:
    """Returns the lines of the table for one network."""
    random = np.random.default_rng(1)
    batches = [{"x": random.normal(size=(1, 3, _SIDE, _SIDE)).astype(np.float32)} for _ in range(16)]
    onnx.save(network(kernel, channels), folder / "float.onnx")
    sessions = {"float": plain_session(folder / "float.onnx")}
    for name, target in targets(folder).items():
        config = ptqjax.QuantizationConfig(equalize=False, correct="none", target=target)
        result = ptqjax.quantize(ptqjax.read(folder / "float.onnx"), batches[:8], config)
        ptqjax.export(result.model, result.encodings, folder, "quantized")
        sessions[name] = plain_session(folder / "quantized.onnx")
    times = milliseconds([lambda s=s: s.run(None, batches[0]) for s in sessions.values()], seconds=_SECONDS)
    exact = np.stack([sessions["float"].run(None, each)[0].astype(np.float64) for each in batches[8:]])
    found = []
    for (name, session), time in zip(sessions.items(), times, strict=True):
        noise = exact - np.stack([session.run(None, each)[0] for each in batches[8:]])
        worth = "" if name == "float" else f"{decibels(np.sum(exact**2), np.sum(noise**2)):.1f}"
        found.append(f"| {kernel}x{kernel}, {channels} channels | {name} | {worth} | {time:.3f} |")
    return found


def main() -> None:
    """Prints the table."""
    print(f"{header()}.\n\n| convolutions | x * sigmoid(x) | SQNR, dB | ms |\n|---|---|---:|---:|")
    for kernel, channels in ((1, 64), (3, 32)):
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(rows(kernel, channels, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
