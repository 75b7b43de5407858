"""Samples from `.npz` files: one array per model input, first axis the samples, and optionally `labels`."""

from __future__ import annotations

import difflib
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptqjax.errors import DataError
from ptqjax.ir import Graph
from ptqjax.places import require_data

_LABELS = "labels"
_OBJECTS = "Object arrays"  # begins what NumPy says of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """What a data file holds: as many samples of each input, and of the labels where there are any."""

    inputs: dict[str, np.ndarray]
    """Each model input, first axis the samples."""
    labels: np.ndarray | None
    """The class index of each sample, where known."""

    @property
    def num_samples(self) -> int:
        """How many samples there are."""
        return len(next(iter(self.inputs.values())))


def load_samples(path: str | os.PathLike[str], graph: Graph) -> Samples:
    """Returns the samples in the file `path` for the inputs of `graph`.

    Names, counts and labels are checked here; shapes, types and values of inputs where they are used.

    Raises:
        DataError: The file is missing, is not an .npz, lacks an input or holds an unknown array, has no samples, or
            different numbers of them; or the labels are not the index of a class for each sample.
    """
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
    _check_counts(path, arrays if labels is None else arrays | {_LABELS: labels})
    if labels is not None:
        labels = checked_labels(labels, num_classes=_num_classes(graph), place=f"'{path}': '{_LABELS}'")
    return Samples(inputs={name: arrays[name] for name in wanted}, labels=labels)


def load_each(paths: Sequence[str | os.PathLike[str]], graph: Graph) -> tuple[Samples, ...]:
    """Returns the samples in several files, file by file; those of unlike size have files of their own.

    Raises:
        DataError: As `load_samples` does; or some files have labels and others have none.
    """
    found = tuple(load_samples(path, graph) for path in paths)
    labelled = [str(path) for path, samples in zip(paths, found, strict=True) if samples.labels is not None]
    bare = [str(path) for path, samples in zip(paths, found, strict=True) if samples.labels is None]
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
        sizes = tuple((name, array.dtype, array.shape[1:]) for name, array in samples.inputs.items())
        groups.setdefault(sizes, []).append(samples)
    return tuple(map(_joined, groups.values()))


def _joined(parts: Sequence[Samples]) -> Samples:
    if len(parts) == 1:
        return parts[0]
    labels = [samples.labels for samples in parts if samples.labels is not None]
    return Samples(
        inputs={name: np.concatenate([samples.inputs[name] for samples in parts]) for name in parts[0].inputs},
        labels=np.concatenate(labels) if labels else None,
    )


def checked_labels(labels: Any, *, num_classes: int | None, place: str) -> np.ndarray:
    """Returns the labels as int64, one class index per sample; whole numbers in a floating type are taken as such.

    Args:
        labels: What is to be the index of the class of each sample.
        num_classes: How many classes there are; None where unknown.
        place: What to call the labels in a message.

    Raises:
        DataError: They are not one-dimensional, not whole numbers, or not in [0, num_classes).
    """
    array = np.asarray(labels)
    if array.ndim != 1:
        raise DataError(
            f"{place} has the shape {array.shape}; expected one class index per sample, in one dimension: "
            f"{_flattening(array, place)}"
        )
    if array.dtype.kind not in "iuf" or not np.all(array == np.floor(array)):  # NaN is not equal to itself
        raise DataError(
            f"{place} is of type {array.dtype} and holds {array[:1].tolist()}, ...; expected whole numbers, the "
            "index of the class of each sample from 0; replace each name or score by the index of its class"
        )
    outside = (array < 0) | (array >= (np.inf if num_classes is None else num_classes))
    if outside.any():
        at = int(np.argmax(outside))
        known = "0 or more" if num_classes is None else f"0 to {num_classes - 1}: the model has {num_classes} classes"
        raise DataError(
            f"{place} holds {array[at]} for sample {at}; expected {known}; number the classes from 0, in the "
            "order of the model's outputs"
        )
    return array.astype(np.int64)


def _flattening(array: np.ndarray, place: str) -> str:
    if array.ndim == 0:
        return f"{place} is a single value; give an array"
    if array.size == len(array):
        return "use labels.reshape(-1)"
    return "where each row marks or scores the classes, use labels.argmax(1)"


def _num_classes(graph: Graph) -> int | None:
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
        fixed = {spec.shape[0] for spec in graph.inputs if spec.shape and isinstance(spec.shape[0], int)}
        self._size = min(fixed) if fixed else size
        self._groups = (samples,) if isinstance(samples, Samples) else tuple(samples)
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
                yield {name: array[start : start + self._size] for name, array in group.inputs.items()}


def _sizes(samples: Samples) -> str:
    return ", ".join(f"'{name}' {'x'.join(map(str, array.shape[1:]))}" for name, array in samples.inputs.items())


def _read(path: Path) -> dict[str, np.ndarray]:
    require_data(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"'{path}' holds a single array without a name; save it as np.savez(path, input=array)")
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise DataError(
            f"data file '{path}' cannot be opened: {error.strerror or error}; expected an .npz file"
        ) from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if _OBJECTS in str(error):
            raise DataError(
                f"'{path}' holds an array of Python objects, and reading these may run any code; save plain arrays: "
                "samples of unlike size in a file for each size, np.savez('a.npz', input=array), and give all of these "
                "files, or their folder"
            ) from error
        raise DataError(
            f"'{path}' is not a readable .npz of plain arrays ({error}); write it with np.savez(path, input=array)"
        ) from error


def _check_counts(path: str | os.PathLike[str], arrays: dict[str, np.ndarray]) -> None:
    for name in [name for name, array in arrays.items() if array.ndim == 0]:
        raise DataError(f"'{path}': '{name}' is a single number; expected an array whose first axis counts samples")
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise DataError(f"'{path}': the arrays hold different numbers of samples ({found}); expected as many of each")
    if not min(counts.values(), default=0):
        raise DataError(f"'{path}' holds no samples: the first axis of {_list(arrays)} is 0; give at least one")


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
