"""Folders of results that are there whole or not at all, whenever a run is killed.

A stage writes into a hidden folder. When it is done, a manifest with the hashes of its files is written, everything is
forced to the disk, and the folder is renamed. What is read later is taken only if every file has its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows: there, two runs that repair the same folder at once may get in each other's way
    fcntl = None

from ptqjax.errors import DataError, OutputError

MANIFEST = "stage.json"
"""The file that says what is in a folder, and what it was made from."""
_HALF = ".half-"
_ABANDONED = 86400.0  # seconds after which a hidden folder is what a killed run left


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What lies in a stage's place."""

    files: Mapping[str, str] | None
    """The SHA-256 of each of its files, where it can be used."""
    note: str = ""
    """Why it cannot be used; "" where it can, and where nothing is there."""


def look(folder: Path, key: str | None) -> Found:
    """Returns what lies in a stage's folder, every file held against its hash.

    Args:
        folder: The stage's place.
        key: What it has to be made from; None: anything.
    """
    if not folder.is_dir():
        return Found(files=None)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        made_from, files = manifest["key"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return Found(files=None, note=f"'{MANIFEST}' is missing or damaged")
    if key is not None and made_from != key:
        return Found(files=None, note="it was made from something else")
    note = _fault(folder, files)
    return Found(files=None if note else files, note=note)


def _fault(folder: Path, files: Mapping[str, str]) -> str:
    """Returns what is wrong with a folder that should hold these files; "" where nothing is."""
    try:
        there = {path.name for path in folder.iterdir()} - {MANIFEST}
        for name in sorted(there ^ files.keys()):
            return f"'{name}' is {'not of it' if name in there else 'missing'}"
        return next((f"'{name}' is damaged" for name in files if file_digest(folder / name) != files[name]), "")
    except OSError as error:  # no permission; or another run is just putting a whole folder in its place
        return f"'{error.filename}' cannot be read: {error.strerror}"


def put(root: Path, name: str, key: str, write: Callable[[Path], None]) -> Mapping[str, str]:
    """Returns the hashes of the files that `write` makes, once they are in `root/name`; damaged ones there make room.

    Where another run has put the same there in the meantime, that stays, and its hashes are returned.

    Raises:
        OutputError: `root` cannot be written.
        DataError: A file elsewhere, which `write` needs, cannot be read.
    """
    try:
        half = Path(tempfile.mkdtemp(prefix=f"{_HALF}{name}-", dir=root))
    except OSError as error:
        raise _cannot(root, error) from error
    try:
        write(half)
        files = {path.name: file_digest(path) for path in sorted(half.iterdir())}
        _finish(half, {"stage": name, "key": key, "files": files})
        return _moved(half, root / name, key)
    except OSError as error:
        _require_elsewhere(root, error)
        raise _cannot(root, error) from error
    finally:
        shutil.rmtree(half, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Writes a file whole: under another name, forced to the disk, renamed.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        handle, half = tempfile.mkstemp(prefix=_HALF, dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(half).replace(path)
        finally:
            Path(half).unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as error:
        raise _cannot(path.parent, error) from error


def remove_abandoned(root: Path) -> None:
    """Removes the hidden folders that killed runs left in `root` a day ago or earlier."""
    for path in root.glob(f"{_HALF}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Returns the SHA-256 of plain data; keys may be in any order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _require_elsewhere(root: Path, error: OSError) -> None:
    """Raises the error that names a file outside `root` which is not there or not readable, if that is the fault."""
    remedies = {FileNotFoundError: "bring it back", PermissionError: "make it readable"}
    remedy = remedies.get(type(error))
    if remedy is None or not isinstance(error.filename, str):
        return
    if not Path(error.filename).resolve().is_relative_to(root.resolve()):
        raise DataError(
            f"'{error.filename}' cannot be read: {error.strerror}; '{root}' needs it: {remedy}, and run again"
        ) from error


def _cannot(root: Path, error: OSError) -> OutputError:
    return OutputError(f"'{root}' cannot be written: {error.strerror or error}; free space, or name another folder")


def _finish(half: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest and forces the folder's files to the disk."""
    (half / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in half.iterdir():
        _sync(path)
    half.chmod(0o755)  # made for its owner alone
    _sync(half)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _moved(half: Path, place: Path, key: str) -> Mapping[str, str]:
    damaged = place.with_name(f"{half.name}-damaged")
    with _locked(place.parent):
        found = look(place, key)
        if found.files is None:
            if place.exists():
                place.rename(damaged)
            half.rename(place)
            _sync(place.parent)
            shutil.rmtree(damaged, ignore_errors=True)
            found = look(place, key)
    if found.files is None:
        raise OutputError(f"'{place}' was written and cannot be read back ({found.note}); check the disk")
    return found.files


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time give folders their places; the system takes the lock from one that is killed."""
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
