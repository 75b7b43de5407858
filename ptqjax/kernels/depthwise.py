"""Depthwise convolution, channels last, as sums of shifted products: a bilinear primitive that is its own transpose.

Left to itself, JAX transposes each of the slices into a padded array of the whole size, a kernel each: ten of them for
a 3x3 layer, which take most of the time of compiling and running a backward pass through a network of such layers. The
transpose in the image is a depthwise convolution as well, of what arrives, spread by the strides, with the taps in
reverse order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Shaped

from ptqjax.kernels.platforms import current
from ptqjax.kernels.windows import Padding, output_sizes, pad_spatial, seen_by_tap


def convolve_depthwise(
    x: Shaped[Array, "n *spatial c"],
    w: Shaped[Array, "c 1 *kernel"],
    *,
    strides: Sequence[int],
    padding: Padding,
    dilations: Sequence[int],
) -> Shaped[Array, "n *out c"]:
    """Returns y[n, p, c], the sum over taps k of x[n, s p + d k, c] w[c, 0, k]: arrays, shifted and multiplied.

    For GPUs the padding is part of the loop (`in_one_loop`): written out it would be a third of the bytes.
    """
    window = {"strides": tuple(strides), "padding": tuple(padding), "dilations": tuple(dilations)}
    return _depthwise.bind(x, w, **window, in_one_loop=current().platform == "gpu")


_depthwise = Primitive("depthwise_convolution")


def _sum_of_taps(x: Any, w: Any, *, strides: Any, padding: Any, dilations: Any, in_one_loop: bool) -> Any:
    kernel = w.shape[2:]
    counts = output_sizes(x.shape[1:-1], kernel=kernel, strides=strides, dilations=dilations, padding=padding)
    if in_one_loop:
        around = [(low, high, 0) for low, high in padding]
        return sum_in_one_loop(x, w, around=around, counts=counts, strides=strides, dilations=dilations)
    # without the barrier XLA would compute what comes before once for each tap
    padded = lax.optimization_barrier(pad_spatial(x, padding))
    weights = iter(tap_by_tap(w))
    total = jnp.zeros((), x.dtype).reshape((1,) * x.ndim)
    for tap in product(*map(range, kernel)):
        seen = seen_by_tap(padded, tap, counts=counts, strides=strides, dilations=dilations)
        total = total + seen * next(weights).reshape(*(1,) * (x.ndim - 1), -1)
    return total


def sum_in_one_loop(x: Any, w: Any, *, around: Any, counts: Any, strides: Any, dilations: Any) -> Any:
    """Returns the sum over taps of shifted products, in one loop that pads as it reads.

    Args:
        x: Channels last.
        w: The kernels, [c, 1, *kernel].
        around: What is added before and after, and between neighbours, along each spatial axis.
        counts: The sizes of the result.
        strides: Steps of the windows.
        dilations: Distances between taps.
    """
    # the barrier keeps the loop from computing what comes before once for each tap
    padded = lax.pad(lax.optimization_barrier(x), jnp.zeros((), x.dtype), [(0, 0, 0), *around, (0, 0, 0)])
    weights = w.reshape(w.shape[0], -1).T
    total = jnp.zeros((), x.dtype).reshape((1,) * x.ndim)
    for number, tap in enumerate(product(*map(range, w.shape[2:]))):
        seen = seen_by_tap(padded, tap, counts=counts, strides=strides, dilations=dilations)
        total = total + seen * lax.slice_in_dim(weights, number, number + 1).reshape(*(1,) * (x.ndim - 1), -1)
    return total


def tap_by_tap(w: jax.Array) -> jax.Array:
    """Returns the kernels [o, i, *kernel] as [i * taps, o], lying so in memory.

    A transposition alone would become part of the loop over the result, which would then read single weights from
    places far apart (2.0 times the time at 14x14x576, measured); into a gather, XLA's CPU compiler does not look.
    """
    taps = w.reshape(w.shape[0], -1).T
    return jnp.take(taps, jnp.arange(taps.shape[0]), axis=0, mode="clip")


def _transposed_in_x(ct: Any, x: Any, w: Any, *, strides: Any, padding: Any, dilations: Any, in_one_loop: bool) -> Any:
    """Returns what arrives at x: each place collects from the windows that saw it."""
    if isinstance(ct, ad.Zero):
        return ad.Zero(x.aval)
    sizes, kernel = x.aval.shape[1:-1], w.shape[2:]
    extents = [(taps - 1) * dilation for taps, dilation in zip(kernel, dilations, strict=True)]
    lengths = [(count - 1) * stride + 1 for count, stride in zip(ct.shape[1:-1], strides, strict=True)]
    around = tuple(
        (extent - low, size + low - length)
        for size, extent, (low, _), length in zip(sizes, extents, padding, lengths, strict=True)
    )
    reverse = jnp.flip(w, range(2, w.ndim))
    if in_one_loop:
        spread_around = [(*ends, stride - 1) for ends, stride in zip(around, strides, strict=True)]
        ones = (1,) * len(sizes)
        return sum_in_one_loop(ct, reverse, around=spread_around, counts=sizes, strides=ones, dilations=dilations)
    config = [(0, 0, stride - 1) for stride in strides]
    spread = lax.pad(ct, jnp.zeros((), ct.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    return convolve_depthwise(spread, reverse, strides=(1,) * len(sizes), padding=around, dilations=dilations)


def _transposed_in_w(ct: Any, x: Any, w: Any, *, strides: Any, padding: Any, dilations: Any, in_one_loop: bool) -> Any:
    """Returns what arrives at w: for each tap the sum over the places of what it saw, times what arrives there."""
    if isinstance(ct, ad.Zero):
        return ad.Zero(w.aval)
    shape = w.aval.shape
    padded = pad_spatial(x, padding) if in_one_loop else lax.optimization_barrier(pad_spatial(x, padding))
    taps = product(*map(range, shape[2:]))
    seen = [seen_by_tap(padded, tap, counts=ct.shape[1:-1], strides=strides, dilations=dilations) * ct for tap in taps]
    sums = [each.sum(axis=tuple(range(each.ndim - 1))) for each in seen]
    return jnp.stack(sums, axis=-1).reshape(shape)


def _batched(arguments: Any, axes: Any, **window: Any) -> tuple[Any, int]:
    (x, w), (of_x, of_w) = arguments, axes
    if of_w is None:  # images of all in one batch
        x = jnp.moveaxis(x, of_x, 0)
        y = _depthwise.bind(x.reshape(-1, *x.shape[2:]), w, **window)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0
    return jax.vmap(lambda x, w: _sum_of_taps(x, w, **window), axes)(x, w), 0


def _shape(x: Any, w: Any, *, strides: Any, padding: Any, dilations: Any, in_one_loop: bool) -> Any:
    del in_one_loop
    counts = output_sizes(x.shape[1:-1], kernel=w.shape[2:], strides=strides, dilations=dilations, padding=padding)
    return ShapedArray((x.shape[0], *counts, x.shape[-1]), x.dtype)


_depthwise.def_impl(jax.jit(_sum_of_taps, static_argnames=("strides", "padding", "dilations", "in_one_loop")))
_depthwise.def_abstract_eval(_shape)
ad.defbilinear(_depthwise, _transposed_in_x, _transposed_in_w)
batching.primitive_batchers[_depthwise] = _batched
mlir.register_lowering(_depthwise, mlir.lower_fun(_sum_of_taps, multiple_results=False))
