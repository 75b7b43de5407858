"""Convolutions: one program in ONNX's layout, for accelerators, and one in channels-last layout, for CPUs.

XLA's CPU convolutions by groups are far from what the machine can do: depthwise ones 30 times (measured, 2 cores with
AVX2, at batch 16; see `scripts/bench_lowering.py`). So there a 1x1 kernel is a dot, a depthwise one, or one of small
groups, a sum of shifted products, and larger groups are convolved one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from ptqjax.kernels.depthwise import convolve_depthwise, tap_by_tap
from ptqjax.kernels.windows import Padding, output_sizes, pad_spatial, seen_by_tap

_FEW_CHANNELS = 8  # of a group: up to here, shifted products take half the time of a convolution, or less
_FEW_GROUPS = 8  # up to here, a convolution each; 32 of them compile in 4 s a layer, their loop in 1 s
_EXACT = lax.Precision.HIGHEST  # float32 products, never TF32 or bfloat16


def convolve(
    x: Shaped[Array, "n c *spatial"],
    w: Shaped[Array, "o i *kernel"],
    *,
    strides: Sequence[int],
    padding: Padding,
    dilations: Sequence[int],
    groups: int,
) -> Shaped[Array, "n o *out"]:
    """Returns the cross-correlation of `x` with the kernels `w`, in ONNX's layout, by XLA's own convolution."""
    return lax.conv_general_dilated(
        x,
        w,
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilations,
        feature_group_count=groups,
        precision=_EXACT,
    )


def convolve_channels_last(
    x: Shaped[Array, "n *spatial c"],
    w: Shaped[Array, "o i *kernel"],
    *,
    strides: Sequence[int],
    padding: Padding,
    dilations: Sequence[int],
    groups: int,
) -> Shaped[Array, "n *out o"]:
    """Returns the same as `convolve` for channels-last `x`; `w` is in ONNX's layout. The program is made for CPUs."""
    kernel = w.shape[2:]
    if math.prod(kernel) == 1 and groups == 1:
        return _pointwise(_one_tap(x, strides, padding, dilations), w)
    window = {"strides": strides, "padding": padding, "dilations": dilations}
    if groups == 1:
        return _dense(x, w, **window)
    if w.shape[1] == 1 and w.shape[0] == groups:
        return convolve_depthwise(x, w, **window)
    if w.shape[1] == 1 or max(w.shape[1], w.shape[0] // groups) <= _FEW_CHANNELS:
        return _shifted(x, w, groups=groups, **window)
    return _grouped(x, w, groups=groups, **window)


def _one_tap(x: jax.Array, strides: Sequence[int], padding: Padding, dilations: Sequence[int]) -> jax.Array:
    ones = (1,) * len(strides)
    counts = output_sizes(x.shape[1:-1], kernel=ones, strides=strides, dilations=dilations, padding=padding)
    return seen_by_tap(pad_spatial(x, padding), (0,) * len(ones), counts=counts, strides=strides, dilations=ones)


def _pointwise(x: jax.Array, w: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    return jnp.dot(rows, w.reshape(w.shape[:2]).T, precision=_EXACT).reshape(*x.shape[:-1], w.shape[0])


def _shifted(
    x: jax.Array, w: jax.Array, *, groups: int, strides: Sequence[int], padding: Padding, dilations: Sequence[int]
) -> jax.Array:
    """y[n, p, o] = sum over the c channels of o's group, and taps k, of x[n, s p + d k, o // m c + i] w[o, i, k].

    With m kernels for each group: whole arrays, shifted and multiplied, one for each channel of a group and tap.
    """
    num_inputs, kernel = w.shape[1], w.shape[2:]
    counts = output_sizes(x.shape[1:-1], kernel=kernel, strides=strides, dilations=dilations, padding=padding)
    # without the barrier XLA would compute what comes before once for each tap
    padded = lax.optimization_barrier(pad_spatial(x, padding))
    weights = iter(tap_by_tap(w))
    total = jnp.zeros((), x.dtype).reshape((1,) * x.ndim)
    for position in range(num_inputs):
        part = padded if num_inputs == 1 else padded[..., position::num_inputs]
        part = part if w.shape[0] == groups else jnp.repeat(part, w.shape[0] // groups, axis=-1)
        for tap in product(*map(range, kernel)):
            seen = seen_by_tap(part, tap, counts=counts, strides=strides, dilations=dilations)
            total = total + seen * next(weights).reshape(*(1,) * (x.ndim - 1), -1)
    return total


def _grouped(
    x: jax.Array, w: jax.Array, *, groups: int, strides: Sequence[int], padding: Padding, dilations: Sequence[int]
) -> jax.Array:
    """A dense convolution for each group; of many groups in a loop, which runs as fast and compiles sooner."""
    window = {"strides": strides, "padding": padding, "dilations": dilations}
    if groups <= _FEW_GROUPS:
        parts = zip(jnp.split(x, groups, axis=-1), jnp.split(w, groups, axis=0), strict=True)
        return jnp.concatenate([_dense(part, kernels, **window) for part, kernels in parts], axis=-1)
    images = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, -1), -2, 0)
    kernels = w.reshape(groups, -1, *w.shape[1:])
    y = jnp.moveaxis(lax.map(lambda pair: _dense(*pair, **window), (images, kernels)), 0, -2)
    return y.reshape(*y.shape[:-2], -1)


def _dense(
    x: jax.Array, w: jax.Array, *, strides: Sequence[int], padding: Padding, dilations: Sequence[int]
) -> jax.Array:
    """XLA's convolution, channels last: im2col, sums over taps of dots and Winograd's were no faster (measured).

    Except under a kernel larger than the image: there XLA lets the two change places, and takes 20 times as long.
    """
    if math.prod(x.shape[1:-1]) < math.prod(w.shape[2:]):
        return _of_columns(x, w, strides=strides, padding=padding, dilations=dilations)
    last = tuple(range(w.ndim))
    inputs_last, kernels_last = (0, w.ndim - 1, *last[1:-1]), (w.ndim - 1, w.ndim - 2, *last[:-2])
    return lax.conv_general_dilated(
        x,
        w.transpose(*last[2:], 1, 0),  # XLA's fast path wants the kernel's channels last as well
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilations,
        dimension_numbers=lax.ConvDimensionNumbers(inputs_last, kernels_last, inputs_last),
        precision=_EXACT,
    )


def _of_columns(
    x: jax.Array, w: jax.Array, *, strides: Sequence[int], padding: Padding, dilations: Sequence[int]
) -> jax.Array:
    """A dot of the kernels with what each of their places sees."""
    kernel = w.shape[2:]
    counts = output_sizes(x.shape[1:-1], kernel=kernel, strides=strides, dilations=dilations, padding=padding)
    padded = pad_spatial(x, padding)
    seen = [
        seen_by_tap(padded, tap, counts=counts, strides=strides, dilations=dilations)
        for tap in product(*map(range, kernel))
    ]
    columns = jnp.stack(seen, axis=-1).reshape(x.shape[0] * math.prod(counts), -1)  # [.., channel * tap], as in w
    return jnp.dot(columns, w.reshape(w.shape[0], -1).T, precision=_EXACT).reshape(x.shape[0], *counts, w.shape[0])


def transposed_convolve(
    x: Shaped[Array, "n c *spatial"],
    w: Shaped[Array, "c i *kernel"],
    *,
    strides: Sequence[int],
    crops: Padding,
    dilations: Sequence[int],
    extra: Sequence[int],
    groups: int,
) -> Shaped[Array, "n o *out"]:
    """Returns the transpose of `convolve` (in its first argument) applied to `x`, in ONNX's layout.

    Args:
        x: What the transpose is applied to.
        w: The kernels, from channel c to the i output channels of its group.
        strides: Distance between the places that neighbours in `x` write to.
        crops: Elements taken off the full result, per axis, at both ends.
        dilations: Distance between the kernel's taps.
        extra: Elements added behind the full result, per axis (ONNX's output_padding).
        groups: Number of groups of channels.
    """
    kernel = w.shape[2:]
    inside = w.reshape(groups, -1, *w.shape[1:])  # [g, c / g, i, *kernel]
    swapped = jnp.swapaxes(inside, 1, 2).reshape(-1, w.shape[0] // groups, *kernel)
    extents = [(taps - 1) * dilation for taps, dilation in zip(kernel, dilations, strict=True)]
    padding = [
        (extent - low, extent - high + more) for extent, (low, high), more in zip(extents, crops, extra, strict=True)
    ]
    return lax.conv_general_dilated(
        x,
        jnp.flip(swapped, range(2, w.ndim)),
        window_strides=(1,) * len(kernel),
        padding=padding,
        lhs_dilation=strides,
        rhs_dilation=dilations,
        feature_group_count=groups,
        precision=_EXACT,
    )
