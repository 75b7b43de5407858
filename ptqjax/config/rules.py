"""A rule: which tensors, and what of them differs from the configuration's own settings."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ptqjax.config.checks import (
    DTYPES,
    SettingError,
    Symmetry,
    check_choice,
    check_dtype,
    check_expressions,
    check_fixed_range,
    check_flag,
    check_granularity,
    check_ranges,
    check_symmetry,
    check_texts,
)

ROLES = ("both", "weights", "activations", "inputs", "outputs")
"""What a rule can be of: "inputs" and "outputs" are those of the graph."""

_SETTINGS = ("enabled", "dtype", "least_bits", "symmetric", "granularity", "ranges", "fixed_range", "power_of_two")
_MOST_BITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Settings for some tensors; what is None stays as it was. Of several rules that match, the later wins.

    A rule matches a tensor that fits all of `tensors`, `nodes`, `operators` and `dtypes` that are given, and is of the
    kind `of`. It is an error if it matches none.

    Raises:
        ConfigError: A field has a value that is not allowed, or nothing is set.
    """

    tensors: tuple[str, ...] = ()
    """Names of tensors: glob patterns, or regular expressions that begin with "re:" (and match the whole name)."""
    nodes: tuple[str, ...] = ()
    """Names of nodes, as patterns: all that they read and write, so a layer's weight, bias, inputs and results. A node
    without a name is called as the tensor that it produces."""
    operators: tuple[str, ...] = ()
    """Operator types, as in "Conv": of the node that produces an activation, or of one that reads a parameter."""
    operands: tuple[int, ...] = ()
    """Positions of inputs: where given, `operators` are those that read the tensor there, also after it was moved."""
    dtypes: tuple[str, ...] = ()
    """Types that the tensor has so far, by the configuration and the rules before."""
    of: str = "both"
    """What the rule is for, one of `ROLES`; constant operands of sums and the like count as activations."""
    enabled: bool | None = None
    """Whether the tensor is rounded: True takes back what an earlier rule or `exclude` has switched off."""
    dtype: str | None = None
    """The type that it is rounded to."""
    least_bits: int | None = None
    """The number of bits that an integer type has at least."""
    symmetric: Symmetry | None = None
    """How 0 lies on the grid."""
    granularity: str | None = None
    """For weights: what shares a scale."""
    ranges: str | None = None
    """The scheme that chooses the range."""
    fixed_range: tuple[float, float] | None = None
    """The range itself."""
    power_of_two: bool | None = None
    """Whether scales are powers of two."""
    optional: bool = False
    """Whether it may match nothing: rules that are written for many models."""

    def __post_init__(self) -> None:
        check_texts("tensors", self.tensors, 'patterns, such as ("conv1*", "re:.*/Add")')
        check_texts("nodes", self.nodes, 'patterns of names of nodes, such as ("/head/*",)')
        check_texts("operators", self.operators, 'operator types, such as ("Conv",)')
        check_texts("dtypes", self.dtypes, 'types, such as ("int16", "uint16")')
        check_choice("of", self.of, ROLES)
        for dtype in self.dtypes:
            check_choice("dtypes", dtype, DTYPES)
        check_expressions("tensors", self.tensors)
        check_expressions("nodes", self.nodes)
        _check_operands(self)
        checks = {
            "enabled": check_flag,
            "dtype": check_dtype,
            "symmetric": check_symmetry,
            "granularity": check_granularity,
            "ranges": check_ranges,
            "fixed_range": check_fixed_range,
            "power_of_two": check_flag,
        }
        for name, check in checks.items():
            if getattr(self, name) is not None:
                check(name, getattr(self, name))
        check_flag("optional", self.optional)
        if self.least_bits is not None and not (_is_integer(self.least_bits) and 2 <= self.least_bits <= _MOST_BITS):  # noqa: PLR2004 - of int2
            raise SettingError("least_bits", f"least_bits={self.least_bits!r}: expected a number from 2 to 16")
        if all(getattr(self, name) is None for name in _SETTINGS):
            raise SettingError("rules", f"{described(self)} sets nothing; expected one of {', '.join(_SETTINGS)}")
        if self.granularity is not None and self.of not in ("weights", "both"):
            raise SettingError("granularity", f"{described(self)}: granularity is for weights only")


def described(rule: Rule) -> str:
    """Returns the rule's conditions in a few words, for people."""
    parts = [repr(pattern) for pattern in rule.tensors]
    parts += [f"nodes {'/'.join(map(repr, rule.nodes))}"] if rule.nodes else []
    where = "/".join(rule.operators)
    if rule.operands:
        where = f"input {' or '.join(map(str, rule.operands))} of {where}"
    parts += [where] if where else []
    parts += [f"now {'/'.join(rule.dtypes)}"] if rule.dtypes else []
    parts += [] if rule.of == "both" else [rule.of]
    return f"rule for {', '.join(parts) or 'all tensors'}"


def set_fields(rule: Rule) -> dict[str, Any]:
    """Returns what the rule sets, by name, without what it leaves as it was."""
    return {name: getattr(rule, name) for name in _SETTINGS if getattr(rule, name) is not None}


def field_names() -> tuple[str, ...]:
    """Returns the names of all fields of a rule."""
    return tuple(field.name for field in fields(Rule))


def _check_operands(rule: Rule) -> None:
    if not isinstance(rule.operands, tuple) or not all(_is_integer(each) and each >= 0 for each in rule.operands):
        raise SettingError("operands", f"operands={rule.operands!r}: expected a tuple of positions, 0 the first")
    if rule.operands and not rule.operators:
        raise SettingError("operands", "operands are positions of inputs of operators; name the operators as well")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
