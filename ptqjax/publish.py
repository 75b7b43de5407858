"""The files of a run reach their names together, or none does and what was there before stays."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ptqjax.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_HIDDEN = ".ptqjax-"
_LOCK = ".lock"  # ends the name of the file beside a hidden folder that its process holds locked
_EARLIER = ".earlier"  # in a hidden folder: what was there before a move
_ABANDONED = 24 * 3600.0  # seconds after which a hidden folder is nobody's, where locks do not tell


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
    with staging(out, names, option=option) as folder:
        yield folder
        publish(folder, out, option=option)


@contextmanager
def staging(out: Path, names: Iterable[str], *, option: str = "") -> Iterator[Path]:
    """Yields a hidden folder in `out` for files that `publish` moves there, once or several times; then it is removed.

    Hidden folders of processes that were killed are removed first. A process holds its folder by a lock on a file
    beside it, which the system takes from one that ends in whatever way: so what a living one works in stays. Where a
    file system has no such locks, hidden folders of a day ago and earlier go.

    `out` is absent at the end if it was absent and nothing was published. Arguments and errors: as for `published`.
    """
    absent = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(out)
            lock, folder = _claimed(out)
        except OSError as error:
            raise OutputError(
                f"{_called(out, option)} cannot be written: {error.strerror}; name a folder that exists or can be made"
            ) from error
        try:
            _require_replaceable(out, names)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # before its lock: what has none may be taken for another's
            _release(lock)
    finally:
        with suppress(OSError):  # the first folder that holds something ends it
            for made in absent:
                made.rmdir()


def publish(folder: Path, out: Path, *, stale: Iterable[str] = (), option: str = "") -> None:
    """Moves the files in `folder`, one of `staging`, to `out`, and removes what is `stale` there; or changes nothing.

    What was there is put back if one of the moves fails or is interrupted; not if the process is killed in between.

    Raises:
        OutputError: One of the names cannot be taken, or a move fails.
    """
    names = sorted(path.name for path in folder.iterdir())
    old = [name for name in stale if name not in names and os.path.lexists(out / name)]
    _require_replaceable(out, [*names, *old])
    earlier = folder / _EARLIER
    try:
        earlier.mkdir()
        for name in (*names, *old):
            _keep(out / name, earlier / name)
        for name in old:
            (out / name).unlink()
        for name in names:
            (folder / name).replace(out / name)
    except BaseException as error:
        for name in names:
            _put_back(folder / name, out / name, earlier / name)
        for name in old:
            if os.path.lexists(earlier / name):
                os.replace(earlier / name, out / name)  # noqa: PTH105 - as in `_put_back`
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"{_called(out, option)} cannot be written: {error.strerror}; nothing in it was changed; free space, or "
            "name another"
        ) from error
    finally:
        shutil.rmtree(earlier, ignore_errors=True)


def stamp(path: Path) -> tuple[int, int, int]:
    """Returns what tells a file from one that took its place: its number, time and size; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size


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


def _claimed(out: Path) -> tuple[IO[str], Path]:
    """Returns a new hidden folder, and the locked file that says that it is in use."""
    while True:
        handle, name = tempfile.mkstemp(prefix=_HIDDEN, suffix=_LOCK, dir=out)
        os.close(handle)
        lock = _locked(Path(name))
        if lock is not None:
            break
    folder = Path(name.removesuffix(_LOCK))
    folder.mkdir(mode=0o700)
    return lock, folder


def _locked(path: Path) -> IO[str] | None:
    """Returns the file, locked where the system can; None where another process took it for an abandoned one."""
    with suppress(FileNotFoundError):
        file = path.open("r+")
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()
    return None


def _release(lock: IO[str]) -> None:
    lock.close()
    Path(lock.name).unlink(missing_ok=True)


def _remove_abandoned(out: Path) -> None:
    """Removes the hidden folders of processes that ended without doing so, and what they locked."""
    paths = list(out.glob(f"{_HIDDEN}*"))
    for lock in {path if path.name.endswith(_LOCK) else path.with_name(path.name + _LOCK) for path in paths}:
        with suppress(OSError):
            _remove_if_abandoned(lock.with_name(lock.name.removesuffix(_LOCK)), lock)


def _remove_if_abandoned(folder: Path, lock: Path) -> None:
    found = lock if lock.exists() else folder
    is_old = time.time() - found.stat().st_mtime > _ABANDONED
    if fcntl is None or not lock.exists():
        if is_old:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)
        return
    with lock.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # in use
            return
        except OSError:
            if not is_old:
                return
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink()


def _require_replaceable(out: Path, names: Iterable[str]) -> None:
    for target in (out / name for name in names):
        if target.is_dir():
            raise OutputError(f"'{target}' is a folder; expected a file or nothing: move it, or name another folder")
        if target.exists() and not os.access(target, os.W_OK):
            raise OutputError(f"'{target}' is write-protected; make it writable, or name another folder")


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
