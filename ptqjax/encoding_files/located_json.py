"""JSON values that remember their path, so that errors can name it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptqjax.errors import DataError


@dataclass(frozen=True, slots=True)
class Located:
    """A value of a JSON file."""

    value: Any
    """The value, as `json` returns it."""
    place: str
    """The file, and the keys that lead to the value."""

    def has(self, key: str) -> bool:
        """Tells whether the value is an object with this key."""
        return isinstance(self.value, dict) and key in self.value

    def item(self, key: str) -> Located:
        """Returns what an object holds under `key`.

        Raises:
            DataError: The value is no object, or has no such key.
        """
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        if key not in self.value:
            raise DataError(f"{self.place}: the key '{key}' is missing; it has {', '.join(self.value) or 'none'}")
        return Located(self.value[key], f"{self.place}.{key}")

    def members(self) -> Iterator[tuple[str, Located]]:
        """Yields the keys of an object and what is under them.

        Raises:
            DataError: The value is no object.
        """
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        yield from ((key, self.item(key)) for key in self.value)

    def elements(self) -> list[Located]:
        """Returns the elements of a list.

        Raises:
            DataError: The value is no list.
        """
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return [Located(value, f"{self.place}[{index}]") for index, value in enumerate(self.value)]

    def text(self) -> str:
        """Returns a string.

        Raises:
            DataError: The value is none.
        """
        if not isinstance(self.value, str):
            raise self.wrong("a string")
        return self.value

    def integer(self, *, least: int, most: int) -> int:
        """Returns an integer within the limits; a float that equals one counts.

        Raises:
            DataError: The value is none, or out of the limits.
        """
        value = self.value
        is_integer = value.is_integer() if isinstance(value, float) else type(value) is int
        if not is_integer:
            raise self.wrong("an integer")
        if not least <= value <= most:
            raise self.wrong(f"an integer from {least} to {most}")
        return int(value)

    def flag(self) -> bool:
        """Returns a boolean; the words that older schemas write for it count.

        Raises:
            DataError: The value is none.
        """
        found = {"True": True, "False": False}.get(self.value) if isinstance(self.value, str) else self.value
        if not isinstance(found, bool):
            raise self.wrong("true or false")
        return found

    def number(self) -> float:
        """Returns a finite number.

        Raises:
            DataError: The value is none.
        """
        found = self.numbers()
        if found.size != 1:
            raise self.wrong("one number")
        return float(found.reshape(()))

    def numbers(self) -> np.ndarray:
        """Returns a number or nested lists of numbers, all finite, as an array of float64.

        Raises:
            DataError: The value is something else, or lists differ in length.
        """
        try:
            found = np.asarray(self.value)
        except ValueError as error:
            raise self.wrong("numbers in lists of equal length") from error
        if found.size == 0 or not np.issubdtype(found.dtype, np.number) or not np.isfinite(found).all():
            raise self.wrong("finite numbers")
        return found.astype(np.float64)

    def wrong(self, expected: str) -> DataError:
        """Returns the error that says that the value is not what was expected."""
        found = json.dumps(self.value, default=str)
        shown = found if len(found) <= 60 else f"{found[:60]}..."  # noqa: PLR2004 - letters; a line stays readable
        return DataError(f"{self.place}: found {shown}, expected {expected}")


def read_json(path: Path) -> Located:
    """Returns the content of a JSON file.

    Raises:
        DataError: The file cannot be read, or is not JSON, or a key stands in an object twice.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}; expected a file of encodings") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is not JSON: {error}; expected a file of encodings") from error
    return Located(found, f"'{path}'")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key '{twice}' stands in an object twice")
    return found


def to_float32(values: Any) -> np.ndarray:
    """Returns numbers of a file in float32; infinite where they are too large for it."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32)
