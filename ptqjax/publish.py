"""The files of a run reach their names together, or none does and what was there before stays."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ptqjax.errors import OutputError


@contextmanager
def published(out: Path, names: Iterable[str], *, option: str = "") -> Iterator[Path]:
    """Yields a hidden folder in `out`; at the end its files move to `out`: all of them, or none.

    Whatever ends the body or the moves early, `out` is as it was before, and absent if it was absent. An error of the
    body passes as it is.

    Args:
        out: Where the files go; made where it does not exist.
        names: The files to be expected, so that a name that cannot be taken is known before the work.
        option: The option of the command line that names `out`, for errors.

    Raises:
        OutputError: `out` cannot be made or written, or one of the names cannot be taken.
    """
    absent = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    try:
        with _staging(out, names, option) as folder:
            yield folder
            _move(folder, out, option)
    finally:
        with suppress(OSError):  # the first folder that holds something ends it
            for made in absent:
                made.rmdir()


def write_text(path: Path, text: str) -> None:
    """Writes a file of a run.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"'{path.name}' cannot be written: {error.strerror}; free space") from error


def _called(out: Path, option: str) -> str:
    return f"{option} '{out}'" if option else f"'{out}'"


@contextmanager
def _staging(out: Path, names: Iterable[str], option: str) -> Iterator[Path]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".ptqjax-", dir=out))
    except OSError as error:
        raise OutputError(
            f"{_called(out, option)} cannot be written: {error.strerror}; name a folder that exists or can be made"
        ) from error
    try:
        _require_replaceable(out, names)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _require_replaceable(out: Path, names: Iterable[str]) -> None:
    for target in (out / name for name in names):
        if target.is_dir():
            raise OutputError(f"'{target}' is a folder; expected a file or nothing: move it, or name another folder")
        if target.exists() and not os.access(target, os.W_OK):
            raise OutputError(f"'{target}' is write-protected; make it writable, or name another folder")


def _move(folder: Path, out: Path, option: str) -> None:
    """Moves the files of `folder` to `out`; puts back what was there if one of the moves fails or is interrupted."""
    names = sorted(path.name for path in folder.iterdir())
    _require_replaceable(out, names)
    earlier = folder / ".earlier"
    try:
        earlier.mkdir()
        for name in names:
            _keep(out / name, earlier / name)
        for name in names:
            (folder / name).replace(out / name)
    except BaseException as error:
        for name in names:
            _put_back(folder / name, out / name, earlier / name)
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"{_called(out, option)} cannot be written: {error.strerror}; nothing in it was changed; free space, or "
            "name another"
        ) from error


def _keep(target: Path, kept: Path) -> None:
    if not os.path.lexists(target):
        return
    try:
        os.link(target, kept, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without hard links
        shutil.copy2(target, kept, follow_symlinks=False)


def _put_back(staged: Path, target: Path, kept: Path) -> None:
    """Undoes one move. Whether it happened is read from the disk: an interrupt may fall between a move and its note."""
    if os.path.lexists(staged):
        return
    if os.path.lexists(kept):
        os.replace(kept, target)  # noqa: PTH105 - not the call that a test, or a fault, stops
    else:
        target.unlink(missing_ok=True)
