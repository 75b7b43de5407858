"""Compiled programs on disk: JAX's own cache, in the platform's folder for such things, bounded."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from ptqjax.errors import OutputError
from ptqjax.versions import machine_digest

_LIMIT = 2**30  # bytes: some thousand programs
_FOLDER = "PTQJAX_CACHE_DIR"


def keep_programs(folder: str | os.PathLike[str] | None = None, *, limit: int = _LIMIT) -> Path:
    """Makes JAX keep on disk what it compiles, and look there before it compiles; returns the folder.

    For the whole process: call it before the first computation. Every program is kept, in a folder of its own for each
    class of machine (processor, its instructions, number of cores), since JAX tells programs apart by less than that.
    When the call finds more than `limit` there, it removes what was not used for longest. Several processes may share
    a folder. Who can write into it can run code as you: it is made for its owner alone.

    Args:
        folder: Where; None: where JAX keeps programs already (JAX_COMPILATION_CACHE_DIR), or else in PTQJAX_CACHE_DIR,
            or else in the platform's folder: ptqjax in $XDG_CACHE_HOME or ~/.cache, in ~/Library/Caches, or in
            %LOCALAPPDATA%.
        limit: How many bytes may be there when a process begins.

    Raises:
        OutputError: The folder cannot be made or written; JAX is left as it was.
    """
    import jax  # noqa: PLC0415  (what checks options does not wait for it)
    from jax.experimental.compilation_cache import compilation_cache  # noqa: PLC0415

    current: Any = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if folder is None and current and not os.environ.get(_FOLDER):
        return Path(current)
    root = _default_folder() if folder is None else Path(folder)
    place = root / machine_digest()
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"1")
    except OSError as error:
        raise OutputError(
            f"compiled programs cannot be kept in '{place}': {error.strerror}; set {_FOLDER} to a folder that can be "
            "written"
        ) from error
    _prune(root, limit)
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # what was compiled before may have decided that there is none
    return place


def remove_programs(folder: Path, name: str) -> None:
    """Removes the programs of a function, by the name that JAX gives them ("jit_observe"): one of them is damaged."""
    for path in folder.iterdir():
        if path.name.rpartition("-")[0].rpartition("-")[0] == name:  # name-key-cache
            with suppress(OSError):
                path.unlink()


def _default_folder() -> Path:
    if chosen := os.environ.get(_FOLDER):
        return Path(chosen)
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OutputError(f"compiled programs cannot be kept: {error}; set {_FOLDER} to a folder") from error
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "ptqjax"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "ptqjax" / "Cache"
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else home / ".cache") / "ptqjax"


def _prune(root: Path, limit: int) -> None:
    """Removes the files that were not read for longest until the others have at most `limit` bytes."""
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            with suppress(OSError):  # another process removes as well
                state = Path(folder, name).stat()
                found.append((max(state.st_atime, state.st_mtime), state.st_size, Path(folder, name)))
    surplus = sum(size for _, size, _ in found) - limit
    for _, size, path in sorted(found):
        if surplus <= 0:
            return
        with suppress(OSError):
            path.unlink()
        surplus -= size
