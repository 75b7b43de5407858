"""Whether a session that is opened without options computes exact sums on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np

from ptqjax import onnx_io
from ptqjax.agreement.runtime import model_file, run, session
from ptqjax.errors import ConfigError, PtqjaxError
from ptqjax.ir import Graph, Model, Node, TensorSpec
from ptqjax.qdq.fuse_quantized import fuse_quantized
from ptqjax.transforms.saturation import Saturation, saturating_weights

_TERMS = 4
_WEIGHT, _INPUT = 127, 255


@lru_cache(maxsize=1)
def saturates_here() -> bool:
    """Tells whether ONNX Runtime's default kernels saturate on this machine: asked of it, by one product of matrices.

    So they do on x86 without VNNI. Where there is no onnxruntime, there are no such kernels either.
    """
    try:
        plain = session(_probe(), exact=False)
    except ConfigError:  # it is not installed
        return False
    found = run(plain, {"x": np.full((1, _TERMS), _INPUT, np.uint8)})
    return int(found["y"].item()) != _TERMS * _WEIGHT * _INPUT


def may_saturate(file: str | os.PathLike[str] | bytes | Model) -> tuple[Saturation, ...]:
    """Returns the weights of a quantized model at which kernels without VNNI may saturate; none where it is unread."""
    try:
        model = file if isinstance(file, Model) else onnx_io.read(model_file(file))
        return saturating_weights(fuse_quantized(model)[0])
    except PtqjaxError:  # a file that ONNX Runtime may run all the same
        return ()


def exact_function(
    file: str | os.PathLike[str] | bytes, *, device: str = "cpu"
) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Returns the file as a function of a batch, computed with exact sums; errors are those of `session` and `run`."""
    return partial(run, session(file, device=device))


def _probe() -> Model:
    params = {"w": np.full((_TERMS, 1), _WEIGHT, np.int8)}
    graph = Graph(
        name="probe",
        inputs=(TensorSpec(name="x", dtype=np.dtype(np.uint8), shape=(1, _TERMS)),),
        outputs=(TensorSpec(name="y", dtype=np.dtype(np.int32), shape=(1, 1)),),
        nodes=(Node(op_type="MatMulInteger", inputs=("x", "w"), outputs=("y",)),),
        parameters=("w",),
    )
    return Model(graph=graph, params=params)
