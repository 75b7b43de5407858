"""The data of commands: one file, several, or a folder of them; what is said of them, and how they are loaded."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ptqjax.errors import ConfigError, DataError
from ptqjax.places import require_data

if TYPE_CHECKING:
    import numpy as np

    from ptqjax.data import Batches, Samples
    from ptqjax.ir import Graph

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


def load(files: Sequence[Path], graph: Graph) -> tuple[np.ndarray | None, Batches]:
    """Returns the labels of the samples in some files, where there are any, and the samples in batches.

    Samples of one size come together, whatever files they are in; the labels have the order of the batches.

    Raises:
        DataError: A file is no .npz, or does not fit the model; of several, the message names the one.
    """
    import numpy as np

    from ptqjax.data import Batches, grouped, load_each

    parts = load_each(files, graph)
    for file, samples in zip(files, parts, strict=True) if len(files) > 1 else ():
        _check(file, samples, graph)
    groups = grouped(parts)
    labels = [group.labels for group in groups if group.labels is not None]
    return np.concatenate(labels) if labels else None, Batches(groups, graph, size=_BATCH)


def _check(file: Path, samples: Samples, graph: Graph) -> None:
    """Checks the samples of a file, since messages about batches of many files would not name it."""
    from ptqjax.quantize.batches import checked_batches

    any_number = [replace(spec, shape=(None, *spec.shape[1:]) if spec.shape else spec.shape) for spec in graph.inputs]
    try:
        for _ in checked_batches(replace(graph, inputs=tuple(any_number)), [samples.inputs]):
            pass
    except DataError as error:
        raise DataError(f"'{file}': {str(error).removeprefix('batch 0: ')}") from error
