"""How far a file's outputs here are from ONNX Runtime's, before and after it was written again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import onnx
import onnxruntime

from ptqjax.ir import Graph, Model, TensorSpec
from ptqjax.lowering import apply
from ptqjax.onnx_io import read, to_proto

Arrays = Mapping[str, np.ndarray]

FILES: Mapping[str, float] = {
    "efficientnet_lite0": 1.0,
    "minilm_l6_sentiment": 1.0,
    "mlperf_ad01_autoencoder": 1.0,
    "mlperf_resnet8_cifar10": 1.0,
    "mlperf_vww_mobilenet_v1_0.25_96": 1.0,
    "mobilenet_v1_0.25_224": 1.0,
    "mobilenet_v2_1.0_224": 1.0,
    "resnet20_cifar10": 1.0,
    "squeezenet_v1.1": 1.0,
    "stories260k": 1.0,
    "tiny_vit_cifar10": 1.0,
    "other/dnsmos_model_v8": 1.0,
    "other/dtln_1": 1.0,
    "other/mnist_cntk": 1.0,
    "other/nanodet_m": 1.0,
    "other/silero_vad_16k_op15": 1.0,
    "other/superresolution_core_op18": 1.0,
    "other/ultraface_rfb320_linzaer": 1.0,
    "other/yunet_n_320": 255.0,  # below, its scores are 1e-5, and ONNX Runtime's Sigmoid is exact to 1e-7
}
"""The real models, with the standard deviation of the values to feed."""

_SIZES = {"sequence": 576, "H": 24, "W": 32, "T": 12}  # of open axes that are not the batch
_VALUES = {"sr": np.int64(16000)}  # inputs that choose a path through the graph
_TOKENS = 500  # ids below are in every vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A file's size, and the largest relative differences between what is computed here and by the oracle."""

    num_nodes: int
    opset: int
    differences: Mapping[int, float]
    """By batch size, of the file as it was read."""
    rewritten: float | None
    """Of ONNX Runtime on the file that was written again against the original one; the largest of all batch sizes. None
    where it was not run."""


def compare(file: bytes, inputs: Callable[[int], Arrays], batches: tuple[int, ...]) -> Comparison:
    """Returns how the file runs here, under `jit`, compared with ONNX Runtime."""
    model, proto = read(file), onnx.load_from_string(file)
    original, again = _session(file), _session(to_proto(model).SerializeToString())
    differences, rewritten = {}, 0.0
    for batch in batches:
        given = inputs(batch)
        expected = _run(original, given)
        differences[batch] = largest_difference(outputs_here(model, given), expected)
        rewritten = max(rewritten, largest_difference(_run(again, given), expected))
    return Comparison(
        num_nodes=len(proto.graph.node),
        opset=max(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")),
        differences=differences,
        rewritten=rewritten,
    )


def outputs_here(model: Model, inputs: Arrays) -> Arrays:
    """Returns what the model computes inside a caller's `jit`, which holds 64-bit types where the graph does."""
    with jax.enable_x64(_is_wide(model.graph)):
        found = jax.jit(partial(apply, model.graph))(model.params, dict(inputs))
    return {name: np.asarray(value) for name, value in found.items()}


def largest_difference(found: Arrays, expected: Arrays) -> float:
    """Returns the largest difference of an output's elements, relative to the largest magnitude in that output.

    Raises:
        AssertionError: The outputs differ in names, shapes or types.
    """
    assert found.keys() == expected.keys()  # in any order: `jit` sorts
    return max(_difference(found[name], value) for name, value in expected.items())


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    expected = expected.astype(np.float64)
    assert np.isfinite(expected).all()  # or the comparison says nothing
    scale = np.abs(expected).max(initial=np.finfo(np.float32).tiny)
    return float(np.abs(found.astype(np.float64) - expected).max(initial=0.0) / scale)


def random_inputs(graph: Graph, deviation: float = 1.0) -> Callable[[int], Arrays]:
    """Returns a function that draws inputs for a batch size; it plays no role where the file fixes its own."""

    def inputs(batch: int) -> Arrays:
        random = np.random.default_rng(batch)
        return {
            spec.name: np.asarray(_VALUES.get(spec.name, _drawn(spec, random, deviation, batch)), np.dtype(spec.dtype))
            for spec in graph.inputs
        }

    return inputs


def _drawn(spec: TensorSpec, random: np.random.Generator, deviation: float, batch: int) -> np.ndarray:
    sizes = _sizes(spec, batch)
    if spec.name == "attention_mask":
        return np.ones(sizes)
    if np.dtype(spec.dtype).kind in "iu":
        return random.integers(0, _TOKENS, sizes)
    return random.normal(scale=deviation, size=sizes)


def batches_of(graph: Graph) -> tuple[int, ...]:
    """Returns the batch sizes to run at: two where an axis is open for it."""
    return (1, 5) if any(_sizes(spec, 1) != _sizes(spec, 5) for spec in graph.inputs) else (1,)


def _sizes(spec: TensorSpec, batch: int) -> list[int]:
    return [size if isinstance(size, int) else _SIZES.get(str(size), batch) for size in spec.shape or ()]


def _is_wide(graph: Graph) -> bool:
    return any(np.dtype(spec.dtype).itemsize == 8 for spec in (*graph.inputs, *graph.outputs))


def _session(file: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # as many processes as cores run tests
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, inputs: Arrays) -> Arrays:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))
