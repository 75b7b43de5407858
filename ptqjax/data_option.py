"""The data of commands: one file, several, or a folder of them; what is said of them, and how they are loaded."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqjax.errors import ConfigError, DataError
from ptqjax.places import require_data

if TYPE_CHECKING:
    import numpy as np

    from ptqjax.data import Batches, Samples
    from ptqjax.ir import Graph
    from ptqjax.sample_axes import SampleAxis

NO_DATA = "none"
"""What stands in place of DATA.npz where there is none."""
_BATCH = 32  # samples at a time
_FEW = 3  # files that are named one by one

data_option = click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="DATA.npz",
    help="One array per model input, first axis the samples, and optionally 'labels' (class indices). Also a folder of "
    "such files, or a pattern in quotes; may be given several times: samples of unlike size have files of their own.",
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


def data_files(given: Sequence[str], option: str) -> tuple[Path, ...]:
    """Returns the files that an option names, folders and patterns resolved, each file once; () where it is `NO_DATA`.

    Raises:
        ConfigError: `NO_DATA` is given beside files, or a name is empty.
        DataError: A file is missing, a folder has no .npz file, or a pattern fits none.
    """
    if "" in given:  # which would be the current folder
        raise ConfigError(f"{option} is given an empty name; expected an .npz file, a folder of them, or a pattern")
    others = [name for name in given if name != NO_DATA]
    if others and len(others) < len(given):
        raise ConfigError(f"{option} {NO_DATA} beside {option} {others[0]}; expected one or the other")
    files = tuple(dict.fromkeys(file for name in others for file in _files(name)))
    for file in files:
        require_data(file)
    return files


def _files(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = sorted(path.glob("*.npz"))
        if not found:
            raise DataError(f"data folder '{name}' has no .npz file; name the folder that has, or a file")
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


def say_reading(model: Path, files: Sequence[Path] = (), *, is_quiet: bool) -> None:
    """Says what is read: at once, before anything slow."""
    if not is_quiet:
        click.echo(f"reading {model}" + (f" and {called(files)}" if files else ""), err=True)


def load(
    files: Sequence[Path], graph: Graph, axes: Mapping[str, int | None] | None = None
) -> tuple[np.ndarray | None, Batches]:
    """Returns the labels of the samples in some files, where there are any, and the samples in batches.

    Samples of one size come together, whatever files they are in; the labels have the order of the batches.

    Args:
        files: The files.
        graph: The model's.
        axes: The axis of the samples by input, where it is told.

    Raises:
        DataError: A file is no .npz, or does not fit the model; of several, the message names the one.
        ConfigError: `axes` does not fit the model.
    """
    import numpy as np

    from ptqjax.data import Batches, grouped, load_each

    each = load_each(files, graph, axes=axes)
    for file, parts in zip(files, each, strict=True) if len(files) > 1 else ():
        _check(file, parts, graph)
    groups = grouped([samples for parts in each for samples in parts])
    labels = [group.labels for group in groups if group.labels is not None]
    return np.concatenate(labels) if labels else None, Batches(groups, graph, size=_BATCH)


def _check(file: Path, parts: Sequence[Samples], graph: Graph) -> None:
    """Checks the samples of a file, since messages about batches of many files would not name it."""
    from ptqjax.quantize.batches import checked_batches

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
