"""How files hold the grids of tensors: in which type, and from which opset on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ptqjax.encodings.encoding import Encoding, quantize
from ptqjax.errors import ConfigError
from ptqjax.ir import Model
from ptqjax.kernels.grid import FLOAT_FORMATS, integer_range

MICROSOFT = "com.microsoft"
"""The operator set in which ONNX Runtime has QuantizeLinear and DequantizeLinear for integers, at any opset."""

OWN = "ptqjax"
"""The operator set of what no file has (`ops.contrib_blocks`)."""

CASTS = {"float16": 10, "bfloat16": 16}
"""Formats that a Cast rounds to, with their numbers as element types in ONNX."""

_BYTES = ("int8", "uint8", "int32")
_BYTE, _HALF_BYTE = 8, 4  # bits
_WIDE = ("int32", "uint32")
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_DYNAMIC_SINCE = 11  # the opset of DynamicQuantizeLinear
_CAST_SINCE = {"float16": 6, "bfloat16": 13}


class StoredGrid(NamedTuple):
    """What decides the operators around a tensor: static, where scales may be traced."""

    dtype: str
    """The type of its codes in files and arrays."""
    is_clipped: bool = False
    """Whether the grid ends before the type does, so that an activation has to be clipped before it is rounded."""


def stored_grid(encoding: Encoding, *, is_activation: bool) -> StoredGrid:
    """Returns how a file holds the grid of an encoding; `qmin` and `qmax` must be concrete.

    Parameters of 2 bits are held in 4: ONNX Runtime 1.32 reads int2 (opset 25), but multiplies by it wrongly (measured:
    MatMul with a 6x6 weight gives 150,000 for 113,750, and other numbers each time). Activations of fewer than 8 bits
    are held in 8: it makes a QLinearConv of 4-bit ones, and then refuses it.
    """
    if encoding.float_format is not None:
        return StoredGrid(encoding.float_format)
    dtype = encoding.dtype
    sign, bits = dtype.rstrip("0123456789"), encoding.num_bits
    if is_activation and bits < _BYTE:
        dtype = f"{sign}{_BYTE}"
    elif bits <= _HALF_BYTE:
        dtype = f"{sign}{_HALF_BYTE}"
    ends = (float(encoding.qmin), float(encoding.qmax))
    return StoredGrid(dtype, is_clipped=ends != tuple(map(float, integer_range(dtype))))


def stored_grids(model: Model, encodings: Mapping[str, Encoding]) -> dict[str, StoredGrid]:
    """Returns how files hold each enabled encoding, by tensor; the leaves must be concrete."""
    return {
        name: stored_grid(encoding, is_activation=name not in model.params)
        for name, encoding in encodings.items()
        if bool(encoding.enabled)
    }


def lowest_opset(grid: StoredGrid, encoding: Encoding) -> int:
    """Returns the first opset that has the operators for a grid and its granularity."""
    if encoding.is_dynamic:
        return _DYNAMIC_SINCE
    return lowest_opset_of(grid.dtype, encoding.axis, encoding.block_size)


def lowest_opset_of(dtype: str, axis: int | None, block_size: int | None) -> int:
    """Returns `lowest_opset` of codes of a type, with scales along an axis or in blocks."""
    if dtype in CASTS:
        return _CAST_SINCE[dtype]
    if block_size is not None or dtype not in (*_BYTES, *FLOAT_FORMATS):
        return 21
    if dtype in FLOAT_FORMATS:
        return 19
    return 10 if axis is None else 13


def needs_opset(grid: StoredGrid, encoding: Encoding) -> bool:
    """Tells whether only ONNX's own operators will do: ONNX Runtime's have no blocks and no floats."""
    return encoding.is_dynamic or encoding.block_size is not None or grid.dtype in FLOAT_FORMATS


def check_writable(model: Model, encodings: Mapping[str, Encoding]) -> None:
    """Checks that ONNX has operators for the encodings, which are concrete and enabled, and ONNX Runtime runs them.

    Raises:
        ConfigError: It has none for one of them.
    """
    for name, encoding in encodings.items():
        is_parameter = name in model.params
        reason = _parameter_objection(model, name, encoding) if is_parameter else _activation_objection(encoding)
        if reason:
            raise ConfigError(f"the encoding of '{name}' cannot be written: {reason}")


def _activation_objection(encoding: Encoding) -> str:
    """Returns why an activation cannot be rounded so, and the remedy, or nothing."""
    if encoding.is_dynamic:
        return ""
    grid = stored_grid(encoding, is_activation=True)
    if grid.dtype in _WIDE:
        return f"QuantizeLinear has no {grid.dtype}; expected 16 bits at most for an activation"
    if encoding.block_size is not None:
        return "blocks are for weights; expected one scale, or one for each position of an axis"
    if grid.is_clipped and encoding.axis is not None:
        return (
            f"the integers {int(encoding.qmin)}..{int(encoding.qmax)} do not fill {grid.dtype}, and Clip has no bounds "
            f"per channel; choose one scale, or all integers of {grid.dtype}"
        )
    return ""


def _parameter_objection(model: Model, name: str, encoding: Encoding) -> str:
    """Returns why a parameter cannot be held so, and the remedy, or nothing."""
    grid = stored_grid(encoding, is_activation=False)
    if grid.dtype == "uint32" or (grid.dtype == "int32" and np.any(encoding.zero_point)):
        return "DequantizeLinear has no uint32, and int32 with the zero point 0 alone; choose dtype='int32', symmetric"
    if grid.dtype == "int32" and any(
        name in node.inputs[:2] for node in model.graph.nodes if node.op_type in _PRODUCTS
    ):
        return "ONNX Runtime multiplies by no 32-bit integers; they are for biases, and weights have 16 bits at most"
    if grid.dtype in CASTS and not np.isfinite(quantize(np.asarray(model.params[name]), encoding)).all():
        largest = f"{float(encoding.qmax):.6g}"
        return f"a value is larger than {largest}, the largest number of {grid.dtype}; choose 'bfloat16' or an integer"
    return ""
