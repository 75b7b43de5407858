"""Peak memory of a weight-only job on a synthetic transformer that is generated into a temporary folder.

python scripts/bench_memory.py --megabytes 300 [--limit 2000] [--weights int8]

The model has external data, blocks of attention and a gated MLP, a table and a head. The job runs in a child process of
its own, whose largest resident set `resource.getrusage` tells; --limit is a hard limit of its heap in MB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench_header import header
from onnx import TensorProto, helper

_VOCABULARY = 16_000
_ALIGNMENT = 4096


def _node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def _block(x: str, i: int) -> Iterator[onnx.NodeProto]:
    """Yields one block: attention of one head and a gated MLP, each behind a LayerNormalization."""
    p = f"b{i}_"
    yield _node("LayerNormalization", f"{x} {p}n1 {p}z1", f"{p}a", axis=-1)
    for name in "qkv":
        yield _node("MatMul", f"{p}a {p}w{name}", f"{p}{name}")
    yield _node("Transpose", f"{p}k", f"{p}kt", perm=[0, 2, 1])
    yield _node("MatMul", f"{p}q {p}kt", f"{p}s")
    yield _node("Softmax", f"{p}s", f"{p}p", axis=-1)
    yield _node("MatMul", f"{p}p {p}v", f"{p}m")
    yield _node("MatMul", f"{p}m {p}wo", f"{p}o")
    yield _node("Add", f"{x} {p}o", f"{p}x")
    yield _node("LayerNormalization", f"{p}x {p}n2 {p}z2", f"{p}c", axis=-1)
    yield _node("MatMul", f"{p}c {p}wg", f"{p}g")
    yield _node("Sigmoid", f"{p}g", f"{p}gs")
    yield _node("MatMul", f"{p}c {p}wu", f"{p}u")
    yield _node("Mul", f"{p}gs {p}u", f"{p}h")
    yield _node("MatMul", f"{p}h {p}wd", f"{p}d")
    yield _node("Add", f"{p}x {p}d", f"y{i}")


def _shapes(width: int, num_blocks: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"table": (_VOCABULARY, width), "head": (width, _VOCABULARY)}
    for i in range(num_blocks):
        p = f"b{i}_"
        found |= {f"{p}{name}": (width,) for name in ("n1", "z1", "n2", "z2")}
        found |= {f"{p}w{name}": (width, width) for name in "qkvo"}
        found |= {f"{p}wg": (width, 4 * width), f"{p}wu": (width, 4 * width), f"{p}wd": (4 * width, width)}
    return found


def generate(folder: Path, *, megabytes: int, width: int) -> dict[str, float]:
    """Writes the transformer tensor by tensor; returns its size, a block's and that of the largest tensor, in MB."""
    block = 16 * width * width * 4
    num_blocks = max(round((megabytes * 2**20 - 8 * _VOCABULARY * width) / block), 1)
    rng, shapes = np.random.default_rng(0), _shapes(width, num_blocks)
    tensors = []
    with (folder / "model.data").open("wb") as file:
        for name, shape in shapes.items():
            value = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))
            file.write(bytes(-file.tell() % _ALIGNMENT))
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
            places = {"location": "model.data", "offset": file.tell(), "length": value.nbytes}
            for key, text in places.items():
                tensor.external_data.add(key=key, value=str(text))
            file.write(value.data)
            tensors.append(tensor)
        total = file.tell()
    nodes = [_node("Gather", "table ids", "x")]
    for i in range(num_blocks):
        nodes += _block("x" if i == 0 else f"y{i - 1}", i)
    nodes += [_node("MatMul", f"y{num_blocks - 1} head", "logits")]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "t"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", "t", _VOCABULARY])
    graph = helper.make_graph(nodes, "synthetic", [ids], [logits], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    largest = max(int(np.prod(shape)) * 4 for shape in shapes.values())
    return {name: size / 2**20 for name, size in (("model", total), ("block", block), ("tensor", largest))}


def job(folder: Path, weights: str, granularity: str) -> None:
    """Rounds the weights, writes the file, and prints what the process held at most after each step, as JSON."""
    start, told = time.process_time(), {}
    import ptqjax  # noqa: PLC0415 - what importing takes is told apart
    from ptqjax.placement.place import place  # noqa: PLC0415
    from ptqjax.placement.sites import WEIGHT  # noqa: PLC0415
    from ptqjax.ranges.schemes import find_scheme  # noqa: PLC0415
    from ptqjax.ranges.search import encode_constants  # noqa: PLC0415

    def step(name: str) -> None:
        told[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    step("import")
    model = ptqjax.read(folder / "model.onnx")
    step("read")
    config = ptqjax.QuantizationConfig(weights=weights, granularity=granularity, ranges="min-max")
    sites = [site for site in place(model, config).sites if site.kind == WEIGHT]
    step("place")
    encodings = encode_constants(sites, model.params, find_scheme("min-max"))
    step("ranges")
    ptqjax.export(model, encodings, folder, "quantized")
    step("export")
    sizes = {file.name: file.stat().st_size / 2**20 for file in folder.glob("quantized*")}
    print(json.dumps({"peak": told, "files": sizes, "seconds": time.process_time() - start, "weights": len(sites)}))


def main() -> None:
    """Generates the model, runs the job in a child and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=0, help="MB of heap that the child may take; 0: any")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--granularity", default="channel")
    parser.add_argument("--job", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        job(given.job, given.weights, given.granularity)
        return
    with tempfile.TemporaryDirectory() as name:
        sizes = generate(Path(name), megabytes=given.megabytes, width=given.width)
        command = [sys.executable, __file__, "--job", name, "--weights", given.weights]
        command += ["--granularity", given.granularity]

        def limit() -> None:
            if given.limit:
                resource.setrlimit(resource.RLIMIT_DATA, (given.limit * 2**20,) * 2)

        done = subprocess.run(command, check=True, capture_output=True, text=True, preexec_fn=limit)
        found = json.loads(done.stdout.splitlines()[-1])
    print(header())
    print(
        f"model {sizes['model']:.0f} MB, a block {sizes['block']:.0f} MB, the largest tensor {sizes['tensor']:.0f} MB"
    )
    print(
        f"{found['weights']} weights in {given.weights} per {given.granularity}, {found['seconds']:.0f} s of processor"
    )
    for step, peak in found["peak"].items():
        print(f"largest resident set up to {step}: {peak:.0f} MB")
    print("files: " + ", ".join(f"{file} {size:.0f} MB" for file, size in sorted(found["files"].items())))


if __name__ == "__main__":
    main()
