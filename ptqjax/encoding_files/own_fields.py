"""All fields of an encoding as JSON: what AIMET's schemas have no word for stands beside their entries."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptqjax.encoding_files.located_json import Located, to_float32
from ptqjax.encodings.encoding import Encoding, concrete
from ptqjax.kernels.grid import FLOAT_FORMATS

ARRAYS = ("scale", "zero_point", "qmin", "qmax", "enabled")
"""Fields that are arrays."""
STATIC = ("axis", "block_size", "float_format", "scale_bits", "is_dynamic")
"""Fields that are not."""
_UNSAID = {"is_dynamic": False}  # what a file means that does not have the field


def fields_of(encoding: Encoding) -> dict[str, Any]:
    """Returns the fields of a concrete encoding as plain data; arrays as nested lists."""
    arrays = {name: np.asarray(getattr(encoding, name)).tolist() for name in ARRAYS}
    return arrays | static_of(encoding)


def static_of(encoding: Encoding) -> dict[str, Any]:
    """Returns the fields that are not arrays as plain data; `static_fields` is the inverse."""
    found = {name: getattr(encoding, name) for name in STATIC}
    return {name: value for name, value in found.items() if name not in _UNSAID or value != _UNSAID[name]}


def encoding_of_fields(found: Located) -> Encoding:
    """Returns the encoding with these fields; whether they make a grid is not looked at.

    Raises:
        DataError: A key is missing, or of another type.
    """
    arrays = {name: to_float32(found.item(name).numbers()) for name in ARRAYS[:-1]}
    return Encoding(**arrays, enabled=np.asarray(found.item("enabled").flag()), **static_fields(found))


def static_fields(found: Located) -> dict[str, Any]:
    """Returns the fields that are not arrays.

    Raises:
        DataError: A key is missing, or of another type.
    """
    least = {"axis": -64, "block_size": 1, "scale_bits": 1}
    integers = {name: _optional(found.item(name), least[name]) for name in least}
    float_format = found.item("float_format")
    if float_format.value not in (None, *FLOAT_FORMATS):
        raise float_format.wrong(f"null or one of {', '.join(FLOAT_FORMATS)}")
    flags = {name: found.item(name).flag() if found.has(name) else unsaid for name, unsaid in _UNSAID.items()}
    return integers | flags | {"float_format": float_format.value}


def is_identical(one: Encoding, other: Encoding) -> bool:
    """Tells whether two encodings are the same to the bit."""
    first, second = concrete(one), concrete(other)
    same = all(_same_array(getattr(first, name), getattr(second, name)) for name in ARRAYS)
    return same and all(getattr(first, name) == getattr(second, name) for name in STATIC)


def _same_array(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _optional(found: Located, least: int) -> int | None:
    return None if found.value is None else found.integer(least=least, most=2**31 - 1)
