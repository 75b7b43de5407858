"""Operators that join tensors and cut them: Concat, Split, Slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.kernels.namespace import array_namespace
from ptqjax.ops.layout import channels_last_axes, channels_last_axis
from ptqjax.ops.registry import lowers, lowers_channels_last, static_integers

_TWO_BITS = ("int2", "uint2")


@lowers("Concat", since=4)
def concat(*parts: Any, axis: int) -> Any:
    """Returns the parts, one behind the other along `axis`."""
    xp = array_namespace(*parts)
    dtype = parts[0].dtype
    if xp is jnp and dtype.name in _TWO_BITS:  # XLA's CPU compiler ends the process on these (jaxlib 0.10)
        return jnp.concatenate([part.astype(np.int8) for part in parts], axis=axis).astype(dtype)
    return xp.concatenate(parts, axis=axis)


@lowers_channels_last("Concat", since=4, num_values=None)
def concat_channels_last(*parts: Any, axis: int) -> Any:
    """Returns `concat` of channels-last values."""
    return concat(*parts, axis=channels_last_axis(axis, parts[0].ndim))


@lowers("Split", since=2)
def split_2(x: Any, /, *, num_node_outputs: int, axis: int = 0, split: Sequence[int] = ()) -> tuple[Any, ...]:
    """Returns parts of the sizes `split` along `axis`; equal ones (the last may be smaller) where none are given.

    Raises:
        ValueError: The sizes are not one for each output, or do not add up to that of the axis.
    """
    size = x.shape[axis]
    each = -(-size // num_node_outputs)
    lengths = split or [max(min(each, size - part * each), 0) for part in range(num_node_outputs)]
    if len(lengths) != num_node_outputs or sum(lengths) != size:
        raise ValueError(f"sizes {list(lengths)}; expected {num_node_outputs} that add up to {size}")
    return tuple(array_namespace(x).split(x, [int(end) for end in np.cumsum(lengths)[:-1]], axis=axis))


@lowers_channels_last("Split", since=2)
def split_2_channels_last(x: Any, /, *, axis: int = 0, **settings: Any) -> tuple[Any, ...]:
    """Returns `split_2` of a channels-last value."""
    return split_2(x, axis=channels_last_axis(axis, x.ndim), **settings)


@lowers("Split", since=13)
def split_13(x: Any, lengths: Any = None, /, *, num_node_outputs: int, axis: int = 0) -> tuple[Any, ...]:
    """Returns `split_2`; the sizes are an input."""
    sizes = () if lengths is None else static_integers(lengths, "the sizes of Split")
    return split_2(x, num_node_outputs=num_node_outputs, axis=axis, split=sizes)


@lowers("Split", since=18)
def split(
    x: Any, lengths: Any = None, /, *, num_node_outputs: int, axis: int = 0, num_outputs: int | None = None
) -> tuple[Any, ...]:
    """Returns `split_13`; `num_outputs` says once more how many parts there are."""
    return split_13(x, lengths, num_node_outputs=num_outputs or num_node_outputs, axis=axis)


@lowers_channels_last("Split", since=13)
@lowers_channels_last("Split", since=18)
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
    return _sliced(x, starts, ends, channels_last_axes(axes or range(len(starts)), x.ndim), None)


@lowers("Slice", since=10)
def slice_10(x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None, /) -> Any:
    """Returns `slice_1` with steps, which may go backwards; the places are inputs."""
    return _sliced(x, *_slice_settings(starts, ends, axes, steps))


@lowers_channels_last("Slice", since=10)
def slice_10_channels_last(x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None, /) -> Any:
    """Returns `slice_10` of a channels-last value."""
    starts, ends, axes, steps = _slice_settings(starts, ends, axes, steps)
    return _sliced(x, starts, ends, channels_last_axes(axes or range(len(starts)), x.ndim), steps)


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
