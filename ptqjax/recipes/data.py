"""The data of a recipe: loaded, and told by a hash of their contents, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ptqjax.data import pictures as images
from ptqjax.data.batches import num_samples
from ptqjax.data.files import Batches, Samples, load_samples, load_sequences
from ptqjax.data.past import interface_of
from ptqjax.decoders import decoding_batches
from ptqjax.errors import DataError
from ptqjax.ir import Graph, Model
from ptqjax.metrics.labels import joined_labels
from ptqjax.recipes.recipe import Pictures
from ptqjax.recipes.store import digest_of, file_digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Samples for a model."""

    batches: Iterable[dict[str, Any]]
    """Arrays by input name, in order."""
    labels: np.ndarray | None
    """The class of each sample, or of each token, where known."""
    num_samples: int
    """The number of samples."""
    digest: str
    """A hash of what they are: arrays, or pictures' files and what is done to them; not of names and places."""


def load(
    source: Path | Pictures,
    graph: Graph,
    *,
    batch: int,
    keep: bool,
    axes: Mapping[str, int | None] | None = None,
    decoder: Model | None = None,
) -> Data:
    """Returns the data that a recipe names.

    Args:
        source: A DATA.npz, or pictures.
        graph: The model's, for names and sizes of inputs.
        batch: Samples at a time, where the model does not fix it.
        keep: Whether pictures are decoded once and kept in memory, for data that are gone through often.
        axes: The axis of the samples by input, where it is told.
        decoder: The model, which makes its past itself where it takes one and the file holds token ids alone; None: it
            has to hold the past.

    Raises:
        DataError: They are missing or do not fit the model.
        ConfigError: They are pictures, and Pillow is missing.
    """
    if isinstance(source, Pictures):
        return _pictures(source, graph, batch, keep=keep)
    if decoder is not None and (decoded := _decoded(source, decoder, batch)) is not None:
        return decoded
    parts = load_samples(source, graph, axes=axes)
    return Data(
        batches=Batches(parts, graph, size=batch),
        labels=joined_labels([part.labels for part in parts]),
        num_samples=sum(part.num_samples for part in parts),
        digest=_digest(parts, axes),
    )


def _decoded(source: Path, decoder: Model, batch: int) -> Data | None:
    """Returns the steps of a decoder with past, where the file holds token ids alone; they are told by these."""
    found = interface_of(decoder.graph)
    sequences = None if found is None else load_sequences([source], found)
    if sequences is None:
        return None
    steps = decoding_batches(decoder, sequences.ids, labels=sequences.labels, others=sequences.others, size=batch)
    held: dict[str, list[np.ndarray]] = {"ids": sequences.ids, "labels": sequences.labels or [], **sequences.others}
    return Data(
        batches=steps,
        labels=steps.labels,
        num_samples=sum(map(num_samples, steps)),
        digest=digest_of([[name, *map(_array_digest, rows)] for name, rows in sorted(held.items())]),
    )


def moved(source: Path | Pictures, path: Path) -> Path | Pictures:
    """Returns the same data at another place: another file, or another folder of pictures."""
    return replace(source, folder=path) if isinstance(source, Pictures) else path


def place_of(source: Path | Pictures | None) -> str:
    """Returns where data lie, as a message says it; "" where there are none."""
    return str(source.folder if isinstance(source, Pictures) else source or "")


def settings_of(source: Path | Pictures | None) -> Mapping[str, Any] | None:
    """Returns what is done to pictures, as plain data; None for arrays, which are taken as they are."""
    if not isinstance(source, Pictures):
        return None
    chosen = {"folder", "split", "list", "count", "skip", "seed"}  # which pictures: their contents tell
    return {key: value for key, value in asdict(source).items() if key not in chosen}


def _digest(parts: Sequence[Samples], axes: Mapping[str, int | None] | None) -> str:
    """Returns a hash of samples, and of which axis they lie along where that is told."""
    found = [_samples_digest(part) for part in parts]
    return found[0] if len(found) == 1 and not axes else digest_of([found, sorted((axes or {}).items())])


def _samples_digest(samples: Samples) -> str:
    labels = {} if samples.labels is None else {"labels": samples.labels}
    digest = hashlib.sha256()
    for name, array in sorted({**samples.inputs, **labels}.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _array_digest(array: np.ndarray) -> str:
    """Returns a hash of an array."""
    head = f"{array.dtype.str} {array.shape}\n".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _pictures(source: Pictures, graph: Graph, batch: int, *, keep: bool) -> Data:
    inputs = graph.inputs
    if len(inputs) != 1:
        raise DataError(
            f"pictures in '{source.folder}': the model has {len(inputs)} inputs, expected one; save arrays for all of "
            "them in a DATA.npz"
        )
    chosen = _chosen(source)
    shape = inputs[0].shape or ()
    fixed = shape[0] if shape and isinstance(shape[0], int) else None
    batches = images.PictureBatches(
        pictures=chosen, preprocessing=_preprocessing(source), name=inputs[0].name, size=fixed or batch
    )
    if fixed and len(chosen) % fixed:
        raise DataError(
            f"the model takes exactly {fixed} samples at a time, which does not divide the {len(chosen)} pictures; set "
            "count to a multiple of it"
        )
    labels = batches.labels
    digest = digest_of([[_picture_digest(picture.path), picture.label] for picture in chosen])
    held = tuple(batches) if keep else batches
    return Data(batches=held, labels=labels, num_samples=len(chosen), digest=digest)


def _picture_digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(
            f"picture '{path}' cannot be read: {error.strerror}; correct the list, or the folder"
        ) from error


def _chosen(source: Pictures) -> tuple[images.Picture, ...]:
    found = (
        images.find_pictures(source.folder, split=source.split)
        if source.list is None
        else images.read_list(source.folder, source.list)
    )
    ordered = found if source.seed is None else images.drawn(found, seed=source.seed)
    end = len(ordered) if source.count is None else source.skip + source.count
    if end > len(ordered) or source.skip >= end:
        raise DataError(
            f"'{source.folder}' has {len(ordered)} pictures; expected {source.skip} to pass over and "
            f"{source.count or 'at least 1'} to take"
        )
    return ordered[source.skip : end]


def _preprocessing(source: Pictures) -> images.Preprocessing:
    named = images.NORMALIZATIONS.get(source.normalization)
    return images.Preprocessing(
        crop=source.crop,
        short_side=source.short_side,
        normalize=named or images.normalization_of(source.mean, source.std),
        channels=source.channels,
    )
