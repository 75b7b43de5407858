"""Arrays of arrays, as `np.savez` writes samples of unlike size: read without running what a file asks for.

NumPy stores them as pickles, which may call anything. Here the few things that an array's pickle consists of are only
noted down, and arrays are made of their bytes; whatever else a pickle asks for is refused.

Source: `numpy.ndarray.__reduce__` and `__setstate__`: (version, shape, dtype, is Fortran's order, bytes or list).
"""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
from numpy.lib import format as npy

from ptqjax.errors import DataError

_NUMBERS = re.compile(r"[biuf?][0-9]*")


class _Array:
    """An array as its pickle describes it."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype:
    """An element type as its pickle describes it."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code, self.order = str(code), "|"

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])


class _Kind:
    """Stands for the class `numpy.ndarray`, which pickles name."""


_KNOWN = {("numpy", "ndarray"): _Kind, ("numpy", "dtype"): _Dtype}
_KNOWN |= {(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")}


class _Notes(pickle.Unpickler):
    """Reads pickles of arrays of arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns what notes down a part of an array."""
        if (module, name) not in _KNOWN:
            raise DataError(f"it asks for {module}.{name}, which is no part of an array")
        return _KNOWN[module, name]


def read_array_of_arrays(file: Any) -> list[np.ndarray]:
    """Returns the arrays in a .npy file, open for reading bytes, that holds one array of them.

    Raises:
        DataError: It is of another form; the message says what was found, without naming the file.
    """
    try:
        version = npy.read_magic(file)
        (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
        outer = _Notes(file).load()
        shape, _, _, elements = _state(outer)
        if len(shape) == 1:
            return [_array(element) for element in elements]
        return list(np.array(elements, np.float64).reshape(shape))  # of one size, NumPy takes them apart
    except DataError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"it is damaged: {type(error).__name__}: {error}") from error


def _state(found: Any) -> tuple[Any, Any, Any, Any]:
    if not isinstance(found, _Array) or not isinstance(found.state, tuple):
        raise DataError(f"it holds a {type(found).__name__} where an array is expected")
    return found.state[-4:]


def _array(found: Any) -> np.ndarray:
    if isinstance(found, int | float):
        return np.asarray(found)
    shape, dtype, is_fortran, data = _state(found)
    if not isinstance(dtype, _Dtype) or not _NUMBERS.fullmatch(dtype.code):
        raise DataError(f"it holds elements of type {getattr(dtype, 'code', dtype)!r}; expected numbers")
    flat = np.frombuffer(data, np.dtype(f"{'>' if dtype.order == '>' else '<'}{dtype.code}"))
    return flat.reshape(shape, order="F" if is_fortran else "C").astype(flat.dtype.newbyteorder("="))
