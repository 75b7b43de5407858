"""Batches that lie on several devices: their parts, one a device, and what several processes tell each other.

A part is treated as a batch of its own: its device runs the very program that one device runs on a batch of that size.
So what is found is what one device finds from the parts one after the other, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ptqjax.errors import DataError, PtqjaxError

_MOST_BYTES = 4096  # of a message that processes exchange
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The samples of a batch that lie on one device of this process."""

    start: int
    """The index of its first sample in the batch."""
    place: str
    """Where it is, for messages: "batch 3", or "batch 3, samples 8 to 15"."""
    device: Any
    """The device; None for a batch that lies on one, or on none yet."""
    inputs: Mapping[str, Any]
    """Arrays by input name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """A batch, as this process has it."""

    num_samples: int
    """How many samples the batch has, on all processes; 1 where no input is an array."""
    num_parts: int
    """How many parts the batch has on all processes."""
    here: tuple[Part, ...]
    """Those of this process, in the order of their samples; a part that several devices hold is there once."""
    is_shared: bool
    """Whether other processes hold parts of the batch."""


def parts_of(batch: Mapping[str, Any], place: str) -> Parts:
    """Returns the parts of a batch; a batch that does not lie on several devices is one part.

    Raises:
        DataError: An input is spread over devices along another axis than the first, or the inputs are spread over
            different devices, or in different parts.
    """
    spread = {name: value for name, value in batch.items() if _is_spread(value)}
    if not spread:
        whole = Part(start=0, place=place, device=None, inputs=batch)
        return Parts(num_samples=_num_samples(batch), num_parts=1, here=(whole,), is_shared=False)
    _check_alike(batch, spread, place)
    # What all devices hold whole decides nothing where another input is divided.
    leader = max(spread, key=lambda name: len(_starts(spread[name])))
    held = [shard for shard in spread[leader].addressable_shards if shard.replica_id == 0]
    here = tuple(_part(batch, shard, place) for shard in sorted(held, key=lambda shard: _start(shard.index)))
    is_shared = not spread[leader].is_fully_addressable
    num_parts = len(_starts(spread[leader]))
    return Parts(num_samples=_num_samples(batch), num_parts=num_parts, here=here, is_shared=is_shared)


def on_host(value: Any) -> np.ndarray:
    """Returns an array of any devices, those of other processes included, as NumPy's; all processes must ask for it."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def parts_on_host(batch: Mapping[str, Any], place: str) -> list[Mapping[str, Any]]:
    """Returns the parts of a batch, those of other processes included, on the host; one that is not spread, as it is.

    Raises:
        DataError: As `parts_of`.
    """
    parts = parts_of(batch, place)
    if parts.num_parts == 1 and not parts.is_shared:
        return [batch]
    whole = {name: on_host(value) for name, value in batch.items()}
    divided = [name for name in batch if len(_starts(batch[name])) > 1]
    pieces = {name: np.split(whole[name], parts.num_parts) for name in divided}
    return [whole | {name: pieces[name][i] for name in divided} for i in range(parts.num_parts)]


def unspread(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields the batches, those that lie on several devices as their parts, one after the other, on the host."""
    for index, batch in enumerate(batches):
        yield from parts_on_host(batch, f"batch {index}")


def together(work: Callable[[], _T], *, is_shared: bool) -> list[_T]:
    """Returns what `work`, arrays in a tree, is on each process, in their order; alone: that of this one.

    Where it fails on one process, all raise its error: so none waits for what does not come.
    """
    if not is_shared:
        return [work()]
    found, failure = None, ""
    try:
        found = work()
    except PtqjaxError as error:
        failure = str(error)
    told = multihost_utils.process_allgather(_encoded(failure))
    messages = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in np.asarray(told)]
    message = next(filter(None, messages), "")
    if message:
        raise DataError(message)
    gathered = multihost_utils.process_allgather(jax.tree.map(np.asarray, found))
    return [jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), gathered) for i in range(jax.process_count())]


def merged(merge: Callable[[_T, _T], _T], states: Sequence[_T], *, is_shared: bool) -> _T:
    """Returns the states of all devices, of this and of other processes, as one; the order must not matter."""
    host = [jax.tree.map(np.asarray, state) for state in states]
    return reduce(merge, together(lambda: reduce(merge, host), is_shared=is_shared))


def _num_samples(batch: Mapping[str, Any]) -> int:
    sizes = (getattr(value, "shape", np.shape(0)) for value in batch.values())
    return next((shape[0] for shape in sizes if shape), 1)


def _is_spread(value: Any) -> bool:
    return isinstance(value, jax.Array) and len(value.sharding.device_set) > 1


def _start(index: tuple[slice, ...]) -> int:
    return (index[0].start or 0) if index else 0


def _starts(value: jax.Array) -> set[int]:
    return {_start(index) for index in value.sharding.devices_indices_map(value.shape).values()}


def _check_alike(batch: Mapping[str, Any], spread: Mapping[str, jax.Array], place: str) -> None:
    starts: dict[str, set[int]] = {}
    for name, value in batch.items():
        first = next(iter(spread.values()))
        if name not in spread or value.sharding.device_set != first.sharding.device_set:
            found = sorted(map(str, value.sharding.device_set)) if name in spread else "none, or a single one"
            raise DataError(
                f"{place}: input '{name}' lies on other devices than '{next(iter(spread))}' ({found}); "
                "put all inputs on one mesh"
            )
        if value.ndim and value.sharding.shard_shape(value.shape)[1:] != value.shape[1:]:
            raise DataError(
                f"{place}: input '{name}' of shape {value.shape} is divided into parts of shape "
                f"{value.sharding.shard_shape(value.shape)}; only its first axis, the samples, may be"
            )
        starts[name] = _starts(value)
    divided = {name: len(found) for name, found in starts.items() if len(found) > 1}
    if len(set(divided.values())) > 1:
        raise DataError(f"{place}: the inputs have different numbers of parts, {divided}; divide all by the same axes")


def _part(batch: Mapping[str, Any], shard: Any, place: str) -> Part:
    local = {
        name: next(each.data for each in value.addressable_shards if each.device == shard.device)
        for name, value in batch.items()
    }
    start, size = _start(shard.index), shard.data.shape[0] if shard.data.ndim else 1
    samples = f"{place}, samples {start} to {start + size - 1}"
    return Part(start=start, place=samples, device=shard.device, inputs=local)


def _encoded(message: str) -> np.ndarray:
    data = message.encode()[:_MOST_BYTES]
    return np.frombuffer(data.ljust(_MOST_BYTES, b"\0"), np.uint8)
