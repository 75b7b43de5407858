"""Widths of groups of tensors: as rules of a configuration, and as encodings picked from some that are there."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ptqjax.config import FLOAT_DTYPES, QuantizationConfig, Rule
from ptqjax.encodings.encoding import Encodings
from ptqjax.experiments.tied_tensors import Group, Kind, groups_of
from ptqjax.ir import Model
from ptqjax.placement.place import place

_ROLES: Mapping[Kind, str] = {"weight": "weights", "activation": "activations"}

Widths = Mapping[str, int]
"""The number of bits of each group, by its name."""


def adjustable_groups(model: Model, config: QuantizationConfig, kinds: Sequence[Kind]) -> tuple[Group, ...]:
    """Returns the groups of these kinds that have the configuration's own integer type.

    Left out is what a rule or an exception of the target has given another type, what has a type of floats, and
    constant operands of sums and the like, which weigh nothing.
    """
    own = {"weight": config.weights, "activation": config.activations}
    dtypes = {site.tensor: site.dtype for site in place(model, config).sites}
    return tuple(
        group
        for group in groups_of(model, config)
        if group.kind in kinds
        and dtypes[group.name] == own[group.kind]
        and own[group.kind] not in FLOAT_DTYPES
        and (group.kind == "weight" or group.name not in model.params)
    )


def with_widths(
    config: QuantizationConfig, groups: Sequence[Group], widths: Widths, *, optional: bool = False
) -> QuantizationConfig:
    """Returns the configuration with a rule behind its own ones for each type that some groups are to have.

    Args:
        config: The configuration.
        groups: The groups.
        widths: Their widths; a group whose type has that width already needs no rule.
        optional: Whether the rules may match nothing.

    Raises:
        ConfigError: The target does not take a type.
    """
    named: dict[tuple[Kind, str], list[str]] = {}
    for group in groups:
        own = config.weights if group.kind == "weight" else config.activations
        dtype = f"{own.rstrip('0123456789')}{widths[group.name]}"
        if dtype != own:
            named.setdefault((group.kind, dtype), []).extend(map(pattern_of, group.tensors))
    rules = (
        Rule(
            tensors=tuple(patterns),
            of=f"{kind}s" if kind == "weight" else "activations",
            dtype=dtype,
            optional=optional,
        )
        for (kind, dtype), patterns in sorted(named.items())
    )
    return replace(config, rules=(*config.rules, *rules))


def pattern_of(name: str) -> str:
    """Returns the pattern of a rule that matches this name alone."""
    return f"[r]{glob.escape(name[1:])}" if name.startswith("re:") else glob.escape(name)


def picked(groups: Sequence[Group], widths: Widths, levels: Mapping[int, Encodings]) -> Encodings:
    """Returns for each tensor of a group the encoding that it has at the group's width, for others that of the widest.

    Args:
        groups: The groups that are to be given a width.
        widths: Their widths.
        levels: Encodings of all tensors, by width.
    """
    found = dict(levels[max(levels)])
    for group in groups:
        found |= {tensor: levels[widths[group.name]][tensor] for tensor in group.tensors}
    return found


def by_name(groups: Sequence[Group], chosen: np.ndarray) -> dict[str, int]:
    """Returns widths by the names of their groups."""
    return {group.name: int(width) for group, width in zip(groups, chosen, strict=True)}
