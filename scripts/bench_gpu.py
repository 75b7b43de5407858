"""Measures an accelerator: rates, each program's time, equality with the CPU, memory; a row at a time, in Markdown.

Needs jax, numpy, onnx and this package alone; the networks are built with random weights.

    python scripts/bench_gpu.py --out bench.jsonl    # under eight minutes on one GPU, smallest first
    python scripts/bench_gpu.py --out bench.jsonl    # again: what is in the file is not measured again
    JAX_PLATFORMS=cpu python scripts/bench_gpu.py --smoke   # seconds, anywhere: that it runs

Each row is written to the file and printed as soon as it is known; after `--seconds` nothing more is begun, and a run
that is cut off leaves what it had. Products are float32 without TF32, the peak is the rate of a large product of
matrices on the same device, the bandwidth that of a copy. Times are medians, with everything waited for, compilation
before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from networks import NETWORKS

import ptqjax
from ptqjax.fit.behaviour import observe_behaviour
from ptqjax.kernels.platforms import current, made_for
from ptqjax.kernels.ways import WAYS
from ptqjax.lowering import interpret

_GIGA = 1e9
_SECONDS = 450.0  # of a run
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How large everything is."""

    image: int
    """Height and width of the images."""
    batches: tuple[int, ...]
    """Batch sizes of the forward passes."""
    matrix: int
    """Rows of the matrices whose product gives the peak."""
    elements: int
    """Elements that are copied and searched."""
    repeats: int
    """Timed runs."""


FULL = Sizes(image=224, batches=(1, 64, 256), matrix=8192, elements=2**26, repeats=10)
SMOKE = Sizes(image=32, batches=(2,), matrix=64, elements=2**12, repeats=1)


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only that everything runs")
    parser.add_argument("--network", action="append", choices=sorted(NETWORKS), help="may be given several times")
    parser.add_argument("--out", type=Path, help="a file of rows that are known already, to which new ones are added")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="after which nothing more is begun")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, ptqjax {ptqjax.__version__}\n")
    print("| what | network | batch | value | unit | |\n|---|---|---:|---:|---|---|", flush=True)
    known = _known(options.out)
    deadline = time.monotonic() + options.seconds
    sizes = SMOKE if options.smoke else FULL
    for key, measure in measurements(sizes, options.network or ["mobilenet_v2", "resnet50"]):
        row = known.get(key)
        if row is None and time.monotonic() > deadline:
            continue
        if row is None:
            row = _measured(key, measure)
            _keep(options.out, row)
        print(_line(row), flush=True)
    print(f"\nPeak device memory: {_peak_memory(device)}.")


def _known(path: Path | None) -> dict[tuple[str, str, int], Row]:
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be cut off
    return {(row["what"], row["network"], row["batch"]): row for row in rows}


def _keep(path: Path | None, row: Row) -> None:
    if path is not None:
        before = path.read_text() if path.exists() else ""
        is_cut_off = bool(before) and not before.endswith("\n")
        with path.open("a") as file:
            print("\n" * is_cut_off + json.dumps(row), file=file)


def _measured(key: tuple[str, str, int], measure: Callable[[], tuple[float, str, str]]) -> Row:
    what, network, batch = key
    try:
        value, unit, remark = measure()
    except Exception as error:  # noqa: BLE001 - what fails is a row, and the next one is measured
        value, unit, remark = float("nan"), "", f"fails: {type(error).__name__}: {error}"[:200].replace("\n", " ")
    return {"what": what, "network": network, "batch": batch, "value": value, "unit": unit, "remark": remark}


def _line(row: Row) -> str:
    batch = row["batch"] or ""
    return f"| {row['what']} | {row['network']} | {batch} | {row['value']:.4g} | {row['unit']} | {row['remark']} |"


def measurements(
    sizes: Sizes, networks: list[str]
) -> Iterator[tuple[tuple[str, str, int], Callable[[], tuple[float, str, str]]]]:
    """Yields what is measured, smallest first: (what, network, batch), and what gives its value, unit and remark."""
    yield ("copy", "", 0), lambda: (copy_bandwidth(sizes) / _GIGA, "GB/s", f"{4 * sizes.elements / 2**20:.0f} MiB")
    yield ("product of matrices", "", 0), lambda: (peak_flops(sizes) / 1e12, "TFLOP/s", f"{sizes.matrix} rows")
    yield ("encoding search (sqnr, int8)", "", 0), lambda: (search_rate(sizes) / _GIGA, "GB/s", "of samples")
    for network in networks:
        bench = _Bench(network, sizes)
        yield ("largest difference from the CPU", network, 2), bench.difference
        yield ("integers that differ from the CPU's", network, 2), bench.differing
        for batch in sizes.batches:
            for what in ("float", "simulated", "integer"):
                yield (what, network, batch), partial(bench.forward, what, batch)
        last = sizes.batches[-1]
        yield ("calibration", network, last), partial(bench.calibration, last)
        yield ("behaviour", network, sizes.batches[0]), partial(bench.behaviour, sizes.batches[0])
        for kind, way in WAYS.items():
            for other in way.others:
                what = f"float, {kind} by {other}"
                yield (what, network, last), partial(bench.forward, "float", last, {kind: other})


class _Bench:
    """A network, and what of it is measured; read and calibrated when the first needs it."""

    def __init__(self, network: str, sizes: Sizes) -> None:
        self.network, self.sizes = network, sizes
        self._ready: tuple[ptqjax.Model, Any, Any] | None = None

    def ready(self) -> tuple[ptqjax.Model, Any, Any]:
        """Returns the model, and its parameters and encodings on the device."""
        if self._ready is None:
            model = ptqjax.read(NETWORKS[self.network](size=self.sizes.image))
            config = ptqjax.QuantizationConfig(ranges="min-max")
            self._ready = model, *jax.device_put((model.params, ptqjax.calibrate(model, [self.images(2)], config)))
        return self._ready

    def images(self, batch: int) -> dict[str, np.ndarray]:
        """Returns random images."""
        return _images(batch, self.sizes)

    def program(self, what: str) -> Callable[[Any], Any]:
        """Returns the float, simulated or integer program, of images."""
        model, params, encodings = self.ready()
        if what == "float":
            return partial(ptqjax.apply, model.graph, params)
        run = ptqjax.simulate(model, encodings, arithmetic="float" if what == "simulated" else "integer")
        return partial(run, params, encodings)

    def forward(self, what: str, batch: int, ways: Mapping[str, str] | None = None) -> tuple[float, str, str]:
        """Returns images a second; `ways` are those of `kernels.ways` that are taken in place of the table's."""
        images, program = jax.device_put(self.images(batch)), self.program(what)
        with made_for(current().platform, ways):
            taken = seconds(lambda: program(images), self.sizes.repeats)
        flops = 2 * batch * num_products(self.ready()[0], self.sizes) / taken
        return batch / taken, "images/s", f"{taken * 1e3:.2f} ms, {flops / 1e12:.2f} T operations/s"

    def difference(self) -> tuple[float, str, str]:
        """Returns how far float outputs are from those of the program for CPUs, relative to the largest."""
        return difference_from_cpu(self.network, self.sizes), "", "of the largest output, in float32"

    def differing(self) -> tuple[float, str, str]:
        """Returns the share of the integer program's outputs that are not to the bit those of the CPU."""
        model, images = self.ready()[0], self.images(2)
        found = np.asarray(self.program("integer")(images)["output"])
        cpu = jax.local_devices(backend="cpu")[0]
        params, encodings = jax.device_put(self.ready()[1:], cpu)
        with jax.default_device(cpu), made_for("cpu"):
            expected = ptqjax.simulate(model, encodings, arithmetic="integer")(params, encodings, images)["output"]
        return float(np.mean(found != np.asarray(expected))), "", "share of the outputs"

    def calibration(self, batch: int) -> tuple[float, str, str]:
        """Returns how many images a second a calibration takes in, beside what it costs once."""
        model, images = self.ready()[0], self.images(batch)
        config = ptqjax.QuantizationConfig(ranges="min-max")
        more, fewer = (
            seconds(lambda count=count: ptqjax.calibrate(model, [images] * count, config), 1) for count in (3, 1)
        )
        return 2 * batch / max(more - fewer, 1e-9), "images/s", f"{fewer:.2f} s with one batch"

    def behaviour(self, batch: int) -> tuple[float, str, str]:
        """Returns the seconds of a pass forward and backward that measures gains."""
        model = self.ready()[0]
        return seconds(lambda: observe_behaviour(model, [self.images(batch)]), self.sizes.repeats), "s", ""


def peak_flops(sizes: Sizes) -> float:
    """Returns the measured float32 operations a second of a large product of matrices."""
    a = jnp.ones((sizes.matrix, sizes.matrix), jnp.float32)
    product = jax.jit(lambda a: jnp.dot(a, a, precision="highest"))
    return 2 * sizes.matrix**3 / seconds(lambda: product(a), sizes.repeats)


def copy_bandwidth(sizes: Sizes) -> float:
    """Returns the bytes a second that a copy reads and writes."""
    x = jnp.ones(sizes.elements, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds(lambda: copy(x), sizes.repeats)


def num_products(model: ptqjax.Model, sizes: Sizes) -> int:
    """Returns how many multiplications the convolutions and the fully connected layers need for one image."""
    shapes: dict[str, tuple[int, ...]] = {}

    def watch(name: str, value: jax.Array, channel_axis: int | None) -> tuple[jax.Array, None]:
        del channel_axis
        shapes[name] = value.shape
        return value, None

    jax.eval_shape(
        lambda x: interpret(model.graph, model.params, x, intercept=watch, platform="gpu")[0], _images(1, sizes)
    )
    layers = [node for node in model.graph.nodes if node.op_type in {"Conv", "Gemm"}]
    return sum(
        int(np.prod(shapes[node.output])) * int(np.prod(model.params[node.inputs[1]].shape[1:])) for node in layers
    )


def difference_from_cpu(network: str, sizes: Sizes) -> float:
    """Returns how far the outputs are from those of the program for CPUs, relative to the largest."""
    model, images = _model(network, sizes), _images(2, sizes)
    found = ptqjax.apply(model.graph, model.params, images)["output"]
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        on_cpu = jax.jit(lambda params, x: interpret(model.graph, params, x, platform="cpu")[0])
        expected = np.asarray(on_cpu(model.params, images)["output"])
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def search_rate(sizes: Sizes) -> float:
    """Returns the bytes a second of the search for an encoding of samples in the host's memory: each counts once."""
    samples = np.random.default_rng(0).normal(size=sizes.elements).astype(np.float32)
    search = partial(ptqjax.choose_encoding, samples, dtype="int8", ranges="sqnr")
    return samples.nbytes / seconds(search, sizes.repeats)


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Returns the median time of a call, after one that compiles."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _model(network: str, sizes: Sizes) -> ptqjax.Model:
    return ptqjax.read(NETWORKS[network](size=sizes.image))


def _images(batch: int, sizes: Sizes) -> dict[str, np.ndarray]:
    shape = (batch, 3, sizes.image, sizes.image)
    return {"input": np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)}


def _peak_memory(device: Any) -> str:
    statistics_of_memory = device.memory_stats() or {}
    peak = statistics_of_memory.get("peak_bytes_in_use")
    return "not told by this device" if peak is None else f"{peak / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
