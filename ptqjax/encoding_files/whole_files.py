"""Files that appear whole under their names, or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ptqjax.errors import OutputError


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name beside `path`, then renames it.

    Raises:
        OutputError: The folder is missing or cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".ptqjax-") as folder:
            half = Path(folder) / path.name
            half.write_bytes(content)
            half.replace(path)
    except OSError as error:
        raise OutputError(
            f"'{path}' cannot be written: {error.strerror}; expected the name of a file in an existing folder with "
            "write permission"
        ) from error
