"""Which values of a tensor its range is to hold, where these are not all: kinds, each with what it makes of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Array, Float

from ptqjax.kernels.reach import within_reach, without_never
from ptqjax.lowering import axis_in_layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """Of what Softmax reads, as far below each row's largest value as exp can tell."""

    axis: int
    """The first axis of a row, as ONNX has it."""
    is_flat: bool
    """Whether the axes behind it are of the row as well, as before opset 13."""
    never: float = float("inf")
    """The magnitude from which values mean "never"; inf where none is known."""

    @property
    def is_masked(self) -> bool:
        """Whether values that mean "never" are on the way here, in data to come if not in those seen."""
        return self.never != float("inf")

    def of(self, value: Float[Array, "..."], channel_axis: int | None) -> Float[Array, "..."]:
        """Returns what is to be looked at of a value that the interpreter holds, see `within_reach`."""
        first = self.axis % value.ndim
        axes = range(first, value.ndim) if self.is_flat else (first,)
        places = tuple(axis_in_layout(axis, channel_axis) for axis in axes)
        return within_reach(value, axes=places, never=self.never, is_masked=self.is_masked)


@dataclass(frozen=True, kw_only=True, slots=True)
class WithoutNever:
    """Of what a maximum is taken of, all but values that mean "never", which the maximum passes over."""

    never: float
    """The magnitude from which values do."""

    def of(self, value: Float[Array, "..."], channel_axis: int | None) -> Float[Array, "..."]:
        """Returns what is to be looked at of a value that the interpreter holds, see `without_never`."""
        del channel_axis
        return without_never(value, self.never)


Counting: TypeAlias = Reach | WithoutNever
"""Which values count; None in its place: all."""
