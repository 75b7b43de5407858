"""All fields of an encoding as JSON: what AIMET's schemas have no word for stands beside their entries."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptqjax.encoding_files.located_json import Located
from ptqjax.errors import ConfigError
from ptqjax.kernels.grid import FLOAT_FORMATS
from ptqjax.quantize.encodings import Encoding, concrete

ARRAYS = ("scale", "zero_point", "qmin", "qmax", "enabled")
"""Fields that are arrays."""
STATIC = ("axis", "block_size", "float_format", "scale_bits")
"""Fields that are not."""


def fields_of(encoding: Encoding) -> dict[str, Any]:
    """Returns the fields of a concrete encoding as plain data; arrays as nested lists."""
    arrays = {name: np.asarray(getattr(encoding, name)).tolist() for name in ARRAYS}
    return arrays | {name: getattr(encoding, name) for name in STATIC}


def encoding_of_fields(found: Located) -> Encoding:
    """Returns the encoding with these fields.

    Raises:
        DataError: A key is missing, or of another type.
    """
    arrays = {name: found.item(name).numbers().astype(np.float32) for name in ARRAYS[:-1]}
    static = {name: _optional(found.item(name), least) for name, least in zip(STATIC, (-64, 1, 0, 0), strict=True)}
    if static["float_format"] not in (None, *FLOAT_FORMATS):
        raise found.item("float_format").wrong(f"null or one of {', '.join(FLOAT_FORMATS)}")
    if arrays["zero_point"].shape != arrays["scale"].shape:
        raise found.item("zero_point").wrong(f"numbers in the shape {arrays['scale'].shape} of the scale")
    return Encoding(**arrays, enabled=np.asarray(found.item("enabled").flag()), **static)


def is_identical(one: Encoding, other: Encoding) -> bool:
    """Tells whether two encodings are the same to the bit."""
    first, second = concrete(one), concrete(other)
    same = all(_same_array(getattr(first, name), getattr(second, name)) for name in ARRAYS)
    return same and all(getattr(first, name) == getattr(second, name) for name in STATIC)


def check_finite(name: str, encoding: Encoding) -> None:
    """Checks that JSON, which has finite numbers alone, can hold a concrete encoding.

    Raises:
        ConfigError: A number is not finite.
    """
    for field in ARRAYS[:-1]:
        values = np.asarray(getattr(encoding, field))
        if not np.isfinite(values).all():
            wrong = values[~np.isfinite(values)].reshape(-1)[0]
            raise ConfigError(f"the encoding of '{name}' has {wrong} in its {field}; expected finite numbers")


def _same_array(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _optional(found: Located, least: int) -> Any:
    if found.value is None or isinstance(found.value, str):
        return found.value
    return found.integer(least=least, most=2**31 - 1)
