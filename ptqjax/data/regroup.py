"""Calibration samples in two parts: some to work with, others that are only looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ptqjax.data.batches import checked_batches, num_samples
from ptqjax.ir import Graph

Batch = dict[str, np.ndarray]


def first_samples(graph: Graph, batches: Iterable[Mapping[str, Any]] | None, most: int | None = None) -> list[Batch]:
    """Returns the batches as NumPy arrays, until they hold `most` samples.

    Raises:
        DataError: The batches do not fit the model, or there are none.
    """
    found: list[Batch] = []
    count = 0
    for batch in checked_batches(graph, batches):
        found.append({name: np.asarray(value) for name, value in batch.items()})
        count += num_samples(batch)
        if most is not None and count >= most:
            break
    return found


def of_few_shapes(batches: Sequence[Batch], most: int) -> list[Batch]:
    """Returns the batches of the `most` shapes that hold most numbers, in their order; others are left out.

    Programs are compiled for a shape, which takes longer than to run them: a part of text of every length tells about
    as much as the whole.
    """
    sizes: dict[Any, int] = {}
    for batch in batches:
        sizes[_shape(batch)] = sizes.get(_shape(batch), 0) + sum(value.size for value in batch.values())
    kept = sorted(sizes, key=sizes.__getitem__, reverse=True)[:most]  # of equal ones the first
    return [batch for batch in batches if _shape(batch) in kept]


def _shape(batch: Batch) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, value.shape) for name, value in batch.items())


def can_be_regrouped(graph: Graph, batches: Sequence[Batch]) -> bool:
    """Tells whether samples can be taken out of their batches: all inputs have them on a free first axis, alike."""
    free = all(spec.shape is None or (spec.shape and not isinstance(spec.shape[0], int)) for spec in graph.inputs)
    shapes = [{name: value.shape[1:] for name, value in batch.items()} for batch in batches]
    sizes = [{value.shape[0] if value.ndim else None for value in batch.values()} for batch in batches]
    return free and all(shape == shapes[0] for shape in shapes) and all(len(size) == 1 for size in sizes)


def joined(batches: Sequence[Batch]) -> Batch:
    """Returns all samples in one batch."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def grouped(samples: Batch, rows: np.ndarray, size: int) -> list[Batch]:
    """Returns the samples of these rows in batches of one size; what does not fill one is left out."""
    size = min(size, len(rows))
    starts = range(0, len(rows) - size + 1, size)
    return [{name: value[rows[start : start + size]] for name, value in samples.items()} for start in starts]
