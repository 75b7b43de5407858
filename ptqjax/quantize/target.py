"""A runtime's rules of placement, read from a data file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path

from ptqjax.config import near_names
from ptqjax.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Which tensors a runtime wants on a grid; all names are ONNX operators."""

    name: str
    """The target's name."""
    description: str
    """One line for people."""
    heads: frozenset[str]
    """Operators whose output is not rounded where an activation function alone reads it."""
    clamps: frozenset[str]
    """Activation functions that clip between two numbers."""
    activations: frozenset[str]
    """Other activation functions that follow a head without rounding in between."""
    data_movement: frozenset[str]
    """Operators whose result has the encoding of their first input."""
    adopt_output: frozenset[str]
    """Operators whose inputs adopt the encoding of their result."""
    constant_operands: frozenset[str]
    """Operators whose constant operands are rounded like activations."""
    fixed_ranges: tuple[tuple[str, tuple[float, float]], ...]
    """Operators whose result has a range that is known beforehand."""
    bounds_per_channel: bool = True
    """Whether a Min or Max with a bound for each channel is as good as a Clip; may be left out."""


def load_target(name: str) -> Target:
    """Returns the target `name` of the package, or the one in the file `name` where that ends in .toml.

    Raises:
        ConfigError: The file cannot be read, or lacks a key, or has one that is unknown.
    """
    return _parse(name, _text(name))


def _text(name: str) -> str:
    try:
        if name.endswith(".toml"):
            return Path(name).read_text(encoding="utf-8")
        return (resources.files("ptqjax.targets") / f"{name}.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"target {name!r} cannot be read: {error}") from error


@lru_cache(maxsize=32)
def _parse(name: str, text: str) -> Target:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"target {name!r} is not TOML: {error}") from error
    expected = {field.name for field in fields(Target)} - {"name"}
    for key in table:
        if key not in expected:
            raise ConfigError(f"target {name!r} has the unknown key {key!r}{near_names(key, expected)}")
    bounds_per_channel = table.get("bounds_per_channel", True)
    if not isinstance(bounds_per_channel, bool):
        raise ConfigError(f"target {name!r}: bounds_per_channel is {bounds_per_channel!r}; expected true or false")
    expected -= {"bounds_per_channel"}
    missing = sorted(expected - set(table))
    if missing:
        raise ConfigError(f"target {name!r} lacks the key {missing[0]!r}")
    ranges = tuple(sorted((op, (float(low), float(high))) for op, (low, high) in table["fixed_ranges"].items()))
    lists = {key: frozenset(table[key]) for key in expected - {"description", "fixed_ranges"}}
    return Target(
        name=name,
        description=table["description"],
        fixed_ranges=ranges,
        bounds_per_channel=bounds_per_channel,
        **lists,  # pyright: ignore[reportArgumentType]
    )
