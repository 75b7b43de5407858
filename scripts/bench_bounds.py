"""Prints what bounds per channel cost in ONNX Runtime, form by form, as Markdown.

    python scripts/bench_bounds.py
    python scripts/bench_bounds.py --model MODEL.onnx --images IMAGENET --preprocessing torch

One network, W8A8 per tensor, is written in several ways; the table tells which files give the same outputs. The
forwards of all files alternate within one process, so that a change of the machine's pace meets all; the table has the
median time and the median, over the rounds, of the ratio to the first file. Sessions have two threads and the entry
session.x64quantprecision=1.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from bench_accuracy import BATCH, PREPROCESSINGS, SHARED, pictures_task
from bench_header import header

import ptqjax
from ptqjax import onnx_io
from ptqjax.encodings.encoding import Encodings
from ptqjax.ir import Model, rebuild
from ptqjax.qdq.implied_clips import drop_implied_clips
from ptqjax.qdq.insert import insert_qdq
from ptqjax.qdq.integer_bounds import bound_integers

THREADS = 2


def forms(plain: Model, plain_grids: Encodings, scaled: Model, grids: Encodings, x: np.ndarray) -> dict[str, Model]:
    """Returns the files to compare, the first being what the others are measured against."""
    unscaled, real = insert_qdq(plain, plain_grids), insert_qdq(scaled, grids)
    integers = bound_integers(real)[0]
    dropped = drop_implied_clips(integers)[0]
    return {
        "nothing scaled, Clip kept": unscaled,
        "nothing scaled, implied Clip dropped": drop_implied_clips(unscaled)[0],
        "scaled, Min of real numbers between two grids": real,
        "scaled, Min of integers": integers,
        "scaled, Min of integers, what is implied dropped (exported)": dropped,
        "scaled, Min of integers with a bound for each element": with_whole_bounds(dropped, x),
        "scaled, Min of integers in the next group (after DequantizeLinear, real)": after_the_grid(dropped),
        "scaled, bounds left out (another function: what is left to gain)": without_bounds(dropped),
    }


def with_whole_bounds(model: Model, x: np.ndarray) -> Model:
    """Returns the model with each integer bound repeated along height and width: nothing but samples broadcasts."""
    bounds = {node.output: node.inputs for node in model.graph.nodes if node.op_type == "Min"}
    shapes = shapes_of(model, list(bounds), x)
    params = dict(model.params)
    for output, names in bounds.items():
        name = next(each for each in names if each in params)
        params[name] = np.broadcast_to(np.asarray(params[name]), (1, *shapes[output][1:])).copy()
    return model.replace(params=params)


def shapes_of(model: Model, tensors: list[str], x: np.ndarray) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of integer tensors for the input `x`, from ONNX Runtime."""
    proto = onnx_io.to_proto(model)
    for name in tensors:
        proto.graph.output.add().name = name
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run(tensors, {session.get_inputs()[0].name: x[:1]})
    return {name: np.asarray(value).shape for name, value in zip(tensors, values, strict=True)}


def after_the_grid(model: Model) -> Model:
    """Returns the model with bounds on what is dequantized: exact too, but what reads them loses its integer kernel."""
    params, nodes = dict(model.params), {node.output: node for node in model.graph.nodes}
    for node in [each for each in model.graph.nodes if each.op_type == "Min"]:
        (reader,) = model.graph.readers[node.output]
        name = next(each for each in node.inputs if each in params)
        value = next(each for each in node.inputs if each != name)
        scale, zero = (np.asarray(params[each]) for each in reader.inputs[1:3])
        params[f"{name}_real"] = ((np.asarray(params[name], np.float32) - zero) * scale).astype(np.float32)
        wide = f"{reader.output}_unbounded"
        del nodes[node.output]
        nodes[wide] = type(reader)(
            op_type=reader.op_type, inputs=(value, *reader.inputs[1:]), outputs=(wide,), attributes=reader.attributes
        )
        nodes[reader.output] = type(node)(op_type="Min", inputs=(wide, f"{name}_real"), outputs=(reader.output,))
    return rebuild(model, nodes=nodes.values(), params=params)


def without_bounds(model: Model) -> Model:
    """Returns the model without its Min nodes."""
    values = {
        node.output: next(name for name in node.inputs if name not in model.params)
        for node in model.graph.nodes
        if node.op_type == "Min"
    }
    nodes = [
        type(node)(
            op_type=node.op_type,
            inputs=tuple(values.get(name, name) for name in node.inputs),
            outputs=node.outputs,
            attributes=node.attributes,
            domain=node.domain,
        )
        for node in model.graph.nodes
        if node.output not in values
    ]
    return rebuild(model, nodes=nodes)


def session_of(path: Path) -> ort.InferenceSession:
    """Opens a file as the measurements need it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def timed(sessions: Sequence[ort.InferenceSession], x: np.ndarray, rounds: int) -> np.ndarray:
    """Returns seconds [round, session]; within a round the sessions follow each other."""
    feeds = [{session.get_inputs()[0].name: x} for session in sessions]
    for session, feed in zip(sessions, feeds, strict=True):
        session.run(None, feed)
    times = np.empty((rounds, len(sessions)))
    for row in times:
        for i, (session, feed) in enumerate(zip(sessions, feeds, strict=True)):
            start = time.perf_counter()
            session.run(None, feed)
            row[i] = time.perf_counter() - start
    return times


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "mobilenet_v2_1.0_224.onnx")
    parser.add_argument("--images", type=Path, default=SHARED / "data" / "imagenet")
    parser.add_argument("--preprocessing", choices=PREPROCESSINGS, default="tf")
    parser.add_argument("--num-calibration", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    task = pictures_task(
        arguments.model,
        arguments.images,
        PREPROCESSINGS[arguments.preprocessing],
        counts=[arguments.num_calibration, BATCH],
    )
    folded, _ = ptqjax.fold_batch_norms(ptqjax.read(arguments.model))
    scaled, _ = ptqjax.equalize(folded)
    name = folded.graph.inputs[0].name
    batches = [{name: task.calibration[i : i + BATCH]} for i in range(0, len(task.calibration), BATCH)]
    config = ptqjax.QuantizationConfig(granularity="tensor")
    x = task.calibration[:BATCH]
    grids = [ptqjax.calibrate(model, batches, config) for model in (folded, scaled)]
    files = forms(folded, grids[0], scaled, grids[1], x)
    with tempfile.TemporaryDirectory() as folder:
        sessions, sizes, answers = [], [], []
        for index, model in enumerate(files.values()):
            path = Path(folder) / f"{index}.onnx"
            onnx_io.write(model, path)
            sessions.append(session_of(path))
            sizes.append(path.stat().st_size / 1e6)
            answers.append(sessions[-1].run(None, {name: x})[0])
        times = timed(sessions, x, arguments.rounds)
    print(header())
    print(
        f"\n{arguments.model.stem}, W8A8 per tensor, batch {BATCH}, {THREADS} threads, {arguments.rounds} rounds, "
        f"{len(task.calibration)} pictures to calibrate on\n"
    )
    print("| form | Min | ms | ratio | file, MB | same outputs as |\n|---|---|---|---|---|---|")
    for index, (label, model) in enumerate(files.items()):
        ratio = statistics.median(times[:, index] / times[:, 0])
        same = next((other for other in range(index) if np.array_equal(answers[other], answers[index])), None)
        alike = "" if same is None else f"row {same + 1}"
        num_bounds = sum(node.op_type == "Min" for node in model.graph.nodes)
        milliseconds = 1e3 * statistics.median(times[:, index])
        print(f"| {label} | {num_bounds} | {milliseconds:.0f} | {ratio:.2f} | {sizes[index]:.1f} | {alike} |")


if __name__ == "__main__":
    main()
