"""Encodings that tensors share: moved data, operators that pass an encoding on, and inputs that adopt a result's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ptqjax.config import Target
from ptqjax.ir import Graph, Model, Node
from ptqjax.placement.movement import moves_data
from ptqjax.placement.rules import Settings
from ptqjax.placement.sites import ACTIVATION, Site, Skipped

Decided = Mapping[str, Site | Skipped]
"""What was decided about tensors so far."""


def passed_on(node: Node, tensor: str, target: Target) -> tuple[str, str] | None:
    """Returns the tensor whose encoding a result adopts although it is computed, and why; None where it has its own."""
    if node.domain:
        return None
    if node.op_type in target.forward_ties:
        return node.inputs[0], f"{node.op_type} passes the encoding of '{node.inputs[0]}' on"
    positions = dict(target.shared_results).get(node.op_type, ())
    if node.outputs.index(tensor) in positions and node.outputs[0]:
        return node.outputs[0], f"state of {node.op_type}, a step of '{node.outputs[0]}'"
    return None


def wanted_tensors(model: Model, target: Target) -> frozenset[str] | None:
    """Returns what is read, if need be through moved data, by an operator in front of which the target rounds.

    None where it rounds everything.
    """
    if not target.rounded_for:
        return None
    wanted: set[str] = set()
    for node in reversed(model.graph.nodes):
        if node.op_type in target.rounded_for and not node.domain:
            wanted.update(node.inputs)
        elif node.output in wanted and moves_data(model, node, target):
            wanted.add(node.inputs[0])
    return frozenset(wanted)


def adopted_roots(graph: Graph, target: Target, decided: Decided) -> dict[str, str]:
    """Returns roots that adopt another's encoding: what a Concat alone reads, if need be through moved data."""
    shared: dict[str, str] = {}
    for node in reversed(graph.nodes):
        result = decided.get(node.output)
        if node.op_type not in target.adopt_output or not isinstance(result, Site):
            continue
        for name in node.inputs:
            origin = _movable_origin(graph, name, decided)
            if origin is not None and origin != node.output:
                shared[origin] = node.output
    return shared


def follow(site: Site, decided: Decided, shared: Mapping[str, str]) -> Site:
    """Returns the site with the tensor at the end of its chain of ties as its root, and that one's grid."""
    origin, adopted = _end_of_ties(site, decided, shared)
    if origin.tensor == site.tensor:
        return site
    is_adopted = adopted is not None and site.root == site.tensor
    return replace(
        site,
        dtype=origin.dtype,
        symmetric=origin.symmetric,
        root=origin.tensor,
        reason=f"{site.reason}; adopts the encoding of '{adopted}'" if is_adopted else site.reason,
        fixed_range=origin.fixed_range,
        power_of_two=origin.power_of_two,
        ranges=origin.ranges,
    )


def differs(settings: Settings, root: Site) -> bool:
    """Tells whether a tensor that would share the encoding of `root` has other settings by its name."""
    own = (settings.dtype, settings.symmetric, settings.power_of_two, settings.ranges)
    is_other = own != (root.dtype, root.symmetric, root.power_of_two, root.ranges)
    return settings.is_named and (is_other or settings.fixed_range is not None)


def _movable_origin(graph: Graph, tensor: str, decided: Decided) -> str | None:
    """Returns the tensor whose encoding `tensor` has, if nothing but the way from there to here depends on it."""
    site = decided.get(tensor)
    while isinstance(site, Site) and site.kind == ACTIVATION and graph.num_readers(site.tensor) == 1:
        if site.root == site.tensor:
            return None if site.fixed_range is not None or site.tensor not in graph.producers else site.tensor
        node = graph.producers[site.tensor]
        if site.root != node.inputs[0]:
            return None
        site = decided.get(site.root)
    return None


def _end_of_ties(site: Site, decided: Decided, shared: Mapping[str, str]) -> tuple[Site, str | None]:
    adopted = None
    while True:
        next_name = site.root if site.root != site.tensor else shared.get(site.tensor)
        following = decided.get(next_name) if next_name is not None else None
        if not isinstance(following, Site):
            return site, adopted
        adopted = next_name if site.root == site.tensor else adopted
        site = following
