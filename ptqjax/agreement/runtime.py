"""ONNX Runtime: sessions that are exact on every x86, what they compute, and the graphs that they run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ptqjax import onnx_io
from ptqjax.errors import ConfigError, DataError, ModelError
from ptqjax.ir import Graph, Model

_FP8 = {"tensor(float8e4m3fn)": ml_dtypes.float8_e4m3fn, "tensor(float8e5m2)": ml_dtypes.float8_e5m2}


def session(
    source: Model | str | os.PathLike[str] | bytes,
    *,
    device: str = "cpu",
    exact: bool = True,
    is_optimized: bool = True,
    **options: Any,
) -> Any:
    """Returns an ONNX Runtime session, exact on every x86 unless the one is asked for that users open.

    Without VNNI, ONNX Runtime's default kernels for uint8 x int8 saturate at 16 bits; the session is opened with
    `session.x64quantprecision`, which takes exact ones.

    Args:
        source: The model: a file, its bytes, or as read.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        exact: Whether sums are exact; False: as ONNX Runtime computes them by default.
        is_optimized: Whether operators are fused and moved; False: each is computed as the file has it.
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
    settings.add_session_config_entry("session.x64quantprecision", str(int(exact)))
    if exact:  # where it makes MatMulNBits of a QDQ file, it rounds activations to int8 else, which no file says
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a third of the processor's time else
    if not is_optimized:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
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
    specs = runtime.get_outputs()
    names = [spec.name for spec in specs]
    with _explained(DataError, "ONNX Runtime cannot run the batch"):
        values = runtime.run(names, {name: np.asarray(value) for name, value in batch.items()})
    return {spec.name: _typed(value, spec.type) for spec, value in zip(specs, values, strict=True)}


def as_written(model: Model) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
    """Returns the model as a function of a batch, node by node as the file has it, in ONNX Runtime on the CPU.

    Nothing is fused or moved, so that each operator computes what ONNX defines. The session is opened at the first
    call.

    Raises (when called):
        ConfigError: onnxruntime is not installed.
        ModelError: ONNX Runtime does not accept the model.
        DataError: The batch does not fit it.
    """

    @cache
    def opened() -> Any:
        return session(model, is_optimized=False)

    return lambda batch: run(opened(), {spec.name: batch[spec.name] for spec in model.graph.inputs})


def _typed(value: Any, kind: str) -> Any:
    """Returns an output in its own type: ONNX Runtime hands fp8 over as bytes."""
    dtype = _FP8.get(kind)
    return value if dtype is None else value.view(dtype)


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


def model_file(source: str | os.PathLike[str] | bytes) -> str | os.PathLike[str] | bytes:
    """Returns the source, or the model in it where it is a folder that `ptqjax quantize` wrote."""
    return source if isinstance(source, bytes) or not Path(source).is_dir() else Path(source) / "model.onnx"


def _loadable(source: Model | str | os.PathLike[str] | bytes) -> str | bytes:
    if isinstance(source, Model):
        return onnx_io.to_proto(source).SerializeToString()
    return source if isinstance(source, bytes) else os.fspath(model_file(source))  # pyright: ignore[reportReturnType]


def optimized(model: Model, *, exact: bool = True) -> Graph:
    """Returns the graph that ONNX Runtime makes of the model on the CPU, in an exact session or in that of users."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(model, exact=exact, optimized_model_filepath=str(path))
        return onnx_io.read(path).graph
