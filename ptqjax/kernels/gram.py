"""What a linear layer's error depends on: second moments of what its weights multiply, at some of its outputs.

With z = W x in float and z' = V x' in the quantized network, E|z - z'|^2 = tr(V H V^T) - 2 tr(V C W^T) + tr(W F W^T),
H = E[x' x'^T], C = E[x' x^T] and F = E[x x^T]: whatever is asked of a rounding V of W follows from these alone, without
another pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ptqjax.kernels.platforms import written_out
from ptqjax.kernels.windows import Padding


class Moments(NamedTuple):
    """Sums over rows, one row for each output that was looked at; per group, k = inputs x taps of a group."""

    gram: Any
    """Sum of x' x'^T, [g, k, k]."""
    cross: Any
    """Sum of x' x^T, [g, k, k]."""
    float_gram: Any
    """Sum of x x^T, [g, k, k]: what the error is measured against."""
    mean: Any
    """Sum of x', [g, k]."""
    float_mean: Any
    """Sum of x, [g, k]."""
    count: Any
    """How many rows."""

    def plus(self, other: Moments) -> Moments:
        """Returns the sums over the rows of both."""
        return Moments(*(one + another for one, another in zip(self, other, strict=True)))

    def means(self) -> Moments:
        """Returns the means over the rows in place of the sums, of one row; zeros for no rows."""
        count = max(float(self.count), 1.0)
        return Moments(*(each / count for each in self[:-1]), count=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Taps:
    """Which elements of the input each output of a layer sees, along its spatial axes."""

    kernel: tuple[int, ...] = ()
    """Taps along each axis; () for a layer without any (Gemm, MatMul)."""
    strides: tuple[int, ...] = ()
    """Steps of the window."""
    dilations: tuple[int, ...] = ()
    """Distance of neighbouring taps."""
    padding: Padding = ()
    """Zeros added before and after; below 0: elements cropped."""
    holes: tuple[int, ...] = ()
    """Zeros put between neighbouring elements (a ConvTranspose)."""
    is_flipped: bool = False
    """Whether the last tap sees the first element (a ConvTranspose)."""


def patches(
    x: Float[Array, "n *spatial c"], taps: Taps, positions: Int[Array | np.ndarray, "p rank"]
) -> Float[Array, "n p c taps"]:
    """Returns what the layer's outputs at some positions, the same ones in each sample, see of the input."""
    config = [(low, high, hole) for (low, high), hole in zip(taps.padding, taps.holes, strict=True)]
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    sizes = padded.shape[1:-1]
    flat = padded.reshape(padded.shape[0], -1, padded.shape[-1])
    seen = []
    for tap in product(*map(range, taps.kernel)):
        at = [size - 1 - index for size, index in zip(taps.kernel, tap, strict=True)] if taps.is_flipped else tap
        places = positions * _row(taps.strides) + _row(at) * _row(taps.dilations)
        seen.append(jnp.take(flat, jnp.sum(places * _row(_strides_of(sizes)), axis=1), axis=1))
    return jnp.stack(seen, axis=-1)


def _row(numbers: Sequence[int]) -> np.ndarray:
    return np.asarray(numbers, np.int32).reshape(1, -1)


def _strides_of(sizes: Sequence[int]) -> list[int]:
    """Returns how far apart neighbours along each axis are in a flat array."""
    return [int(np.prod(sizes[axis + 1 :])) for axis in range(len(sizes))]


def moments(rows: Float[Array, "r c taps"], float_rows: Float[Array, "r c taps"], groups: int) -> Moments:
    """Returns the sums over rows of one set of outputs."""
    x, exact = (written_out(_by_group(each, groups)) for each in (rows, float_rows))

    def products(one: Any, other: Any) -> Any:
        return jnp.einsum("rgk,rgl->gkl", one, other, precision=lax.Precision.HIGHEST)

    count = jnp.asarray(rows.shape[0], jnp.float32)
    return Moments(
        gram=products(x, x),
        cross=products(x, exact),
        float_gram=products(exact, exact),
        mean=x.sum(axis=0),
        float_mean=exact.sum(axis=0),
        count=count,
    )


def _by_group(rows: Any, groups: int) -> Any:
    return rows.reshape(rows.shape[0], groups, rows.shape[1] // groups * rows.shape[2])
