"""Batches for decoders with past from token sequences alone: the model's own past is fed along.

Ranges found on first steps alone would say nothing of the past, which is empty there; and a decoder meets one token
at a time later on. So each sequence is cut: its first part goes in without a past, each later one with what came out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptqjax.agreement import run, session
from ptqjax.data.past import Interface, empty_past, interface_of
from ptqjax.errors import DataError, PtqjaxError
from ptqjax.ir import Graph, Model, TensorSpec
from ptqjax.lowering import apply_few_times
from ptqjax.metrics.labels import IGNORED, padded_labels
from ptqjax.onnx_io import read, to_proto
from ptqjax.ranges.ids import check_ids

BRANCH = "use_cache_branch"
"""The input that picks the branch of a merged file: true for the one with past."""
_BATCH = 32
_SHORTEST = 2  # tokens of a sequence that can be cut


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """Sequences of tokens, of unlike length."""

    ids: tuple[np.ndarray, ...]
    """The ids [T] of each."""
    labels: tuple[np.ndarray, ...] | None = None
    """The label [T] of each token; None without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """What a decoder is fed for sequences, step by step."""

    batches: tuple[dict[str, np.ndarray], ...]
    """Every input by name, in the order of steps; can be gone through again and again."""
    labels: np.ndarray | None
    """The labels of every sample of the batches, padded to the longest step; None without."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches."""
        return iter(self.batches)

    def __len__(self) -> int:
        """Returns how many there are."""
        return len(self.batches)


def read_with_past(path: Path) -> Model:
    """Returns the model in a file; of one with merged branches the one with past, which takes an empty one as well."""
    model = read(path)
    return read(path, fixed={BRANCH: True}) if is_merged(model.graph) else model


def is_merged(graph: Graph) -> bool:
    """Tells whether an input picks between branches with and without past."""
    return any(spec.name == BRANCH and spec.dtype.kind == "b" for spec in graph.inputs)


def like_model(reference: Path, graph: Graph) -> Path | bytes:
    """Returns a reference for a model: its file, or the branch with past where the file merges it and the model not."""
    if is_merged(graph) or not is_merged(read(reference).graph):
        return reference
    return to_proto(read_with_past(reference)).SerializeToString()


def decoding_batches(
    model: Model,
    sequences: Iterable[Any],
    *,
    labels: Iterable[Any] | None = None,
    cuts: Callable[[int], Sequence[int]] | None = None,
    size: int = _BATCH,
    others: Mapping[str, Any] | None = None,
    run_model: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Decoded:
    """Returns batches for a decoder with past, made by running it: each part of a sequence after the past of its own.

    Attention mask, position ids and the choice of a merged file's branch follow from the ids.

    Args:
        model: The decoder, in float: inputs `input_ids` and `past_key_values...`, outputs `present...`, and what of
            `attention_mask`, `position_ids`, `use_cache_branch` it takes.
        sequences: The ids [T] of each sequence; those of one length are fed together.
        labels: The label [T] of each token of each sequence; None without.
        cuts: Where a sequence of so many tokens is cut; None: at the half, and before the last token.
        size: Sequences at a time.
        others: What other inputs are fed, such as an encoder's states: for each sequence its own, along the first axis
            or in a list; a single one serves all.
        run_model: A function of inputs to outputs that gives the past; None: ONNX Runtime, or JAX where there is none.

    Raises:
        DataError: The model has no past that is known by its names, takes an input that is not given, a sequence is
            empty or no sequence of ids, or an id is none of the model's table.
    """
    found = require_interface(model.graph, others or {})
    given = _sequences(sequences, labels)
    beside = {name: _for_each(name, (others or {})[name], len(given.ids)) for name in found.others}
    feeder = _Feeder(model=model, interface=found, run=run_model or _function(model))
    batches, told = [], []
    for (length, *_), rows in _alike(given.ids, beside).items():
        ends = _ends(length, (cuts or _halves)(length))
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            ids = np.stack([given.ids[row] for row in some])
            fed = {name: np.stack([values[row] for row in some]) for name, values in beside.items()}
            for begin, end, batch in feeder.steps(ids, ends, fed):
                batches.append(batch)
                told += [] if given.labels is None else [given.labels[row][begin:end] for row in some]
    return Decoded(batches=tuple(batches), labels=padded_labels(told, "labels") if told else None)


def require_interface(graph: Graph, others: Mapping[str, Any]) -> Interface:
    """Returns how a decoder takes its past.

    Raises:
        DataError: It is no decoder with past, or takes an input besides that `others` does not give.
    """
    found = interface_of(graph)
    if found is None:
        raise DataError(
            "the model is no decoder with past: expected inputs 'input_ids' and 'past_key_values...' of four axes, and "
            f"outputs 'present...' of the same names behind that; it takes {', '.join(s.name for s in graph.inputs)}"
        )
    missing = next((name for name in found.others if name not in others), None)
    if missing is not None:
        raise DataError(
            f"the model takes '{missing}' besides ids and past; give it for each sequence: an array '{missing}' beside "
            f"the ids in a DATA.npz, or others={{'{missing}': ...}}"
        )
    return found


def _sequences(sequences: Iterable[Any], labels: Iterable[Any] | None) -> Sequences:
    ids = tuple(np.asarray(each).reshape(-1) for each in sequences)
    told = None if labels is None else tuple(np.asarray(each).reshape(-1) for each in labels)
    if not ids:
        raise DataError("there are no sequences; expected at least one array of token ids")
    for index, row in enumerate(ids):
        if row.dtype.kind not in "iu" or not row.size:
            raise DataError(f"sequence {index} is of type {row.dtype} and holds {row.size} ids; expected integers")
        if told is not None and (len(told) != len(ids) or told[index].shape != row.shape):
            raise DataError(
                f"sequence {index} has {row.size} tokens, and labels differ in number; expected one for each token, "
                f"{IGNORED} where none counts"
            )
    return Sequences(ids=ids, labels=told)


def _for_each(name: str, value: Any, count: int) -> list[np.ndarray]:
    """Returns what an input is fed beside each of `count` sequences, without the axis of samples."""
    if len(value) not in (1, count):
        raise DataError(
            f"'{name}' is given {len(value)} times; expected {count}, one for each sequence, or one for all"
        )
    return [np.asarray(value[row if len(value) > 1 else 0]) for row in range(count)]


def _alike(ids: Sequence[np.ndarray], beside: Mapping[str, Sequence[np.ndarray]]) -> dict[tuple[Any, ...], list[int]]:
    """Returns the sequences that can be fed together, by their length and the shapes of what is fed beside them."""
    rows: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(ids):
        rows.setdefault((len(row), *(np.shape(values[index]) for values in beside.values())), []).append(index)
    return rows


def _halves(length: int) -> Sequence[int]:
    return (length // 2, length - 1) if length > _SHORTEST else (length - 1,)


def _ends(length: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    places = sorted({0, length, *(cut for cut in cuts if 0 < cut < length)})
    return list(itertools.pairwise(places))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Feeder:
    """A decoder that is fed step by step."""

    model: Model
    """The decoder."""
    interface: Interface
    """How it takes its past."""
    run: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    """Gives outputs for inputs."""

    def steps(
        self, ids: np.ndarray, ends: Sequence[tuple[int, int]], others: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
        """Yields where each step begins and ends, and its inputs."""
        specs = {spec.name: spec for spec in self.model.graph.inputs}
        past = {name: empty_past(specs[name], len(ids), "an empty past") for name in self.interface.pasts}
        for begin, end in ends:
            made = {**self._batch(specs, past, ids, begin, end), **others}
            batch = {name: made[name] for name in specs}
            check_ids(self.model.graph, self.model.params, batch, f"tokens {begin} to {end - 1}")
            yield begin, end, batch
            if end < ends[-1][1]:
                outputs = self.run(batch)
                past = {name: np.asarray(outputs[output]) for name, output in self.interface.pasts.items()}

    def _batch(
        self, specs: Mapping[str, TensorSpec], past: Mapping[str, np.ndarray], ids: np.ndarray, begin: int, end: int
    ) -> dict[str, np.ndarray]:
        found = self.interface
        made = {**past, found.ids: ids[:, begin:end].astype(specs[found.ids].dtype)}
        if found.mask is not None:
            made[found.mask] = np.ones((len(ids), end), specs[found.mask].dtype)
        if found.positions is not None:
            places = np.arange(begin, end, dtype=specs[found.positions].dtype)
            made[found.positions] = np.broadcast_to(places, (len(ids), end - begin)).copy()
        if found.branch is not None:
            made[found.branch] = np.full(1, begin > 0)
        return made


def _function(model: Model) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    try:
        runtime = session(model)
    except PtqjaxError:
        return lambda batch: apply_few_times(model.graph, model.params, batch)
    return lambda batch: run(runtime, batch)
