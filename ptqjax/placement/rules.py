"""What configuration and rules say of each tensor, before its place in the graph is looked at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ptqjax.config import QuantizationConfig, Rule, Symmetry, Target, near_names
from ptqjax.config.checks import FLOAT_DTYPES, SettingError
from ptqjax.config.constraints import resolved_symmetry
from ptqjax.config.rules import described, set_fields
from ptqjax.ir import Graph, Model, Node
from ptqjax.placement.movement import moved_tensors
from ptqjax.placement.names import matches_name, node_name, nodes_named, tensors_around, without_match

_DIGITS = re.compile(r"\d+")
_WRITTEN_OTHERWISE = {
    "BatchNormalization": "; batch norms are folded into the layers before them, whose results such rules are for",
    "Clip": "; equalization may have made Relu and Min of its Clips: name these, or set equalize=False",
}
_FIELDS = {"given_symmetry": "symmetric"}  # as a rule calls them


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is set for one tensor."""

    is_weight: bool
    """Whether it counts as a weight, or as an activation."""
    dtype: str
    """Type of the codes."""
    given_symmetry: Symmetry | None
    """How 0 lies on the grid; None for the default."""
    granularity: str
    """What shares a scale, if it is a weight."""
    ranges: str
    """The scheme; "" for that of the configuration."""
    power_of_two: bool
    """Whether scales are powers of two."""
    fixed_range: tuple[float, float] | None = None
    """The range, where a rule says so."""
    off: str = ""
    """What leaves the tensor in float, for people; "" where nothing does."""
    on: bool = False
    """Whether a rule asks for the tensor to be rounded."""
    rules: tuple[str, ...] = ()
    """What rules set that was otherwise before, each with the rule, for people."""
    is_named: bool = False
    """Whether one of these rules is for this tensor by name."""

    @property
    def is_asked_for(self) -> bool:
        """Whether a rule asks for the tensor to be rounded, or sets its grid by its name."""
        return self.on or self.is_named

    @property
    def symmetric(self) -> Symmetry:
        """How 0 lies on the grid."""
        return resolved_symmetry(self.given_symmetry, self.dtype, of_weights=self.is_weight)


@dataclass(frozen=True, slots=True)
class Settled:
    """What is set for the tensors of a model, and which tensors each rule is for."""

    by_tensor: Mapping[str, Settings]
    """The settings of each tensor, by its name."""
    matches: tuple[tuple[Rule, tuple[str, ...]], ...]
    """The configuration's rules, each with the tensors that it matches."""


def settle(
    model: Model, config: QuantizationConfig, target: Target, floating: Iterable[str], weights: Iterable[str]
) -> Settled:
    """Returns what `config` and the exceptions of `target` set for each of the tensors `floating`.

    Args:
        model: The model.
        config: Settings and rules; the later rule wins.
        target: Its exceptions come before the rules.
        floating: All floating tensors.
        weights: Those that count as weights.

    Raises:
        ConfigError: A pattern, an operator or a rule matches nothing.
    """
    names, weights = tuple(floating), frozenset(weights)
    moved = moved_tensors(model, target)
    found = {name: _of_config(config, is_weight=name in weights) for name in names}
    for name, reason in _excluded(model.graph, config, names, moved).items():
        found[name] = replace(found[name], off=reason)
    for rule in target.exceptions:
        for name in _matching(model.graph, rule, found, moved):
            found[name] = _changed(found[name], rule, f"target {target.name!r}")
    matches = []
    for index, rule in enumerate(config.rules):
        if not rule.optional:
            _check_exists(model.graph, rule, names, index)
        matching = tuple(_matching(model.graph, rule, found, moved))
        if not matching and not rule.optional:
            message = f"rules: no tensor meets all conditions of the {described(rule)}; widen them, or drop it"
            raise SettingError("rules", message, rule=index)
        for name in matching:
            found[name] = _changed(found[name], rule, f"the {described(rule)}")
        matches.append((rule, matching))
    return Settled(found, tuple(matches))


def num_bits(dtype: str) -> int:
    """Returns the number of bits of a type's codes."""
    return int(_DIGITS.findall(dtype)[0])


def _of_config(config: QuantizationConfig, *, is_weight: bool) -> Settings:
    return Settings(
        is_weight=is_weight,
        dtype=config.weights if is_weight else config.activations,
        given_symmetry=config.weights_symmetric if is_weight else config.activations_symmetric,
        granularity=config.granularity,
        ranges=(config.weight_ranges if is_weight else config.activation_ranges) or "",
        power_of_two=config.power_of_two,
    )


def _excluded(
    graph: Graph, config: QuantizationConfig, names: tuple[str, ...], moved: Mapping[str, tuple[str, ...]]
) -> dict[str, str]:
    """Returns the tensors that the configuration leaves out, with the reason."""
    found: dict[str, str] = {}
    for pattern in config.exclude:
        _check_tensors(graph, pattern, names, "exclude")
        found |= {name: f"excluded by the pattern {pattern!r}" for name in names if matches_name(pattern, name)}
    for pattern in config.exclude_nodes:
        around = tensors_around(_checked_nodes(graph, pattern, "exclude_nodes"), moved)
        matching = [name for name in names if name in around]
        if not matching:
            message = f"exclude_nodes: no node that {pattern!r} matches reads or writes floating numbers; drop it"
            raise SettingError("exclude_nodes", message)
        found |= dict.fromkeys(matching, f"excluded with the nodes {pattern!r}")
    return found


def _matching(
    graph: Graph, rule: Rule, found: Mapping[str, Settings], moved: Mapping[str, tuple[str, ...]]
) -> Iterator[str]:
    inputs = {spec.name for spec in graph.inputs}
    around = tensors_around(nodes_named(graph, rule.nodes), moved) if rule.nodes else frozenset(found)
    for name, settings in found.items():
        is_of = {
            "both": True,
            "weights": settings.is_weight,
            "activations": not settings.is_weight,
            "inputs": name in inputs,
            "outputs": name in graph.output_names,
        }
        if not is_of[rule.of] or (rule.dtypes and settings.dtype not in rule.dtypes):
            continue
        if name not in around:
            continue
        if rule.tensors and not any(matches_name(pattern, name) for pattern in rule.tensors):
            continue
        operators = _readers(graph, (name, *moved.get(name, ())), rule.operands) if rule.operands else _own(graph, name)
        if not rule.operators or not operators.isdisjoint(rule.operators):
            yield name


def _own(graph: Graph, tensor: str) -> set[str]:
    """Returns the type of the operator that produces a tensor, or those of a parameter's readers."""
    if tensor in graph.producers:
        return {graph.producers[tensor].op_type}
    return {node.op_type for node in graph.readers.get(tensor, ())} if tensor in graph.parameters else set()


def _readers(graph: Graph, tensors: Iterable[str], operands: tuple[int, ...]) -> set[str]:
    """Returns the types of the operators that read one of `tensors` at one of the positions `operands`."""
    return {
        node.op_type
        for tensor in tensors
        for node in graph.readers.get(tensor, ())
        if any(name == tensor and position in operands for position, name in enumerate(node.inputs))
    }


def _changed(settings: Settings, rule: Rule, text: str) -> Settings:
    if rule.enabled is not None:
        settings = replace(settings, off="" if rule.enabled else f"switched off by {text}", on=rule.enabled)
    given = {key: value for key, value in set_fields(rule).items() if key not in ("enabled", "least_bits", "symmetric")}
    if rule.symmetric is not None:
        given["given_symmetry"] = rule.symmetric
    dtype = given.get("dtype", settings.dtype)
    if rule.least_bits is not None and dtype not in FLOAT_DTYPES and num_bits(dtype) < rule.least_bits:
        given["dtype"] = dtype.rstrip("0123456789") + str(rule.least_bits)
    given = {key: value for key, value in given.items() if getattr(settings, key) != value}
    if not given:
        return settings
    what = ", ".join(f"{_FIELDS.get(key, key)}={value}" for key, value in given.items())
    is_named = settings.is_named or bool(rule.tensors)
    return replace(settings, **given, rules=(*settings.rules, f"{what} by {text}"), is_named=is_named)


def _check_exists(graph: Graph, rule: Rule, names: tuple[str, ...], index: int) -> None:
    for pattern in rule.tensors:
        _check_tensors(graph, pattern, names, "tensors", index)
    for pattern in rule.nodes:
        _checked_nodes(graph, pattern, "nodes", index)
    known = {node.op_type for node in graph.nodes}
    for operator in rule.operators:
        if operator not in known:
            near = near_names(operator, known) or _WRITTEN_OTHERWISE.get(operator, "")
            message = f"rules: the model has no operator {operator!r} (of {len(known)} types){near}"
            raise SettingError("operators", message, rule=index)


def _check_tensors(graph: Graph, pattern: str, names: tuple[str, ...], field: str, index: int | None = None) -> None:
    if not any(matches_name(pattern, name) for name in names):
        message = f"{_said(field, index)}: {without_match(pattern, names, graph, of='tensors')}"
        raise SettingError(field, message, rule=index)


def _checked_nodes(graph: Graph, pattern: str, field: str, index: int | None = None) -> tuple[Node, ...]:
    nodes = nodes_named(graph, [pattern])
    if not nodes:
        names = [node_name(node) for node in graph.nodes]
        message = f"{_said(field, index)}: {without_match(pattern, names, graph, of='nodes')}"
        raise SettingError(field, message, rule=index)
    return nodes


def _said(field: str, index: int | None) -> str:
    return field if index is None else "rules"
