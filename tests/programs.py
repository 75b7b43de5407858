"""The compiled programs that test runs hand on to each other.

JAX writes an entry of its cache where it is read, in steps: another process may find half of one. So each process has a
folder of its own within the shared one, to and from which whole entries are linked; a link is there or not.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOST_BYTES = 2**27
"""What the kept programs may take, three times what a run of all tests needs; those not read for longest go first.

Some 20,000 entries, which take a process a second to link and to unlink.
"""

_LEFT_BEHIND = 24 * 3600
"""The age in seconds at which a process's own folder is one of a process that was killed."""


def folder() -> Path:
    """Where programs are kept: `$PTQJAX_PROGRAMS`, or `.cache/ptqjax-programs` at the root of the repository."""
    return Path(os.environ.get("PTQJAX_PROGRAMS") or Path(__file__).parents[1] / ".cache" / "ptqjax-programs")


@contextmanager
def own_folder(kept: Path) -> Iterator[Path]:
    """A folder for one process, with all that is kept; what is new in it is kept at the end, unless `forget` was."""
    kept.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="own-", dir=kept))
    try:
        exchange(own, kept)
        yield own
        exchange(own, kept)
    finally:
        shutil.rmtree(own, ignore_errors=True)
        remove_oldest(kept)


def exchange(own: Path, kept: Path) -> None:
    """Gives each of the two folders the entries of the other; called while this process writes none."""
    ours, theirs = entries(own), entries(kept)
    for source, target, names in ((own, kept, ours - theirs), (kept, own, theirs - ours)):
        for name in names:
            # Another process has linked the same one, or removed it to make room.
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(f"{source}/{name}", f"{target}/{name}")


def entries(of: Path) -> set[str]:
    """Returns the names of the entries that lie in a folder."""
    with os.scandir(of) as found:
        return {entry.name for entry in found if entry.name.endswith("-cache")}


def forget(*folders: Path) -> None:
    """Removes all entries: one of them is damaged, and JAX neither says which nor writes it anew."""
    for path in [each / name for each in folders for name in entries(each)]:
        path.unlink(missing_ok=True)


def remove_oldest(kept: Path, *, most: int | None = None) -> None:
    """Removes entries until the rest takes `most` bytes or fewer, and the folders that killed processes left."""
    found = []
    for path in kept.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process removes as well
            status = path.stat()
            if not path.is_dir():
                found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
            elif path.name.startswith("own-") and time.time() - status.st_mtime > _LEFT_BEHIND:
                shutil.rmtree(path, ignore_errors=True)
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > (MOST_BYTES if most is None else most):
            path.unlink(missing_ok=True)
