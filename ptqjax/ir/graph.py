"""The graph of a model and the model itself: frozen data, no behaviour beyond look-ups.

A `Graph` is hashable and static under `jit`; a `Model` adds the arrays. Nodes are known by the tensors that they
produce: every tensor name is written once (by a node, an input, a constant or a parameter).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from ptqjax.pytrees import PyTreeNode, static_field

Dimension: TypeAlias = int | str | None
"""A known size, a symbolic size, or nothing known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Name, element type and shape of a graph input or output."""

    name: str
    """The tensor's name."""
    dtype: np.dtype
    """The element type."""
    shape: tuple[Dimension, ...] | None
    """The shape; None where not even the rank is declared."""
    kind: str = "tensor"
    """What holds tensors of this type and shape, from the outside in: "tensor", "sequence", "optional", "optional
    sequence"; "sparse" is a sparse tensor, "map:int64" a map with keys of that type; "unknown": no type is declared."""


@dataclass(frozen=True, eq=False, slots=True)
class Constant:
    """A tensor that is part of the graph itself: integers, booleans, strings, what shapes depend on.

    Equal and hashed by content, so that a graph that holds it can key a compilation cache.
    """

    value: np.ndarray
    """The elements; read-only."""
    _digests: list[bytes] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        value = self.value
        if not isinstance(value, np.ndarray) or value.flags.writeable:
            value = np.array(value)  # a copy: the caller's array stays the caller's
            value.flags.writeable = False
        object.__setattr__(self, "value", value)

    @property
    def _digest(self) -> bytes:
        if not self._digests:
            value = self.value
            digest = hashlib.blake2b(f"{value.dtype.name}{value.shape}".encode(), digest_size=16)
            if value.dtype == object:
                digest.update(repr(value.tolist()).encode())
            else:
                digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            self._digests.append(digest.digest())
        return self._digests[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseConstant:
    """A tensor of which only the elements that are not zero are stored: an attribute."""

    values: Constant
    """The elements that are stored."""
    indices: Constant
    """Where they are: positions in the flattened tensor, or a row of coordinates for each."""
    shape: tuple[int, ...]
    """The shape of the whole tensor."""


_One: TypeAlias = "int | float | str | Constant | SparseConstant | Graph | TensorSpec"
_Plain: TypeAlias = "tuple[int, ...] | tuple[float, ...] | tuple[str, ...]"
_Several: TypeAlias = "tuple[Constant, ...] | tuple[SparseConstant, ...] | tuple[Graph, ...] | tuple[TensorSpec, ...]"
Attribute: TypeAlias = "_One | _Plain | _Several"
"""The value of a node's attribute. ONNX's byte strings are text here, its types are unnamed `TensorSpec`s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One operator applied to tensors."""

    op_type: str
    """The operator's name, as ONNX spells it."""
    inputs: tuple[str, ...]
    """Names of the tensors read; "" stands for an optional input left out."""
    outputs: tuple[str, ...]
    """Names of the tensors written; "" stands for an optional output left out."""
    attributes: tuple[tuple[str, Attribute], ...] = ()
    """Attributes by name, sorted; a model that was read has the schema's defaults filled in."""
    domain: str = ""
    """The operator's domain; "" is ONNX's own."""
    name: str = ""
    """The node's own, optional name: for people, never a key."""

    def attribute(self, name: str, default: Any = None) -> Any:
        """Returns the attribute `name`, or `default` where the node has none."""
        return dict(self.attributes).get(name, default)

    @property
    def output(self) -> str:
        """The first tensor that the node writes: by this the node is known."""
        return next((name for name in self.outputs if name), "")

    @property
    def subgraphs(self) -> tuple[Graph, ...]:
        """The graphs among the attributes, in order."""
        found: list[Graph] = []
        for _, value in self.attributes:
            if isinstance(value, Graph):
                found.append(value)
            elif isinstance(value, tuple) and value and isinstance(value[0], Graph):
                found += [each for each in value if isinstance(each, Graph)]
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Operators in topological order, with what they read from outside.

    Parameters are not in the graph but in `Model.params`: a tensor that no node, input or constant produces is one.
    """

    name: str
    """The graph's name."""
    inputs: tuple[TensorSpec, ...]
    """What a caller feeds."""
    outputs: tuple[TensorSpec, ...]
    """What a caller gets."""
    nodes: tuple[Node, ...]
    """The operators, each after the producers of its inputs."""
    constants: tuple[tuple[str, Constant], ...] = ()
    """Tensors that are part of the graph, sorted by name."""
    parameters: tuple[str, ...] = ()
    """Names of the tensors that `Model.params` holds, sorted."""
    opsets: tuple[tuple[str, int], ...] = (("", 17),)
    """Version of each operator set, by domain."""
    ir_version: int = 8
    """The version of the ONNX file format."""
    metadata: tuple[tuple[str, str], ...] = ()
    """The file's metadata_props, sorted."""

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.inputs, self.outputs, self.nodes, self.constants, self.parameters, self.opsets))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def constant_values(self) -> Mapping[str, np.ndarray]:
        """The constants as read-only arrays, by name."""
        return {name: constant.value for name, constant in self.constants}

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """The node that writes each tensor."""
        return {output: node for node in self.nodes for output in node.outputs if output}

    @cached_property
    def readers(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read each tensor, a node once for each time that it reads it; subgraphs count."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in (*node.inputs, *captured(node)):
                if name:
                    found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def output_names(self) -> frozenset[str]:
        """The names of the graph's outputs."""
        return frozenset(spec.name for spec in self.outputs)

    def opset(self, domain: str = "") -> int:
        """Returns the version of the operator set `domain` (1 where the file names none)."""
        return dict(self.opsets).get(domain, 1)

    def num_readers(self, tensor: str) -> int:
        """Returns how often `tensor` is read; being a graph output counts as a reading."""
        return len(self.readers.get(tensor, ())) + (tensor in self.output_names)


def captured(node: Node) -> tuple[str, ...]:
    """Returns the names of the outer tensors that the node's subgraphs read."""
    names: list[str] = []
    for graph in node.subgraphs:
        own = {spec.name for spec in graph.inputs} | set(graph.producers) | set(graph.constant_values)
        wanted = [name for inner in graph.nodes for name in (*inner.inputs, *captured(inner)) if name]
        wanted += [spec.name for spec in graph.outputs]
        names += [name for name in dict.fromkeys(wanted) if name not in own]
    return tuple(names)


class Statistics(PyTreeNode):
    """What is known of a tensor's distribution, per channel, before any data is seen.

    A folded batch norm implies it: its output has mean beta and standard deviation |gamma|.
    """

    mean: Any
    """Mean per channel, shape [c]."""
    std: Any
    """Standard deviation per channel, shape [c]; not negative."""


class Model(PyTreeNode):
    """A network: a static graph, its arrays, and what is known of its activations.

    A pytree: `graph` is static, the arrays are leaves (NumPy or JAX). Nothing changes it; transforms return another.
    """

    graph: Graph = static_field()
    """The operators and what they read."""
    params: dict[str, Any]
    """The tensors that take part in arithmetic, by name."""
    statistics: dict[str, Statistics] = field(default_factory=dict)
    """Per tensor (channel axis 1), where known; `onnx_io.write` does not store it."""


def place_of(node: Node) -> str:
    """Returns how an error names a node: operator, own name where it has one, and the tensor that it produces."""
    label = f" '{node.name}'" if node.name else ""
    return f"{node.op_type}{label} (producing '{node.output}')"
