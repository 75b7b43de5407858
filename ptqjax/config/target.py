"""A runtime's rules of placement, read from a data file."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from ptqjax.config.checks import SettingError, near_names, read_text
from ptqjax.config.rules import Rule, field_names
from ptqjax.errors import ConfigError

CONSTRAINED = ("weights", "activations", "weights_symmetric", "activations_symmetric", "granularity", "power_of_two")
"""Settings that a target may restrict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Which tensors a runtime wants on which grid; all names of operators are ONNX's."""

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
    supergroups: tuple[tuple[str, ...], ...] = ()
    """Runs of operators that are rounded once, behind the last, beside what heads and what follows them give."""
    forward_ties: frozenset[str] = frozenset()
    """Operators whose result adopts the encoding of their first input although they compute something."""
    shared_results: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """For each operator, the positions of outputs that share output 0's encoding."""
    rounded_for: frozenset[str] = frozenset()
    """Operators in front of which activations are rounded; empty: activations are rounded wherever they arise."""
    products: frozenset[str] = frozenset()
    """Operators that sum products of integers: roundings in front of and behind them are repaid; empty: every rounding
    is made, repaid or not."""
    float_results: frozenset[str] = frozenset()
    """Operators among `products` that may give what they sum up in float."""
    dynamic_products: frozenset[str] = frozenset()
    """Operators among `products` that can find the grid of what they read at run time."""
    companions: frozenset[str] = frozenset()
    """Operators that are computed in integers where they get and give integers anyway."""
    rounded_parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """For each operator, the input positions of parameters quantized like weights, one scale each."""
    biases: str = "int32"
    """What biases are: "int32" integers with the scale of input times weight, or "float"."""
    exported_weights: str = "integer"
    """How weights are written: "integer" with DequantizeLinear, "float" with both, or "matmul-nbits": as "integer", but
    where activations are in float or in blocks as ONNX Runtime's MatMulNBits and GatherBlockQuantized."""
    fixed_point: bool = False
    """Whether sums are multiplied by s_x s_w / s_y in integers, with the output's zero point in the sum: weights then
    get scales for which both fit (`encodings.biases.guard_biases`)."""
    pairs_in_16_bits: bool = False
    """Whether some of its processors add products of 8 bits two by two in 16 bits, saturating: weights are then chosen
    so that no pair does (`ranges.pairs.fit_pairs`)."""
    stored_weights: frozenset[str] = frozenset()
    """Operators that compute in float, or only move data, whose weights are kept in integers all the same: Gather (its
    tables), GRU, LSTM, RNN."""
    pieces: bool = True
    """Whether nothing is rounded inside a function that several operators spell, such as a normalization."""
    integer_pieces: frozenset[str] = frozenset()
    """Names of such functions that are rounded at each piece all the same, as "Swish": the runtime has integer kernels
    for all of their pieces, and takes less time so."""
    bounds_per_channel: bool = True
    """Whether a Min or Max with a bound for each channel is as good as a Clip."""
    exceptions: tuple[Rule, ...] = ()
    """Rules that the configuration's own rules follow."""
    defaults: tuple[tuple[str, Any], ...] = ()
    """Settings of a configuration that is made for the target."""
    allowed: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Settings that the runtime restricts, of `CONSTRAINED`, and the values that it takes."""


def target_names() -> tuple[str, ...]:
    """Returns the names of the targets that come with the package, sorted."""
    files = resources.files("ptqjax.targets").iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def load_target(name: str) -> Target:
    """Returns the target `name` of the package, or the one in the file `name` where that ends in .toml.

    Raises:
        ConfigError: The file cannot be read, lacks a key, or has one that is unknown or of a wrong type.
    """
    return _parse(name, _text(name))


def check_target_name(value: object) -> None:
    """Checks that `value` is the name of a target, or the path of a file with one."""
    if isinstance(value, str) and (value in target_names() or (value.endswith(".toml") and Path(value).is_file())):
        return
    near = near_names(value, target_names()) if isinstance(value, str) else ""
    known = ", ".join(target_names())
    raise SettingError(
        "target", f"target={value!r} is unknown; expected one of {known}, or the path of a .toml file{near}"
    )


def _text(name: str) -> str:
    if name.endswith(".toml"):
        return read_text(name, f"target {name!r}")
    try:
        return (resources.files("ptqjax.targets") / f"{name}.toml").read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"target {name!r} cannot be read: {error}") from error


@lru_cache(maxsize=32)
def _parse(name: str, text: str) -> Target:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"target {name!r} is not TOML: {error}") from error
    known = {field.name: field for field in fields(Target) if field.name != "name"}
    for key in table:
        if key not in known:
            raise ConfigError(f"target {name!r} has the unknown key {key!r}{near_names(key, known)}")
    missing = sorted(key for key, field in known.items() if field.default is MISSING and key not in table)
    if missing:
        raise ConfigError(f"target {name!r} lacks the key {missing[0]!r}")
    return Target(name=name, **{key: _value(name, key, value) for key, value in table.items()})


def _value(target: str, key: str, value: Any) -> Any:
    read, expected = _READERS[key]
    try:
        return read(value)
    except ConfigError as error:
        raise ConfigError(f"target {target!r}, {key}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"target {target!r}: {key} is {value!r}; expected {expected}") from error


def _kind(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError
        return value

    return read


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError
    return tuple(value)


def _pair(value: Any) -> tuple[float, float]:
    low, high = value
    return float(low), float(high)


def _one_of(*choices: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError
        return value

    return read


def _by_operator(read: Callable[[Any], Any]) -> Callable[[Mapping[str, Any]], tuple[tuple[str, Any], ...]]:
    return lambda table: tuple(sorted((operator, read(value)) for operator, value in table.items()))


def _allowed(table: Mapping[str, Any]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    for key in table:
        if key not in CONSTRAINED:
            raise ConfigError(f"unknown key {key!r}; expected one of {', '.join(CONSTRAINED)}")
    return tuple((key, tuple(values)) for key, values in table.items())


def rule_of(table: Mapping[str, Any]) -> Rule:
    """Returns the rule that a table of a TOML file holds.

    Raises:
        ConfigError: A key is unknown, or a value is not allowed.
    """
    for key in table:
        if key not in field_names():
            known = near_names(key, field_names()) or f"; expected one of {', '.join(field_names())}"
            raise SettingError(key, f"a rule has the unknown key {key!r}{known}")
    settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return Rule(**settings)


_LIST = (lambda value: frozenset(_names(value)), "a list of operators")
_READERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "description": (_kind(str), "a text"),
    **dict.fromkeys(("heads", "clamps", "activations", "data_movement", "adopt_output", "constant_operands"), _LIST),
    **dict.fromkeys(
        (
            *("forward_ties", "rounded_for", "products", "float_results", "dynamic_products", "companions"),
            "stored_weights",
        ),
        _LIST,
    ),
    "fixed_ranges": (_by_operator(_pair), "a table: operator = [low, high]"),
    "supergroups": (lambda value: tuple(map(_names, value)), "a list of lists of operators"),
    **dict.fromkeys(
        ("shared_results", "rounded_parameters"),
        (_by_operator(lambda value: tuple(map(_kind(int), value))), "a table: operator = [positions]"),
    ),
    "biases": (_one_of("int32", "float"), '"int32" or "float"'),
    "exported_weights": (
        _one_of("integer", "float", "matmul-nbits"),
        '"integer", "float" or "matmul-nbits"',
    ),
    "fixed_point": (_kind(bool), "true or false"),
    "integer_pieces": (lambda value: frozenset(_names(value)), "a list of functions"),
    **dict.fromkeys(("pairs_in_16_bits", "pieces", "bounds_per_channel"), (_kind(bool), "true or false")),
    "exceptions": (lambda value: tuple(map(rule_of, value)), "tables, each a rule"),
    "defaults": (lambda value: tuple(value.items()), "a table of settings"),
    "allowed": (_allowed, "a table: setting = [values]"),
}
