"""GridSample, AffineGrid, DeformConv: images read between their elements, where data say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.kernels.sampling import MODES, sample
from ptqjax.ops.interpolation import check_choice, in_real_arithmetic
from ptqjax.ops.layout import to_channels_last, to_onnx
from ptqjax.ops.registry import lowers, lowers_channels_last, static_integers

_OLD_MODES = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest"}


@lowers("GridSample", since=20)
def grid_sample(
    x: Any, grid: Any, /, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Any:
    """Returns `x` [n, c, *spatial] read at the points of `grid` [n, *out, rank], whose last axis is x, y (, z).

    Coordinates -1 and 1 are the ends of an axis: its outer elements' centres with `align_corners`, else their edges.

    Raises:
        UnsupportedOperatorError: `mode` or `padding_mode` is unknown.
    """
    y = grid_sample_channels_last(
        to_channels_last(jnp.asarray(x)), grid, align_corners=align_corners, mode=mode, padding_mode=padding_mode
    )
    return to_onnx(y)


@lowers_channels_last("GridSample", since=20)
def grid_sample_channels_last(
    x: Any, grid: Any, /, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Any:
    """Returns `grid_sample` of a channels-last value."""
    check_choice(mode, MODES, "mode")
    check_choice(padding_mode, ("zeros", "border", "reflection"), "padding_mode")
    sizes = np.asarray(x.shape[1:-1])
    points = in_real_arithmetic(grid)[..., ::-1]
    along = tuple(np.asarray(size, points.dtype) for size in (sizes - 1, sizes))
    shaped = [each.reshape((1,) * (points.ndim - 1) + (-1,)) for each in along]
    positions = (points + 1) / 2 * shaped[0] if align_corners else ((points + 1) * shaped[1] - 1) / 2
    outer = 0.0 if align_corners else 0.5
    borders = [(-outer, size - 1 + outer) for size in sizes.tolist()]
    y = sample(in_real_arithmetic(x), positions, mode=mode, padding_mode=padding_mode, borders=borders)
    return y.astype(x.dtype)


@lowers("GridSample", since=16)
def grid_sample_16(
    x: Any, grid: Any, /, *, align_corners: int = 0, mode: str = "bilinear", padding_mode: str = "zeros"
) -> Any:
    """Returns `grid_sample` of images of two axes, whose modes had other names."""
    check_choice(mode, _OLD_MODES, "mode")
    return grid_sample(x, grid, align_corners=align_corners, mode=_OLD_MODES[mode], padding_mode=padding_mode)


@lowers("AffineGrid", since=20)
def affine_grid(theta: Any, size: Any, /, *, align_corners: int = 0) -> Any:
    """Returns the points [n, *sizes, rank] for GridSample that `theta` [n, rank, rank + 1] makes of those of an image.

    `size` is that of the image to be made, [n, c, *sizes].
    """
    sizes = static_integers(size, "the size of AffineGrid")[2:]
    axes = [np.linspace(-1, 1, each) if align_corners else (2 * np.arange(each) + 1) / each - 1 for each in sizes]
    points = np.stack([*np.meshgrid(*axes, indexing="ij")[::-1], np.ones(sizes)], axis=-1)
    flat = jnp.asarray(points.reshape(1, -1, len(sizes) + 1), theta.dtype)
    grid = jnp.matmul(flat, jnp.swapaxes(theta, 1, 2), precision="highest")
    return grid.reshape(theta.shape[0], *sizes, len(sizes))


@lowers("DeformConv", since=19)
def deform_conv(
    x: Any,
    w: Any,
    offset: Any,
    bias: Any = None,
    mask: Any = None,
    /,
    *,
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    offset_group: int = 1,
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Any:
    """Returns the convolution of `x` [n, c, *spatial] with `w`, each tap moved by an offset and scaled by a mask.

    `offset` is [n, offset_group * taps * rank, *out], `mask` [n, offset_group * taps, *out].
    """
    del kernel_shape  # the weight has it
    rank, out, taps = x.ndim - 2, offset.shape[2:], math.prod(w.shape[2:])
    n, groups = x.shape[0], offset_group
    fixed = _tap_positions(w.shape[2:], out, dilations or (1,) * rank, pads or (0,) * rank, strides or (1,) * rank)
    moved = jnp.moveaxis(offset.reshape(n * groups, taps, rank, *out), 2, -1) + jnp.asarray(fixed, offset.dtype)[None]
    images = in_real_arithmetic(x).reshape(n * groups, x.shape[1] // groups, *x.shape[2:])
    outside = [(-math.inf, math.inf)] * rank
    values = sample(to_channels_last(images), in_real_arithmetic(moved), mode="linear", borders=outside)
    if mask is not None:
        values = values * mask.reshape(n * groups, taps, *out, 1)
    values = jnp.moveaxis(
        values.reshape(n, groups, taps, math.prod(out), -1), 1, -2
    )  # [n, taps, out, groups, c / groups]
    values = values.reshape(n, taps, math.prod(out), group, -1)
    kernels = w.reshape(group, -1, *w.shape[1:2], taps)
    y = jnp.einsum("ntpgc,gmct->ngmp", values, kernels, precision="highest").reshape(n, w.shape[0], *out)
    y = y if bias is None else y + bias.reshape(1, -1, *(1,) * rank)
    return y.astype(x.dtype)


def _tap_positions(
    kernel: Sequence[int], out: Sequence[int], dilations: Sequence[int], pads: Sequence[int], strides: Sequence[int]
) -> np.ndarray:
    """Returns where each tap of each window lies without offsets, [taps, *out, rank]."""
    windows = [np.arange(count) * stride - low for count, stride, low in zip(out, strides, pads, strict=False)]
    first = np.stack(np.meshgrid(*windows, indexing="ij"), axis=-1)
    taps = np.array(list(product(*map(range, kernel)))) * np.asarray(dilations)
    return first[None] + taps.reshape(-1, *(1,) * len(out), len(out))
