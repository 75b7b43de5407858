"""Measures an accelerator: equality with the CPU, throughput, bandwidth, memory; prints tables in Markdown.

Needs jax, numpy, onnx and this package alone; the networks are built with random weights.

    python scripts/bench_gpu.py > table.md           # about 10 minutes on one GPU
    JAX_PLATFORMS=cpu python scripts/bench_gpu.py --smoke   # seconds, anywhere: that it runs

What is compared with what: matrix products are float32 without TF32 (`jax_default_matmul_precision=highest` where the
caller chooses, and so in the package), the peak is the rate of a large product of matrices on the same device, the
bandwidth that of a copy. Times are medians, with everything waited for, compilation before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from networks import NETWORKS

import ptqjax
from ptqjax.lowering import interpret

_GIGA = 1e9


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


FULL = Sizes(image=224, batches=(1, 8, 32, 128, 256), matrix=8192, elements=2**26, repeats=10)
SMOKE = Sizes(image=32, batches=(2,), matrix=64, elements=2**12, repeats=1)


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only that everything runs")
    parser.add_argument("--network", action="append", choices=sorted(NETWORKS), help="may be given several times")
    options = parser.parse_args()
    for line in report(SMOKE if options.smoke else FULL, options.network or ["mobilenet_v2", "resnet50"]):
        print(line, flush=True)


def report(sizes: Sizes, networks: list[str]) -> Iterator[str]:
    """Yields the lines of the report, as they come to be known."""
    device = jax.devices()[0]
    peak = peak_flops(sizes)
    bandwidth = copy_bandwidth(sizes)
    yield f"{device.device_kind} ({device.platform}), jax {jax.__version__}, ptqjax {_version()}"
    yield ""
    yield (
        f"Measured: {peak / 1e12:.2f} TFLOP/s in float32 without TF32 (a product of matrices of {sizes.matrix} rows), "
        f"{bandwidth / _GIGA:.0f} GB/s (a copy of {4 * sizes.elements / 2**20:.0f} MiB)."
    )
    yield ""
    yield "| network | batch | float images/s | of the peak | simulated images/s | simulated / float time |"
    yield "|---|---:|---:|---:|---:|---:|"
    for network in networks:
        yield from forward_lines(network, sizes, peak)
    yield ""
    yield "| largest difference of float32 outputs from the CPU, of the largest output | |"
    yield "|---|---:|"
    for network in networks:
        yield f"| {network} | {difference_from_cpu(network, sizes):.1e} |"
    yield ""
    yield "| throughput | GB/s | of the copy's |"
    yield "|---|---:|---:|"
    for name, rate in (("encoding search (sqnr, int8)", search_rate(sizes)), ("calibration", calibration_rate(sizes))):
        yield f"| {name} | {rate / _GIGA:.2f} | {rate / bandwidth:.3f} |"
    yield ""
    yield f"Peak device memory: {_peak_memory(device)}."


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


def forward_lines(network: str, sizes: Sizes, peak: float) -> Iterator[str]:
    """Yields a row per batch size: the float forward and the simulated one."""
    model = _model(network, sizes)
    encodings = ptqjax.calibrate(model, [_images(2, sizes)], ptqjax.QuantizationConfig(ranges="min-max"))
    simulate = ptqjax.simulate(model, encodings)
    params, encodings = jax.device_put((model.params, encodings))
    for batch in sizes.batches:
        images = jax.device_put(_images(batch, sizes))
        plain = seconds(lambda images=images: ptqjax.apply(model.graph, params, images), sizes.repeats)
        simulated = seconds(lambda images=images: simulate(params, encodings, images), sizes.repeats)
        share = batch * 2 * num_products(model, sizes) / plain / peak
        yield (
            f"| {network} | {batch} | {batch / plain:.0f} | {share:.1%} | {batch / simulated:.0f} | "
            f"{simulated / plain:.2f} |"
        )


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


def calibration_rate(sizes: Sizes) -> float:
    """Returns the bytes a second of activations that a calibration of MobileNetV2 looks at."""
    model, batch = _model("mobilenet_v2", sizes), _images(max(sizes.batches), sizes)
    config = ptqjax.QuantizationConfig(ranges="min-max")
    written = {output for node in model.graph.nodes for output in node.outputs}
    num_bytes: list[int] = []

    def watch(name: str, value: jax.Array, channel_axis: int | None) -> tuple[jax.Array, None]:
        del channel_axis
        num_bytes.append(value.size * value.dtype.itemsize if name in written else 0)
        return value, None

    jax.eval_shape(lambda x: interpret(model.graph, model.params, x, intercept=watch, platform="gpu")[0], batch)
    more, fewer = (
        seconds(lambda count=count: ptqjax.calibrate(model, [batch] * count, config), sizes.repeats) for count in (3, 1)
    )
    return sum(num_bytes) / max((more - fewer) / 2, 1e-9)  # without what a calibration costs besides


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


def _version() -> str:
    return ptqjax.__version__


def _peak_memory(device: Any) -> str:
    statistics_of_memory = device.memory_stats() or {}
    peak = statistics_of_memory.get("peak_bytes_in_use")
    return "not told by this device" if peak is None else f"{peak / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
