"""Supergroups: runs of operators that a runtime computes in one kernel, so that nothing is rounded inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ptqjax.config import Target
from ptqjax.ir import Model, Node, bias_behind, only_reader
from ptqjax.placement.pieces import find_pieces


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """What supergroups decide about the tensors inside them."""

    inside: Mapping[str, str] = field(default_factory=dict)
    """Tensors that are not rounded -> the reason."""
    bounded: Mapping[str, str] = field(default_factory=dict)
    """Tensors that a Min or Max bounds -> the group's result, whose encoding they share."""
    spelled: Mapping[str, str] = field(default_factory=dict)
    """What nodes write that spell a function together -> the function's name, for people."""


def find_groups(model: Model, target: Target, supergroups: Sequence[tuple[str, ...]] = ()) -> Groups:
    """Returns the tensors inside the supergroups of `model`; no operator is in two.

    First come the runs that `target` and `supergroups` list, the longest first: operators of these types, each the only
    reader of the one before; depthwise convolutions are no exception. Then a head with what follows it: a head is a
    product, a sum or a normalization; a bias, the shift of an affine map per channel, a batch norm, clamps, constant
    bounds and one activation function may follow. Before all of them, functions spelled in pieces (`find_pieces`).
    Source: the fusions that `target` names.
    """
    pieces = [each for each in find_pieces(model) if each.name not in target.integer_pieces] if target.pieces else []
    inside = {name: f"inside {each.name}, which produces '{each.result}'" for each in pieces for name in each.inside}
    spelled = {node.output: each.name for each in pieces for node in each.nodes}
    bounded: dict[str, str] = {}
    used: set[str] = set(inside)
    chains = _find_runs(model, (*target.supergroups, *supergroups), used)
    for node in model.graph.nodes:
        if (node.op_type in target.heads or node.op_type == "MatMul") and not node.domain and node.output not in used:
            chains.append(_chain(model, node, target, used))
            used.update(member.output for member in chains[-1])
    for chain in chains:
        label = "+".join(member.op_type for member in chain)
        for member, follower in pairwise(chain):
            if follower.op_type in ("Min", "Max"):
                bounded[member.output] = chain[-1].output
            else:
                inside[member.output] = f"inside {label}, which produces '{chain[-1].output}'"
    return Groups(inside=inside, bounded=bounded, spelled=spelled)


def _find_runs(model: Model, runs: Sequence[tuple[str, ...]], used: set[str]) -> list[list[Node]]:
    """Returns the nodes of each run of operators that is listed, and adds their results to `used`."""
    chains: list[list[Node]] = []
    for run in sorted(set(runs), key=lambda run: (-len(run), run)):
        for node in model.graph.nodes:
            chain = _run_from(model, node, run)
            if chain and used.isdisjoint(member.output for member in chain):
                chains.append(chain)
                used.update(member.output for member in chain)
    return chains


def _run_from(model: Model, node: Node, run: tuple[str, ...]) -> list[Node]:
    """Returns the nodes of the run that begins at `node`; empty where none does."""
    chain: list[Node] = []
    following: Node | None = node
    for operator in run:
        if following is None or following.domain or following.op_type != operator:
            return []
        chain.append(following)
        following = only_reader(model.graph, following.output)
    return chain


def _chain(model: Model, head: Node, target: Target, used: set[str]) -> list[Node]:
    """Returns the head and what follows it without rounding in between."""
    chain, has_curve = [head], False
    while (node := only_reader(model.graph, chain[-1].output)) is not None and not node.domain:
        if node.output in used:
            break
        previous = chain[-1]
        is_bias = previous.op_type == "MatMul" and _has_vector_behind(model, previous)
        is_bias |= shift_of(model, previous) == node.output
        if not is_bias and head.op_type not in target.heads:
            break
        is_normalization = node.op_type == "BatchNormalization" and previous.op_type not in target.clamps
        is_bound = node.op_type in ("Min", "Max") and _other_is_parameter(model, node, previous.output)
        is_curve = node.op_type in target.activations and not has_curve and node.inputs[0] == previous.output
        is_clamp = node.op_type in target.clamps and node.inputs[0] == previous.output
        if not (is_bias or is_normalization or is_bound or is_curve or is_clamp):
            break
        has_curve = has_curve or is_curve
        chain.append(node)
    return chain


def shift_of(model: Model, product: Node) -> str:
    """Returns the result of the Add that makes a Mul an affine map per channel, k x + t; "" where there is none.

    So a batch norm that could not be folded is written: k and t are parameters of one shape [c, 1, ...].
    """
    add = only_reader(model.graph, product.output)
    if product.op_type != "Mul" or product.domain or add is None or add.op_type != "Add" or add.domain:
        return ""
    shapes = [np.shape(model.params[name]) for node in (product, add) for name in node.inputs if name in model.params]
    is_per_channel = len(shapes) == 2 and len(shapes[0]) > 1 and shapes[0][0] > 1 and set(shapes[0][1:]) == {1}  # noqa: PLR2004
    return add.output if is_per_channel and shapes[0] == shapes[1] else ""


def _other_is_parameter(model: Model, node: Node, tensor: str) -> bool:
    others = [name for name in node.inputs if name != tensor]
    return len(others) == 1 and others[0] in model.params


def _has_vector_behind(model: Model, product: Node) -> bool:
    """Tells whether a bias of one number per column is added: a single number for all is an Add of its own."""
    found = bias_behind(model, product)
    return found is not None and np.size(model.params[found[1]]) == np.shape(model.params[product.inputs[1]])[-1]
