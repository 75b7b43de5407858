"""What groups do to the outputs, and the samples and labels that it is measured on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from ptqjax.data.batches import checked_batches, num_samples
from ptqjax.data.files import checked_labels
from ptqjax.errors import ConfigError, DataError, ModelError
from ptqjax.ir import Graph

PREDICTED = "predicted"
Labels: TypeAlias = np.ndarray | Literal["predicted"] | None
"""The index of the class of each sample, or "predicted", the class that the float model names; None: there is no task.
"""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Effects:
    """What each group does to the outputs, in the order of the groups."""

    noise: np.ndarray
    """Power of the noise in an output over the output's power, the mean over all outputs."""
    loss: np.ndarray | None
    """Mean rise of the task's loss; None without labels."""
    change: np.ndarray | None = None
    """Change of a metric that was given; None without one."""


def checked_labels_of(labels: Any) -> Labels:
    """Returns the labels, as integers where they are an array.

    Raises:
        ConfigError: They are a text other than "predicted".
        DataError: They are not the index of a class for each sample.
    """
    if labels is None:
        return None
    if isinstance(labels, str):
        if labels != PREDICTED:
            raise ConfigError(f"labels={labels!r} is unknown; expected 'predicted', an array of classes, or None")
        return PREDICTED
    return checked_labels(labels, num_classes=None, place="labels")


def with_labels(
    graph: Graph, batches: Iterable[Mapping[str, Any]], labels: Labels
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yields each batch, checked, with the labels of its samples: -1 where they are not given.

    Raises:
        DataError: The batches do not fit the graph, there are none, or not as many labels as samples.
    """
    start = 0
    for batch in checked_batches(graph, batches):
        size = num_samples(batch)
        given = labels[start : start + size] if isinstance(labels, np.ndarray) else np.full(size, -1)
        start += size
        if len(given) < size:
            continue  # the message tells how many there are
        yield batch, given.astype(np.int32)
    check_count(labels, start)


def check_count(labels: Labels, count: int) -> None:
    """Checks that there are as many labels as samples.

    Raises:
        DataError: There are not.
    """
    if isinstance(labels, np.ndarray) and len(labels) != count:
        raise DataError(f"labels has {len(labels)} entries for {count} samples; expected one for each sample")


def floating_outputs(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the outputs that hold floating numbers.

    Raises:
        ModelError: None does.
    """
    found = {name: value for name, value in outputs.items() if jnp.issubdtype(value.dtype, jnp.floating)}
    if not found:
        raise ModelError(
            f"none of the outputs ({', '.join(outputs)}) holds floating numbers, to which errors could be followed; "
            "expected one: take the model's output before ArgMax or Cast"
        )
    return found
