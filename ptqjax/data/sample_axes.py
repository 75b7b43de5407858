"""Where the samples lie in each input of a model: along its first axis, along another, or nowhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptqjax.errors import ConfigError, DataError
from ptqjax.ir import Graph, TensorSpec

Given = Mapping[str, int | None]
"""The axis of the samples by input, where it is told; None: the input is the same for all samples."""


_ORDINALS = {0: "first", 1: "second", 2: "third"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleAxis:
    """Where the samples lie in one input."""

    axis: int | None = 0
    """The axis; None: there is none, a run takes one array whatever the number of samples."""
    rows: int = 1
    """How many positions along it are a sample: 2 of a state [2, 1, n] beside an input [1, m]."""

    def count(self, array: np.ndarray) -> int | None:
        """Returns how many samples an array holds; None where it says nothing about that."""
        return None if self.axis is None else array.shape[self.axis] // self.rows

    def part(self, array: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Returns the samples from `start` to before `stop`; what has no samples as it is."""
        if self.axis is None:
            return array
        return array[(slice(None),) * self.axis + (slice(start * self.rows, stop * self.rows),)]

    def joined(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Returns all samples of several arrays; of those without samples, which are equal, the first."""
        return arrays[0] if self.axis is None else np.concatenate(arrays, axis=self.axis)

    def size_of_one(self, array: np.ndarray) -> tuple[Any, ...]:
        """Returns what arrays have to have in common to be joined: type and shape without the samples, or all."""
        if self.axis is None:
            return array.dtype, array.shape, array.tobytes()
        return array.dtype, array.shape[: self.axis], array.shape[self.axis + 1 :]


def sample_axes(graph: Graph, given: Given | None = None) -> dict[str, SampleAxis]:
    """Returns where the samples lie in each input of a model.

    As it is told; else along the axis whose symbolic size is that of another input's first axis (a state [2, N, h]
    beside an input [N, t]), nowhere in single numbers, and along the first axis of all others.

    Raises:
        ConfigError: It is told of an input that the model has not, or an axis that the input has not.
    """
    given = given or {}
    _check(graph, given)
    symbol = next((spec.shape[0] for spec in graph.inputs if spec.shape and isinstance(spec.shape[0], str)), None)
    axes = {spec.name: given[spec.name] if spec.name in given else _axis(spec, symbol) for spec in graph.inputs}
    sizes = {spec.name: size for spec in graph.inputs if (size := _size(spec, axes[spec.name]))}
    batch = min(sizes.values(), default=1)
    rows = {name: size // batch for name, size in sizes.items() if size % batch == 0}
    return {name: SampleAxis(axis=axis, rows=rows.get(name, 1)) for name, axis in axes.items()}


Listed = np.ndarray | list[np.ndarray]
"""The samples of an input: in one array, along its axis of samples, or one by one, each as the model takes it."""


def listed(spec: TensorSpec, where: SampleAxis, value: Any, place: str) -> Listed:
    """Returns the samples of an input from what a file holds, an array or a list of arrays.

    An array with one axis more than the model declares counts whole feeds along its first. The arrays of a list have
    the axes that the model declares, or lack that of the samples.

    Raises:
        DataError: It is a single number, or one of too few axes, where samples are to lie along an axis.
    """
    rank = None if spec.shape is None else len(spec.shape)
    if isinstance(value, list):
        return [_as_a_feed(each, where, rank) for each in value]
    if where.axis is None:
        return [np.asarray(each) for each in value] if rank is not None and value.ndim == rank + 1 else value
    if rank is not None and value.ndim == rank + 1 and len(value):
        return np.concatenate(list(value), axis=where.axis)
    if value.ndim <= where.axis:
        found = "a single number" if not value.ndim else f"of the shape {value.shape}"
        raise DataError(
            f"{place}: '{spec.name}' is {found}; expected an array whose {_ORDINALS.get(where.axis, where.axis)} axis "
            f"counts samples: where one serves all samples, say --batch-axis {spec.name}=none"
        )
    return value


def _as_a_feed(value: np.ndarray, where: SampleAxis, rank: int | None) -> np.ndarray:
    lacks_axis = where.axis is not None and (rank is None or value.ndim == rank - 1)
    return np.expand_dims(value, where.axis or 0) if lacks_axis else value


def fixed_batch_size(graph: Graph, axes: Mapping[str, SampleAxis]) -> int | None:
    """Returns how many samples a model takes at a time; None where it takes any number."""
    sizes = [_size(spec, axes[spec.name].axis) for spec in graph.inputs]
    return min((size for size in sizes if size), default=None)


def _axis(spec: TensorSpec, symbol: str | None) -> int | None:
    shape = spec.shape
    if shape is not None and not shape:
        return None
    return shape.index(symbol) if shape and symbol is not None and symbol in shape else 0


def _size(spec: TensorSpec, axis: int | None) -> int | None:
    """Returns the fixed number of positions along the axis of the samples; None where it is free, or there is none."""
    size = spec.shape[axis] if spec.shape and axis is not None else None
    return size if isinstance(size, int) else None


def _check(graph: Graph, given: Given) -> None:
    ranks = {spec.name: None if spec.shape is None else len(spec.shape) for spec in graph.inputs}
    for name, axis in given.items():
        if name not in ranks:
            raise ConfigError(f"batch axis of '{name}': the model has no such input; it has {', '.join(ranks)}")
        rank = ranks[name]
        if axis is not None and rank is not None and axis >= rank:
            raise ConfigError(
                f"batch axis {axis} of '{name}': the input has {rank} axes; expected 0 to {rank - 1}, or none where "
                "one array serves all samples"
            )
