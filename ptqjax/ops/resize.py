"""Resize and Upsample: images made larger or smaller, axis by axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.kernels import resampling
from ptqjax.kernels.resampling import Axis, Taps
from ptqjax.ops.interpolation import check_choice, in_real_arithmetic
from ptqjax.ops.layout import channels_last_axis
from ptqjax.ops.registry import known, lowers, lowers_channels_last, static_integers

# Nearest elements in float32, as in runtimes: a scale of 1.3333334 then means 4/3.
_POSITIONS = {"nearest": np.float32, "linear": np.float64, "cubic": np.float64}


@lowers("Resize", since=11)
def resize(
    x: Any,
    roi: Any = None,
    scales: Any = None,
    sizes: Any = None,
    /,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Any:
    """Returns `x` in another size, which `scales` or `sizes` tell of all axes, or of `axes` alone.

    With `antialias`, an element of an axis that becomes shorter is made from all that it covers. Interpolated integers
    are rounded half to even and saturated.

    Raises:
        UnsupportedOperatorError: A mode is unknown, or neither or both of `scales` and `sizes` are given.
    """
    check_choice(mode, {"nearest", "linear", "cubic"}, "mode")
    check_choice(coordinate_transformation_mode, resampling.TRANSFORMATIONS, "coordinate_transformation_mode")
    check_choice(nearest_mode, resampling.ROUNDINGS, "nearest_mode")
    region = roi if coordinate_transformation_mode == "tf_crop_and_resize" else None
    plans = _axes(x.shape, region, scales, sizes, axes=axes, policy=keep_aspect_ratio_policy)
    positions = {
        place: resampling.source_positions(axis, coordinate_transformation_mode, dtype=_POSITIONS[mode])
        for place, axis in plans.items()
    }
    if mode == "nearest":
        taps = {
            place: resampling.nearest(positions[place], axis.size, rounding=nearest_mode)
            for place, axis in plans.items()
        }
    else:
        kernel, support = _kernel(mode, cubic_coeff_a)
        taps = {
            place: resampling.interpolating(
                positions[place],
                axis.size,
                kernel=kernel,
                support=support,
                shrinking=min(axis.scale, 1.0) if antialias else 1.0,
                exclude_outside=bool(exclude_outside),
            )
            for place, axis in plans.items()
        }
    y = _resampled(x, taps)
    return y if region is None else _extrapolated(y, positions, plans, extrapolation_value)


@lowers_channels_last("Resize", since=11)
def resize_channels_last(
    x: Any,
    roi: Any = None,
    scales: Any = None,
    sizes: Any = None,
    /,
    *,
    axes: Sequence[int] | None = None,
    **attributes: Any,
) -> Any:
    """Returns `resize` of a channels-last value."""
    places = [channels_last_axis(axis, x.ndim) for axis in (range(x.ndim) if axes is None else axes)]
    return resize(x, roi, scales, sizes, axes=places, **attributes)


@lowers("Resize", since=10)
def resize_10(x: Any, scales: Any, /, *, mode: str = "nearest") -> Any:
    """Returns `x` with each axis `scales` times as long; element i of the result lies at i / scale.

    The nearest one is that before it where an axis grows, that behind it where it shrinks, as in ONNX's cases for this
    version and in ONNX Runtime.
    """
    grown, shrunk = (known(scales, "the scales of Resize").copy() for _ in range(2))
    grown[grown < 1], shrunk[shrunk > 1] = 1, 1
    settings: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": "asymmetric"}
    y = resize(x, None, shrunk, nearest_mode="ceil", **settings)
    return resize(y, None, grown, nearest_mode="floor", **settings)


@lowers_channels_last("Resize", since=10)
def resize_10_channels_last(x: Any, scales: Any, /, **attributes: Any) -> Any:
    """Returns `resize_10` of a channels-last value."""
    return resize_10(x, _with_channels_last(known(scales, "the scales of Resize")), **attributes)


@lowers("Upsample", since=9)
def upsample(x: Any, scales: Any, /, *, mode: str = "nearest") -> Any:
    """Returns `x` with each axis `scales` times as long, like `resize_10`."""
    return resize_10(x, known(scales, "the scales of Upsample"), mode=mode)


@lowers_channels_last("Upsample", since=9)
def upsample_channels_last(x: Any, scales: Any, /, **attributes: Any) -> Any:
    """Returns `upsample` of a channels-last value."""
    return upsample(x, _with_channels_last(known(scales, "the scales of Upsample")), **attributes)


@lowers("Upsample", since=7)
def upsample_7(x: Any, /, *, scales: Sequence[float], mode: str = "nearest") -> Any:
    """Returns `upsample`; the scales are an attribute."""
    return upsample(x, np.asarray(scales, np.float32), mode=mode)


def _axes(
    shape: Sequence[int], roi: Any, scales: Any, sizes: Any, *, axes: Sequence[int] | None, policy: str
) -> dict[int, Axis]:
    """Returns what becomes of each axis that does not stay as it is, those that shrink first."""
    check_choice(policy, {"stretch", "not_larger", "not_smaller"}, "keep_aspect_ratio_policy")
    places = [axis % len(shape) for axis in (range(len(shape)) if axes is None else axes)]
    old = [shape[place] for place in places]
    has_scales, has_sizes = (value is not None and value.size > 0 for value in (scales, sizes))
    if has_scales == has_sizes:
        raise UnsupportedOperatorError("exactly one of the inputs 'scales' and 'sizes' must be given")
    if has_scales:
        factors = known(scales, "the scales of Resize").astype(np.float32).tolist()
        new = [int(np.float32(size) * np.float32(factor)) for size, factor in zip(old, factors, strict=True)]
        lengths = [size * factor for size, factor in zip(old, factors, strict=True)]
    else:
        new = list(static_integers(sizes, "the sizes of Resize"))
        factors = [goal / size for goal, size in zip(new, old, strict=True)]
        lengths = [float(goal) for goal in new]
        if policy != "stretch":
            factors = [min(factors) if policy == "not_larger" else max(factors)] * len(old)
            lengths = [size * factor for size, factor in zip(old, factors, strict=True)]
            new = [int(length + 0.5) for length in lengths]
    regions = np.tile([[0.0], [1.0]], len(old)) if roi is None else known(roi, "the roi of Resize").reshape(2, -1)
    found = {
        place: Axis(size, num, factor, length, float(start), float(end))
        for place, size, num, factor, length, start, end in zip(
            places, old, new, factors, lengths, *regions.astype(np.float64), strict=True
        )
        if not (factor == 1 and num == size and (start, end) == (0, 1))
    }
    return dict(sorted(found.items(), key=lambda item: item[1].scale))


def _kernel(mode: str, cubic_coeff_a: float) -> tuple[Any, int]:
    return (resampling.cubic_kernel(cubic_coeff_a), 2) if mode == "cubic" else (resampling.linear_kernel, 1)


def _resampled(x: Any, taps: Mapping[int, Taps]) -> Any:
    moved = all(each.weights is None for each in taps.values())
    y = jnp.asarray(x) if moved else in_real_arithmetic(x)
    for place, each in taps.items():
        y = resampling.resample(y, each, place)
    return y if moved else _rounded_to(y, x.dtype)


def _rounded_to(y: Any, dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.integer):
        info = ml_dtypes.iinfo(dtype)
        return jnp.clip(jnp.round(y), float(info.min), float(info.max)).astype(dtype)
    return y.astype(dtype)


def _extrapolated(y: Any, positions: Mapping[int, np.ndarray], plans: Mapping[int, Axis], value: float) -> Any:
    """Returns `y` with `value` where the position lies outside of the old axis."""
    for place, axis in plans.items():
        outside = (positions[place] < 0) | (positions[place] > axis.size - 1)
        y = jnp.where(np.expand_dims(outside, [i for i in range(y.ndim) if i != place]), jnp.asarray(value, y.dtype), y)
    return y


def _with_channels_last(scales: np.ndarray) -> np.ndarray:
    return np.concatenate([scales[:1], scales[2:], scales[1:2]])
