"""Convolutions, channels last, as XLA's compiler for GPUs makes few kernels of them: see `ways` for which and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from ptqjax.kernels.depthwise import convolve_depthwise
from ptqjax.kernels.ways import kind_of_convolution, way_of
from ptqjax.kernels.windows import Padding, are_tiles, output_sizes, pad_spatial, seen_by_tap, seen_by_windows

_EXACT = lax.Precision.HIGHEST  # float32 products, never TF32 or bfloat16


def convolve_on_gpu(
    x: Shaped[Array, "n *spatial c"],
    w: Shaped[Array, "o i *kernel"],
    *,
    strides: Sequence[int],
    padding: Padding,
    dilations: Sequence[int],
    groups: int,
) -> Shaped[Array, "n *out o"]:
    """Returns the cross-correlation of a channels-last `x` with kernels in ONNX's layout. The program is for GPUs."""
    has_tiles = are_tiles(w.shape[2:], strides=strides, dilations=dilations)
    way = way_of(kind_of_convolution(w.shape, groups, has_tiles=has_tiles))
    return _BY_WAY[way](x, w, groups, strides=strides, padding=padding, dilations=dilations)


def _dot(x: Any, w: Any, _: int, *, strides: Any, padding: Any, dilations: Any) -> Any:
    ones = (1,) * len(strides)
    counts = output_sizes(x.shape[1:-1], kernel=ones, strides=strides, dilations=dilations, padding=padding)
    seen = seen_by_tap(pad_spatial(x, padding), (0,) * len(ones), counts=counts, strides=strides, dilations=ones)
    rows = seen.reshape(-1, x.shape[-1])
    return jnp.dot(rows, w.reshape(w.shape[:2]).T, precision=_EXACT).reshape(x.shape[0], *counts, w.shape[0])


def _taps(x: Any, w: Any, groups: int, *, strides: Any, padding: Any, dilations: Any) -> Any:
    if kind_of_convolution(w.shape, groups) == "depthwise":
        return convolve_depthwise(x, w, strides=strides, padding=padding, dilations=dilations)
    num_inputs, kernel = w.shape[1], w.shape[2:]
    counts = output_sizes(x.shape[1:-1], kernel=kernel, strides=strides, dilations=dilations, padding=padding)
    padded = pad_spatial(lax.optimization_barrier(x), padding)
    weights = w.reshape(w.shape[0], -1).T  # a row for each channel of a group and tap
    total = jnp.zeros((), x.dtype).reshape((1,) * x.ndim)
    for position in range(num_inputs):
        part = padded if num_inputs == 1 else padded[..., position::num_inputs]
        part = part if w.shape[0] == groups else jnp.repeat(part, w.shape[0] // groups, axis=-1)
        for number, tap in enumerate(product(*map(range, kernel)), position * math.prod(kernel)):
            seen = seen_by_tap(part, tap, counts=counts, strides=strides, dilations=dilations)
            own = lax.slice_in_dim(weights, number, number + 1)
            total = total + seen * own.reshape(*(1,) * (x.ndim - 1), -1)
    return total


def _convolution(x: Any, w: Any, groups: int, *, strides: Any, padding: Any, dilations: Any) -> Any:
    last = tuple(range(w.ndim))
    inputs_last, kernels_last = (0, w.ndim - 1, *last[1:-1]), (w.ndim - 1, w.ndim - 2, *last[:-2])
    return lax.conv_general_dilated(
        x,
        w.transpose(*last[2:], 1, 0),
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilations,
        dimension_numbers=lax.ConvDimensionNumbers(inputs_last, kernels_last, inputs_last),
        feature_group_count=groups,
        precision=_EXACT,
    )


def _columns(x: Any, w: Any, _: int, *, strides: Any, padding: Any, dilations: Any) -> Any:
    kernel = w.shape[2:]
    counts = output_sizes(x.shape[1:-1], kernel=kernel, strides=strides, dilations=dilations, padding=padding)
    seen = seen_by_windows(pad_spatial(x, padding), kernel=kernel, counts=counts, strides=strides, dilations=dilations)
    columns = seen.reshape(-1, seen.shape[-2] * seen.shape[-1])
    kernels = w.reshape(*w.shape[:2], -1).transpose(2, 1, 0).reshape(-1, w.shape[0])
    return jnp.dot(columns, kernels, precision=_EXACT).reshape(x.shape[0], *counts, w.shape[0])


_BY_WAY = {"dot": _dot, "taps": _taps, "convolution": _convolution, "columns": _columns}
