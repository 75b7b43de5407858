"""Settings as TOML files."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from ptqjax.config.checks import SettingError, near_names, read_text
from ptqjax.config.rules import Rule, field_names
from ptqjax.config.settings import QuantizationConfig
from ptqjax.config.target import load_target, rule_of
from ptqjax.errors import ConfigError, OutputError

_NONE = "none"
"""What stands for None, which TOML has not."""
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def read_config(path: str | Path, **settings: Any) -> QuantizationConfig:
    """Returns the settings of a TOML file, as `write_config` writes them.

    What the file leaves out has the default of its target.

    Args:
        path: The file.
        **settings: Settings that win over those of the file.

    Raises:
        ConfigError: The file cannot be read, is not TOML, or holds an unknown key or a value that is not allowed; the
            message has the line and the key.
    """
    return config_from_toml(read_text(path, f"config {str(path)!r}"), source=str(path), **settings)


def config_from_toml(text: str, *, source: str = "config", **settings: Any) -> QuantizationConfig:
    """Returns the settings of a TOML text; `source` is what errors call it. See `read_config`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from error
    return config_from_table(table, text=text, source=source, **settings)


def config_from_table(table: Mapping[str, Any], *, text: str, source: str, **settings: Any) -> QuantizationConfig:
    """Returns the settings of a table that was read from the TOML text `text`, in which errors find their lines.

    So files that hold settings among other things have the same errors: see `read_config`.
    """
    known = [field.name for field in fields(QuantizationConfig)]
    for key in table:
        if key not in known:
            raise _at(source, text, SettingError(key, f"unknown key {key!r}{near_names(key, known)}"))
    rules = _rules(source, text, table.get("rules", []))
    try:
        found = (
            {key: _value(key, value) for key, value in table.items()} | ({"rules": rules} if rules else {}) | settings
        )
        return QuantizationConfig.for_target(**{"target": "ort-cpu", **found})
    except SettingError as error:
        raise (error if error.field in settings else _at(source, text, error)) from error


@contextmanager
def located(text: str, source: str, *, given: Container[str] = ()) -> Iterator[None]:
    """Gives what is wrong with a setting, once it meets a model, the line of the TOML text that it comes from.

    Args:
        text: The text.
        source: What errors call it.
        given: Settings that are from elsewhere.

    Raises:
        ConfigError: A `SettingError` was raised inside, and the text has the setting; other errors pass.
    """
    try:
        yield
    except SettingError as error:
        if (error.rule is None and error.field in given) or not _line(text, error):
            raise
        raise _at(source, text, error) from error


def write_config(config: QuantizationConfig, path: str | Path) -> None:
    """Writes the settings to a TOML file; `read_config` of it returns an equal record.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        Path(path).write_text(config_to_toml(config), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"config {str(path)!r} cannot be written: {error}") from error


def config_to_toml(config: QuantizationConfig) -> str:
    """Returns the settings as a TOML text; what is None is left out, or "none" where the target has a default."""
    settings = {field.name: getattr(config, field.name) for field in fields(QuantizationConfig)}
    rules = settings.pop("rules")
    defaults = dict(load_target(config.target).defaults)
    said = {name: _NONE for name, value in settings.items() if value is None and defaults.get(name) is not None}
    settings |= said  # left out, the target's default would be read
    lines = [f"{name} = {_text(value)}" for name, value in settings.items() if value is not None]
    for rule in rules:
        lines += ["", "[[rules]]", *(f"{name} = {_text(value)}" for name, value in _changed(rule).items())]
    return "\n".join(lines) + "\n"


def _changed(rule: Rule) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(Rule)}
    values = {name: getattr(rule, name) for name in field_names()}
    return {name: value for name, value in values.items() if value is not None and value != defaults[name]}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A JSON string is a TOML string, save for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return repr(value)


def _rules(source: str, text: str, tables: Any) -> tuple[Rule, ...]:
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise _at(source, text, SettingError("rules", f"rules is {tables!r}; expected tables, each headed [[rules]]"))
    found = []
    for index, table in enumerate(tables):
        try:
            found.append(rule_of(table))
        except SettingError as error:
            line = _line_in_rule(text, index, error.field)
            raise ConfigError(f"{source}, line {line}: {error}") from error
    return tuple(found)


def _value(key: str, value: Any) -> Any:
    is_optional = {field.name: field.default is None for field in fields(QuantizationConfig)}
    return None if value == _NONE and is_optional[key] else _frozen(value)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _at(source: str, text: str, error: SettingError) -> ConfigError:
    """Returns the error with the line of the setting that it is about, where the text has it."""
    line = _line(text, error)
    return ConfigError(f"{source}, line {line}: {error}" if line else f"{source}: {error}")


def _line(text: str, error: SettingError) -> int:
    if error.rule is not None:
        return _line_in_rule(text, error.rule, error.field)
    return line_of(text.splitlines(), error.field)


def _line_in_rule(text: str, index: int, key: str) -> int:
    lines = text.splitlines()
    heads = [number for number, line in enumerate(lines) if re.match(r"\s*\[\[\s*rules\s*\]\]", line)]
    if index >= len(heads):  # written in one line
        return line_of(lines, "rules") or 1
    end = heads[index + 1] if index + 1 < len(heads) else len(lines)
    return heads[index] + (line_of(lines[heads[index] : end], key) or 1)


def line_of(lines: list[str], key: str) -> int:
    """Returns the number of the first line that sets `key` or opens its table, from 1; 0 where none does."""
    name = re.escape(key) if _BARE_KEY.fullmatch(key) else re.escape(json.dumps(key))
    pattern = re.compile(rf"\s*(\[+\s*)?[\"']?{name}[\"']?\s*(=|\]|\.)")
    return next((number for number, line in enumerate(lines, 1) if pattern.match(line)), 0)
