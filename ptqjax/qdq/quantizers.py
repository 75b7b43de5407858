"""The grids that QuantizeLinear, DequantizeLinear and pairs of Cast have in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ptqjax.encodings.encoding import Encoding, Encodings, concrete, make_encoding
from ptqjax.ir import Model, Node, value_of
from ptqjax.kernels.grid import FLOAT_FORMATS
from ptqjax.qdq.insert import with_own_copies
from ptqjax.qdq.stored_grids import CASTS, MICROSOFT, stored_grid

GRIDS = "ptqjax.grids"
"""The key of a file's metadata under which stands what its operators do not tell of grids."""
BIAS = "int32"
"""The type of biases, which have no encoding of their own."""

_TYPES = ("int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", BIAS, *FLOAT_FORMATS)
_FLOAT = 1  # the number of float32 as an element type in ONNX
_DEFAULT_AXIS = 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Quantizer:
    """The grid of a node that quantizes or dequantizes, as its inputs and attributes have it."""

    dtype: str
    """Type of the codes."""
    scale: np.ndarray
    """float32; a scalar, [c] along `axis`, or of the tensor's rank for blocks."""
    zero_point: np.ndarray
    """float32, in the shape of `scale`."""
    axis: int | None = None
    """The axis that scales run along, as the node spells it; None for one scale."""
    block_size: int | None = None
    """Number of neighbours that share a scale; None where not by blocks."""
    limits: tuple[float, float] | None = None
    """Smallest and largest code, where the grid ends before its type does."""
    scale_bits: int | None = None
    """The bits of the scales' integers in low-power blocks, see `Encoding`."""

    def is_same(self, other: Quantizer) -> bool:
        """Tells whether two nodes have the same grid; limits, which only the one that quantizes has, do not count."""
        mine, its = (each.axis if each.block_size is None else (each.axis, each.block_size) for each in (self, other))
        same = self.dtype == other.dtype and mine == its
        return same and _same_array(self.scale, other.scale) and _same_array(self.zero_point, other.zero_point)

    def encoding(self) -> Encoding:
        """Returns the encoding of a tensor on this grid."""
        found = make_encoding(
            self.scale,
            self.zero_point,
            dtype=self.dtype,
            axis=self.axis,
            block_size=self.block_size,
            scale_bits=self.scale_bits,
        )
        if self.limits is None:
            return found
        return found.replace(qmin=np.asarray(self.limits[0], np.float32), qmax=np.asarray(self.limits[1], np.float32))


def untold_grids(model: Model, encodings: Encodings) -> dict[str, dict[str, Any]]:
    """Returns what a QDQ file's operators do not tell of enabled encodings, by tensor, as plain data.

    These are the smallest and largest code where the grid ends before the type does ("limits"), the bits of low-power
    blocks ("scale_bits"), and the type of parameters that a Cast rounds ("dtype"). Copies of parameters that several
    nodes read, which `insert_qdq` makes, are told of as well.
    """
    found = {}
    for name, encoding in encodings.items():
        if bool(encoding.enabled):
            grid, told = stored_grid(concrete(encoding), is_activation=name not in model.params), {}
            if grid.is_clipped:
                told["limits"] = [float(encoding.qmin), float(encoding.qmax)]
            if encoding.scale_bits is not None:
                told["scale_bits"] = encoding.scale_bits
            if grid.dtype in CASTS and name in model.params:
                told["dtype"] = grid.dtype
            found |= {name: told} if told else {}
    enabled = {name for name, encoding in encodings.items() if bool(encoding.enabled)}
    _, sources = with_own_copies(model, enabled & set(model.params))
    return found | {copy: found[source] for copy, source in sources.items() if source in found}


def is_quantize(node: Node) -> bool:
    """Tells whether the node is a QuantizeLinear of ONNX or ONNX Runtime."""
    return node.op_type == "QuantizeLinear" and node.domain in ("", MICROSOFT)


def is_dequantize(node: Node) -> bool:
    """Tells whether the node is a DequantizeLinear of ONNX or ONNX Runtime."""
    return node.op_type == "DequantizeLinear" and node.domain in ("", MICROSOFT)


def cast_format(node: Node) -> str | None:
    """Returns the format that a Cast narrows floats to; None for other nodes."""
    if node.op_type != "Cast" or node.domain:
        return None
    return next((name for name, number in CASTS.items() if node.attribute("to") == number), None)


def is_cast_back(node: Node) -> bool:
    """Tells whether the node is a Cast to float32."""
    return node.op_type == "Cast" and not node.domain and node.attribute("to") == _FLOAT


def cast_quantizer(dtype: str) -> Quantizer:
    """Returns the grid of a pair of Cast."""
    return Quantizer(dtype=dtype, scale=np.ones((), np.float32), zero_point=np.zeros((), np.float32))


def quantizer_of(model: Model, node: Node, shape: tuple[int, ...] | None = None) -> Quantizer | None:
    """Returns the grid of a node that quantizes or dequantizes; None where it is computed, or of a type of no grid.

    Args:
        model: The model that the node is of.
        node: QuantizeLinear or DequantizeLinear.
        shape: That of the tensor, where it is known: a single scale along an axis of one place is one per channel.
    """
    scale = value_of(model, node.inputs[1])
    zero_name = node.inputs[2] if len(node.inputs) > 2 else ""  # noqa: PLR2004 - the zero point's place
    zero_point = value_of(model, zero_name) if zero_name else None
    dtype = _dtype(model, node, zero_point)
    if scale is None or (zero_name and zero_point is None) or dtype not in _TYPES:
        return None
    scale = np.asarray(scale, np.float32)
    zeros = np.zeros(()) if zero_point is None else np.asarray(zero_point)
    zeros = zeros.reshape(()) if zeros.size == 1 else zeros
    block_size = node.attribute("block_size") or None
    axis = int(node.attribute("axis", _DEFAULT_AXIS))
    if block_size is None and _is_single(scale, axis, shape):
        scale, zeros, axis = scale.reshape(()), zeros.reshape(()), None
    zeros = np.broadcast_to(zeros, scale.shape).astype(np.float32)
    return Quantizer(dtype=dtype, scale=scale, zero_point=zeros, axis=axis, block_size=block_size)


def _is_single(scale: np.ndarray, axis: int, shape: tuple[int, ...] | None) -> bool:
    if scale.size > 1:
        return False
    if scale.ndim == 0 or shape is None or not -len(shape) <= axis < len(shape):
        return True
    return shape[axis] != 1


def _dtype(model: Model, node: Node, zero_point: Any) -> str:
    if zero_point is not None:
        return np.asarray(zero_point).dtype.name
    codes = value_of(model, node.inputs[0]) if is_dequantize(node) else None
    if codes is not None:
        return np.asarray(codes).dtype.name
    return "uint8" if not node.attribute("output_dtype") else ""


def _same_array(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.array_equal(one, other)
