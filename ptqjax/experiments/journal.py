"""A file of finished rows, a line of JSON each, so that a sweep that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptqjax.errors import OutputError
from ptqjax.versions import source_digest

_START = b'{"key": "'  # what every line begins with


def _digest(*parts: Any) -> str:
    """Returns a hash of the parts: texts, arrays, mappings, sequences of these."""
    digest = hashlib.sha256(source_digest().encode())
    for part in parts:
        _feed(digest, part)
    return digest.hexdigest()


def _feed(digest: Any, part: Any) -> None:
    if isinstance(part, Mapping):
        _feed(digest, sorted(part))
        _feed(digest, [part[key] for key in sorted(part)])
    elif isinstance(part, str | bytes | int | float | None):
        digest.update(f"{type(part).__name__} {part!r};".encode())
    elif isinstance(part, Iterable) and not hasattr(part, "dtype"):
        digest.update(b"[")
        for element in part:  # one at a time: batches may be more than memory holds
            _feed(digest, element)
        digest.update(b"]")
    else:
        array = np.ascontiguousarray(part)
        digest.update(f"{array.dtype.name}{array.shape}".encode())
        digest.update(array.tobytes())


def read_rows(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Returns the rows of a journal by key; none where there is no file yet. A half-written last line is left out.

    Raises:
        OutputError: A line is none of a journal, nor the last one the beginning of one: the file is something else.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OutputError(f"journal '{os.fspath(path)}' cannot be read: {error.strerror}; name a file") from error
    rows = {}
    for number, line in enumerate(lines[:-1]):  # behind the last whole line: nothing, or half a line
        try:
            entry = json.loads(line)
            rows[entry["key"]] = entry["row"]
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(_no_row(path, number)) from error
    if lines[-1][: len(_START)] != _START[: len(lines[-1])]:
        raise OutputError(_no_row(path, len(lines) - 1))
    return rows


def _no_row(path: str | os.PathLike[str], number: int) -> str:
    return f"journal '{os.fspath(path)}', line {number + 1} is no row of a sweep; name another file, or remove it"


def append_rows(path: str | os.PathLike[str], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds rows to a journal, on disk when this returns; half a line at its end is cut off before.

    Raises:
        OutputError: The file cannot be written.
    """
    text = "".join(json.dumps({"key": key, "row": row}) + "\n" for key, row in rows.items())
    try:
        with Path(path).open("a+b") as file:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(
            f"journal '{os.fspath(path)}' cannot be written: {error.strerror}; name a file in a folder that can be"
        ) from error


def keys(shared: Sequence[Any], each: Iterable[Sequence[Any]]) -> list[str]:
    """Returns the key of each row, of what all rows share and what each has of its own."""
    common = _digest(*shared)
    return [_digest(common, *own) for own in each]
