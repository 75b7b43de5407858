"""Exact sums of products of 8-bit integers as a GPU's tensor cores take them: int8 times int8, added up in int32.

With signed values q and zero points z, sum (q_x - z_x)(q_w - z_w) is the dot of the values less what the zero points
add, which sums of rows and columns tell. An unsigned value becomes a signed one by turning its highest bit over, which
is 128 less, as is its zero point then. All sums are exact (modulo 2^32, as the runtime's), so their order is free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Shaped

from ptqjax.kernels.integer import HALF, turned
from ptqjax.kernels.platforms import written_out
from ptqjax.kernels.ways import kind_of_convolution
from ptqjax.kernels.windows import Padding, output_sizes, pad_spatial, seen_by_tap, seen_by_windows

_ALIGNMENT = 16  # terms of a sum: XLA's kernels for products of int8 want them so, zeros fill up


class Integers(NamedTuple):
    """Integers of 8 bits, signed, and what is to be taken off them."""

    values: Any
    """int8."""
    zero: Any
    """int32, of the rank of the values; None: nothing."""

    def centred(self) -> Any:
        """Returns the values less their zero points, int32."""
        wide = self.values.astype(jnp.int32)
        return wide if self.zero is None else wide - self.zero


def are_narrow(*arrays: Any) -> bool:
    """Tells whether all arrays hold integers of 8 bits and fewer."""
    return all(not jnp.issubdtype(each.dtype, jnp.floating) and each.dtype.itemsize == 1 for each in arrays)


def signed(q: Shaped[Array, "..."], zero_point: Shaped[Array, "..."] | None) -> Integers:
    """Returns integers of 8 bits and fewer as int8, with their zero point (of the same rank, or None for 0)."""
    zero = None if zero_point is None else zero_point.astype(jnp.int32)
    if q.dtype != jnp.uint8:
        return Integers(q.astype(jnp.int8), zero)
    return Integers(turned(q), (jnp.zeros((1,) * q.ndim, jnp.int32) if zero is None else zero) - HALF)


def multiply_matrices(a: Integers, b: Integers) -> Int[Array, "... m n"]:
    """Returns the product of matrices, exactly; zeros are one, or one for each row of `a` and each column of `b`."""
    left, right = _aligned(a.values, -1), _aligned(b.values, -2)
    count = a.values.shape[-1]
    total = jnp.matmul(left, right, preferred_element_type=jnp.int32)
    if a.zero is not None:
        columns = jnp.sum(b.values, axis=-2, keepdims=True, dtype=jnp.int32)
        total = total - _ranked(a.zero, total) * _ranked(columns, total)
    if b.zero is not None:
        rows = jnp.sum(a.values, axis=-1, keepdims=True, dtype=jnp.int32)
        rows = rows if a.zero is None else rows - a.zero * count
        total = total - _ranked(rows, total) * _ranked(b.zero, total)
    return total


def _ranked(values: Any, like: Any) -> Any:
    return values.reshape((1,) * (like.ndim - values.ndim) + values.shape)


def _aligned(values: Any, axis: int) -> Any:
    """Returns values filled up with zeros along an axis to what XLA's kernels want."""
    config = [(0, 0, 0)] * values.ndim
    config[axis] = (0, -values.shape[axis] % _ALIGNMENT, 0)
    return lax.pad(values, np.int8(0), config) if config[axis][1] else values


def convolve(
    x: Integers,
    w: Integers,
    *,
    strides: Sequence[int],
    padding: Padding,
    dilations: Sequence[int],
    groups: int,
) -> Int[Array, "n *out o"]:
    """Returns the cross-correlation of channels-last `x` (of one zero) with kernels [o, i, *kernel], exactly.

    The zero of `w` is one or one for each output, in the kernels' rank. What lies outside of `x` counts as its zero.
    """
    kind = kind_of_convolution(w.values.shape, groups)
    window = {"strides": strides, "padding": padding, "dilations": dilations}
    if kind in {"depthwise", "small groups"}:
        return _taps(x, w, groups, **window)
    return _columns(x, w, groups, **window)


def _taps(x: Integers, w: Integers, groups: int, *, strides: Any, padding: Any, dilations: Any) -> Any:
    """Whole arrays, shifted and multiplied: one loop that reads and writes 8 bits for each element."""
    num_outputs, num_inputs, *kernel = w.values.shape
    sizes, rank = x.values.shape[1:-1], x.values.ndim
    counts = output_sizes(sizes, kernel=kernel, strides=strides, dilations=dilations, padding=padding)
    padded = pad_spatial(lax.optimization_barrier(x.values), padding, fill=0 if x.zero is None else x.zero.reshape(()))
    weights = w.centred().reshape(num_outputs, -1).T
    total = jnp.zeros((1,) * rank, jnp.int32)
    for position in range(num_inputs):
        part = padded if num_inputs == 1 else padded[..., position::num_inputs]
        part = part if num_outputs == groups else jnp.repeat(part, num_outputs // groups, axis=-1)
        for number, tap in enumerate(product(*map(range, kernel)), position * math.prod(kernel)):
            seen = seen_by_tap(part, tap, counts=counts, strides=strides, dilations=dilations)
            own = lax.slice_in_dim(weights, number, number + 1).reshape(*(1,) * (rank - 1), -1)
            total = total + Integers(seen, x.zero).centred() * own
    return total


def _columns(x: Integers, w: Integers, groups: int, *, strides: Any, padding: Any, dilations: Any) -> Any:
    """A dot of the kernels with what each of their places sees, which is written out once, in 8 bits."""
    num_outputs, num_inputs, *kernel = w.values.shape
    sizes = x.values.shape[1:-1]
    counts = output_sizes(sizes, kernel=kernel, strides=strides, dilations=dilations, padding=padding)
    padded = pad_spatial(x.values, padding, fill=0 if x.zero is None else x.zero.reshape(()))
    columns = seen_by_windows(padded, kernel=kernel, counts=counts, strides=strides, dilations=dilations)
    taps = columns.shape[-2]
    columns = columns if taps == 1 else written_out(columns)
    shape = (-1, groups, taps * num_inputs, num_outputs // groups)
    if groups == 1:
        rows, kernels = columns.reshape(-1, shape[2]), _matrix(w.values).reshape(shape[2], num_outputs)
        zero = None if w.zero is None else w.zero.reshape(1, -1)
        total = multiply_matrices(Integers(rows, _of_rank(x.zero, 2)), Integers(kernels, zero))
        return total.reshape(x.values.shape[0], *counts, num_outputs)
    split = columns.reshape(-1, taps, groups, num_inputs)
    rows = jnp.moveaxis(split, 2, 0).reshape(groups, -1, shape[2])
    kernels = jnp.moveaxis(_matrix(w.values).reshape(shape[2], groups, shape[3]), 1, 0)
    zero = None if w.zero is None else jnp.broadcast_to(w.zero.reshape(-1), (num_outputs,)).reshape(groups, 1, shape[3])
    total = multiply_matrices(Integers(rows, _of_rank(x.zero, 3)), Integers(kernels, zero))
    return jnp.moveaxis(total, 0, 1).reshape(x.values.shape[0], *counts, num_outputs)


def _matrix(w: jax.Array) -> jax.Array:
    """Returns kernels [o, i, *kernel] as [taps, i, o]."""
    return w.reshape(*w.shape[:2], -1).transpose(2, 1, 0)


def _of_rank(zero: Any, rank: int) -> Any:
    return None if zero is None else zero.reshape((1,) * rank)
