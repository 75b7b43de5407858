"""AIMET's configuration files as they are: what they mean here, and what of them means nothing.

Source: aimet-onnx 2.42, `common/quantsim_config/quantsim_config_schema.py` (the keys) and `quantsim.py` (the rules by
hardware version, which no file holds). Differs: depthwise and 3-d convolutions take part in supergroups; a bias behind
a MatMul is part of it whether or not the file asks for that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptqjax.config.checks import Symmetry, near_names, read_text
from ptqjax.config.constraints import resolved_symmetry
from ptqjax.config.rules import Rule
from ptqjax.config.settings import QuantizationConfig
from ptqjax.errors import ConfigError

_UP_TO_V69 = ("V66", "V68", "V69")
_NORMS_LIKE_OUTPUT = ("GroupNormalization", "InstanceNormalization", "RMSNormalization")
_NORMS = ("LayerNormalization", "BatchNormalization")
_WIDE = ("int16", "uint16")

_PARAMETER = {"is_quantized", "is_symmetric"}
_ACTIVATION = {"is_input_quantized", "is_output_quantized", "is_symmetric"}
_OPERATOR = {*_ACTIVATION, "per_channel_quantization", "params", "encoding_constraints", "supported_kernels"}
_DEFAULTS = {"ops", "params", "strict_symmetric", "unsigned_symmetric", "per_channel_quantization"}
_DEFAULTS |= {"supported_kernels", "hw_version"}
_SECTIONS = {"defaults", "params", "op_type", "supergroups", "supergroup_pass_list", "model_input", "model_output"}
_PASSES = ("MatmulAdd", "LayerNormalization", "RMSNormalization", "MaskedSoftmax")


def config_from_aimet(path: str | Path, **settings: Any) -> tuple[QuantizationConfig, tuple[str, ...]]:
    """Returns the settings that mean what an AIMET configuration file means, and notes on parts that mean nothing.

    The file says which tensors are rounded and how 0 lies on their grids; of widths and schemes it says nothing: they
    are the defaults here, or those of `settings`. The target is "aimet", which holds the rules that AIMET's code has.

    Args:
        path: The JSON file.
        **settings: Settings of `QuantizationConfig` that win over those of the file, such as `weights` or `ranges`.

    Raises:
        ConfigError: The file cannot be read, is not JSON, or has a key or value that is none of AIMET's.
    """
    reader = _Reader(source=str(path), content=_load(path))
    reader.check()
    symmetry = reader.symmetry()
    found = {"target": "aimet", **reader.settings(symmetry), **settings}
    rules = tuple(_optional(reader.rules(symmetry)))
    exceptions = tuple(_optional(_by_code(reader.hardware, QuantizationConfig(**found))))
    found["rules"] = (*rules, *exceptions, *settings.get("rules", ()))
    return QuantizationConfig(**found), tuple(reader.notes())


@dataclass(frozen=True, slots=True)
class _Reader:
    """The content of one file; keys are given as they stand in it, "defaults.ops.is_symmetric"."""

    source: str
    content: Mapping[str, Any]

    def check(self) -> None:
        """Checks that all keys are AIMET's."""
        self._known("", self.content, _SECTIONS)
        defaults = self._table("defaults")
        self._known("defaults", defaults, _DEFAULTS)
        self._known("defaults.ops", self._table("defaults.ops"), _ACTIVATION)
        self._known("defaults.params", self._table("defaults.params"), _PARAMETER)
        self._check_parameters("params")
        for operator in self._table("op_type"):
            place = f"op_type.{operator}"
            self._known(place, self._table(place), _OPERATOR)
            self._check_parameters(f"{place}.params")
            self._known(f"{place}.encoding_constraints", self._table(f"{place}.encoding_constraints"), {"min", "max"})
        self._known("model_input", self._table("model_input"), {"is_input_quantized"})
        self._known("model_output", self._table("model_output"), {"is_output_quantized"})
        for name in self._list("supergroup_pass_list"):
            if name not in _PASSES:
                raise self._error("supergroup_pass_list", name, f"one of {', '.join(_PASSES)}")

    @property
    def hardware(self) -> str:
        return str(self._table("defaults").get("hw_version", ""))

    def symmetry(self) -> Callable[[bool], Symmetry]:
        """Returns what "is_symmetric" means in this file."""
        words = [word for word in ("strict", "unsigned") if self._flag(f"defaults.{word}_symmetric")]
        return lambda is_symmetric: (" ".join(words) or True) if is_symmetric else False

    def settings(self, symmetry: Callable[[bool], Symmetry]) -> dict[str, Any]:
        is_quantized = self._flag("params.bias.is_quantized", missing=self._flag("defaults.params.is_quantized"))
        return {
            "weights_symmetric": symmetry(bool(self._flag("defaults.params.is_symmetric"))),
            "activations_symmetric": symmetry(bool(self._flag("defaults.ops.is_symmetric"))),
            "granularity": "channel" if self._flag("defaults.per_channel_quantization") else "tensor",
            "biases": "int32" if is_quantized else "float",
            "supergroups": self._supergroups(),
        }

    def rules(self, symmetry: Callable[[bool], Symmetry]) -> Iterator[Rule]:
        """Yields the rules in the order in which AIMET lets the later win."""
        if not self._flag("defaults.ops.is_output_quantized"):
            yield Rule(of="activations", enabled=False)
        if not self._flag("defaults.params.is_quantized"):
            yield Rule(of="weights", enabled=False)
        yield from self._of_parameter("params.weight", (), symmetry)
        for operator in self._table("op_type"):
            yield from self._of_operator(operator, symmetry)
        yield Rule(of="inputs", enabled=bool(self._flag("model_input.is_input_quantized")))
        if (output := self._flag("model_output.is_output_quantized")) is not None:
            yield Rule(of="outputs", enabled=output)

    def notes(self) -> Iterator[str]:
        """Yields a sentence on each part of the file that means nothing here."""
        if "supported_kernels" in self._table("defaults"):
            yield "defaults.supported_kernels: not read; a target file's [allowed] says which types a runtime has"
        if self._flag("defaults.ops.is_input_quantized"):
            yield "defaults.ops.is_input_quantized: nothing to do; what an operator reads is rounded where it arises"
        yield from self._notes_on_parameters("params")
        for operator, table in self._table("op_type").items():
            yield from self._notes_on_operator(operator, table)
        for name in self._list("supergroup_pass_list"):
            if name != "MatmulAdd":
                yield f"supergroup_pass_list, {name}: written as single operators it is not recognized: each is rounded"
        if "MatmulAdd" not in self._list("supergroup_pass_list"):
            yield "supergroup_pass_list lacks MatmulAdd: here a bias behind a MatMul is part of it all the same"
        if any(run[0] == "Conv" for run in self._supergroups()):
            yield "supergroups: depthwise and 3-d convolutions take part in them, which AIMET leaves out"

    def _of_operator(self, operator: str, symmetry: Callable[[bool], Symmetry]) -> Iterator[Rule]:
        place, names = f"op_type.{operator}", (operator,)
        if (is_quantized := self._flag(f"{place}.is_output_quantized")) is not None:
            yield Rule(operators=names, of="activations", enabled=is_quantized)
        if (is_symmetric := self._flag(f"{place}.is_symmetric")) is not None:
            yield Rule(operators=names, of="activations", symmetric=symmetry(is_symmetric))
        if (per_channel := self._flag(f"{place}.per_channel_quantization")) is not None:
            yield Rule(operators=names, of="weights", granularity="channel" if per_channel else "tensor")
        yield from self._of_parameter(f"{place}.params.weight", names, symmetry)
        limits = self._table(f"{place}.encoding_constraints")
        if "min" in limits and "max" in limits:
            low, high = (self._number(f"{place}.encoding_constraints.{end}") for end in ("min", "max"))
            yield Rule(
                operators=names, of="activations", fixed_range=(low, high), symmetric=True if low == -high else None
            )

    def _of_parameter(
        self, place: str, operators: tuple[str, ...], symmetry: Callable[[bool], Symmetry]
    ) -> Iterator[Rule]:
        if (is_quantized := self._flag(f"{place}.is_quantized")) is not None:
            yield Rule(operators=operators, of="weights", enabled=is_quantized)
        if (is_symmetric := self._flag(f"{place}.is_symmetric")) is not None:
            yield Rule(operators=operators, of="weights", symmetric=symmetry(is_symmetric))

    def _notes_on_parameters(self, place: str) -> Iterator[str]:
        for name, table in self._table(place).items():
            is_known = name in ("weight", "bias", "running_mean", "running_var")
            if not is_known or (name.startswith("running") and table.get("is_quantized") == "True"):
                yield f"{place}.{name}: such parameters stay in float"
            if name == "bias" and "is_symmetric" in table:
                yield f"{place}.bias.is_symmetric: integer biases are always symmetric"

    def _notes_on_operator(self, operator: str, table: Mapping[str, Any]) -> Iterator[str]:
        place = f"op_type.{operator}"
        if "is_input_quantized" in table:
            yield f"{place}.is_input_quantized: nothing to do; what an operator reads is rounded where it arises"
        if "supported_kernels" in table:
            yield f"{place}.supported_kernels: not read; a target file's [allowed] says which types a runtime has"
        if operator == "PRelu" and table.get("per_channel_quantization") == "True":
            yield f"{place}.per_channel_quantization: slopes have one scale, as in AIMET itself"
        if self._table(f"{place}.params.bias").get("is_quantized") == "True":
            yield f"{place}.params.bias.is_quantized: biases of normalizations stay in float"
        yield from (note for note in self._notes_on_parameters(f"{place}.params") if ".bias." not in note)
        limits = self._table(f"{place}.encoding_constraints")
        if "min" in limits and "max" not in limits:
            yield f"{place}.encoding_constraints: one end alone fixes no range; the range is that of the data"

    def _supergroups(self) -> tuple[tuple[str, ...], ...]:
        found = []
        for index, entry in enumerate(self._list("supergroups")):
            place = f"supergroups[{index}]"
            if not isinstance(entry, Mapping):
                raise self._error(place, entry, 'a table {"op_list": [...]}')
            self._known(place, entry, {"op_list"})
            run = entry.get("op_list")
            if not isinstance(run, list) or len(run) < 2 or not all(isinstance(name, str) for name in run):  # noqa: PLR2004
                raise self._error(f"{place}.op_list", run, "two operators or more")
            found.append(tuple(run))
        return tuple(found)

    def _check_parameters(self, place: str) -> None:
        for name in self._table(place):
            self._known(f"{place}.{name}", self._table(f"{place}.{name}"), _PARAMETER)

    def _known(self, place: str, table: Mapping[str, Any], known: set[str]) -> None:
        for key in table:
            if key not in known:
                where = f"{place}.{key}" if place else key
                raise ConfigError(
                    f"{self.source}: unknown key {where!r}{near_names(key, known)}; it is none of AIMET's"
                )

    def _value(self, place: str) -> Any:
        value: Any = self.content
        for key in place.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def _table(self, place: str) -> Mapping[str, Any]:
        value = self._value(place)
        if value is not None and not isinstance(value, Mapping):
            raise self._error(place, value, "a table")
        return value or {}

    def _list(self, place: str) -> list[Any]:
        value = self._value(place)
        if value is not None and not isinstance(value, list):
            raise self._error(place, value, "a list")
        return value or []

    def _flag(self, place: str, *, missing: bool | None = None) -> bool | None:
        value = self._value(place)
        if value not in (None, "True", "False"):
            raise self._error(place, value, '"True" or "False", as texts')
        return missing if value is None else value == "True"

    def _number(self, place: str) -> float:
        value = self._value(place)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(place, value, "a number")
        return float(value)

    def _error(self, place: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f"{self.source}: {place} is {value!r}; expected {expected}")


def _by_code(version: str, config: QuantizationConfig) -> Iterator[Rule]:
    """Yields the rules that AIMET's code has beside the file, some by hardware version ("": none is named)."""
    weights = resolved_symmetry(config.weights_symmetric, config.weights, of_weights=True)
    outputs = resolved_symmetry(config.activations_symmetric, config.activations, of_weights=False)
    yield Rule(
        operators=("Conv", "ConvTranspose", "Gemm", "MatMul"), operands=(1,), of="activations", symmetric=weights
    )
    yield Rule(operators=_NORMS_LIKE_OUTPUT, of="weights", dtype=config.activations, symmetric=outputs)
    yield Rule(operators=_NORMS_LIKE_OUTPUT, of="weights", least_bits=8)
    yield Rule(operators=_NORMS, of="weights", least_bits=8, symmetric=False)
    if version in _UP_TO_V69:
        yield Rule(operators=_NORMS, of="weights", dtype="uint8" if config.weights.startswith("u") else "int8")
        yield Rule(operators=("MatMul",), operands=(1,), of="activations", dtype="int8", symmetric=True)
        return
    yield Rule(operators=_NORMS, of="weights", dtypes=_WIDE, symmetric=True)
    if version:
        yield Rule(operators=("MatMul",), operands=(1,), of="activations", dtypes=_WIDE, symmetric=True)


def _optional(rules: Iterator[Rule]) -> Iterator[Rule]:
    """Yields the rules as such that may match nothing: the file is for many models."""
    return (replace(rule, optional=True) for rule in rules)


def _load(path: str | Path) -> Mapping[str, Any]:
    try:
        content = json.loads(read_text(path, f"config {str(path)!r}"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} is no AIMET configuration: expected a table at the top")
    return content
