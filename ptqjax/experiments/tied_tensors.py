"""Groups of tensors that share one encoding: what can be switched, or given another width, independently."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ptqjax.config import QuantizationConfig
from ptqjax.encodings.encoding import Encoding, Encodings, concrete
from ptqjax.ir import Model
from ptqjax.placement.granularity import weight_uses
from ptqjax.placement.place import WEIGHT, place

Kind: TypeAlias = Literal["weight", "activation"]
"""What a group's tensors are; constant operands of sums and the like count as activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Tensors that are tied to one encoding."""

    name: str
    """The first of its tensors."""
    kind: Kind
    """Whether it is a weight, or what flows."""
    tensors: tuple[str, ...]
    """All of them: parameters by name, then graph inputs, then results in the order of the nodes."""


def groups_of(model: Model, plan: QuantizationConfig | Encodings) -> tuple[Group, ...]:
    """Returns the groups of all tensors that are rounded, in the order of their first tensors.

    Args:
        model: The model that is quantized: after its transforms.
        plan: A configuration: what `place` ties together under it. Or concrete encodings: what an operator without
            weights reads and returns on equal grids; encodings that are not enabled are left out.

    Raises:
        ConfigError: The configuration does not fit the model, see `place`.
        ModelError: The model cannot be quantized, see `place`.
    """
    if isinstance(plan, QuantizationConfig):
        sites = place(model, plan).sites
        roots = {site.tensor: site.root for site in sites}
        weights = {site.tensor for site in sites if site.kind == WEIGHT}
    else:
        weights = set(weight_uses(model))
        roots = _roots(model, plan, weights)
    members: dict[str, list[str]] = {}
    for tensor, root in roots.items():
        members.setdefault(root, []).append(tensor)
    return tuple(
        Group(name=tensors[0], kind="weight" if tensors[0] in weights else "activation", tensors=tuple(tensors))
        for tensors in members.values()
    )


def _roots(model: Model, encodings: Mapping[str, Encoding], weights: AbstractSet[str]) -> dict[str, str]:
    """Returns one tensor of its group for each enabled encoding, in the order of the graph."""
    graph = model.graph
    inputs = [spec.name for spec in graph.inputs]
    order = [*sorted(graph.parameters), *inputs, *(name for node in graph.nodes for name in node.outputs)]
    held = {name: concrete(encodings[name]) for name in order if name in encodings}
    roots = {name: name for name, encoding in held.items() if encoding.enabled}

    def root(name: str) -> str:
        while roots[name] != name:
            name = roots[name]
        return name

    for node in graph.nodes:
        if not weights.isdisjoint(node.inputs):  # equal by chance, as powers of two are
            continue
        for read in node.inputs:
            for written in node.outputs:
                if {read, written} <= set(roots) - set(graph.parameters) and _is_equal(held[read], held[written]):
                    roots[root(written)] = root(read)
    return {name: root(name) for name in roots}


def _is_equal(one: Encoding, other: Encoding) -> bool:
    static = ("axis", "block_size", "float_format")
    leaves = ("scale", "zero_point", "qmin", "qmax")
    return all(getattr(one, name) == getattr(other, name) for name in static) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in leaves
    )
