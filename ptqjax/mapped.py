"""Arrays that lie in mapped files: their pages are given back once they have been read, and come again when touched."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np


def release(array: Any) -> None:
    """Gives back the memory of an array's part of a read-only mapped file; nothing happens to any other array.

    A page that is read stays in memory otherwise: a model that is walked through would be held whole.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray) and not isinstance(owner, np.memmap):
        owner = owner.base
    if not isinstance(owner, np.memmap) or owner.flags.writeable or not hasattr(mmap, "MADV_DONTNEED"):
        return
    file = getattr(owner, "_mmap", None)
    if not isinstance(file, mmap.mmap):
        return
    low, high = np.lib.array_utils.byte_bounds(array)
    start = low - np.lib.array_utils.byte_bounds(owner)[0]
    begin = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages alone: neighbours may still be read
    length = (start + high - low) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    if length > 0:
        file.madvise(mmap.MADV_DONTNEED, begin, length)
