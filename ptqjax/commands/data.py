"""The data of commands: one file, several, or a folder of them; what is said of them, and how they are loaded."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from ptqjax.commands.pictures import Pictures, holds_pictures, load_pictures, pictures_of
from ptqjax.errors import ConfigError, DataError
from ptqjax.places import require_data

if TYPE_CHECKING:
    import numpy as np

    from ptqjax.data.files import Batches, Samples
    from ptqjax.data.pictures import PictureBatches
    from ptqjax.data.sample_axes import SampleAxis
    from ptqjax.decoders import Decoded
    from ptqjax.ir import Graph, Model

Loaded: TypeAlias = "Batches | PictureBatches | Decoded | tuple[dict[str, np.ndarray], ...]"
"""Samples in batches, with a length, that can be gone through again and again."""
NO_DATA = "none"
"""What stands in place of DATA.npz where there is none."""
_BATCH = 32  # samples at a time
_FEW = 3  # files that are named one by one

data_option = click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="DATA.npz|DIR|LIST",
    help="One array per model input, first axis the samples, and optionally 'labels' (class indices, one a sample; or "
    "one a token, -100 where none counts). Also a folder of such files, or a pattern in quotes; may be given several "
    "times. Or a folder of pictures, DIR/CLASS/PICTURE or DIR/PICTURE, or a list of them (.tsv: path, tab, class "
    "index), with --preprocessing.",
)
"""The option of commands that measure."""
axes_option = click.option(
    "--batch-axis",
    "batch_axes",
    multiple=True,
    metavar="NAME=AXIS",
    callback=lambda _context, _option, given: _axes(given),
    help="The axis of an input that counts its samples, where that is not the first: state=1. Or NAME=none: one array "
    "serves all samples, as single numbers do without being named. May be given several times.",
)
"""The option of all commands that read samples."""


def _axes(given: Sequence[str]) -> dict[str, int | None]:
    """Returns the axes that "NAME=AXIS" tell, AXIS a number from 0 or "none"."""
    found: dict[str, int | None] = {}
    for text in given:
        name, _, axis = text.rpartition("=")
        if not name or not (axis == NO_DATA or axis.isdecimal()):
            raise click.BadParameter(
                f"{text!r}: expected NAME=AXIS, an input and the axis that counts its samples (0 the first), or "
                "NAME=none where one array serves all samples"
            )
        found[name] = None if axis == NO_DATA else int(axis)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFiles:
    """The data that an option names."""

    files: tuple[Path, ...] = ()
    """Files of samples, or of pictures; none where there are none."""
    pictures: Pictures | None = None
    """What the pictures are, where they are pictures."""

    def __bool__(self) -> bool:
        """Tells whether there are any."""
        return bool(self.files)


def data_files(given: Sequence[str], option: str, preprocessing: str | None = None) -> DataFiles:
    """Returns the data that an option names, folders and patterns resolved, each file once; none where it is `NO_DATA`.

    Args:
        given: What the option was given.
        option: What messages call it.
        preprocessing: What is done to pictures, where that is said.

    Raises:
        ConfigError: `NO_DATA` is given beside files, a name is empty, pictures are given beside something else, or
            without what is done to them.
        DataError: A file is missing, a folder has neither .npz files nor pictures, or a pattern fits nothing.
    """
    if "" in given:  # which would be the current folder
        raise ConfigError(f"{option} is given an empty name; expected an .npz file, a folder of them, or a pattern")
    others = [name for name in given if name != NO_DATA]
    if others and len(others) < len(given):
        raise ConfigError(f"{option} {NO_DATA} beside {option} {others[0]}; expected one or the other")
    pictured = [name for name in others if holds_pictures(Path(name))]
    if pictured and len(others) > 1:
        raise ConfigError(f"{option} {pictured[0]}, which holds pictures, beside other data; expected one or the other")
    if pictured:
        pictures = pictures_of(Path(pictured[0]), preprocessing, option)
        return DataFiles(files=tuple(picture.path for picture in pictures.found), pictures=pictures)
    if preprocessing is not None:
        raise ConfigError(
            f"--preprocessing {preprocessing} is for a folder or a list of pictures, and {option} names none; leave it "
            "out: arrays are taken as they are"
        )
    files = tuple(dict.fromkeys(file for name in others for file in _files(name)))
    for file in files:
        require_data(file)
    return DataFiles(files=files)


def _files(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = sorted(path.glob("*.npz"))
        if not found:
            raise DataError(
                f"data folder '{name}' has no .npz file and no picture (in it, or in folders of classes); name the "
                "folder that has, or a file"
            )
        return found
    if path.exists() or not glob.has_magic(name):
        return [path]
    found = sorted(map(Path, glob.glob(name, recursive=True)))  # noqa: PTH207 - the pattern may be absolute
    if not found:
        raise DataError(f"no data file fits '{name}'; name an .npz file, a folder of them, or another pattern")
    return found


def called(files: Sequence[Path]) -> str:
    """Returns what data are called: their names, or how many files and the first and the last name."""
    if len(files) <= _FEW:
        return ", ".join(map(str, files))
    return f"{len(files)} files, {files[0]} to {files[-1]}"


def say_reading(model: Path, data: DataFiles | None = None, *, is_quiet: bool) -> None:
    """Says what is read: at once, before anything slow."""
    if not is_quiet:
        click.echo(f"reading {model}" + (f" and {called(data.files)}" if data else ""), err=True)


def load(
    data: DataFiles, graph: Graph, axes: Mapping[str, int | None] | None = None, *, decoder: Model | None = None
) -> tuple[np.ndarray | None, Loaded]:
    """Returns the labels of the samples that an option names, where there are any, and the samples in batches.

    Samples of one size come together, whatever files they are in; the labels have the order of the batches.

    Args:
        data: The data.
        graph: The model's.
        axes: The axis of the samples by input, where it is told.
        decoder: The model, which makes its past itself where it takes one and the files hold token ids alone; None:
            they have to hold the past.

    Raises:
        DataError: A file is no .npz, or does not fit the model; of several, the message names the one.
        ConfigError: `axes` does not fit the model.
    """
    from ptqjax.data.files import Batches, grouped, load_each
    from ptqjax.metrics.labels import joined_labels

    if data.pictures is not None:
        return load_pictures(data.pictures, graph, size=_BATCH)
    files = data.files
    if decoder is not None and (decoded := _decoded(files, decoder)) is not None:
        return decoded.labels, decoded
    each = load_each(files, graph, axes=axes)
    for file, parts in zip(files, each, strict=True) if len(files) > 1 else ():
        _check(file, parts, graph)
    groups = grouped([samples for parts in each for samples in parts])
    return joined_labels([group.labels for group in groups]), Batches(groups, graph, size=_BATCH)


def _decoded(files: Sequence[Path], decoder: Model) -> Decoded | None:
    """Returns the steps of a decoder with past, where files hold token ids alone."""
    from ptqjax.data.files import load_sequences
    from ptqjax.data.past import interface_of
    from ptqjax.decoders import decoding_batches

    found = interface_of(decoder.graph)
    sequences = None if found is None else load_sequences(files, found)
    if sequences is None:
        return None
    return decoding_batches(decoder, sequences.ids, labels=sequences.labels, others=sequences.others, size=_BATCH)


def _check(file: Path, parts: Sequence[Samples], graph: Graph) -> None:
    """Checks the samples of a file, since messages about batches of many files would not name it."""
    from ptqjax.data.batches import checked_batches

    any_number = [replace(spec, shape=_with_any(spec.shape, parts[0].axis_of(spec.name))) for spec in graph.inputs]
    try:
        for _ in checked_batches(replace(graph, inputs=tuple(any_number)), [samples.inputs for samples in parts]):
            pass
    except DataError as error:
        raise DataError(f"'{file}': {str(error).removeprefix('batch 0: ')}") from error


def _with_any(shape: Any, where: SampleAxis) -> Any:
    """Returns the shape with any number of samples."""
    if not shape or where.axis is None:
        return shape
    return (*shape[: where.axis], None, *shape[where.axis + 1 :])
