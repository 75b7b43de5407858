"""One operator by its lowering: on NumPy alone, as while tracing, and inside `jit`; each held to ONNX Runtime."""

from collections.abc import Collection, Sequence

import jax
import numpy as np

from ptqjax.ops import find_lowering
from tests.single_node import in_onnxruntime, single_node


def _as_list(results: object) -> list[object]:
    return list(results) if isinstance(results, tuple | list) else [results]


def in_numpy(
    op_type: str, inputs: Sequence[np.ndarray | None], *, opset: int, **attributes: object
) -> list[np.ndarray]:
    """What it gives where all is known while tracing."""
    function = find_lowering(op_type, opset=opset).function
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        return [np.asarray(result) for result in _as_list(function(*inputs, **attributes))]


def in_jit(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    *,
    opset: int,
    data: Collection[int] = (0,),
    x64: bool = True,
    **attributes: object,
) -> list[np.ndarray]:
    """What it gives where the inputs at the positions `data` are traced."""
    function = find_lowering(op_type, opset=opset).function

    def run(traced: dict[int, jax.Array]) -> list[object]:
        return _as_list(function(*(traced.get(at, value) for at, value in enumerate(inputs)), **attributes))

    with jax.enable_x64(x64):
        return [np.asarray(result) for result in jax.jit(run)({at: inputs[at] for at in data})]


def assert_same(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float = 0) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def assert_both_as_in_onnxruntime(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    *,
    opset: int,
    data: Collection[int] = (0,),
    outputs: Sequence[type | np.dtype] | None = None,
    tolerance: float = 0,
    **attributes: object,
) -> None:
    """Both ways give ONNX Runtime's types, shapes and values; `outputs` are types: that of the first input alone."""
    types = [inputs[0].dtype] if outputs is None else outputs
    count = {"num_node_outputs": len(types)} if op_type == "Split" else {}
    expected = in_onnxruntime(single_node(op_type, inputs, opset=opset, outputs=types, **attributes), inputs)
    assert_same(in_numpy(op_type, inputs, opset=opset, **attributes, **count), expected, tolerance)
    if data:
        assert_same(in_jit(op_type, inputs, opset=opset, data=data, **attributes, **count), expected, tolerance)
