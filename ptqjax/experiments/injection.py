"""The graph in which every quantizer's error can be scaled: beside each node, what it gives for another operand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptqjax.experiments.tied_tensors import Group
from ptqjax.ir import Graph, Node, captured

_OTHER = "::other"
"""Behind a parameter's name: what it is on the other side of its rounding."""
_ROUNDED = "::rounded"
"""Behind a tensor's name: what it is rounded."""
_STILL = "::still"
"""Behind a tensor's name: the same, with no derivative."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A tensor at which a group's error comes into being."""

    tensor: str
    """The tensor, of the model."""
    group: int
    """The group's number."""
    other: str
    """What the tensor is with the group's operand on the other side of its rounding; "": its own rounding is the error,
    of itself."""
    is_rounded_again: bool = False
    """Whether the error is that of `other` and its rounding: it has tensors of the same group in front."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Injection:
    """A graph and where errors come into being in it; static under `jit`."""

    graph: Graph
    """The model's graph and, before each node that reads what a group rounds, copies of it that read the other side."""
    places: tuple[Place, ...]
    """Where errors come into being."""
    others: tuple[tuple[str, str], ...]
    """Parameters that groups round: each with the name under which the graph reads its other side."""
    rounded: tuple[tuple[str, str], ...]
    """Copies that are to be rounded, with the tensors whose grids they are rounded to."""
    still: frozenset[str]
    """What copies read in place of activations: the same without a derivative, which nobody asks copies for."""
    num_groups: int
    """How many groups there are."""

    @property
    def copies(self) -> frozenset[str]:
        """The tensors that copies write, from which places take their errors."""
        return frozenset(place.other for place in self.places if place.other)


def injection_of(graph: Graph, groups: Sequence[Group], *, from_float: bool) -> Injection:
    """Returns the graph in which the error of each group can be scaled without knowing any operator.

    A parameter's error is one of what reads it: the node's result with the rounded parameter less that with the other.
    So it has a number for each sample, and is exact for any operator. What is computed from parameters alone is copied
    along with them. An activation's error is its own rounding.

    Args:
        graph: The model's.
        groups: Whose errors; in the order of their numbers.
        from_float: Whether the tensors in front of a group's tensor are in float. Then, where one of the same group is
            in front, the error is that of rounding what came of the rounded one: nothing, where values only move.
            Otherwise that holds by itself.
    """
    numbers = {tensor: number for number, group in enumerate(groups) for tensor in group.tensors}
    writer = _Writer(graph, numbers, from_float=from_float)
    for node in graph.nodes:
        writer.add(node)
    others = tuple((name, name + _OTHER) for name in graph.parameters if name in numbers)
    return Injection(
        graph=replace(
            graph,
            nodes=tuple(writer.nodes),
            parameters=tuple(sorted((*graph.parameters, *(other for _, other in others)))),
        ),
        places=tuple(writer.places),
        others=others,
        rounded=tuple((name + _ROUNDED, name) for name in writer.rounded),
        still=frozenset(name + _STILL for name in writer.still),
        num_groups=len(groups),
    )


class _Writer:
    """The graph as it grows node by node."""

    def __init__(self, graph: Graph, numbers: Mapping[str, int], *, from_float: bool) -> None:
        self.nodes: list[Node] = []
        self.rounded: dict[str, None] = {}
        self.still: dict[str, None] = {}
        self._numbers = numbers
        self._from_float = from_float
        self._fixed = {name for name, _ in graph.constants} | set(graph.parameters)
        self._versions = {name: {name: name + _OTHER} for name in graph.parameters if name in numbers}
        inputs = [spec.name for spec in graph.inputs]
        self.places = [Place(tensor=name, group=numbers[name], other="") for name in inputs if name in numbers]

    def add(self, node: Node) -> None:
        """Adds a node, and its copies before it."""
        is_fixed = all(not name or name in self._fixed for name in node.inputs) and not node.subgraphs
        for parameter, renamed in self._other_operands(node).items():
            copy = self._copied(node, renamed, f"::{parameter}{_OTHER}")
            for name, other in zip(node.outputs, copy.outputs, strict=True):
                if name and is_fixed:
                    self._versions.setdefault(name, {})[parameter] = other
                elif name:
                    self.places.append(Place(tensor=name, group=self._numbers[parameter], other=other))
        self._fixed |= set(node.outputs) if is_fixed else set()
        for name in [name for name in node.outputs if name in self._numbers]:
            self.places.append(self._own(node, name))
        self.nodes.append(node)

    def _other_operands(self, node: Node) -> dict[str, dict[str, str]]:
        """Returns by parameter the operands that depend on it, each with its name on the other side."""
        found: dict[str, dict[str, str]] = {}
        for operand in (*node.inputs, *captured(node)):
            for parameter, other in self._versions.get(operand, {}).items():
                found.setdefault(parameter, {})[operand] = other
        return found

    def _own(self, node: Node, name: str) -> Place:
        """Returns the place of a tensor's own rounding."""
        number = self._numbers[name]
        before = [operand for operand in node.inputs if self._numbers.get(operand) == number]
        if not (self._from_float and before):
            return Place(tensor=name, group=number, other="")
        renamed = {operand: self._as_rounded(operand) for operand in dict.fromkeys(before)}
        copy = self._copied(node, renamed, f"::{name}::again")
        return Place(tensor=name, group=number, other=copy.outputs[node.outputs.index(name)], is_rounded_again=True)

    def _as_rounded(self, name: str) -> str:
        """Returns the name of a copy of the tensor that is to be rounded."""
        if name + _OTHER in self._versions.get(name, {}).values():
            return name + _OTHER
        return self._once(name, _ROUNDED, self.rounded)

    def _once(self, name: str, suffix: str, known: dict[str, None]) -> str:
        """Returns the name of a tensor beside another, which is written where it is asked for first."""
        if name not in known:
            known[name] = None
            self.nodes.append(Node(op_type="Identity", inputs=(name,), outputs=(name + suffix,)))
        return name + suffix

    def _copied(self, node: Node, renamed: dict[str, str], suffix: str) -> Node:
        moving = (name for name in (*node.inputs, *captured(node)) if name and name not in self._fixed)
        renamed = {name: self._once(name, _STILL, self.still) for name in moving if name not in renamed} | renamed
        copy = replace(_reading(node, renamed), name="", outputs=tuple(_with_suffix(node.outputs, suffix)))
        self.nodes.append(copy)
        return copy


def _reading(node: Node, renamed: Mapping[str, str]) -> Node:
    """Returns the node with other operands, in its subgraphs as well."""
    return replace(
        node,
        inputs=tuple(renamed.get(name, name) for name in node.inputs),
        attributes=tuple((key, _attribute_reading(value, renamed)) for key, value in node.attributes),
    )


def _attribute_reading(value: Any, renamed: Mapping[str, str]) -> Any:
    if isinstance(value, tuple):
        return tuple(_attribute_reading(each, renamed) for each in value)
    if not isinstance(value, Graph):
        return value
    own = {spec.name for spec in value.inputs} | set(value.producers) | set(value.constant_values)
    outer = {name: other for name, other in renamed.items() if name not in own}
    return replace(
        value,
        nodes=tuple(_reading(node, outer) for node in value.nodes),
        outputs=tuple(replace(spec, name=outer.get(spec.name, spec.name)) for spec in value.outputs),
    )


def _with_suffix(names: Iterable[str], suffix: str) -> Iterable[str]:
    return (name + suffix if name else "" for name in names)
