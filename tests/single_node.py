"""One operator as a model, computed here and by ONNX Runtime."""

import warnings
from collections.abc import Sequence

import jax
import numpy as np
import onnx
import onnxruntime
from onnx import helper

import ptqjax


def single_node(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    *,
    opset: int,
    domain: str = "",
    outputs: Sequence[type | np.dtype | None] = (np.float32,),
    **attributes: object,
) -> onnx.ModelProto:
    """A model of one node: inputs x0, x1, ... and outputs y0, y1, ... of these types; None: left out."""
    infos = [
        helper.make_tensor_value_info(f"x{at}", helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for at, value in enumerate(inputs)
        if value is not None
    ]
    results = [
        helper.make_tensor_value_info(f"y{at}", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)
        for at, dtype in enumerate(outputs)
        if dtype is not None
    ]
    names = ["" if value is None else f"x{at}" for at, value in enumerate(inputs)]
    written = ["" if dtype is None else f"y{at}" for at, dtype in enumerate(outputs)]
    node = helper.make_node(op_type, names, written, domain=domain, **attributes)
    graph = helper.make_graph([node], "single", infos, results)
    versions = {"": 17, domain: opset}
    opsets = [helper.make_opsetid(name, version) for name, version in versions.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def feeds_of(inputs: Sequence[np.ndarray | None]) -> dict[str, np.ndarray]:
    return {f"x{at}": value for at, value in enumerate(inputs) if value is not None}


def by_us(proto: onnx.ModelProto, inputs: Sequence[np.ndarray | None], *, jit: bool = False) -> list[np.ndarray]:
    """What `apply` gives: alone, or inside the caller's `jit`."""
    model = ptqjax.read(proto)

    def run(feeds: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return ptqjax.apply(model.graph, model.params, feeds)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="tensor '.*' is of a 64-bit type" if jit else "nothing")
        return [np.asarray(value) for value in (jax.jit(run) if jit else run)(feeds_of(inputs)).values()]


def in_onnxruntime(proto: onnx.ModelProto, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    """What ONNX Runtime's CPU kernels give, node by node as written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds_of(inputs))


def assert_as_in_onnxruntime(
    op_type: str, inputs: Sequence[np.ndarray | None], *, atol: float, jit: bool = False, **model: object
) -> None:
    """Same types, shapes and values; `model` are the settings of `single_node`."""
    proto = single_node(op_type, inputs, **model)
    for found, expected in zip(by_us(proto, inputs, jit=jit), in_onnxruntime(proto, inputs), strict=True):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=atol, atol=atol)
