"""Batches that lie on several devices: their parts, one a device, and what several processes tell each other.

A part is treated as a batch of its own: its device runs the very program that one device runs on a batch of that size.
So what is found is what one device finds from the parts one after the other, to the bit.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ptqjax.errors import DataError, PtqjaxError

_BYTES_OF_A_SIZE = 8
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
    """The parts of this process, in the order of their samples; a part that several devices hold is there once."""
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


def parts_on_host(batch: Mapping[str, Any], place: str) -> list[Mapping[str, Any]]:
    """Returns the parts of a batch, those of other processes included, on the host; one that is not spread, as it is.

    Raises:
        DataError: As `parts_of`.
    """
    parts = parts_of(batch, place)
    if parts.num_parts == 1 and not parts.is_shared:
        return [batch]

    def held() -> list[tuple[int, Mapping[str, np.ndarray]]]:
        return [(each.start, {name: np.asarray(value) for name, value in each.inputs.items()}) for each in parts.here]

    found = [each for some in together(held, is_shared=parts.is_shared) for each in some]
    return [inputs for _, inputs in sorted(found, key=lambda each: each[0])]


def unspread(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields the batches, those that lie on several devices as their parts, one after the other, on the host."""
    for index, batch in enumerate(batches):
        yield from parts_on_host(batch, f"batch {index}")


def together(work: Callable[[], _T], *, is_shared: bool) -> list[_T]:
    """Returns what `work` gives on each process, in their order, on the host; alone: on this one, as it is.

    Where it fails on one process, all raise its error: so none waits for what does not come.
    """
    if not is_shared:
        return [work()]
    try:
        told = ("", jax.device_get(work()))
    except PtqjaxError as error:
        told = (str(error), None)
    everyone = [pickle.loads(each) for each in _exchanged(pickle.dumps(told))]  # noqa: S301 - of processes like this
    failure = next((message for message, _ in everyone if message), "")
    if failure:
        raise DataError(failure)
    return [found for _, found in everyone]


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


def _exchanged(message: bytes) -> list[bytes]:
    """Returns the messages of all processes, which may differ in length."""
    size = np.frombuffer(len(message).to_bytes(_BYTES_OF_A_SIZE, "little"), np.uint8)
    sizes = [int.from_bytes(row.tobytes(), "little") for row in _gathered(size)]
    longest = 1 << (max(sizes) - 1).bit_length()  # few lengths are compiled
    rows = _gathered(np.frombuffer(message.ljust(longest, b"\0"), np.uint8))
    return [row.tobytes()[:size] for row, size in zip(rows, sizes, strict=True)]


def _gathered(row: np.ndarray) -> np.ndarray:
    """Returns the rows of all processes, in their order, exchanged between one device of each."""
    firsts: dict[int, Any] = {}
    for device in jax.devices():
        firsts.setdefault(device.process_index, device)
    mesh = Mesh(np.asarray([firsts[index] for index in sorted(firsts)]), ("process",))
    apart, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("process",), ()))
    rows = jax.make_array_from_process_local_data(apart, row[None], (len(firsts), *row.shape))
    return np.asarray(jax.jit(_as_it_is, out_shardings=everywhere)(rows).addressable_data(0))


def _as_it_is(rows: jax.Array) -> jax.Array:
    return rows
