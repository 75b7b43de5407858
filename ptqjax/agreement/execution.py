"""What a session makes of a quantized file: the layers that run in integers, its size, and how long a run takes.

The session is the one that a user opens, without options but one thread, on this processor; the float model runs in
turns with it. Kernels are told from the graph that ONNX Runtime optimizes: an integer kernel reads the codes of a
layer's weight; anything else is float.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptqjax import onnx_io
from ptqjax.agreement.runtime import model_file
from ptqjax.errors import ConfigError, ModelError
from ptqjax.ir import Graph, Model, Node, all_nodes, place_of
from ptqjax.qdq.fuse_quantized import fuse_quantized

KERNELS = ("Conv", "Gemm", "MatMul")
"""Operators that ONNX Runtime's CPU provider has integer kernels for."""
_LAYERS = (*KERNELS, "ConvTranspose", "GRU", "LSTM", "RNN")
_INTEGER = ("QLinear", "QGemm", "QAttention", "MatMulInteger", "MatMulNBits", "ConvInteger", "DynamicQuantize")
_ON_THE_WAY = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "DequantizeLinear", "Clip")
_ROUNDS = (5, 51)  # that are timed, at least and at most
SLOWER = 1.05
"""A ratio of times that is more than what two runs of one file differ by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A layer, and what computes it."""

    name: str
    """Its weight; its result where both operands are computed."""
    operator: str
    """Its operator."""
    in_integers: bool
    """Whether an integer kernel computes it."""
    reason: str
    """Why none does; "" where one does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """What a session makes of a file, beside the float model."""

    layers: tuple[Layer, ...]
    """The layers, in the order of the graph."""
    kernels: Mapping[str, int]
    """How many nodes of each operator the session has, by the runtime's names."""
    num_bytes: int
    """Size of the file, external data included."""
    float_num_bytes: int
    """Size of the float file."""
    milliseconds: float
    """Processor time of a run of one sample on one thread."""
    float_milliseconds: float
    """The float model's, measured in turns with it."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against the file, a sentence each."""
        found = []
        if self.num_bytes > self.float_num_bytes:
            sizes = f"{kilobytes(self.num_bytes)} against {kilobytes(self.float_num_bytes)}"
            found.append(f"the file is larger than the float one, {sizes}: few of its parameters are quantized")
        if self.milliseconds > SLOWER * self.float_milliseconds:
            times = f"{self.milliseconds:.3g} against {self.float_milliseconds:.3g} ms a run"
            found.append(f"the file is slower than the float one on this processor, {times}")
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as plain data, for JSON."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers], "warnings": list(self.warnings)}


def kilobytes(num_bytes: int) -> str:
    """Returns a size for people, in units of 1,024 bytes."""
    return f"{num_bytes / 1024:,.0f} KB"


def execution(
    quantized: str | os.PathLike[str],
    reference: Model | str | os.PathLike[str],
    sample: Mapping[str, Any],
    *,
    seconds: float = 0.5,
) -> Execution:
    """Returns what ONNX Runtime makes of a quantized file, beside the float model.

    Args:
        quantized: The file, or the folder that `ptqjax quantize` wrote.
        reference: The float model: its file, or as read.
        sample: Inputs by name, as the models take them; one sample, to time what a user times.
        seconds: How long runs are timed; five of each model are in any case.

    Raises:
        ConfigError: onnxruntime is not installed.
        ModelError: ONNX Runtime does not accept or run one of the models.
    """
    file = model_file(os.fspath(quantized))
    sources = [_source(reference), file]
    model = onnx_io.read(file)
    graph = _optimized(file)
    sessions = [plain_session(source) for source in sources]
    try:
        float_time, own_time = milliseconds(
            [lambda run=session.run: run(None, dict(sample)) for session in sessions], seconds=seconds
        )
    except Exception as error:  # ONNX Runtime's errors have no common class of their own
        raise ModelError(f"ONNX Runtime does not run one of the models on the sample: {error}") from error
    return Execution(
        layers=layers_of(model, graph),
        kernels=dict(Counter(node.op_type for node in graph.nodes).most_common()),
        num_bytes=_num_bytes(file, model),
        float_num_bytes=_num_bytes(sources[0], reference),
        milliseconds=own_time,
        float_milliseconds=float_time,
    )


def plain_session(source: str | os.PathLike[str] | bytes, *, exact: bool = False, **options: Any) -> Any:
    """Returns a session as users open it, on the CPU and one thread.

    Args:
        source: The file, or its bytes.
        exact: Whether integers are summed exactly on processors without VNNI, too.
        options: Further attributes of `onnxruntime.SessionOptions`.

    Raises:
        ConfigError: onnxruntime is not installed.
        ModelError: ONNX Runtime does not accept the model.
    """
    try:
        import onnxruntime  # noqa: PLC0415 - an extra: there may be none
    except ImportError as error:
        raise ConfigError("onnxruntime is not installed; install ptqjax[cpu]") from error
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # that a saved graph is for this processor is known
    settings.intra_op_num_threads = 1
    if exact:
        settings.add_session_config_entry("session.x64quantprecision", "1")
    for name, value in options.items():
        setattr(settings, name, value)
    model = source if isinstance(source, bytes) else os.fspath(source)
    try:
        return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise ModelError(f"ONNX Runtime does not accept the model: {error}") from error


def milliseconds(functions: Sequence[Callable[[], Any]], *, seconds: float) -> list[float]:
    """Returns the processor time of this thread that each function takes, in milliseconds: the median of its calls.

    The functions take turns, so that all of them see the same machine; one that takes little is called several times.

    Args:
        functions: What to time; they compute on the calling thread.
        seconds: How long all of it may take, about; at least five rounds are made.
    """
    num_calls = [max(1, int(2e-3 / max(_warm(function), 1e-6))) for function in functions]
    rounds: list[list[float]] = []
    end = time.monotonic() + seconds
    while len(rounds) < _ROUNDS[0] or (len(rounds) < _ROUNDS[1] and time.monotonic() < end):
        rounds.append([_time_of(function, num) for function, num in zip(functions, num_calls, strict=True)])
    return [1e3 * float(value) for value in np.median(rounds, axis=0)]


def _warm(function: Callable[[], Any]) -> float:
    for _ in range(2):
        function()
    return _time_of(function, 1)


def _time_of(function: Callable[[], Any], num_calls: int) -> float:
    start = time.thread_time()
    for _ in range(num_calls):
        function()
    return (time.thread_time() - start) / num_calls


def layers_of(model: Model, graph: Graph) -> tuple[Layer, ...]:
    """Returns the layers of a QDQ model, subgraphs included, and which of them an integer kernel computes.

    Args:
        model: The model.
        graph: What ONNX Runtime made of it.
    """
    read_as_codes = {
        name for node in graph.nodes if node.op_type.startswith(_INTEGER) for name in (*node.inputs, *node.outputs)
    }
    foreseen = {record.where[0]: record for record in fuse_quantized(model)[1]}
    own = {id(node) for node in model.graph.nodes}
    found = []
    for node in (node for node in all_nodes(model.graph) if node.op_type in _LAYERS and not node.domain):
        codes, weight = _codes(model, node)
        results = _quantized(model, node)
        record = foreseen.get(node.output)
        known = {codes} if codes else {node.output, *results}
        in_integers = id(node) in own and not known.isdisjoint(read_as_codes)
        reason = "" if in_integers else _reason(node, record.reason if record else "", inside=id(node) not in own)
        name = (weight or min(results, default=node.output)).removesuffix("_quantized")
        found.append(Layer(name=name, operator=node.op_type, in_integers=in_integers, reason=reason))
    return tuple(found)


def _codes(model: Model, node: Node) -> tuple[str, str]:
    """Returns the codes of a layer's weight, and what holds the weight; "" where there are none."""
    for operand in node.inputs[1::-1]:
        tensor, producers = operand, model.graph.producers
        while (before := producers.get(tensor)) is not None and before.op_type in _ON_THE_WAY:
            tensor = before.inputs[0]
        if tensor in model.params:
            is_float = np.issubdtype(np.asarray(model.params[tensor]).dtype, np.floating)
            return ("" if is_float else tensor), tensor
    return "", ""


def _quantized(model: Model, node: Node) -> set[str]:
    """Returns what quantizes a layer's result, if need be behind an activation function."""
    found, tensors = set(), [node.output]
    for tensor in tensors:
        for reader in model.graph.readers.get(tensor, ()):
            if reader.op_type in ("Relu", "Clip") and len(tensors) < len(_LAYERS):
                tensors.append(reader.output)
            if reader.op_type == "QuantizeLinear":
                found.add(reader.output)
    return found


def _reason(node: Node, foreseen: str, *, inside: bool) -> str:
    if inside:
        return "it is inside a subgraph, which is not quantized"
    if node.op_type not in KERNELS:
        return f"ONNX Runtime has no integer kernel for {node.op_type}"
    return foreseen or f"ONNX Runtime chose no integer kernel for {place_of(node)}"


def _optimized(file: str | os.PathLike[str] | bytes) -> Graph:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        plain_session(file, optimized_model_filepath=str(path))
        return onnx_io.read(path).graph


def _source(reference: Model | str | os.PathLike[str]) -> str | bytes:
    if isinstance(reference, Model):
        return onnx_io.to_proto(reference).SerializeToString()
    return os.fspath(reference)


def _num_bytes(source: str | os.PathLike[str] | bytes, model: Model | str | os.PathLike[str]) -> int:
    """Returns the size of a model's file; where it holds less than half of its parameters, theirs beside it as well."""
    size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    params = (model if isinstance(model, Model) else onnx_io.read(model)).params
    beside = sum(np.asarray(value).nbytes for value in params.values())
    return size if 2 * size >= beside else size + beside
