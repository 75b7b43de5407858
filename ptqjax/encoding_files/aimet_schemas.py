"""The entry of one tensor in each of AIMET's JSON schemas, written and read.

Offsets are those of unsigned integers, negated: x = (c + offset) * scale with c from 0. Source: aimet-onnx 2.42, whose
exports and loader were observed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptqjax.encoding_files.entries import Entry, block_shapes, num_bits
from ptqjax.encoding_files.fitting import UnfitError
from ptqjax.encoding_files.located_json import Located
from ptqjax.encodings.low_power import channel_axis
from ptqjax.kernels.grid import FLOAT_FORMATS
from ptqjax.placement.tensor_axes import TensorAxes

_LARGEST_BLOCK = 2**31 - 1
_SPELLINGS = {name.replace("_", ""): name for name in FLOAT_FORMATS}  # AIMET's: float8e4m3fn


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """How a version of the schema has the entry of a tensor."""

    version: str
    """The version, as the file states it."""
    to_json: Callable[[Entry, TensorAxes], Any]
    """(entry, axes) -> the JSON value; raises `UnfitError` where the version has no such grid."""
    from_json: Callable[[Located, TensorAxes], Entry]
    """(JSON value, axes) -> the entry; raises `UnfitError` where it does not fit the tensor."""


def _written_0_6_1(entry: Entry, axes: TensorAxes) -> list[dict[str, Any]]:
    del axes  # blocks, whose order they decide, do not exist
    if entry.block_size is not None:
        raise UnfitError("scales by blocks", "a scale per tensor or channel: take version 1.0.0 or 2.0.0")
    if entry.dtype in FLOAT_FORMATS:
        _check_float16(entry)
        return [{"bitwidth": 16, "dtype": "float"}]
    bits, signed = num_bits(entry.dtype), not entry.dtype.startswith("u")
    pairs = zip(entry.scale.ravel().tolist(), _offsets(entry).ravel().tolist(), strict=True)
    return [
        {
            "bitwidth": bits,
            "dtype": "int",
            "is_symmetric": str(_is_symmetric(entry, signed=signed)),
            "min": offset * scale,
            "max": (offset + 2**bits - 1) * scale,
            "offset": offset,
            "scale": scale,
        }
        for scale, offset in pairs
    ]


def _read_0_6_1(found: Located, axes: TensorAxes) -> Entry:
    parts = found.elements()
    if not parts:
        raise found.wrong("a list of one entry or more")
    bits, dtype = _same(parts, "bitwidth").integer(least=1, most=64), _same(parts, "dtype").text()
    if dtype != "int":
        return _float16(dtype, bits)
    signed = _same(parts, "is_symmetric").flag()
    scale, offset = (np.array([part.item(key).number() for part in parts]) for key in ("scale", "offset"))
    if len(parts) == 1:
        return _integers(bits, scale.reshape(()), offset.reshape(()), signed=signed)
    return _integers(bits, scale, offset, signed=signed, axis=_channel(axes, scale))


def _same(channels: list[Located], key: str) -> Located:
    """Returns what all channels have under a key."""
    first, *others = (channel.item(key) for channel in channels)
    for other in others:
        if other.value != first.value:
            raise other.wrong(f"{first.value!r}, as in the first entry of the tensor")
    return first


def _written_1_0_0(entry: Entry, axes: TensorAxes) -> dict[str, Any]:
    if entry.dtype in FLOAT_FORMATS:
        _check_float16(entry)
        return {"enc_type": "PER_TENSOR", "dtype": "FLOAT", "bw": 16}
    bits, signed = num_bits(entry.dtype), not entry.dtype.startswith("u")
    is_sym = _is_symmetric(entry, signed=signed)
    if entry.multiples is not None:
        wide = bits + (entry.scale_bits or 0)
        return {
            "enc_type": "LPBQ",
            "dtype": "INT",
            "bw": wide,
            "is_sym": is_sym,
            "scale": entry.scale.ravel().tolist(),
            "offset": [-(2 ** (wide - 1))] * entry.scale.size,
            "block_size": entry.block_size,
            "compressed_bw": bits,
            "per_block_int_scale": [int(value) for value in _rows(entry.multiples, axes).ravel()],
        }
    blocks = {} if entry.block_size is None else {"block_size": entry.block_size}
    scale, offset = (_rows(values, axes) if blocks else values for values in (entry.scale, _offsets(entry)))
    return {
        "enc_type": "PER_BLOCK" if blocks else "PER_TENSOR" if entry.axis is None else "PER_CHANNEL",
        "dtype": "INT",
        "bw": bits,
        "is_sym": is_sym,
        "scale": scale.ravel().tolist(),
        "offset": [int(value) for value in offset.ravel()],
        **blocks,
    }


def _read_1_0_0(found: Located, axes: TensorAxes) -> Entry:
    kind, bits = found.item("enc_type").text(), found.item("bw").integer(least=1, most=64)
    if found.item("dtype").text().upper() != "INT":
        return _float16(found.item("dtype").text(), bits)
    if found.has("zero_point_shift"):
        raise UnfitError("a zero point between two integers (zero_point_shift)", "an integer")
    signed, scale = found.item("is_sym").flag(), found.item("scale").numbers().reshape(-1)
    if kind == "LPBQ":
        return _read_low_power(found, axes, bits, scale)
    offset = found.item("offset").numbers().reshape(-1)
    if kind == "PER_TENSOR" and scale.size == offset.size == 1:
        return _integers(bits, scale.reshape(()), offset.reshape(()), signed=signed)
    if kind == "PER_TENSOR":
        raise UnfitError(f"{scale.size} scales", "one scale")
    if kind == "PER_CHANNEL":
        return _integers(bits, scale, offset, signed=signed, axis=_channel(axes, scale))
    if kind != "PER_BLOCK":
        raise found.item("enc_type").wrong("one of PER_TENSOR, PER_CHANNEL, PER_BLOCK, LPBQ")
    size = found.item("block_size").integer(least=1, most=_LARGEST_BLOCK)
    scale, offset = (_by_blocks(values, axes, size) for values in (scale, offset))
    return _integers(bits, scale, offset, signed=signed, axis=axes.summed, block_size=size)


def _read_low_power(found: Located, axes: TensorAxes, wide: int, scale: np.ndarray) -> Entry:
    bits = found.item("compressed_bw").integer(least=1, most=wide - 1)
    size = found.item("block_size").integer(least=1, most=_LARGEST_BLOCK)
    multiples = _by_blocks(found.item("per_block_int_scale").numbers().reshape(-1), axes, size)
    return Entry(
        dtype=f"int{bits}",
        scale=_per_channel(scale, multiples, axes.summed),
        zero_point=np.zeros(()),
        axis=axes.summed,
        block_size=size,
        multiples=multiples,
        scale_bits=wide - bits,
    )


def _written_2_0_0(entry: Entry, axes: TensorAxes) -> dict[str, Any]:
    del axes  # the file has axes of its own
    written: dict[str, Any] = {"output_dtype": entry.dtype.replace("_", "")}
    if entry.multiples is None:
        written["y_scale"] = entry.scale.tolist()
        if entry.zero_point.any():
            written["y_zero_point"] = entry.zero_point.astype(np.int64).tolist()
    else:
        written["per_channel_float_scale"] = entry.scale.tolist()
        written["per_block_int_scale"] = entry.multiples.astype(np.int64).tolist()
    stated = {"axis": entry.axis, "block_size": entry.block_size}
    return written | {key: value for key, value in stated.items() if value is not None}


def _read_2_0_0(found: Located, axes: TensorAxes) -> Entry:
    del axes  # the file has axes of its own
    dtype = found.item("output_dtype").text()
    axis = found.item("axis").integer(least=-64, most=63) if found.has("axis") else None
    size = found.item("block_size").integer(least=1, most=_LARGEST_BLOCK) if found.has("block_size") else None
    low_power = found.has("per_block_int_scale")
    scale = found.item("per_channel_float_scale" if low_power else "y_scale").numbers()
    zero_point = found.item("y_zero_point").numbers() if found.has("y_zero_point") else np.zeros(scale.shape)
    if size is not None and axis is None:
        raise found.item("block_size").wrong("an axis beside it, which the blocks cut")
    if axis is None and scale.size == zero_point.size == 1:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    multiples = found.item("per_block_int_scale").numbers() if low_power else None
    if multiples is not None:
        scale, zero_point = _per_channel(scale, multiples, axis), np.zeros(())
    elif scale.shape != zero_point.shape:
        raise found.item("y_zero_point").wrong(f"a zero point for each scale, in the shape {scale.shape}")
    return Entry(
        dtype=_SPELLINGS.get(dtype, dtype),
        scale=scale,
        zero_point=zero_point,
        axis=axis,
        block_size=size,
        multiples=multiples,
        scale_bits=None if multiples is None else num_bits(dtype),
    )


def _integers(
    bits: int,
    scale: np.ndarray,
    offset: np.ndarray,
    *,
    signed: bool,
    axis: int | None = None,
    block_size: int | None = None,
) -> Entry:
    if scale.shape != offset.shape:
        raise UnfitError(f"{scale.size} scales and {offset.size} offsets", "an offset for each scale")
    dtype = f"{'' if signed else 'u'}int{bits}"
    num_bits(dtype)
    smallest = -(2.0 ** (bits - 1)) if signed else 0.0
    return Entry(dtype=dtype, scale=scale, zero_point=np.asarray(smallest - offset), axis=axis, block_size=block_size)


def _offsets(entry: Entry) -> np.ndarray:
    bits, signed = num_bits(entry.dtype), not entry.dtype.startswith("u")
    return np.asarray((-(2.0 ** (bits - 1)) if signed else 0.0) - entry.zero_point)


def _is_symmetric(entry: Entry, *, signed: bool) -> bool:
    """Tells whether a grid is one of those that AIMET calls symmetric; a zero point of -1 is a strict one."""
    return signed and bool(np.all(entry.zero_point == 0) or np.all(entry.zero_point == -1))


def _check_float16(entry: Entry) -> None:
    if entry.dtype != "float16" or entry.axis is not None or entry.scale != 1:
        raise UnfitError(f"codes in {entry.dtype} with scales", "integers, or plain float16: take version 2.0.0")


def _float16(dtype: str, bits: int) -> Entry:
    if dtype.lower() != "float" or bits != 16:  # noqa: PLR2004 - the one width that these versions have
        raise UnfitError(f"the type {dtype!r} of {bits} bits", "int, or float of 16 bits")
    return Entry(dtype="float16", scale=np.ones(()), zero_point=np.zeros(()))


def _channel(axes: TensorAxes, scale: np.ndarray) -> int:
    """Returns the axis of scales per channel, which these versions do not state."""
    if axes.channel is not None:
        return axes.channel
    if axes.shape is not None and len(axes.shape) == 1:
        return 0
    raise UnfitError(f"{scale.size} scales", "one scale, as no operator tells the axis that more would run along")


def _is_transposed(axes: TensorAxes) -> bool:
    """Tells whether blocks of the weight are written channel by channel, although channels lie on the second axis."""
    return axes.shape is not None and len(axes.shape) == 2 and axes.channel in (1, -1)  # noqa: PLR2004 - a matrix


def _rows(values: np.ndarray, axes: TensorAxes) -> np.ndarray:
    return values.T if _is_transposed(axes) else values


def _by_blocks(flat: np.ndarray, axes: TensorAxes, block_size: int) -> np.ndarray:
    if axes.shape is None or axes.summed is None:
        raise UnfitError("scales by blocks", "one scale, as no operator tells the axis that blocks would cut")
    shapes = block_shapes(axes, axes.summed, block_size)
    shape = next((shape for shape in shapes if flat.size == np.prod(shape)), None)
    if shape is None:
        raise UnfitError(f"{flat.size} scales", f"{np.prod(shapes[0])}, those of shape {shapes[0]}")
    return flat.reshape(shape[::-1]).T if _is_transposed(axes) else flat.reshape(shape)


def _per_channel(scale: np.ndarray, multiples: np.ndarray, axis: int | None) -> np.ndarray:
    """Returns the scales of channels, or of rows of blocks, in a shape that broadcasts over blocks."""
    rank, sizes = multiples.ndim, multiples.shape
    if axis is None or not -rank <= axis < rank:
        raise UnfitError(f"the axis {axis}", f"one of {rank} axes")
    rows = tuple(1 if i == axis % rank else size for i, size in enumerate(sizes))
    channel = channel_axis(axis, rank)
    channels = tuple(size if i == channel else 1 for i, size in enumerate(sizes))
    if scale.ndim == rank and all(one in (1, size) for one, size in zip(scale.shape, rows, strict=True)):
        return scale
    shape = next((shape for shape in (rows, channels) if scale.size == np.prod(shape)), None)
    if shape is None:
        raise UnfitError(f"{scale.size} scales of channels", f"{np.prod(channels)}, one for each")
    return scale.reshape(shape)


SCHEMAS = (
    Schema(version="0.6.1", to_json=_written_0_6_1, from_json=_read_0_6_1),
    Schema(version="1.0.0", to_json=_written_1_0_0, from_json=_read_1_0_0),
    Schema(version="2.0.0", to_json=_written_2_0_0, from_json=_read_2_0_0),
)
"""The versions that are written and read."""
