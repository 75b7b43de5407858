"""What the entries of AIMET's schemas say of a tensor, in one form, and the encoding that this is."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from ptqjax.encoding_files.fitting import UnfitError, fitting
from ptqjax.encoding_files.located_json import to_float32
from ptqjax.encodings.encoding import Encoding
from ptqjax.encodings.low_power import decompose
from ptqjax.errors import ConfigError
from ptqjax.kernels.grid import FLOAT_FORMATS
from ptqjax.placement.tensor_axes import TensorAxes

_INTEGERS = re.compile(r"(u?)int(\d+)")
_MOST_BITS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The grid of one tensor as files have it."""

    dtype: str
    """Type of the codes: "int4", "uint8", a float format."""
    scale: np.ndarray
    """float64: a scalar; [c] along `axis`; of the tensor's rank for blocks. Of low-power blocks, the channel's."""
    zero_point: np.ndarray
    """float64, as the type's integers have it; of the shape of `scale`, but for low-power blocks."""
    axis: int | None = None
    """The axis that scales run along, or blocks cut; None for one scale."""
    block_size: int | None = None
    """Number of neighbours along `axis` that share a scale; None where not by blocks."""
    multiples: np.ndarray | None = None
    """For low-power blocks, the integer that the channel's scale is multiplied by, for each block."""
    scale_bits: int | None = None
    """For low-power blocks, the bits of these integers."""


def num_bits(dtype: str) -> int:
    """Returns the bits of an integer type, which may be of any width up to 32.

    Raises:
        UnfitError: It is no such type.
    """
    match = _INTEGERS.fullmatch(dtype)
    if match is None or not 1 < int(match[2]) <= _MOST_BITS:
        raise UnfitError(f"the type {dtype!r}", f"int or uint of 2 to {_MOST_BITS} bits, or {', '.join(FLOAT_FORMATS)}")
    return int(match[2])


def entry_of(encoding: Encoding, axes: TensorAxes) -> Entry:
    """Returns what files say of an encoding, whose leaves are concrete; axes are counted from the front.

    What an entry cannot hold is left out: limits other than the type's (but for strictly symmetric grids, see
    `encoding_of`), fractions of zero points, whether the encoding is enabled.

    Raises:
        UnfitError: The scales of low-power blocks are no multiples of one scale per channel.
    """
    scale = np.asarray(encoding.scale, np.float64)
    dtype = encoding.float_format or f"{'u' if encoding.qmin >= 0 else ''}int{encoding.num_bits}"
    shift = 0.0 if encoding.float_format else float(encoding.qmin) - _limits(dtype)[0]
    zero_point = np.asarray(np.rint(np.asarray(encoding.zero_point, np.float64)) - shift)
    axis = encoding.axis
    if axis is not None and axes.shape is not None:
        axis %= len(axes.shape)
    entry = Entry(dtype=dtype, scale=scale, zero_point=zero_point, axis=axis, block_size=encoding.block_size)
    return entry if encoding.scale_bits is None else _low_power(entry, encoding)


def encoding_of(entry: Entry, axes: TensorAxes) -> Encoding:
    """Returns the encoding that an entry means.

    A signed grid whose zero point is -1 throughout is strictly symmetric: AIMET, which leaves the largest of the
    unsigned integers unused, writes these so. An axis is spelled as placement spells it.

    Raises:
        UnfitError: The entry does not fit the tensor.
    """
    if entry.multiples is not None:
        _check_multiples(entry, entry.multiples)
    scale = _effective_scale(entry)
    qmin, qmax = _limits(entry.dtype)
    zero_point = np.broadcast_to(entry.zero_point, scale.shape)
    if entry.dtype.startswith("int") and np.all(zero_point == -1):
        qmin, zero_point = qmin + 1, np.zeros(scale.shape)
    between = zero_point[zero_point != np.rint(zero_point)]
    if between.size:
        raise UnfitError(f"the zero point {float(between[0])}", "an integer")
    found = Encoding(
        scale=scale,
        zero_point=to_float32(zero_point),
        qmin=np.asarray(qmin, np.float32),
        qmax=np.asarray(qmax, np.float32),
        enabled=np.asarray(True),
        axis=axes.spelled(entry.axis, entry.block_size),
        block_size=entry.block_size,
        float_format=entry.dtype if entry.dtype in FLOAT_FORMATS else None,
        scale_bits=entry.scale_bits,
    )
    return fitting(found, axes)


def block_shapes(axes: TensorAxes, axis: int, block_size: int) -> list[tuple[int, ...]]:
    """Returns the shapes that scales by blocks may have: one scale for all places of a kernel, or each its own."""
    shape = axes.shape or ()
    axis %= len(shape)
    full = tuple(-(-size // block_size) if i == axis else size for i, size in enumerate(shape))
    if axes.channel is None:
        return [full]
    kept = (axis, axes.channel % len(shape))
    return [tuple(size if i in kept else 1 for i, size in enumerate(full)), full]


def _effective_scale(entry: Entry) -> np.ndarray:
    scale = to_float32(entry.scale)
    return scale if entry.multiples is None else np.asarray(scale * entry.multiples.astype(np.float32))


def _low_power(entry: Entry, encoding: Encoding) -> Entry:
    try:
        found = decompose(encoding)
    except ConfigError as error:
        raise UnfitError(
            "scales of low-power blocks that are no multiples of one scale per channel", "multiples"
        ) from error
    return replace(
        entry,
        scale=np.asarray(found.per_channel, np.float64),
        multiples=np.asarray(found.per_block, np.float64),
        scale_bits=encoding.scale_bits,
    )


def _limits(dtype: str) -> tuple[float, float]:
    if dtype in FLOAT_FORMATS:
        info = ml_dtypes.finfo(dtype)
        return float(info.min), float(info.max)
    bits = num_bits(dtype)
    return (0.0, 2.0**bits - 1) if dtype.startswith("u") else (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)


def _check_multiples(entry: Entry, multiples: np.ndarray) -> None:
    most = 2 ** (entry.scale_bits or 0)
    if np.any(multiples != np.rint(multiples)) or np.any((multiples < 1) | (multiples > most)):
        raise UnfitError("multiples of a channel's scale out of range", f"integers from 1 to {most}")
    shared = tuple(i for i, size in enumerate(entry.scale.shape) if size == 1)
    if np.any(multiples.max(axis=shared) != most):
        raise UnfitError("a channel none of whose blocks has the largest scale", f"a block with {most} in each channel")
