"""What a tensor's integers mean: scale, zero point and grid, as arrays that a compiled program takes as arguments."""

from __future__ import annotations

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from ptqjax.errors import ConfigError
from ptqjax.kernels import float_formats, grid
from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.precision import is_traced
from ptqjax.kernels.ranges import Symmetry, grid_kind
from ptqjax.kernels.run_time_grids import codes_in_blocks, constant, grid_of_values
from ptqjax.pytrees import PyTreeNode, static_field

_STORED = ("int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32")


class Encoding(PyTreeNode):
    """The grid of one tensor: x stands for (q - zero_point) * scale, q an integer in [qmin, qmax].

    q = clip(round_half_to_even(x / scale) + zero_point, qmin, qmax). All fields but the static `axis` and `block_size`
    are arrays, so that one compiled program serves all widths and ranges. With a `float_format`, q is a number of that
    format: x / scale rounded to it, saturating, for 8 bits; x itself, cast, for 16 (see `kernels.float_formats`).
    """

    scale: Any
    """Step of the grid, float32, more than 0: a scalar; [c] along `axis`; with blocks an array of the tensor's rank."""
    zero_point: Any
    """The integer that stands for 0, as float32 so that it can be learned; of the shape of `scale`."""
    qmin: Any
    """Smallest integer, float32 scalar."""
    qmax: Any
    """Largest integer, float32 scalar."""
    enabled: Any
    """Boolean scalar; False leaves the tensor in float."""
    axis: int | None = static_field(default=None)
    """Axis of the tensor that `scale` runs along (as ONNX has it, may be negative); None where one scale serves all."""
    block_size: int | None = static_field(default=None)
    """Number of neighbours along `axis` that share a scale; None where not by blocks. Along each other axis `scale`
    then has the tensor's size, as ONNX has it."""
    float_format: str | None = static_field(default=None)
    """Where codes are floating-point numbers and not integers: their type, one of `grid.FLOAT_FORMATS`. `qmin` and
    `qmax` are then its smallest and largest finite number, and the zero point is 0."""
    is_dynamic: bool = static_field(default=False)
    """Whether scale and zero point are found at run time, from the values, and those here stand for nothing: of an
    activation as a whole, in uint8, or of its blocks along the last axis, in int8 (`kernels.run_time_grids`)."""
    scale_bits: int | None = static_field(default=None)
    """For low-power blocks (LPBQ): each scale is an integer from 1 to 2^scale_bits times one scale per channel."""

    @property
    def dtype(self) -> str:
        """The narrowest integer type that arrays and files have and that holds the grid: "int8", "uint4", ...

        The format, where codes are floating-point numbers. A grid of 6 bits is held in 8 (`num_bits` tells them
        apart). Needs concrete `qmin`, `qmax`.
        """
        if self.float_format is not None:
            return self.float_format
        low, high = float(self.qmin), float(self.qmax)
        ranges = ((name, grid.integer_range(name)) for name in _STORED if name.startswith("u") == (low >= 0))
        return next(name for name, (smallest, largest) in ranges if smallest <= low and high <= largest)

    @property
    def num_bits(self) -> int:
        """The number of bits that tell the grid's codes apart: 6 for -32..31 (needs concrete `qmin`, `qmax`)."""
        if self.float_format is not None:
            return float_formats.num_bits_of(self.float_format)
        return (int(self.qmax) - int(self.qmin)).bit_length()

    @property
    def granularity(self) -> str:
        """Which parts of the tensor have a scale of their own: "tensor" (none), "channel", "block" or "lpbq"."""
        if self.scale_bits is not None:
            return "lpbq"
        if self.block_size is not None:
            return "block"
        return "tensor" if self.axis is None else "channel"


Encodings: TypeAlias = dict[str, Encoding]
"""Encodings by tensor name: weights and activations. Biases have none, see `encodings.biases`."""


def make_encoding(
    scale: Any,
    zero_point: Any,
    *,
    dtype: str,
    symmetric: Symmetry = False,
    axis: int | None = None,
    block_size: int | None = None,
    scale_bits: int | None = None,
) -> Encoding:
    """Returns an enabled encoding on the grid of `dtype`, its leaves in float32 (NumPy where given NumPy).

    Of `symmetric`, it counts whether it is strict: then the smallest integer is left out. `dtype` may be one of
    `grid.FLOAT_FORMATS`; then the zero point is 0, and those of 16 bits have the scale 1.

    Raises:
        ConfigError: `dtype` is unknown, or a floating format has another zero point or scale.
    """
    xp = array_namespace(scale, zero_point)
    is_float = dtype in grid.FLOAT_FORMATS
    qmin, qmax = _ends_of_format(dtype) if is_float else _ends_of_integers(dtype, symmetric)
    scale = xp.asarray(scale, dtype=np.float32)
    if is_float:
        _check_float_format(dtype, scale, zero_point)
    return Encoding(
        scale=scale,
        zero_point=xp.broadcast_to(xp.asarray(zero_point, dtype=np.float32), scale.shape),
        qmin=xp.asarray(qmin, dtype=np.float32),
        qmax=xp.asarray(qmax, dtype=np.float32),
        enabled=xp.asarray(True),
        axis=axis,
        block_size=block_size,
        float_format=dtype if is_float else None,
        scale_bits=scale_bits,
    )


def _ends_of_format(name: str) -> tuple[float, float]:
    largest = float_formats.largest_number(name)
    return -largest, largest


def _ends_of_integers(dtype: str, symmetric: Symmetry) -> tuple[Any, Any]:
    kind = grid_kind(dtype, symmetric=symmetric)
    return kind.qmin, kind.qmax


def _check_float_format(name: str, scale: Any, zero_point: Any) -> None:
    """Checks concrete scales and zero points.

    Raises:
        ConfigError: A zero point is not 0, or a format of 16 bits has another scale than 1.
    """
    if is_traced(scale) or is_traced(zero_point):
        return
    if np.any(np.asarray(zero_point) != 0):
        raise ConfigError(f"dtype={name!r} has the zero point 0 alone; found {np.asarray(zero_point).ravel()[:4]}")
    if not float_formats.float_format(name).has_scale and np.any(np.asarray(scale) != 1):
        raise ConfigError(f"dtype={name!r} is a cast and has the scale 1; found {np.asarray(scale).ravel()[:4]}")


def dynamic_encoding(block_size: int | None = None) -> Encoding:
    """Returns the encoding of an activation whose grid is found at run time: for all of it, or in blocks."""
    if block_size is None:
        return make_encoding(np.float32(1), np.float32(0), dtype="uint8").replace(is_dynamic=True)
    whole = make_encoding(np.float32(1), np.float32(0), dtype="int8", symmetric="strict")
    return whole.replace(is_dynamic=True, axis=-1, block_size=block_size)


def grid_for(x: Any, encoding: Encoding) -> tuple[Any, Any]:
    """Returns scale and zero point for `x`, in shapes that broadcast to it: found from its values where dynamic."""
    if encoding.is_dynamic:
        return grid_of_values(x)
    return tuple(along_axis(each, encoding, np.shape(x)) for each in (encoding.scale, encoding.zero_point))


def _rounded_in_blocks(x: Any, encoding: Encoding) -> Any:
    """Returns `x` rounded in blocks whose grids are found from its values; gradients pass straight through."""
    codes, step = codes_in_blocks(x, encoding.block_size or x.shape[-1])
    xp = array_namespace(x)
    return xp.where(encoding.enabled, x + (codes * step - constant(x)), x)


def along_axis(values: Any, encoding: Encoding, shape: tuple[int, ...]) -> Any:
    """Returns `values` (a scale or zero point of `encoding`) in a shape that broadcasts to `shape`, of equal rank."""
    if np.ndim(values) == 0 or encoding.axis is None:
        return values
    xp = array_namespace(values)
    axis = encoding.axis % len(shape)
    if encoding.block_size is None:
        return xp.reshape(values, tuple(-1 if i == axis else 1 for i in range(len(shape))))
    repeated = xp.repeat(values, encoding.block_size, axis=axis)
    return repeated[(slice(None),) * axis + (slice(shape[axis]),)]  # the last block may be partial


def quantize(x: Any, encoding: Encoding) -> Any:
    """Returns the codes of `x` as float32: integers, or numbers of the float format; `enabled` is not looked at."""
    scale, zero_point = grid_for(x, encoding)
    if encoding.float_format is not None:
        return float_formats.quantize_float(x, scale, encoding.float_format)
    return grid.quantize(x, scale, zero_point, encoding.qmin, encoding.qmax)


def dequantize(codes: Any, encoding: Encoding) -> Any:
    """Returns the real numbers that `codes` stand for; `enabled` is not looked at."""
    scale, zero_point = (along_axis(v, encoding, np.shape(codes)) for v in (encoding.scale, encoding.zero_point))
    if encoding.float_format is not None:
        return float_formats.dequantize_float(codes, scale, encoding.float_format)
    return grid.dequantize(codes, scale, zero_point)


def fake_quantize(x: Any, encoding: Encoding) -> Any:
    """Returns `x` rounded to the grid, or `x` where the encoding is not enabled; gradients pass straight through.

    Differentiable in `x`, `scale` and `zero_point`, see `kernels.grid.fake_quantize` and
    `kernels.float_formats.fake_quantize_float`.
    """
    if encoding.is_dynamic and encoding.block_size is not None:
        return _rounded_in_blocks(x, encoding)
    scale, zero_point = grid_for(x, encoding)
    if encoding.float_format is not None:
        return float_formats.fake_quantize_float(x, scale, encoding.float_format, enabled=encoding.enabled)
    return grid.fake_quantize(x, scale, zero_point, encoding.qmin, encoding.qmax, enabled=encoding.enabled)


def integers(x: Any, encoding: Encoding) -> np.ndarray:
    """Returns the codes of concrete `x` in the type of the encoding: integers, or numbers of the float format."""
    return np.asarray(quantize(np.asarray(x), concrete(encoding))).astype(storage_dtype(encoding.dtype))


def storage_dtype(dtype: str) -> np.dtype:
    """Returns the array type for the type of a grid: NumPy's own, or that of `ml_dtypes`."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype))


def concrete(encoding: Encoding) -> Encoding:
    """Returns the encoding with its leaves as NumPy arrays."""
    leaves = {name: np.asarray(getattr(encoding, name)) for name in ("scale", "zero_point", "qmin", "qmax", "enabled")}
    return encoding.replace(**leaves)
