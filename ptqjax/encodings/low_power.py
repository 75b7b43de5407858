"""Low-power blocks (LPBQ): a block's scale is a small integer times the scale of its channel.

With scales s of blocks and B = scale_bits, a channel has S = max(s) / 2^B, a block the integer k = round(s / S) in
1..2^B, half to even, and the scale k S. A machine then sums blocks in integers and multiplies once a channel.

Source: aimet-onnx 2.42; golden values of its tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ptqjax.encodings.encoding import Encoding, concrete, make_encoding
from ptqjax.errors import ConfigError
from ptqjax.kernels.namespace import array_namespace


class LowPowerScales(NamedTuple):
    """The scales of blocks as products."""

    per_channel: Any
    """S, float32: of the rank of the scales, of size 1 along the axes that share it."""
    per_block: Any
    """k, integer-valued: of the shape of the scales."""


def low_power_scales(scale: Any, *, scale_bits: int, axis: int) -> LowPowerScales:
    """Returns the products nearest to the scales of blocks, per channel.

    Args:
        scale: Scales of blocks, float32, more than 0; of the rank of the tensor.
        scale_bits: Number of bits B of the integers.
        axis: Axis that is cut into blocks, as ONNX has it; `channel_axis` tells the channel's.
    """
    xp = array_namespace(scale)
    channel = channel_axis(axis, np.ndim(scale))
    others = tuple(i for i in range(np.ndim(scale)) if i != channel)
    per_channel = _divided(xp.max(scale, axis=others, keepdims=True), scale_bits)
    return LowPowerScales(per_channel, xp.clip(xp.round(scale / per_channel), 1, 2**scale_bits))


def channel_axis(axis: int, rank: int) -> int:
    """Returns the axis of the output channels beside one that is cut into blocks: the other one of its pair.

    Weights have the two side by side: first in Conv, ConvTranspose and Gemm, last in MatMul (where `axis` is negative).
    0 for a tensor of one axis, which is its own channel.
    """
    if rank == 1:
        return 0
    return axis % rank ^ 1 if axis >= 0 else (rank - 1) - ((-axis - 1) ^ 1)


def compose(scales: LowPowerScales) -> Any:
    """Returns the scales of blocks, k S in float32."""
    xp = array_namespace(scales.per_channel, scales.per_block)
    return xp.asarray(scales.per_block, np.float32) * scales.per_channel


def low_power_encoding(
    scales: LowPowerScales, *, dtype: str, axis: int, block_size: int, scale_bits: int, zero_point: Any = 0
) -> Encoding:
    """Returns the encoding of low-power blocks.

    Raises:
        ConfigError: An integer is not one of 1..2^scale_bits.
    """
    k = np.asarray(scales.per_block)
    if np.any((k < 1) | (k > 2**scale_bits) | (k != np.round(k))):
        raise ConfigError(
            f"low-power blocks: expected integers from 1 to {2**scale_bits} (scale_bits={scale_bits}); "
            f"found {float(k.min()):g} to {float(k.max()):g}"
        )
    scale = compose(scales)
    return make_encoding(
        scale, np.float32(zero_point), dtype=dtype, axis=axis, block_size=block_size, scale_bits=scale_bits
    )


def decompose(encoding: Encoding) -> LowPowerScales:
    """Returns the factors of low-power blocks, of which `compose` gives the encoding's scales back to the bit.

    S is that of the channel (`channel_axis`), or of each row of blocks where only these have one in common.

    Raises:
        ConfigError: The encoding has no `scale_bits`, or its scales are no such products.
    """
    if encoding.scale_bits is None or encoding.axis is None or encoding.block_size is None:
        raise ConfigError("the encoding is not of low-power blocks: expected an axis, a block_size and scale_bits")
    scale = np.asarray(concrete(encoding).scale)
    for found in _candidates(scale, encoding.axis, encoding.scale_bits):
        in_range = np.all((found.per_block >= 1) & (found.per_block <= 2**encoding.scale_bits))
        if in_range and np.array_equal(compose(found), scale):
            return found
    raise ConfigError(
        f"the scales of the blocks are not integers from 1 to {2**encoding.scale_bits} times one scale per channel; "
        "round them with low_power_scales"
    )


def _candidates(scale: np.ndarray, axis: int, scale_bits: int) -> list[LowPowerScales]:
    per_row = _divided(scale.max(axis=axis, keepdims=True), scale_bits)
    return [
        low_power_scales(scale, scale_bits=scale_bits, axis=axis),
        LowPowerScales(per_row, np.round(scale / per_row)),
    ]


def _divided(scale: Any, scale_bits: int) -> Any:
    # Never subnormal: k S would not be a multiple to the bit, and S a scale that machines flush to 0.
    return array_namespace(scale).maximum(scale * np.float32(2.0**-scale_bits), np.finfo(np.float32).tiny)
