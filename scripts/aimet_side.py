"""The AIMET half of the comparisons: run by the benches with the interpreter of an environment that has aimet-onnx.

    python scripts/aimet_side.py quantize MODEL CALIBRATION.npy OUT.onnx [--weights int4] [--per-channel] [--equalize] ...
    python scripts/aimet_side.py forward MODEL INPUT.npy      times one forward for each line on stdin
    python scripts/aimet_side.py equalize MODEL               times one equalization for each line on stdin
    python scripts/aimet_side.py encodings MODEL SAMPLES.npy  times encodings: of "weights" or "all", line by line

AIMET knows nodes by their names and takes a Conv without a `group` attribute for an unknown layer; both are added
before it sees the model. Clip bounds stay initializers.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aimet_onnx  # pyright: ignore[reportMissingImports]
import numpy as np
import onnx
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight  # pyright: ignore[reportMissingImports]
from aimet_onnx.cross_layer_equalization import equalize_model  # pyright: ignore[reportMissingImports]

BATCH = 16


def prepare(path: str, *, equalize: bool) -> onnx.ModelProto:
    """Returns the model with names, groups and opset imports as AIMET wants them, folded or equalized."""
    model = onnx.load(path)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        if node.op_type == "Conv" and all(attribute.name != "group" for attribute in node.attribute):
            node.attribute.append(onnx.helper.make_attribute("group", 1))
    if equalize:
        equalize_model(model)
    else:
        fold_all_batch_norms_to_weight(model)
    return model


def simulation(
    model: onnx.ModelProto,
    samples: np.ndarray,
    *,
    weights: str = "int8",
    per_channel: bool = True,
    activations: str = "int8",
    scheme: str = "min_max",
) -> Any:
    """Returns AIMET's simulation, calibrated on `samples`, if any; the CPU alone."""
    folder = Path(str(aimet_onnx.__file__)).parent / "common" / "quantsim_config"
    config = folder / ("default_config_per_channel.json" if per_channel else "default_config.json")
    sim = aimet_onnx.QuantizationSimModel(
        model,
        param_type=aimet_onnx.qtype.int(int(weights.removeprefix("int"))),
        activation_type=aimet_onnx.qtype.int(int(activations.removeprefix("int"))),
        quant_scheme=scheme,
        config_file=str(config),
        providers=["CPUExecutionProvider"],
    )
    if len(samples):
        sim.compute_encodings(batches_of(model, samples))
    return sim


def batches_of(model: onnx.ModelProto, samples: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Returns the samples as AIMET takes them."""
    name = model.graph.input[0].name
    return [{name: samples[i : i + BATCH]} for i in range(0, len(samples), BATCH)]


def round_weights(sim: Any, batches: list[dict[str, np.ndarray]], rounding: str, iterations: int) -> None:
    """Chooses scales ("seq-mse") or roundings ("adaround") of weights on the batches, and then all other encodings."""
    if rounding == "adaround":
        aimet_onnx.apply_adaround(sim, batches, num_iterations=iterations)
    elif rounding == "seq-mse":
        aimet_onnx.apply_seq_mse(sim, batches)
    sim.compute_encodings(batches)


def answer_forwards(sim: Any, samples: np.ndarray) -> None:
    """Writes versions, then for each line read the seconds of one forward of `samples`, and the CPU's, as JSON."""
    feed = {sim.session.get_inputs()[0].name: samples}
    sim.session.run(None, feed)
    print(json.dumps({"aimet_onnx": version("aimet-onnx"), "onnxruntime": version("onnxruntime")}), flush=True)
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        sim.session.run(None, feed)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}), flush=True)


def answer_equalizations(path: str) -> None:
    """Writes versions, then for each line read the seconds of one equalization, folding included, as JSON.

    AIMET scales over a Clip only where its bounds are Constant nodes: so they are made.
    """
    model = onnx.load(path)
    bounds = {name for node in model.graph.node if node.op_type == "Clip" for name in node.input[1:]}
    moved = [tensor for tensor in model.graph.initializer if tensor.name in bounds]
    for tensor in moved:
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        if node.op_type == "Conv" and all(attribute.name != "group" for attribute in node.attribute):
            node.attribute.append(onnx.helper.make_attribute("group", 1))
    print(json.dumps({"aimet_onnx": version("aimet-onnx")}), flush=True)
    for _ in sys.stdin:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        start, cpu_start = time.perf_counter(), time.process_time()
        equalize_model(copy)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}), flush=True)


def answer_encodings(model: onnx.ModelProto, samples: np.ndarray, scheme: str) -> None:
    """Writes versions, then for each line read the seconds of new encodings, and the largest memory so far, as JSON.

    Of "weights": per channel, with the forward of one sample that AIMET computes them in; of anything else: of all
    tensors, on `samples` in batches. The simulation is made before the clock starts.
    """
    print(json.dumps({"aimet_onnx": version("aimet-onnx")}), flush=True)
    name = model.graph.input[0].name
    batches = [{name: np.asarray(samples[i : i + BATCH])} for i in range(0, len(samples), BATCH)]
    for line in sys.stdin:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        sim = simulation(copy, samples[:0], scheme=scheme)
        start, cpu_start = time.perf_counter(), time.process_time()
        if line.strip() == "weights":
            sim._compute_param_encodings(dummy_input={name: np.asarray(samples[:1])})  # noqa: SLF001 - no public way
        else:
            sim.compute_encodings(batches)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak}), flush=True)


def main() -> None:
    """Reads the command line and does what it says."""
    parser = argparse.ArgumentParser(description="The AIMET half of the comparisons.")
    commands = parser.add_subparsers(dest="command", required=True)
    quantize = commands.add_parser("quantize", help="write AIMET's QDQ model")
    forward = commands.add_parser("forward", help="time AIMET's simulated forward on demand")
    equalize = commands.add_parser("equalize", help="time AIMET's equalization on demand")
    encodings = commands.add_parser("encodings", help="time AIMET's choice of encodings on demand")
    for command in (quantize, forward, equalize, encodings):
        command.add_argument("model")
    for command in (quantize, forward, encodings):
        command.add_argument("samples", help="an .npy of network inputs")
    quantize.add_argument("out")
    quantize.add_argument("--per-channel", action="store_true")
    quantize.add_argument("--weights", default="int8", help="type of the weights: int8, int6, int4")
    quantize.add_argument("--activations", default="int8", help="type of the activations: int8, int4")
    quantize.add_argument("--rounding", choices=("nearest", "seq-mse", "adaround"), default="nearest")
    quantize.add_argument("--iterations", type=int, default=10_000, help="of adaround, for each layer")
    for command in (quantize, encodings):
        command.add_argument("--scheme", default="min_max")
    quantize.add_argument("--equalize", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "equalize":
        answer_equalizations(arguments.model)
        return
    samples = np.load(arguments.samples, mmap_mode="r")
    if arguments.command == "forward":
        answer_forwards(simulation(prepare(arguments.model, equalize=False), samples), np.asarray(samples))
        return
    if arguments.command == "encodings":
        answer_encodings(prepare(arguments.model, equalize=False), samples, arguments.scheme)
        return
    model = prepare(arguments.model, equalize=arguments.equalize)
    sim = simulation(
        model,
        samples[:0],
        weights=arguments.weights,
        per_channel=arguments.per_channel,
        activations=arguments.activations,
        scheme=arguments.scheme,
    )
    round_weights(sim, batches_of(model, np.asarray(samples)), arguments.rounding, arguments.iterations)
    onnx.save(sim.to_onnx_qdq(), arguments.out)


if __name__ == "__main__":
    main()
