"""Operators on weights in blocks, and on activations that are rounded in blocks."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.kernels.run_time_grids import codes_in_blocks
from ptqjax.ops.indexing import gather
from ptqjax.ops.layout import with_rank
from ptqjax.ops.linear import matmul
from ptqjax.ops.registry import MICROSOFT, OWN, lowers

_INT8 = 4  # the accuracy level at which activations are rounded
_NEVER_ROUNDED = {2: (16, 256)}  # block sizes for which ONNX Runtime 1.32 has no such kernel, by bits (measured)


@lowers("RoundInBlocks", since=1, domain=OWN)
def round_in_blocks(x: Any, /, *, block_size: int) -> Any:
    """Returns `x` on the symmetric int8 grid of each block along its last axis; what MatMulNBits does at level 4."""
    codes, step = codes_in_blocks(jnp.asarray(x), block_size)
    return codes * step


@lowers("MatMulNBits", since=1, domain=MICROSOFT)
def matmul_nbits(  # noqa: PLR0917 - ONNX's operands
    a: Any,
    b: Any,
    scales: Any,
    zero_points: Any = None,
    g_idx: Any = None,
    bias: Any = None,
    /,
    *,
    K: int,  # noqa: N803 - ONNX's name
    N: int,  # noqa: N803 - ONNX's name
    block_size: int,
    accuracy_level: int = 0,
    bits: int = 4,
    weight_prepacked: int = 0,
) -> Any:
    """Returns a w^T + bias with w = (b - zero point) scale, [N, K]; its integers are packed in bytes, low bits first.

    A scale and a zero point (the middle of the range where there are none) serve `block_size` neighbours of a row. At
    the accuracy level 4 `a` is rounded to int8 in blocks of as many, as ONNX Runtime does.

    Raises:
        UnsupportedOperatorError: The weights are in an order of their own.
    """
    if g_idx is not None or weight_prepacked:
        raise UnsupportedOperatorError("g_idx and weight_prepacked have no lowering")
    num_blocks = -(-K // block_size)
    q = _unpacked(jnp.reshape(b, (N, num_blocks, -1)), bits, block_size).astype(a.dtype)
    zero = _zero_points(zero_points, bits, (N, num_blocks)).astype(a.dtype)
    w = ((q - zero[..., None]) * jnp.reshape(scales, (N, num_blocks, 1))).reshape(N, -1)[:, :K]
    is_rounded = accuracy_level == _INT8 and block_size not in _NEVER_ROUNDED.get(bits, ())
    y = matmul(round_in_blocks(a, block_size=block_size) if is_rounded else a, w.T)
    return y if bias is None else y + with_rank(bias, y.ndim)


@lowers("GatherBlockQuantized", since=1, domain=MICROSOFT)
def gather_block_quantized(
    data: Any,
    indices: Any,
    scales: Any,
    zero_points: Any = None,
    /,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Any:
    """Returns rows of the table (data - zero point) scale, with a scale for `block_size` neighbours of a row.

    Integers are packed in bytes, low bits first, or have a type of their own.

    Raises:
        UnsupportedOperatorError: It is no matrix of which rows are taken, with blocks along the rows.
    """
    rank = jnp.ndim(data)
    if rank != 2 or gather_axis % rank or quantize_axis % rank != 1:  # noqa: PLR2004 - a matrix
        raise UnsupportedOperatorError(
            f"GatherBlockQuantized has a lowering for rows of a matrix alone; found rank {rank}, {gather_axis=}, "
            f"{quantize_axis=}"
        )
    codes, scale = (gather(each, indices, axis=0) for each in (data, scales))
    size = codes.shape[-1]
    if np.dtype(data.dtype) == np.uint8:
        size = size * 8 // bits
        codes, zero_points = _unpacked(codes, bits, size), _zero_points(zero_points, bits, jnp.shape(scales))
    zero = jnp.zeros_like(scales) if zero_points is None else zero_points
    steps = gather(zero, indices, axis=0).astype(scale.dtype), scale
    zero, scale = (jnp.repeat(each, block_size, axis=-1)[..., :size] for each in steps)
    return (codes.astype(scale.dtype) - zero) * scale


def _zero_points(zero_points: Any, bits: int, shape: tuple[int, ...]) -> Any:
    """Returns the zero points of packed integers, [rows, blocks]: packed as they are, or one by one in floats."""
    if zero_points is None:
        return jnp.full(shape, 2 ** (bits - 1), jnp.uint8)
    if np.dtype(zero_points.dtype) == np.uint8:
        return _unpacked(jnp.reshape(zero_points, (shape[0], -1)), bits, shape[1])
    return jnp.reshape(zero_points, shape)


def _unpacked(packed: Any, bits: int, count: int) -> Any:
    """Returns the first `count` integers along the last axis of bytes that hold 8 / bits of them."""
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[(None,) * packed.ndim]
    integers = (packed[..., None] >> shifts) & jnp.uint8(2**bits - 1)
    return integers.reshape(*packed.shape[:-1], -1)[..., :count]
