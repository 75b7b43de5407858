"""Samples from `.npz` files: one array per model input, first axis the samples, and optionally `labels`."""

from __future__ import annotations

import difflib
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ptqjax.data.object_arrays import read_array_of_arrays
from ptqjax.data.past import Interface
from ptqjax.data.sample_axes import Given, Listed, SampleAxis, fixed_batch_size, listed, sample_axes
from ptqjax.errors import DataError
from ptqjax.ir import Graph
from ptqjax.metrics.labels import checked_labels, joined_labels
from ptqjax.places import require_data

_LABELS = "labels"
_TOKEN_AXES = 3  # of scores for each token: samples, tokens, classes
_OBJECTS = "Object arrays"  # begins what NumPy says of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """What a data file holds, of one size: as many samples of each input, and of the labels where there are any."""

    inputs: dict[str, np.ndarray]
    """Each model input, first axis the samples unless `axes` says otherwise."""
    labels: np.ndarray | None
    """The class index of each sample [N], or of each token [N, T], where known."""
    axes: Mapping[str, SampleAxis] = field(default_factory=dict)
    """Where the samples lie in each input; along the first axis of those that are not named."""

    @property
    def num_samples(self) -> int:
        """How many samples there are."""
        counts = (self.axis_of(name).count(array) for name, array in self.inputs.items())
        return next((count for count in counts if count is not None), 1)

    def axis_of(self, name: str) -> SampleAxis:
        """Returns where the samples lie in an input."""
        return self.axes.get(name, SampleAxis())

    def part(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns each input of the samples from `start` to before `stop`."""
        return {name: self.axis_of(name).part(array, start, stop) for name, array in self.inputs.items()}


def load_samples(path: str | os.PathLike[str], graph: Graph, *, axes: Given | None = None) -> tuple[Samples, ...]:
    """Returns the samples in the file `path` for the inputs of `graph`, those of one size together.

    An array has the axes that the model declares, and holds samples along one of them (see `sample_axes`); or one axis
    more, the first, which counts whole feeds; or is an array of arrays, samples of unlike size. A single number is for
    all samples. Names, counts and labels are checked here; shapes, types and values of inputs where they are used.

    Args:
        path: The file.
        graph: The model's.
        axes: The axis of the samples by input, where it is not the first; None: the array serves all samples.

    Raises:
        DataError: The file is missing, is not an .npz, lacks an input or holds an unknown array, has no samples, or
            different numbers of them; or the labels are not the index of a class for each sample,
            or for each of its tokens.
        ConfigError: `axes` does not fit the model.
    """
    where = sample_axes(graph, axes)
    arrays = _read(Path(path))
    labels = None if _LABELS in {spec.name for spec in graph.inputs} else arrays.pop(_LABELS, None)
    wanted = [spec.name for spec in graph.inputs]
    for name in [name for name in wanted if name not in arrays]:
        raise DataError(
            f"'{path}' has no array '{name}', which the model takes; it holds {_list(arrays)}{_near(name, arrays)}; "
            f"save it as np.savez(path, {name}=...)"
        )
    for name in [name for name in arrays if name not in wanted]:
        raise DataError(
            f"'{path}' holds '{name}', which is no input of the model{_near(name, wanted)}; "
            f"expected {_list(wanted)} and optionally '{_LABELS}'"
        )
    found = {spec.name: listed(spec, where[spec.name], arrays[spec.name], f"'{path}'") for spec in graph.inputs}
    num_samples = _num_samples(path, found, where, labels)
    if labels is not None:
        labels = _checked(labels, graph, f"'{path}': '{_LABELS}'")
    if not any(isinstance(value, list) for value in found.values()):
        plain = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
        return (Samples(inputs=plain, labels=labels, axes=where),)
    one_by_one = [
        Samples(
            inputs={name: _of_sample(value, where[name], index) for name, value in found.items()},
            labels=None if labels is None else labels[index : index + 1],
            axes=where,
        )
        for index in range(num_samples)
    ]
    return grouped(one_by_one)


class Sequences(NamedTuple):
    """Sequences of tokens, of unlike length."""

    ids: list[np.ndarray]
    """The ids [T] of each."""
    labels: list[np.ndarray] | None
    """The label [T] of each token; None without."""
    others: dict[str, list[np.ndarray]]
    """What other inputs are fed beside each sequence, without an axis of samples."""


def load_sequences(paths: Sequence[str | os.PathLike[str]], found: Interface) -> Sequences | None:
    """Returns the token ids of each sequence in files, with what goes with them; None where a file holds a past.

    Where a file holds the decoder's attention mask as well, the tokens that it leaves out are left out.

    Raises:
        DataError: A file is missing or is no .npz, or its arrays are not as many as sequences, or not as long.
    """
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    beside: dict[str, list[np.ndarray]] = {}
    for path in paths:
        arrays = _read(Path(path))
        if found.ids not in arrays or set(arrays) - {found.ids, found.mask, _LABELS, *found.others}:
            return None
        rows = [np.asarray(row).reshape(-1) for row in arrays[found.ids]]
        kept = [np.ones(len(row), bool) for row in rows]
        for name in [name for name in (found.mask, _LABELS) if name in arrays]:
            others = [np.asarray(row).reshape(-1) for row in arrays[name]]
            if [len(row) for row in others] != [len(row) for row in rows]:
                raise DataError(
                    f"'{path}': '{name}' and '{found.ids}' hold sequences of unlike number or length; expected an "
                    "entry for each token"
                )
            if name == found.mask:
                kept = [row != 0 for row in others]
            else:
                labels += [row[keep] for row, keep in zip(others, kept, strict=True)]
        ids += [row[keep] for row, keep in zip(rows, kept, strict=True)]
        for name in set(found.others) & set(arrays):
            beside.setdefault(name, []).extend(np.asarray(each) for each in arrays[name])
    if labels and len(labels) != len(ids):
        raise DataError(f"some files have '{_LABELS}' and others have none; give labels to all of them, or to none")
    return Sequences(ids=ids, labels=labels or None, others=beside)


def _of_sample(value: Listed, axis: SampleAxis, index: int) -> np.ndarray:
    return value[index] if isinstance(value, list) else axis.part(value, index, index + 1)


def load_each(
    paths: Sequence[str | os.PathLike[str]], graph: Graph, *, axes: Given | None = None
) -> tuple[tuple[Samples, ...], ...]:
    """Returns the samples in several files, file by file.

    Raises:
        DataError: As `load_samples` does; or some files have labels and others have none.
        ConfigError: `axes` does not fit the model.
    """
    found = tuple(load_samples(path, graph, axes=axes) for path in paths)
    labelled = [str(path) for path, parts in zip(paths, found, strict=True) if parts[0].labels is not None]
    bare = [str(path) for path, parts in zip(paths, found, strict=True) if parts[0].labels is None]
    if labelled and bare:
        raise DataError(
            f"'{bare[0]}' has no '{_LABELS}', and '{labelled[0]}' has; give labels to the samples of all files, or of "
            "none"
        )
    return found


def grouped(parts: Sequence[Samples]) -> tuple[Samples, ...]:
    """Returns the same samples, those of one size and type together: in the order of the parts, sizes as they come."""
    groups: dict[Any, list[Samples]] = {}
    for samples in parts:
        sizes = tuple((name, samples.axis_of(name).size_of_one(array)) for name, array in samples.inputs.items())
        groups.setdefault(sizes, []).append(samples)
    return tuple(map(_joined, groups.values()))


def _joined(parts: Sequence[Samples]) -> Samples:
    first = parts[0]
    if len(parts) == 1:
        return first
    return Samples(
        inputs={name: first.axis_of(name).joined([part.inputs[name] for part in parts]) for name in first.inputs},
        labels=joined_labels([samples.labels for samples in parts]),
        axes=first.axes,
    )


def _checked(labels: Any, graph: Graph, place: str) -> np.ndarray:
    """Returns labels that may be of the model's first output; of tokens, where an output may have a score for each."""
    may_be_tokens = any(spec.shape is None or len(spec.shape) == _TOKEN_AXES for spec in graph.outputs)
    is_of_tokens = may_be_tokens and (isinstance(labels, list) or np.ndim(labels) > 1)
    size = None if is_of_tokens else num_classes(graph)
    return checked_labels(labels, num_classes=size, place=place, may_be_tokens=may_be_tokens)


def num_classes(graph: Graph) -> int | None:
    """Returns how many elements the first output has per sample; None where the graph does not say."""
    shape = graph.outputs[0].shape or ()
    sizes = [size for size in shape[1:] if isinstance(size, int)]
    return math.prod(sizes) if sizes and len(sizes) == len(shape) - 1 else None


class Batches:
    """The samples in order, some at a time, as dicts by input name; can be gone through again and again."""

    def __init__(self, samples: Samples | Sequence[Samples], graph: Graph, *, size: int) -> None:
        """Takes `size` samples at a time, or as many as the model's fixed batch size asks for; of one group each.

        Raises:
            DataError: The model's batch size is fixed and does not divide the number of samples.
        """
        self._groups = (samples,) if isinstance(samples, Samples) else tuple(samples)
        axes = {spec.name: self._groups[0].axis_of(spec.name) for spec in graph.inputs} if self._groups else {}
        fixed = fixed_batch_size(graph, axes) if axes else None
        self._size = fixed or size
        for group in self._groups if fixed else ():
            surplus = group.num_samples % self._size
            if surplus:
                of_size = "given" if len(self._groups) == 1 else f"of one size: {_sizes(group)}"
                raise DataError(
                    f"the model takes exactly {self._size} samples at a time, which does not divide the "
                    f"{group.num_samples} {of_size}; leave {surplus} out, or export the model with a dynamic first axis"
                )

    def __len__(self) -> int:
        """Returns the number of batches."""
        return sum(-(-group.num_samples // self._size) for group in self._groups)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches; the last one of a group may be smaller."""
        for group in self._groups:
            for start in range(0, group.num_samples, self._size):
                yield group.part(start, start + self._size)


def _sizes(samples: Samples) -> str:
    sizes = {name: samples.axis_of(name).part(array, 0, 1) for name, array in samples.inputs.items()}
    shapes = {
        name: array.shape[1:] if samples.axis_of(name).axis == 0 else array.shape for name, array in sizes.items()
    }
    return ", ".join(f"'{name}' {'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _read(path: Path) -> dict[str, Any]:
    """Returns the arrays in a file by name; for an array of arrays their list."""
    require_data(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"'{path}' holds a single array without a name; save it as np.savez(path, input=array)")
            return {name: _member(archive, name, path) for name in archive.files}
    except OSError as error:
        raise DataError(
            f"data file '{path}' cannot be opened: {error.strerror or error}; expected an .npz file"
        ) from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"'{path}' is not a readable .npz of plain arrays ({error}); write it with np.savez(path, input=array)"
        ) from error


def _member(archive: np.lib.npyio.NpzFile, name: str, path: Path) -> Any:
    try:
        return archive[name]
    except ValueError as error:
        if not str(error).startswith(_OBJECTS):
            raise
    try:
        with zipfile.ZipFile(path) as whole, whole.open(f"{name}.npy") as file:
            return read_array_of_arrays(file)
    except DataError as error:
        raise DataError(
            f"'{path}': '{name}' is an array of Python objects that are no arrays of numbers ({error}), and reading "
            "these may run any code; save plain arrays, or np.array([first, second, ...], dtype=object) of such"
        ) from error


def _num_samples(
    path: str | os.PathLike[str],
    arrays: Mapping[str, Listed],
    axes: Mapping[str, SampleAxis],
    labels: np.ndarray | list[np.ndarray] | None,
) -> int:
    counts = {
        name: len(value) if isinstance(value, list) else axes[name].count(value) for name, value in arrays.items()
    }
    counts = {name: count for name, count in counts.items() if count is not None}
    if isinstance(labels, list) or (labels is not None and np.ndim(labels)):
        counts[_LABELS] = len(labels)
    if len(set(counts.values())) > 1:
        found = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise DataError(
            f"'{path}': the arrays hold different numbers of samples ({found}); expected as many of each: where they "
            "do not lie along an array's first axis, say --batch-axis NAME=AXIS, or NAME=none where one serves all"
        )
    if not min(counts.values(), default=1):
        raise DataError(f"'{path}' holds no samples: the first axis of {_list(counts)} is 0; give at least one")
    return next(iter(counts.values()), 1)


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
