"""Files that are to be read: there and readable, as is known before anything slow is imported."""

from __future__ import annotations

import stat
from pathlib import Path

from ptqjax.errors import DataError, ModelError, PtqjaxError

RUN = "run.json"
"""The file of a recipe's run that tells what it takes to run it again."""


def require_model(path: Path, label: str | None = None) -> None:
    """Checks that a model's file can be opened; `label` is what a message calls it, its path in quotes where None.

    Raises:
        ModelError: It cannot.
    """
    _require_file(path, label or f"'{path}'", "the path of an ONNX file", ModelError)


def require_data(path: Path) -> None:
    """Checks that a file of samples can be opened.

    Raises:
        DataError: It cannot.
    """
    _require_file(path, f"data file '{path}'", "an .npz file", DataError)


def require_encodings(path: Path) -> None:
    """Checks that a file of encodings can be opened.

    Raises:
        DataError: It cannot.
    """
    _require_file(path, f"'{path}'", "a file of encodings", DataError)


def require_run(folder: Path) -> None:
    """Checks that a folder holds a run of a recipe.

    Raises:
        DataError: It does not.
    """
    if not (folder / RUN).is_file():
        raise DataError(
            f"'{folder / RUN}' cannot be read: it is not there; name a folder that `ptqjax run` wrote, out/<hash>"
        )


def _require_file(path: Path, label: str, expected: str, fault: type[PtqjaxError]) -> None:
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)  # before it is opened: a pipe would wait for a writer
        if is_file:
            path.open("rb").close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise fault(f"{label} cannot be opened: {reason}; expected {expected}") from error
    if not is_file:
        raise fault(f"{label} cannot be opened: it is no regular file; expected {expected}")
