"""Where the windows of convolutions and pools lie: padding, output sizes, the elements that one tap sees."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Padding: TypeAlias = tuple[tuple[int, int], ...]
"""Elements added before and after, per spatial axis."""


def explicit_padding(
    sizes: Sequence[int],
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    auto_pad: str,
) -> Padding:
    """Returns the padding per axis that ONNX's `pads` (all begins, then all ends) or `auto_pad` ask for."""
    if auto_pad == "NOTSET":
        rank = len(sizes)
        return tuple(zip(pads[:rank], pads[rank:], strict=True))
    if auto_pad == "VALID":
        return ((0, 0),) * len(sizes)
    padding = []
    for size, taps, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        extent = (taps - 1) * dilation + 1
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
        less, more = total // 2, total - total // 2
        padding.append((less, more) if auto_pad == "SAME_UPPER" else (more, less))
    return tuple(padding)


def output_sizes(
    sizes: Sequence[int],
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    padding: Padding,
    ceil_mode: bool = False,
) -> tuple[int, ...]:
    """Returns how many windows fit along each axis; with `ceil_mode` also one that begins inside and ends outside."""
    counts = []
    for size, taps, stride, dilation, (low, high) in zip(sizes, kernel, strides, dilations, padding, strict=True):
        span = size + low + high - (taps - 1) * dilation - 1
        count = (-(-span // stride) if ceil_mode else span // stride) + 1
        if ceil_mode and (count - 1) * stride >= size + low:
            count -= 1  # a window that would begin in the padding at the end is none
        counts.append(count)
    return tuple(counts)


def seen_by_tap(
    padded: jax.Array,
    tap: Sequence[int],
    *,
    counts: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> jax.Array:
    """Returns the element under the kernel's position `tap` of every window: [n, *counts, c] from [n, *padded, c]."""
    starts = [position * dilation for position, dilation in zip(tap, dilations, strict=True)]
    stops = [start + (count - 1) * stride + 1 for start, count, stride in zip(starts, counts, strides, strict=True)]
    return lax.slice(
        padded,
        (0, *starts, 0),
        (padded.shape[0], *stops, padded.shape[-1]),
        (1, *strides, 1),
    )


def seen_by_windows(
    padded: jax.Array, *, kernel: Sequence[int], counts: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> jax.Array:
    """Returns what every window sees, [n, *counts, taps, c] from [n, *padded, c]."""
    if are_tiles(kernel, strides=strides, dilations=dilations):
        return _tiles(padded, kernel, counts)
    window = {"counts": counts, "strides": strides, "dilations": dilations}
    return jnp.stack([seen_by_tap(padded, tap, **window) for tap in product(*map(range, kernel))], axis=-2)


def are_tiles(kernel: Sequence[int], *, strides: Sequence[int], dilations: Sequence[int]) -> bool:
    """Tells whether windows lie side by side: each is as long as the step to the next."""
    return all(
        taps == stride and 1 in {taps, dilation}
        for taps, stride, dilation in zip(kernel, strides, dilations, strict=True)
    )


def _tiles(padded: jax.Array, kernel: Sequence[int], counts: Sequence[int]) -> jax.Array:
    """The elements of windows that lie side by side are those of the array in another order: none is gathered."""
    n, *_, c = padded.shape
    rank = len(kernel)
    lengths = [count * taps for count, taps in zip(counts, kernel, strict=True)]
    cut = lax.slice(padded, (0,) * padded.ndim, (n, *lengths, c))
    split = cut.reshape(n, *(size for pair in zip(counts, kernel, strict=True) for size in pair), c)
    side_by_side = split.transpose(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    return side_by_side.reshape(n, *counts, -1, c)


def pad_spatial(x: jax.Array, padding: Padding, *, fill: Any = 0) -> jax.Array:
    """Returns the channels-last `x` with its spatial axes padded by `fill`; negative padding crops."""
    if all(low == high == 0 for low, high in padding):
        return x
    config = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    return lax.pad(x, jnp.asarray(fill, x.dtype), config)
