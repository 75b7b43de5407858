"""Operators that move, cut, join or count elements, and compute none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.layout import channels_last_axis, with_rank
from ptqjax.ops.registry import is_static, lowers, lowers_channels_last, static_integers


@lowers("Constant", since=1)
def constant(
    *,
    value: Any = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
) -> np.ndarray:
    """Returns the one value that is given, known while tracing."""
    if value is not None:
        return np.asarray(value)
    floats = value_float if value_float is not None else value_floats
    integers = value_int if value_int is not None else value_ints
    return np.asarray(floats, np.float32) if floats is not None else np.asarray(integers, np.int64)


@lowers("Shape", since=1)
def shape(x: Any, /, *, start: int = 0, end: int | None = None) -> np.ndarray:
    """Returns the sizes of `x` from axis `start` up to `end`, known while tracing."""
    return np.asarray(x.shape[start:end], np.int64)


@lowers("Flatten", since=1)
def flatten(x: Any, /, *, axis: int = 1) -> Any:
    """Returns `x` as a matrix: the axes before `axis` make the rows."""
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@lowers("Reshape", since=5)
def reshape(x: Any, sizes: Any, /, *, allowzero: int = 0) -> Any:
    """Returns `x` in another shape: -1 is what remains, 0 (unless `allowzero`) is the size that `x` has there."""
    wanted = static_integers(sizes, "the shape of Reshape")
    if not allowzero:
        wanted = tuple(x.shape[i] if size == 0 else size for i, size in enumerate(wanted))
    return x.reshape(wanted)


@lowers("Transpose", since=1)
def transpose(x: Any, /, *, perm: Sequence[int] | None = None) -> Any:
    """Returns `x` with its axes in the order `perm`; reversed where there is none."""
    return array_namespace(x).transpose(x, perm)


@lowers("Squeeze", since=1)
def squeeze_1(x: Any, /, *, axes: Sequence[int] | None = None) -> Any:
    """Returns `x` without the given axes of size 1; without all of them where none is given."""
    return array_namespace(x).squeeze(x, None if axes is None else tuple(axes))


@lowers("Squeeze", since=13)
def squeeze(x: Any, axes: Any = None, /) -> Any:
    """Returns `squeeze_1`; the axes are an input."""
    return squeeze_1(x, axes=None if axes is None else static_integers(axes, "the axes of Squeeze"))


@lowers("Unsqueeze", since=1)
def unsqueeze_1(x: Any, /, *, axes: Sequence[int]) -> Any:
    """Returns `x` with axes of size 1, at the given places of the result."""
    return array_namespace(x).expand_dims(x, tuple(axes))


@lowers("Unsqueeze", since=13)
def unsqueeze(x: Any, axes: Any, /) -> Any:
    """Returns `unsqueeze_1`; the axes are an input."""
    return unsqueeze_1(x, axes=static_integers(axes, "the axes of Unsqueeze"))


@lowers("Expand", since=8)
def expand(x: Any, sizes: Any, /) -> Any:
    """Returns `x` broadcast with the shape `sizes`; a size of 1 there leaves that of `x`."""
    wanted = np.broadcast_shapes(x.shape, static_integers(sizes, "the shape of Expand"))
    return array_namespace(x).broadcast_to(with_rank(x, len(wanted)), wanted)


@lowers("Gather", since=1)
def gather(x: Any, indices: Any, /, *, axis: int = 0) -> Any:
    """Returns the slices of `x` along `axis` at the `indices`, which may count from the end."""
    if is_static(x, indices):
        return np.asarray(np.take(x, indices, axis=axis))
    indices = array_namespace(indices).where(indices < 0, indices + x.shape[axis], indices)
    return jnp.take(jnp.asarray(x), indices, axis=axis, mode="clip")


@lowers("Concat", since=4)
def concat(*parts: Any, axis: int) -> Any:
    """Returns the parts, one behind the other along `axis`."""
    return array_namespace(*parts).concatenate(parts, axis=axis)


@lowers_channels_last("Concat", since=4, num_values=None)
def concat_channels_last(*parts: Any, axis: int) -> Any:
    """Returns `concat` of channels-last values."""
    return concat(*parts, axis=channels_last_axis(axis, parts[0].ndim))


@lowers("Split", since=2)
def split_2(x: Any, /, *, num_node_outputs: int, axis: int = 0, split: Sequence[int] = ()) -> tuple[Any, ...]:
    """Returns parts of the sizes `split` along `axis`; equal ones (the last may be smaller) where none are given."""
    size = x.shape[axis]
    each = -(-size // num_node_outputs)
    lengths = split or [max(min(each, size - start), 0) for start in range(0, num_node_outputs * each, each)]
    return tuple(array_namespace(x).split(x, [int(end) for end in np.cumsum(lengths)[:-1]], axis=axis))


@lowers_channels_last("Split", since=2)
def split_2_channels_last(x: Any, /, *, axis: int = 0, **settings: Any) -> tuple[Any, ...]:
    """Returns `split_2` of a channels-last value."""
    return split_2(x, axis=channels_last_axis(axis, x.ndim), **settings)


@lowers("Split", since=13)
def split(
    x: Any, lengths: Any = None, /, *, num_node_outputs: int, axis: int = 0, num_outputs: int | None = None
) -> tuple[Any, ...]:
    """Returns `split_2`; the sizes are an input. `num_outputs` (opset 18) is the number of parts."""
    sizes = () if lengths is None else static_integers(lengths, "the sizes of Split")
    return split_2(x, num_node_outputs=num_outputs or num_node_outputs, axis=axis, split=sizes)


@lowers_channels_last("Split", since=13)
def split_channels_last(x: Any, lengths: Any = None, /, *, axis: int = 0, **settings: Any) -> tuple[Any, ...]:
    """Returns `split` of a channels-last value."""
    return split(x, lengths, axis=channels_last_axis(axis, x.ndim), **settings)


@lowers("Slice", since=1)
def slice_1(x: Any, /, *, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None = None) -> Any:
    """Returns the elements from `starts` up to `ends` along `axes` (the first axes where none are given)."""
    return _sliced(x, starts, ends, axes, None)


@lowers_channels_last("Slice", since=1)
def slice_1_channels_last(
    x: Any, /, *, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None = None
) -> Any:
    """Returns `slice_1` of a channels-last value."""
    return _sliced(x, starts, ends, _channels_last_axes(axes, len(starts), x.ndim), None)


@lowers("Slice", since=10)
def slice_10(x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None, /) -> Any:
    """Returns `slice_1` with steps, which may go backwards; the places are inputs."""
    return _sliced(x, *_slice_settings(starts, ends, axes, steps))


@lowers_channels_last("Slice", since=10)
def slice_10_channels_last(x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None, /) -> Any:
    """Returns `slice_10` of a channels-last value."""
    starts, ends, axes, steps = _slice_settings(starts, ends, axes, steps)
    return _sliced(x, starts, ends, _channels_last_axes(axes, len(starts), x.ndim), steps)


@lowers("Pad", since=2)
def pad_2(x: Any, /, *, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> Any:
    """Returns `x` with `pads` elements added before, then after, each axis; negative ones are taken away."""
    return _padded(x, pads, range(x.ndim), mode, value)


@lowers_channels_last("Pad", since=2)
def pad_2_channels_last(x: Any, /, *, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> Any:
    """Returns `pad_2` of a channels-last value."""
    return _padded(x, pads, _channels_last_axes(None, x.ndim, x.ndim), mode, value)


@lowers("Pad", since=11)
def pad(x: Any, pads: Any, value: Any = None, axes: Any = None, /, *, mode: str = "constant") -> Any:
    """Returns `pad_2` along `axes` (all where none are given); amounts, filling value and axes are inputs."""
    amounts, axes = static_integers(pads, "the pads of Pad"), _pad_axes(axes, x.ndim)
    return _padded(x, amounts, axes, mode, 0 if value is None else value)


@lowers_channels_last("Pad", since=11)
def pad_channels_last(x: Any, pads: Any, value: Any = None, axes: Any = None, /, *, mode: str = "constant") -> Any:
    """Returns `pad` of a channels-last value."""
    amounts, axes = static_integers(pads, "the pads of Pad"), _pad_axes(axes, x.ndim)
    return _padded(x, amounts, _channels_last_axes(axes, 0, x.ndim), mode, 0 if value is None else value)


@lowers("Dropout", since=7)
def dropout_7(x: Any, /, *, ratio: float = 0.5) -> tuple[Any, Any]:
    """Returns `x`, and a mask that keeps everything: nothing is dropped at inference."""
    del ratio
    return x, jnp.ones(x.shape, bool)


@lowers("Dropout", since=12)
def dropout(x: Any, ratio: Any = None, training_mode: Any = None, /, *, seed: int = 0) -> tuple[Any, Any]:
    """Returns `dropout_7`; the ratio is an input.

    Raises:
        UnsupportedOperatorError: The node is in training mode.
    """
    del ratio, seed
    if training_mode is not None and any(static_integers(training_mode, "training_mode of Dropout")):
        raise UnsupportedOperatorError("Dropout in training mode has no lowering; export the model for inference")
    return x, jnp.ones(x.shape, bool)


def _slice_settings(starts: Any, ends: Any, axes: Any, steps: Any) -> tuple[Any, Any, Any, Any]:
    def integers(value: Any, what: str) -> tuple[int, ...] | None:
        return None if value is None else static_integers(value, f"the {what} of Slice")

    return integers(starts, "starts"), integers(ends, "ends"), integers(axes, "axes"), integers(steps, "steps")


def _sliced(
    x: Any,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None,
    steps: Sequence[int] | None,
) -> Any:
    places = [slice(None)] * x.ndim
    axes = range(len(starts)) if axes is None else axes
    for axis, start, end, step in zip(axes, starts, ends, steps or (1,) * len(starts), strict=True):
        places[axis] = slice(start, end, step)  # Python clamps as ONNX does
    return x[tuple(places)]


def _padded(x: Any, pads: Sequence[int], axes: Sequence[int], mode: str, value: Any) -> Any:
    amounts = [(0, 0)] * x.ndim
    for axis, low, high in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        amounts[axis] = (low, high)
    cut = tuple(slice(max(-low, 0), size - max(-high, 0)) for (low, high), size in zip(amounts, x.shape, strict=True))
    added = [(max(low, 0), max(high, 0)) for low, high in amounts]
    xp = array_namespace(x, value)
    if mode == "constant":
        return xp.pad(x[cut], added, constant_values=xp.asarray(value, x.dtype).reshape(()))
    return xp.pad(x[cut], added, mode=mode)


def _pad_axes(axes: Any, rank: int) -> Sequence[int]:
    return range(rank) if axes is None else static_integers(axes, "the axes of Pad")


def _channels_last_axes(axes: Sequence[int] | None, num_axes: int, rank: int) -> tuple[int, ...]:
    return tuple(channels_last_axis(axis, rank) for axis in (range(num_axes) if axes is None else axes))
