"""Operators that add elements around a tensor or take them away: Pad, CenterCropPad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.layout import channels_last_axes
from ptqjax.ops.registry import lowers, lowers_channels_last, static_integers


@lowers("Pad", since=2)
def pad_2(x: Any, /, *, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> Any:
    """Returns `x` with `pads` elements added before, then after, each axis; negative ones are taken away."""
    return _padded(x, pads, range(x.ndim), mode, value)


@lowers_channels_last("Pad", since=2)
def pad_2_channels_last(x: Any, /, *, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> Any:
    """Returns `pad_2` of a channels-last value."""
    return _padded(x, pads, channels_last_axes(range(x.ndim), x.ndim), mode, value)


@lowers("Pad", since=11)
def pad(x: Any, pads: Any, value: Any = None, axes: Any = None, /, *, mode: str = "constant") -> Any:
    """Returns `pad_2` along `axes` (all where none are given); amounts, filling value and axes are inputs."""
    amounts, along = _pad_settings(pads, axes, x.ndim)
    return _padded(x, amounts, along, mode, value)


@lowers_channels_last("Pad", since=11)
def pad_channels_last(x: Any, pads: Any, value: Any = None, axes: Any = None, /, *, mode: str = "constant") -> Any:
    """Returns `pad` of a channels-last value."""
    amounts, along = _pad_settings(pads, axes, x.ndim)
    return _padded(x, amounts, channels_last_axes(along, x.ndim), mode, value)


@lowers("CenterCropPad", since=18)
def center_crop_pad(x: Any, sizes: Any, /, *, axes: Sequence[int] | None = None) -> Any:
    """Returns the middle of `x` with the given sizes along `axes` (all where none are given), zeros around it.

    An odd number of elements is one smaller before than after.
    """
    wanted = static_integers(sizes, "the shape of CenterCropPad")
    along = range(x.ndim) if axes is None else axes
    missing = [size - x.shape[axis] for axis, size in zip(along, wanted, strict=True)]
    before = [abs(amount) // 2 * (1 if amount > 0 else -1) for amount in missing]
    after = [amount - first for amount, first in zip(missing, before, strict=True)]
    return _padded(x, (*before, *after), along, "constant", None)


def _padded(x: Any, pads: Sequence[int], axes: Sequence[int], mode: str, value: Any) -> Any:
    amounts = [(0, 0)] * x.ndim
    for axis, low, high in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        amounts[axis] = (low, high)
    cut = tuple(slice(max(-low, 0), size - max(-high, 0)) for (low, high), size in zip(amounts, x.shape, strict=True))
    added = [(max(low, 0), max(high, 0)) for low, high in amounts]
    xp = array_namespace(x, value)
    if mode == "constant":
        filling = xp.asarray(_nothing(x) if value is None else value, x.dtype).reshape(())
        if array_namespace(value) is jnp:
            x = jnp.where(False, filling, x)  # JAX 0.10 has gradients to the filling only beside some to `x`; free
        return xp.pad(x[cut], added, constant_values=filling)
    return xp.pad(x[cut], added, mode=mode)


def _nothing(x: Any) -> Any:
    return "" if x.dtype == object else 0


def _pad_settings(pads: Any, axes: Any, rank: int) -> tuple[tuple[int, ...], Sequence[int]]:
    along = range(rank) if axes is None else static_integers(axes, "the axes of Pad")
    return static_integers(pads, "the pads of Pad"), along
