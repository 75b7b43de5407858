"""Weights at which 16-bit kernels saturate: what differs on an x86 without VNNI."""

from __future__ import annotations

import numpy as np

from ptqjax.ir import Model, Node, value_of


def warn_of_saturation(fused: Model) -> list[str]:
    """Returns a warning that names the weights at which x86 kernels without VNNI would saturate, if there are any.

    Those add two products uint8 x int8 in 16 bits: 255 (w + w') must stay within [-2**15, 2**15 - 1].
    """
    names = [name for node in fused.graph.nodes if (name := _weight_of(node)) and _can_saturate(fused, node, name)]
    if not names:
        return []
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")  # noqa: PLR2004
    warning = (
        f"on an x86 without VNNI, ONNX Runtime's default kernels may saturate at {len(names)} weights ({shown}); "
        "there, open sessions with the entry session.x64quantprecision=1, as ptqjax does"
    )
    return [warning]


def _weight_of(node: Node) -> str:
    return node.inputs[3] if node.op_type in ("QLinearConv", "QLinearMatMul", "QGemm") else ""


def _can_saturate(fused: Model, node: Node, name: str) -> bool:
    weight = value_of(fused, name)
    x_zero_point = value_of(fused, node.inputs[2])
    if weight is None or x_zero_point is None or weight.dtype != np.int8 or x_zero_point.dtype != np.uint8:
        return False
    columns = _columns(np.asarray(weight, np.int64), node)
    if columns.shape[1] < 2 or (node.op_type == "QLinearConv" and weight.shape[1] == 1):  # noqa: PLR2004
        return False  # depthwise kernels add in 32 bits
    ordered = np.sort(columns, axis=1)
    info = np.iinfo(np.int16)
    return bool(np.any(255 * ordered[:, -2:].sum(1) > info.max) or np.any(255 * ordered[:, :2].sum(1) < info.min))


def _columns(weight: np.ndarray, node: Node) -> np.ndarray:
    """Returns the weights that are summed for one output, [outputs, terms]."""
    is_first = node.op_type == "QLinearConv" or node.attribute("transB", 0)
    by_output = weight if is_first else np.moveaxis(weight, -1, 0)
    return by_output.reshape(len(by_output), -1)
