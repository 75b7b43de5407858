"""Which tensors are rounded, on which grid, and why: one plan, used by calibration, simulation and export alike.

Every floating tensor of the graph gets exactly one of: a `Site` (it has an encoding, its own or a shared one), a
`BiasSite` (int32 with a scale that follows from input and weight), or a `Skipped` entry with the reason.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ptqjax.config import RUN_TIME, QuantizationConfig, Target, load_target
from ptqjax.encodings.biases import BiasSite, bias_sites
from ptqjax.ir import Model, Node, Origin, only_reader, origins_of
from ptqjax.placement.biases import biases_in_float, check_biases, float_biases_by, has_grids
from ptqjax.placement.counting import WithoutNever
from ptqjax.placement.effects import check_effects
from ptqjax.placement.granularity import Use, all_uses, parameter_site, rounded_parameters, weight_site
from ptqjax.placement.movement import keeps_all, moves_data
from ptqjax.placement.never import Nevers, find_nevers
from ptqjax.placement.repaid import unrepaid
from ptqjax.placement.rules import Settings, settle
from ptqjax.placement.run_time import at_run_time, check_tied, rounded_reads, stores_zero_points
from ptqjax.placement.shared import Decided, adopted_roots, differs, follow, passed_on, wanted_tensors
from ptqjax.placement.sites import ACTIVATION, CONSTANT, WEIGHT, Placement, Site, Skipped, kind_of
from ptqjax.placement.supergroups import Groups, find_groups, shift_of
from ptqjax.placement.tables import is_transposed, transposed_tables
from ptqjax.placement.tensors import check_not_quantized, check_types, floating_tensors

__all__ = ["ACTIVATION", "CONSTANT", "WEIGHT", "Placement", "Site", "Skipped", "kind_of", "place", "place_as_found"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What decides about a tensor."""

    model: Model
    target: Target
    settings: Mapping[str, Settings]
    groups: Groups
    weights: Mapping[str, list[Use]]
    """Parameters that are multiplied and summed, and tables -> their uses."""
    transposed: Mapping[str, str]
    """Weights that are a table transposed -> the table."""
    parameters: Mapping[str, str]
    """Other parameters that are rounded like weights -> the operator that reads them."""
    wanted: frozenset[str] | None
    """The activations to be rounded; None for all."""
    apart: Mapping[str, str]
    """Activations that are left in float because their parts are unlike -> the reason."""
    unrepaid: Mapping[str, str]
    """Tensors whose rounding no integer kernel repays -> the reason."""
    origins: Mapping[str, Origin]
    """What the values of each tensor depend on."""
    run_time: str = ""
    """What activations are in place of a type, one of `RUN_TIME`; "" where they have one."""
    reads: dict[tuple[str, int | None], list[Node]] = field(default_factory=dict)
    """The products that find grids at run time, by what they read."""
    nevers: Nevers
    """What values that mean "never" decide."""


def place(
    model: Model, config: QuantizationConfig | None = None, *, apart: Mapping[str, str] | None = None
) -> Placement:
    """Returns the plan for `model`: what is rounded, on which grid, what shares an encoding, what stays in float.

    Args:
        model: The model.
        config: Types, granularity, target; None: the defaults.
        apart: Activations that stay in float, with the reason, and as long as their values are but moved: what they are
            made of, and what is cut out of them, has grids of its own (`unlike`).

    Raises:
        ConfigError: The target's file is unreadable, a pattern or rule matches no tensor, or a rule is only for
            tensors that have no grid of their own.
        ModelError: The model is quantized already, or a tensor to be rounded is not float32.
    """
    check_not_quantized(model)
    config = QuantizationConfig() if config is None else config
    target = load_target(config.target)
    floating = floating_tensors(model)
    uses, others = all_uses(model, target), rounded_parameters(model, target)
    settled = settle(model, config, target, floating, (*uses, *others))
    groups = find_groups(model, target, config.supergroups)
    off = frozenset(tensor for tensor, found in settled.by_tensor.items() if found.off)
    plan = _Plan(
        model=model,
        target=target,
        settings=settled.by_tensor,
        groups=groups,
        weights=uses,
        transposed=transposed_tables(model, uses),
        parameters=others,
        wanted=wanted_tensors(model, target),
        apart=apart or {},
        unrepaid={} if config.activations in RUN_TIME else unrepaid(model, target, groups, off),
        run_time=config.activations if config.activations in RUN_TIME else "",
        origins=origins_of(model.graph),
        nevers=Nevers() if config.compatibility else find_nevers(model),
    )
    layers = {site.bias: site for site in bias_sites(model)}
    decided: dict[str, Site | Skipped] = {}
    for tensor in floating:
        if tensor in model.params and tensor not in layers:
            decided[tensor] = _decision(plan, tensor, decided)
    if config.activations == "dynamic":
        plan = replace(plan, reads=rounded_reads(model, target, decided))
    for tensor in floating:
        if tensor not in model.params:
            decided[tensor] = _decision(plan, tensor, decided)
    placement = _with_biases(plan, decided, layers, float_biases_by(config, target))
    check_effects(settled, placement)
    check_types(model, (*(site.tensor for site in placement.sites), *(site.bias for site in placement.biases)))
    return placement


def place_as_found(model: Model, config: QuantizationConfig, encodings: Container[str]) -> Placement:
    """Returns the plan that encodings of `calibrate` follow: what has none because its parts are unlike is in float."""
    placement = place(model, config)
    missing = [site.tensor for site in placement.sites if site.kind == ACTIVATION and site.tensor not in encodings]
    return place(model, config, apart=dict.fromkeys(missing, "its parts are unlike")) if missing else placement


def _with_biases(plan: _Plan, decided: Decided, layers: Mapping[str, BiasSite], by: str) -> Placement:
    """Returns the plan of all tensors, from what was decided of those that are no layer's bias.

    Args:
        plan: What decides.
        decided: The decisions.
        layers: The layers with a bias, by bias.
        by: What leaves all biases in float; "" where they are integers.
    """
    integers = tuple(site for site in layers.values() if has_grids(site, decided))
    names = {site.bias for site in integers}
    check_biases(plan.settings, names)
    decided = {**decided, **biases_in_float(plan.settings, layers, names, by)}
    order = [decided[tensor] for tensor in plan.settings if tensor in decided]
    shared = adopted_roots(plan.model.graph, plan.target, decided)
    return Placement(
        sites=tuple(follow(site, decided, shared) for site in order if isinstance(site, Site)),
        biases=() if by else integers,
        skipped=tuple(entry for entry in order if isinstance(entry, Skipped)),
        float_biases=tuple(site.bias for site in integers) if by else (),
    )


def _decision(plan: _Plan, tensor: str, decided: Decided) -> Site | Skipped:
    settings = plan.settings[tensor]
    if settings.off:
        return Skipped(tensor=tensor, reason=settings.off)
    if tensor in plan.weights:
        operators = "" if settings.is_asked_for else _without_kernel(plan, tensor)
        reason = f"weight of {operators}, which target {plan.target.name!r} has in float"
        return Skipped(tensor=tensor, reason=reason) if operators else _weight(plan, tensor)
    if tensor in plan.parameters:
        return parameter_site(tensor, settings, f"parameter of {plan.parameters[tensor]}")
    if plan.run_time:
        return at_run_time(plan.model.graph, tensor, plan.reads, plan.run_time)
    return _constant(plan, tensor) if tensor in plan.model.params else _activation(plan, tensor, decided)


def _without_kernel(plan: _Plan, weight: str) -> str:
    """Returns the operators that read a weight where the target computes none of them in integers; "" elsewhere."""
    operators = sorted({use.node.op_type for use in plan.weights[weight]})
    taken = plan.target.products | plan.target.stored_weights
    return "" if not plan.unrepaid or taken.intersection(operators) else ", ".join(operators)


def _weight(plan: _Plan, tensor: str) -> Site:
    """Returns the site of a weight; one that is a table transposed has the table's grid, if that is to be had."""
    site = _weight_site(plan, tensor)
    table = plan.transposed.get(tensor)
    if table is None or plan.settings[table].off:
        return site
    other = _weight_site(plan, table)
    is_same = is_transposed(site, other)
    if plan.run_time:
        check_tied(site, other, is_same=is_same)
    return replace(site, root=table, reason=f"{site.reason}; the table '{table}' transposed") if is_same else site


def _weight_site(plan: _Plan, tensor: str) -> Site:
    """Returns the site of a weight by itself.

    A zero point that is stored in any case is used, unless it is set otherwise.
    """
    settings, uses = plan.settings[tensor], plan.weights[tensor]
    is_asymmetric = settings.given_symmetry is None and stores_zero_points(plan.target, plan.run_time, settings, uses)
    return weight_site(plan.model, tensor, uses, replace(settings, given_symmetry=False) if is_asymmetric else settings)


# Parameters


def _constant(plan: _Plan, tensor: str) -> Site | Skipped:
    readers = plan.model.graph.readers.get(tensor, ())
    operators = sorted({node.op_type for node in readers})
    settings = plan.settings[tensor]
    if not settings.on and (reason := _reason_for_float(plan, tensor, readers)):
        return Skipped(tensor=tensor, reason=reason)
    return parameter_site(tensor, settings, f"constant operand of {', '.join(operators)}")


def _reason_for_float(plan: _Plan, tensor: str, readers: tuple[Node, ...]) -> str:
    operators = sorted({node.op_type for node in readers})
    if reason := _by_size(plan, tensor, readers) or plan.nevers.in_float.get(tensor, ""):
        return reason
    if not set(operators) <= plan.target.constant_operands:
        return f"parameter of {', '.join(operators)}"
    if all(node.op_type in ("Min", "Max") for node in readers):
        return "bounds of an activation, one per channel"
    if spelled := {plan.groups.spelled.get(node.output, "") for node in readers} - {""}:
        return f"parameter of {', '.join(sorted(spelled))}"
    if all(_is_of_affine(plan.model, node) for node in readers):
        return "parameter of an affine map per channel, like that of a BatchNormalization"
    return _unrepaid(plan, tensor)


def _by_size(plan: _Plan, tensor: str, readers: tuple[Node, ...]) -> str:
    size = np.size(plan.model.params[tensor])
    if size > 1 or (size == 1 and _reaches_a_kernel(plan, tensor, readers)):
        return ""
    return "a single number" if size else "has no values"


def _reaches_a_kernel(plan: _Plan, number: str, readers: tuple[Node, ...]) -> bool:
    """Tells whether a number's readers are integer kernels for want of nothing but its grid, which holds it exactly."""
    return bool(plan.target.companions) and all(
        node.op_type in ("Add", "Mul")
        and number not in plan.unrepaid
        and node.output not in {*plan.unrepaid, *plan.groups.inside, *plan.groups.bounded}
        for node in readers
    )


def _is_of_affine(model: Model, node: Node) -> bool:
    """Tells whether the node is the Mul or the Add of an affine map per channel."""
    producers = (model.graph.producers.get(name) for name in node.inputs)
    products = [node, *(found for found in producers if found is not None and node.op_type == "Add")]
    return any(shift_of(model, product) for product in products)


# Activations

_WITHOUT_DATA = {
    Origin.CONSTANT: "depends on no input, and is computed beforehand",
    Origin.SIZE: "depends on sizes alone, on no element of an input",
}


def _activation(plan: _Plan, tensor: str, decided: Decided) -> Site | Skipped:
    if reason := _reason_to_skip(plan, tensor, decided):
        return Skipped(tensor=tensor, reason=reason)
    node = plan.model.graph.producers.get(tensor)
    if node is None:
        return _own_site(plan, tensor, "graph input")
    if moves := _moves_values(plan, node):
        return _tied(plan, tensor, node.inputs[0], moves, decided)
    if tensor in plan.groups.bounded:
        root = plan.groups.bounded[tensor]
        reason = f"bounded by Min or Max into '{root}', whose encoding it has"
        return _activation_site(plan, tensor, reason, root)
    fixed = dict(plan.target.fixed_ranges).get(node.op_type)
    tie = passed_on(node, tensor, plan.target)
    if tie is not None and fixed is None and plan.settings[tensor].fixed_range is None:
        return _tied(plan, tensor, *tie, decided)
    return _own_site(plan, tensor, f"result of {node.op_type}", fixed)


def _moves_values(plan: _Plan, node: Node) -> str:
    """Returns why the node's result has the encoding of its first input, whose values it moves; "" where it has not."""
    if moves_data(plan.model, node, plan.target):
        return f"{node.op_type} moves the values of '{node.inputs[0]}'"
    if node.op_type == "Pad" and isinstance(plan.nevers.counted.get(node.output), WithoutNever):
        return f"Pad moves the values of '{node.inputs[0]}', and adds what means never"
    return ""


def _own_site(plan: _Plan, tensor: str, reason: str, fixed: tuple[float, float] | None = None) -> Site:
    """Returns the site of a tensor with an encoding of its own, found from the values that count."""
    said = "; ".join(filter(None, (reason, plan.nevers.reasons.get(tensor))))
    return _activation_site(plan, tensor, said, tensor, fixed)


def _reason_to_skip(plan: _Plan, tensor: str, decided: Decided) -> str:
    """Returns why an activation stays in float, for people; "" where it does not."""
    if reason := _WITHOUT_DATA.get(plan.origins[tensor]):
        return reason
    root, node = plan.groups.bounded.get(tensor), plan.model.graph.producers.get(tensor)
    if root is not None and (plan.settings[root].off or root in plan.unrepaid or root in plan.nevers.in_float):
        return f"bounded into '{root}', which stays in float"
    return "" if plan.settings[tensor].on else _reason_by_place(plan, tensor, node, decided)


def _reason_by_place(plan: _Plan, tensor: str, node: Node | None, decided: Decided) -> str:
    """Returns why an activation that no rule asks for is left alone: what stands around it."""
    kept = "" if tensor in plan.groups.bounded else _unrepaid(plan, tensor)
    found = (plan.groups.inside.get(tensor), plan.nevers.in_float.get(tensor), plan.apart.get(tensor), kept)
    if reason := next(filter(None, found), ""):
        return reason
    if node is not None and (mean := _mean_by_size(plan, node)):
        return f"inside a mean, sum over size, which produces '{mean}'"
    if plan.wanted is not None and tensor not in plan.wanted:
        return f"no operator reads it that target {plan.target.name!r} rounds for"
    if node is not None and tensor not in plan.nevers.reasons and _shares_float(plan, node, decided):
        return f"{node.op_type} of '{node.inputs[0]}', which stays in float"
    return ""


def _shares_float(plan: _Plan, node: Node, decided: Decided) -> bool:
    """Tells whether a node moves values that stay in float: all of them, or a part of what is in float for its own."""
    if not moves_data(plan.model, node, plan.target) or not isinstance(decided.get(node.inputs[0]), Skipped):
        return False
    return keeps_all(node) or not plan.apart or _origin(plan, node.inputs[0]) not in plan.apart


def _origin(plan: _Plan, tensor: str) -> str:
    """Returns the tensor whose values, all of them, `tensor` holds."""
    while (node := plan.model.graph.producers.get(tensor)) is not None and tensor not in plan.apart:
        if not (keeps_all(node) and moves_data(plan.model, node, plan.target)):
            break
        tensor = node.inputs[0]
    return tensor


def _unrepaid(plan: _Plan, tensor: str) -> str:
    """Returns why no integer kernel repays rounding a tensor that no rule asks for; "" where one does."""
    return "" if plan.settings[tensor].is_asked_for else plan.unrepaid.get(tensor, "")


def _mean_by_size(plan: _Plan, node: Node) -> str:
    """Returns the mean that a sum becomes by a size: unlike the sum, it grows with no size; "" where it is none."""
    division = only_reader(plan.model.graph, node.output) if node.op_type == "ReduceSum" else None
    if division is None or division.op_type not in ("Div", "Mul"):
        return ""
    is_by_size = any(plan.origins[name] == Origin.SIZE for name in division.inputs)
    return division.output if is_by_size else ""


def _tied(plan: _Plan, tensor: str, root: str, reason: str, decided: Decided) -> Site:
    """Returns the site of a tensor that shares the encoding of `root`, if that has one for activations.

    And if no rule by name differs.
    """
    settings, source = plan.settings[tensor], decided.get(root)
    node = plan.model.graph.producers[tensor]
    if not isinstance(source, Site) or source.kind == WEIGHT:  # a table has scales for its rows
        return _own_site(plan, tensor, f"result of {node.op_type}")
    if differs(settings, _root_of(source, decided)):
        return _own_site(plan, tensor, f"result of {node.op_type}, apart from '{root}'")
    return _activation_site(plan, tensor, reason, root)


def _root_of(site: Site, decided: Decided) -> Site:
    while site.root != site.tensor and isinstance(following := decided.get(site.root), Site):
        site = following
    return site


def _activation_site(
    plan: _Plan, tensor: str, reason: str, root: str, fixed: tuple[float, float] | None = None
) -> Site:
    settings = plan.settings[tensor]
    rules = settings.rules if root == tensor else ()
    return Site(
        tensor=tensor,
        kind=ACTIVATION,
        dtype=settings.dtype,
        symmetric=settings.symmetric,
        root=root,
        reason="; ".join((reason, *rules)),
        fixed_range=(settings.fixed_range or fixed) if root == tensor else None,
        power_of_two=settings.power_of_two,
        ranges=settings.ranges,
        counted=plan.nevers.counted.get(tensor),
    )
