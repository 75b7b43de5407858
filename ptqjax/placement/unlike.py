"""Tensors of unlike parts: where one grid for all would leave a part few steps, and what is done about it.

By the rules of a target, what a Concat joins and what a Split takes apart share a grid. A grid per tensor is as coarse
as its widest part asks for: of scores from 0 to 1 beside boxes up to 640 nothing is left. Then the tensor stays in
float, and each part has the grid that it would have alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ptqjax.config import Target
from ptqjax.encodings.encoding import Encoding
from ptqjax.ir import Graph, Model, Node, Record
from ptqjax.placement.movement import keeps_all, moves_data
from ptqjax.placement.sites import ACTIVATION, WEIGHT, Placement, Site

TIMES_AS_COARSE = 8.0
"""Steps of a part's own grid that one step of the common grid has to be, to count as a loss: three bits."""
LEAST_STEPS = 32.0
"""Steps that a part is to have on a grid that is not its own: where fewer are left, its grid is given back to it."""
LEAST_STEPS_MADE = 16.0
"""The same where the tensor comes out of a product (Conv, Gemm, MatMul), which is then computed in float."""
LEAST_STEPS_READ = 4.0
"""The same where a product reads the tensor, which is then computed in float: hardly anything of the part is left."""

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_WITH_PARAMETERS = frozenset({"Add", "Div", "Max", "Min", "Mul", "Sub"})  # element by element, with a parameter
_BY_CHANNEL = frozenset(
    {"Abs", "AveragePool", "Clip", "GlobalAveragePool", "GlobalMaxPool", "LeakyRelu", "MaxPool", "Neg", "PRelu"}
    | {"ReduceMax", "ReduceMean", "ReduceMin", "Relu", "Resize", "Upsample"}
)
_NAME = "give_up_grids"


@dataclass(frozen=True, kw_only=True, slots=True)
class Joint:
    """A tensor that is made of others, or that others are cut out of, all on one grid."""

    tensor: str
    """The tensor."""
    members: tuple[str, ...]
    """It, and those that hold the same values, moved."""
    parts: tuple[str, ...]
    """The tensors that are joined."""
    least_steps: float
    """Steps of its grid that each of them is to have."""
    carried: tuple[str, ...] = ()
    """What operators by channel or element make of it: as unlike, and read by no product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Joints:
    """All of them under a plan, and what would have a grid of its own without them."""

    each: tuple[Joint, ...] = ()
    """In the order of the nodes."""
    untied: tuple[Site, ...] = ()
    """Activations that share a grid with one of them or of its parts, each as the root that it is not."""


def find_joints(model: Model, placement: Placement, target: Target) -> Joints:
    """Returns the tensors of more than one part under a plan."""
    sites = {site.tensor: site for site in placement.sites if site.kind != WEIGHT}
    origins = _origins(model, sites, target)
    members: dict[str, list[str]] = {}
    for tensor, origin in origins.items():
        members.setdefault(origin, []).append(tensor)
    parts = _parts(model, sites, origins, target)
    each = tuple(
        Joint(
            tensor=origin,
            members=tuple(members[origin]),
            parts=tuple(parts[origin]),
            least_steps=_least_steps(model.graph, sites, origin, members[origin]),
            carried=tuple(name for name in _carried(model, origin, target) if name in sites),
        )
        for origin in members
        if origin in parts
    )
    roots = {sites[name].root for joint in each for name in (joint.tensor, *joint.parts)}
    shared = [site for site in sites.values() if site.root in roots and site.root != site.tensor]
    untied = [site for site in shared if site.kind == ACTIVATION and origins[site.tensor] == site.tensor]
    return Joints(each=each, untied=tuple(replace(site, root=site.tensor) for site in untied))


def give_up(joints: Joints, own: Mapping[str, Encoding], target: Target) -> tuple[dict[str, str], list[Record]]:
    """Returns the tensors that are to stay in float -> the reason, and a record for each tensor of unlike parts.

    Args:
        joints: The tensors of more than one part.
        own: The grid that each tensor would have alone; of others nothing is said.
        target: Where sums are in fixed point there is no float: then the loss is recorded, and that is all.
    """
    reasons: dict[str, str] = {}
    records: list[Record] = []
    for joint in joints.each:
        lost = {part: steps for part, steps in _steps_left(joint, own).items() if steps < joint.least_steps}
        if not lost:
            continue
        part = min(lost, key=lambda name: lost[name])
        whole = own[joint.tensor]
        reason = f"one grid leaves its part '{part}' {lost[part]:.3g} of {float(whole.qmax - whole.qmin):.0f} steps"
        if not target.fixed_point:
            reasons[joint.tensor] = reason
            reasons |= dict.fromkeys(joint.carried, f"made of '{joint.tensor}', whose parts are unlike")
        records.append(_record(joint, reason, sorted(lost, key=lambda name: lost[name]), target))
    return reasons, records


def _record(joint: Joint, reason: str, lost: Sequence[str], target: Target) -> Record:
    advice = f"; target {target.name!r} has no float: give it 16 bits by a rule, or end the model before it"
    return Record(
        transform=_NAME,
        done=not target.fixed_point,
        what="left alone" if target.fixed_point else "left in float; its parts have grids of their own",
        where=(joint.tensor, *lost, *joint.carried),
        reason=reason + (advice if target.fixed_point else ""),
    )


def _steps_left(joint: Joint, own: Mapping[str, Encoding]) -> dict[str, float]:
    """Returns how many steps of the joint's grid each part reaches over, of those whose own grid is much finer."""
    whole = own.get(joint.tensor)
    if whole is None or not _is_uniform(whole):
        return {}
    parts = {name: own[name] for name in joint.parts if name in own and _is_uniform(own[name])}
    return {
        name: float(part.qmax - part.qmin) * float(part.scale) / float(whole.scale)
        for name, part in parts.items()
        if float(whole.scale) >= TIMES_AS_COARSE * float(part.scale)
    }


def _is_uniform(encoding: Encoding) -> bool:
    return encoding.axis is None and encoding.float_format is None


def _origins(model: Model, sites: Mapping[str, Site], target: Target) -> dict[str, str]:
    """Returns the tensors with a grid -> the first one that holds the same values, all of them, on that grid."""
    origins = {name: name for name in sites}
    for node in model.graph.nodes:
        source, result = sites.get(node.inputs[0] if node.inputs else ""), sites.get(node.output)
        if source is None or result is None or result.root != source.root:
            continue
        if keeps_all(node) and moves_data(model, node, target):
            origins[node.output] = origins[source.tensor]
    return origins


def _parts(
    model: Model, sites: Mapping[str, Site], origins: Mapping[str, str], target: Target
) -> dict[str, dict[str, None]]:
    """Returns the parts of each tensor that has some: what it is joined of, and what is cut out of it."""
    joined: dict[str, dict[str, None]] = {}
    for node in model.graph.nodes:
        inputs = [origins[name] for name in node.inputs if name in sites]
        if node.op_type in target.adopt_output and not node.domain and node.output in sites and len(inputs) > 1:
            joined[node.output] = {leaf: None for name in inputs for leaf in joined.get(name, {name: None})}
    cut: dict[str, dict[str, None]] = {}
    for source, result in reversed(list(_cuts(model, sites, target))):
        cut.setdefault(origins[source], {}).update({result: None, **cut.get(result, {})})
    return {name: joined.get(name, {}) | cut.get(name, {}) for name in (*joined, *cut)}


def _cuts(model: Model, sites: Mapping[str, Site], target: Target) -> Iterator[tuple[str, str]]:
    """Yields what some values are taken of, and where they go, on the same grid."""
    for node in model.graph.nodes:
        source = sites.get(node.inputs[0] if node.inputs else "")
        if source is not None and moves_data(model, node, target) and not keeps_all(node):
            yield from (
                (source.tensor, name) for name in node.outputs if name in sites and sites[name].root == source.root
            )


def _least_steps(graph: Graph, sites: Mapping[str, Site], origin: str, members: Sequence[str]) -> float:
    if any(_is_product(node) for name in members for node in graph.readers.get(name, ())):
        return LEAST_STEPS_READ
    node = graph.producers.get(origin)
    while node is not None and not _is_product(node) and node.inputs and node.inputs[0] not in sites:
        node = graph.producers.get(node.inputs[0])  # inside the group that makes it
    return LEAST_STEPS_MADE if node is not None and _is_product(node) else LEAST_STEPS


def _carried(model: Model, tensor: str, target: Target) -> list[str]:
    """Returns what is computed of a tensor by channel or element, one after the other, until a product reads it."""
    found: list[str] = []
    for node in model.graph.readers.get(tensor, ()):
        is_moved = keeps_all(node) and moves_data(model, node, target)
        if not is_moved and not _is_by_channel(model, node, tensor):
            continue
        further = [] if is_moved else [node.output]
        if is_moved or not any(map(_is_product, model.graph.readers.get(node.output, ()))):
            found += [*further, *_carried(model, node.output, target)]
    return found


def _is_by_channel(model: Model, node: Node, tensor: str) -> bool:
    """Tells whether each channel, or element, of a node's result is one of a tensor's, changed."""
    if node.domain or node.op_type not in _BY_CHANNEL | _WITH_PARAMETERS:
        return False
    others = [name for name in node.inputs if name != tensor]
    return node.op_type in _BY_CHANNEL or all(name in model.params for name in others)


def _is_product(node: Node) -> bool:
    return node.op_type in _PRODUCTS and not node.domain
