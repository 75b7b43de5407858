"""What a single setting may be: checks that name the field, what was found, and what would be right."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from ptqjax.errors import ConfigError

FLOAT_DTYPES = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16")
"""Floating-point types that a tensor may be rounded to in place of integers."""
INTEGER_DTYPES = tuple(f"{sign}int{bits}" for bits in (8, 4, 16, 2, *(3, 5, 6, 7), *range(9, 16)) for sign in ("", "u"))
"""Integer types that a tensor may be rounded to. A width that no file has is stored in the next wider type that has."""
DTYPES = (*INTEGER_DTYPES, *FLOAT_DTYPES)
"""All types that a tensor may be rounded to."""

RUN_TIME = ("float", "dynamic")
"""What activations may be in place of a type: left in float, or rounded to grids that are found at run time."""

Symmetry: TypeAlias = bool | str
"""How 0 lies on a grid, as `kernels.ranges` has it."""
SYMMETRIES = (False, True, "strict", "unsigned", "strict unsigned")
"""The values of `Symmetry`."""

RANGES = ("min-max", "moving-average", "sqnr", "percentile:P", "mse", "entropy")
"""Schemes that choose a range; P is a percentage."""
GRANULARITIES = ("tensor", "channel", "block:N", "lpbq:N")
"""What may share a scale in a weight; N is a number of weights."""


class SettingError(ConfigError):
    """A setting is not allowed."""

    def __init__(self, field: str, message: str, *, rule: int | None = None) -> None:
        super().__init__(message)
        self.field = field
        """The setting, as the record calls it."""
        self.rule = rule
        """The place of the rule that is meant, from 0; None for a setting of its own."""


def read_text(path: str | Path, what: str) -> str:
    """Returns the text of a file, without the byte order mark that some editors put in front.

    Raises:
        ConfigError: It cannot be read, or is not UTF-8; `what` is what the message calls it.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error}") from error
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{what} cannot be read: line {line} holds the byte 0x{data[error.start]:02x}, which is not UTF-8; save it "
            "as UTF-8"
        ) from error


def near_names(wanted: str, names: Iterable[str]) -> str:
    """Returns the end of an error message that lists what `wanted` may have meant: '; near names: a, b', or ''."""
    near = difflib.get_close_matches(wanted, tuple(names), n=3, cutoff=0.5)
    return f"; near names: {', '.join(near)}" if near else ""


def check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """Checks that `value` is one of `allowed`."""
    if value in allowed:
        return
    near = near_names(value, allowed) if isinstance(value, str) else ""
    raise SettingError(field, f"{field}={value!r} is unknown; expected one of {', '.join(allowed)}{near}")


def check_dtype(field: str, value: object, *, also: tuple[str, ...] = ()) -> None:
    """Checks that `value` is a type that a tensor may be rounded to, or one of the words `also`."""
    if value not in (*DTYPES, *also):
        near = near_names(value, (*DTYPES, *also)) if isinstance(value, str) else ""
        others = "".join(f", or {word!r}" for word in also)
        floats = ", ".join(FLOAT_DTYPES)
        raise SettingError(
            field,
            f"{field}={value!r} is unknown; expected int or uint with 2 to 16 bits, as in 'int8', or one of "
            f"{floats}{others}{near}",
        )


def check_symmetry(field: str, value: object) -> None:
    """Checks that `value` says how 0 lies on a grid."""
    if not isinstance(value, bool | str) or value not in SYMMETRIES:
        expected = ", ".join(repr(each) for each in SYMMETRIES)
        raise SettingError(field, f"{field}={value!r} is unknown; expected one of {expected}")


def check_ranges(field: str, value: object) -> None:
    """Checks that `value` names a scheme that chooses ranges."""
    name, _, percentage = value.partition(":") if isinstance(value, str) else ("", "", "")
    if value in RANGES and name != "percentile":
        return
    if name == "percentile":
        number = _number(percentage)
        if number is not None and 50 < number <= 100:  # noqa: PLR2004 - below, more would be cut than is left
            return
        raise SettingError(field, f"{field}={value!r}: expected percentile:P with 50 < P <= 100, as in percentile:99.9")
    near = near_names(value, RANGES) if isinstance(value, str) else ""
    raise SettingError(field, f"{field}={value!r} is unknown; expected one of {', '.join(RANGES)}{near}")


def check_granularity(field: str, value: object) -> None:
    """Checks that `value` says what shares a scale in a weight."""
    if value in ("tensor", "channel"):
        return
    kind, _, size = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind in ("block", "lpbq") and size.isdecimal() and int(size) > 0:
        return
    raise SettingError(
        field, f"{field}={value!r} is unknown; expected tensor, channel, block:N or lpbq:N with N = 1 or more"
    )


def check_flag(field: str, value: object) -> None:
    """Checks that `value` is True or False."""
    if not isinstance(value, bool):
        raise SettingError(field, f"{field}={value!r}: expected True or False")


def check_fixed_range(field: str, value: Any) -> None:
    """Checks that `value` is a range (low, high) with 0 in it."""
    is_pair = isinstance(value, tuple) and len(value) == 2  # noqa: PLR2004 - two ends
    if not is_pair or not all(type(end) in (int, float) and math.isfinite(end) for end in value):
        raise SettingError(field, f"{field}={value!r}: expected two finite numbers, as in (0.0, 1.0)")
    if not value[0] <= 0 <= value[1] or value[0] == value[1]:
        raise SettingError(field, f"{field}={value!r}: expected a range with 0 in it, low <= 0 <= high")


def check_texts(field: str, value: object, example: str) -> None:
    """Checks that `value` is a tuple of texts that are not empty."""
    if not isinstance(value, tuple) or not all(isinstance(each, str) and each for each in value):
        raise SettingError(field, f"{field}={value!r}: expected a tuple of {example}")


def check_expressions(field: str, patterns: tuple[str, ...]) -> None:
    """Checks that those of some patterns that begin with "re:" are regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            raise SettingError(field, f"{field}: {pattern!r} is no regular expression: {error}") from error


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
