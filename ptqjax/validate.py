"""Runs an exported file in ONNX Runtime and compares, in steps, group by group, with the integer program.

One rounding that falls the other way changes all that follows, so exactness is judged where it can be: each group is
recomputed from ONNX Runtime's own integers before it. End to end, programs are compared by SQNR and agreement.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ptqjax import onnx_io
from ptqjax.errors import ConfigError, DataError, ModelError
from ptqjax.ir import Graph, Model, Node, Report, TensorSpec, rebuild, value_of
from ptqjax.lowering import apply
from ptqjax.transforms.fuse_quantized import fuse_quantized
from ptqjax.transforms.saturation import warn_of_saturation

Run = Callable[[Mapping[str, Any]], dict[str, np.ndarray]]
"""A model as something that runs: inputs by name to outputs by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """How far one quantized tensor, recomputed from the runtime's integers before it, is from the runtime's."""

    tensor: str
    """The quantized tensor."""
    operator: str
    """What computes it: the operator behind which it is quantized."""
    integer: bool
    """Whether the runtime computed it in integers, by the operator that also runs where nothing is exposed.

    Where exposing the integers keeps the runtime from fusing, what was compared is not what runs: False, and a warning.
    """
    largest: int
    """Largest distance, in steps."""
    num_equal: int
    """How many elements agree."""
    num_elements: int
    """How many there are."""

    @property
    def equal(self) -> float:
        """The fraction of elements that agree."""
        return self.num_equal / self.num_elements


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """How like two programs' outputs are, end to end."""

    sqnr: float
    """10 log10(sum y^2 / sum (y - y')^2) over all outputs, y the runtime's, in dB; infinite where they are equal."""
    agreement: float
    """Fraction of samples whose largest element of the first output is the same one."""
    equal: float
    """Fraction of elements that are the same to the bit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What `validate` found."""

    groups: tuple[Group, ...]
    """Every quantized tensor, in the order of the graph."""
    integer: Likeness
    """The integer program against ONNX Runtime."""
    float: Likeness
    """The float program against ONNX Runtime."""
    num_samples: int
    """How many samples were compared."""
    fusion: Report
    """Which operators the runtime computes in integers, which not, and why."""
    warnings: tuple[str, ...]
    """What the reader should know: groups fused otherwise than foreseen, weights that saturate elsewhere."""

    @property
    def largest(self) -> int:
        """Largest distance of all groups, in steps."""
        return max((group.largest for group in self.groups), default=0)

    @property
    def equal(self) -> float:
        """The fraction of elements that agree, in the group where it is lowest."""
        return min((group.equal for group in self.groups), default=1.0)

    def as_dict(self) -> dict[str, Any]:
        """Returns the findings as plain data, for JSON."""
        return asdict(self)


def validate(
    model: Model | str | os.PathLike[str] | bytes, batches: Iterable[Mapping[str, Any]], *, device: str = "cpu"
) -> Validation:
    """Returns how an exported QDQ model in ONNX Runtime compares with what is simulated.

    Args:
        model: The QDQ model: its file, the folder that `ptqjax quantize` wrote, its bytes, or the model as read.
        batches: Inputs by name, samples along the first axis; one batch at a time is held.
        device: Where ONNX Runtime computes: "cpu", "cuda" or "auto".

    Raises:
        ModelError: The model cannot be read or run, or is not quantized.
        DataError: The batches do not fit, or there are none.
        ConfigError: onnxruntime is not installed, or has no such device.
    """
    quantized = model if isinstance(model, Model) else onnx_io.read(_file(model))
    tensors = _quantized_tensors(quantized)
    if not tensors:
        raise ModelError(
            "the model has no QuantizeLinear node: there is nothing to validate; export it quantized first"
        )
    fused, fusion = fuse_quantized(quantized)
    cut = _cut(fused, tensors)
    exposed = _with_outputs(quantized, tensors)
    runtime = session(exposed, device=device)
    fusions = _Fusions(plain=_optimized(quantized), exposed=_optimized(exposed), foreseen=fused.graph)
    as_it_is = (
        runtime if _operators(fusions.plain) == _operators(fusions.exposed) else session(quantized, device=device)
    )
    totals = {name: _Totals() for name in tensors}
    integer, floating = _Sums(), _Sums()
    num_samples = 0
    for batch in batches:
        found = run(runtime, batch)
        whole = found if as_it_is is runtime else run(as_it_is, batch)
        outputs = {spec.name: whole[spec.name] for spec in quantized.graph.outputs}
        recomputed = apply(cut.graph, cut.params, {**batch, **{name: found[name] for name in tensors}})
        totals = {name: total.plus(found[name], recomputed[_again(name)]) for name, total in totals.items()}
        integer = integer.plus(outputs, apply(fused.graph, fused.params, batch))
        floating = floating.plus(outputs, apply(quantized.graph, quantized.params, batch))
        num_samples += len(next(iter(batch.values())))
    if not num_samples:
        raise DataError("there are no samples to validate with; give at least one batch")
    return Validation(
        groups=tuple(_group(fusions, quantized.graph, name, total) for name, total in totals.items()),
        integer=integer.likeness(),
        float=floating.likeness(),
        num_samples=num_samples,
        fusion=fusion,
        warnings=(*_otherwise_fused(fusions), *warn_of_saturation(fused)),
    )


def session(source: Model | str | os.PathLike[str] | bytes, *, device: str = "cpu", **options: Any) -> Any:
    """Returns an ONNX Runtime session, exact on every x86.

    Without VNNI, ONNX Runtime's default kernels for uint8 x int8 saturate at 16 bits; the session is opened with
    `session.x64quantprecision`, which takes exact ones.

    Args:
        source: The model: a file, its bytes, or as read.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        options: Further attributes of `onnxruntime.SessionOptions`.

    Raises:
        ConfigError: onnxruntime is not installed, or has no such device.
        ModelError: ONNX Runtime does not accept the model.
    """
    try:
        import onnxruntime  # noqa: PLC0415 - an extra: there may be none
    except ImportError as error:
        raise ConfigError(
            "onnxruntime is not installed; install ptqjax[cpu], or ptqjax[cuda12] where there is an NVIDIA GPU"
        ) from error
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors only
    settings.add_session_config_entry("session.x64quantprecision", "1")
    for name, value in options.items():
        setattr(settings, name, value)
    providers = _providers(device, onnxruntime.get_available_providers())
    label = "the model" if isinstance(source, Model | bytes) else f"'{os.fspath(source)}'"
    with _explained(ModelError, f"ONNX Runtime does not accept {label}"):
        return onnxruntime.InferenceSession(_loadable(source), settings, providers=providers)


def run(runtime: Any, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns all outputs of an ONNX Runtime session by name.

    Raises:
        DataError: The batch does not fit the model.
    """
    expected = {spec.name for spec in runtime.get_inputs()}
    if set(batch) != expected:
        raise DataError(f"the batch holds {sorted(batch)}; the model takes {sorted(expected)}")
    names = [spec.name for spec in runtime.get_outputs()]
    with _explained(DataError, "ONNX Runtime cannot run the batch"):
        values = runtime.run(names, {name: np.asarray(value) for name, value in batch.items()})
    return dict(zip(names, values, strict=True))


@contextmanager
def _explained(kind: type[ModelError | DataError], what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ONNX Runtime's errors have no common class of their own
        raise kind(f"{what}: {error}") from error


def _providers(device: str, available: Sequence[str]) -> list[str]:
    cuda = "CUDAExecutionProvider"
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={device!r} is unknown; expected auto, cpu or cuda")
    if device == "cuda" and cuda not in available:
        raise ConfigError("device='cuda': this onnxruntime has no CUDA provider; install ptqjax[cuda12], or use 'cpu'")
    use_cuda = device != "cpu" and cuda in available
    return [*([cuda] if use_cuda else []), "CPUExecutionProvider"]


def _file(source: str | os.PathLike[str] | bytes) -> str | os.PathLike[str] | bytes:
    """Returns the source, or the model in it where it is a folder that `ptqjax quantize` wrote."""
    return source if isinstance(source, bytes) or not Path(source).is_dir() else Path(source) / "model.onnx"


def _loadable(source: Model | str | os.PathLike[str] | bytes) -> str | bytes:
    if isinstance(source, Model):
        return onnx_io.to_proto(source).SerializeToString()
    return source if isinstance(source, bytes) else os.fspath(_file(source))  # pyright: ignore[reportReturnType]


def _quantized_tensors(model: Model) -> dict[str, np.dtype]:
    """Returns the outputs of QuantizeLinear nodes with their types, in the order of the graph."""
    quantizers = (node for node in model.graph.nodes if node.op_type == "QuantizeLinear")
    return {node.output: _zero_point_type(model, node) for node in quantizers}


def _zero_point_type(model: Model, quantizer: Node) -> np.dtype:
    zero_point = value_of(model, quantizer.inputs[2]) if len(quantizer.inputs) > 2 else None  # noqa: PLR2004
    return np.dtype(np.uint8) if zero_point is None else np.dtype(zero_point.dtype)


def _specs(tensors: Mapping[str, np.dtype]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, dtype=dtype, shape=None) for name, dtype in tensors.items())


def _with_outputs(model: Model, tensors: Mapping[str, np.dtype]) -> Model:
    graph = model.graph
    return model.replace(graph=replace(graph, outputs=(*graph.outputs, *_specs(tensors))))


def _again(tensor: str) -> str:
    return f"{tensor} recomputed"


def _cut(fused: Model, tensors: Mapping[str, np.dtype]) -> Model:
    """Returns the model cut at `tensors`: each of them is an input, and an output under the name `_again` of it."""
    graph = fused.graph
    nodes = tuple(
        replace(node, outputs=tuple(_again(name) if name in tensors else name for name in node.outputs))
        for node in graph.nodes
    )
    again = _specs({_again(name): dtype for name, dtype in tensors.items()})
    cut = replace(graph, inputs=(*graph.inputs, *_specs(tensors)), outputs=again, nodes=nodes)
    return rebuild(fused.replace(graph=cut))


@dataclass(frozen=True, slots=True)
class _Totals:
    """What is counted of one tensor."""

    largest: int = 0
    num_equal: int = 0
    num_elements: int = 0

    def plus(self, found: np.ndarray, recomputed: Any) -> _Totals:
        steps = np.abs(found.astype(np.int64) - np.asarray(recomputed).astype(np.int64))
        return _Totals(
            largest=max(self.largest, int(steps.max(initial=0))),
            num_equal=self.num_equal + int(np.count_nonzero(steps == 0)),
            num_elements=self.num_elements + steps.size,
        )


@dataclass(frozen=True, slots=True)
class _Sums:
    """What is summed over batches to say how like two programs are."""

    signal: float = 0.0
    noise: float = 0.0
    num_same_class: int = 0
    num_samples: int = 0
    num_equal: int = 0
    num_elements: int = 0

    def plus(self, found: Mapping[str, np.ndarray], computed: Mapping[str, Any]) -> _Sums:
        pairs = [(value.astype(np.float64), np.asarray(computed[name], np.float64)) for name, value in found.items()]
        first, other = (value.reshape(len(value), -1) if value.ndim else value.reshape(1, 1) for value in pairs[0])
        return _Sums(
            signal=self.signal + sum(float(np.sum(y**2)) for y, _ in pairs),
            noise=self.noise + sum(float(np.sum((y - z) ** 2)) for y, z in pairs),
            num_same_class=self.num_same_class + int(np.count_nonzero(first.argmax(-1) == other.argmax(-1))),
            num_samples=self.num_samples + len(first),
            num_equal=self.num_equal + sum(int(np.count_nonzero(y == z)) for y, z in pairs),
            num_elements=self.num_elements + sum(y.size for y, _ in pairs),
        )

    def likeness(self) -> Likeness:
        return Likeness(
            sqnr=decibels(self.signal, self.noise),
            agreement=self.num_same_class / self.num_samples,
            equal=self.num_equal / self.num_elements,
        )


def decibels(signal: float, noise: float) -> float:
    """Returns 10 log10(signal / noise): infinite without noise, minus infinity without signal."""
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal else float("-inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fusions:
    """The graphs that ONNX Runtime and we make of a model."""

    plain: Graph
    """The runtime's, of the model as it is."""
    exposed: Graph
    """The runtime's, of the model whose outputs are all quantized tensors."""
    foreseen: Graph
    """Ours."""


def _group(fusions: _Fusions, quantized: Graph, tensor: str, total: _Totals) -> Group:
    node = fusions.foreseen.producers[tensor]
    before = quantized.producers.get(quantized.producers[tensor].inputs[0])
    is_integer = node.op_type != "QuantizeLinear" and _is_verified(fusions, tensor, node.op_type)
    operator = node.op_type if is_integer else "" if before is None else before.op_type
    return Group(
        tensor=tensor,
        operator=operator or "graph input",
        integer=is_integer,
        largest=total.largest,
        num_equal=total.num_equal,
        num_elements=total.num_elements,
    )


def _is_verified(fusions: _Fusions, tensor: str, operator: str) -> bool:
    """Tells whether the tensor was exposed from an operator that the model as it is has no fewer of."""
    producer = fusions.exposed.producers.get(tensor)
    while producer is not None and producer.op_type == "Transpose":  # kernels may work channels last
        producer = fusions.exposed.producers.get(producer.inputs[0])
    is_same = producer is not None and _kind(producer) == operator
    return is_same and _operators(fusions.plain)[operator] >= _operators(fusions.exposed)[operator]


def _otherwise_fused(fusions: _Fusions) -> list[str]:
    """Returns a warning for each integer operator that the runtime has in another number than foreseen."""
    plain, seen, foreseen = (_operators(graph) for graph in (fusions.plain, fusions.exposed, fusions.foreseen))
    warnings = []
    for name in sorted(name for name in {*plain, *seen, *foreseen} if name.startswith("Q") and name not in _TABLES):
        if plain[name] != seen[name]:
            warnings.append(
                f"exposing the integers changes how many {name} there are: {plain[name]}, {seen[name]} exposed; "
                "groups that were compared in float instead are marked so: they say nothing about the integer kernels"
            )
        if plain[name] != foreseen[name]:
            warnings.append(f"ONNX Runtime has {plain[name]} {name}, {foreseen[name]} were foreseen")
    return warnings


# Operators that the runtime computes through tables, to the same integers as in float: left alone by `fuse_quantized`.
_TABLES = ("QLinearConcat", "QLinearLeakyRelu", "QLinearSigmoid", "QLinearWhere", "QuantizeLinear")


def _operators(graph: Graph) -> Counter[str]:
    return Counter(_kind(node) for node in graph.nodes)


def _kind(node: Node) -> str:
    return node.op_type.removeprefix("Nhwc")


def _optimized(model: Model) -> Graph:
    """Returns the graph that ONNX Runtime makes of the model on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(model, optimized_model_filepath=str(path))
        return onnx_io.read(path).graph
