"""Which tensors are rounded, on which grid, and why: one plan, used by calibration, simulation and export alike.

Every floating tensor of the graph gets exactly one of: a `Site` (it has an encoding, its own or a shared one), a
`BiasSite` (int32 with a scale that follows from input and weight), or a `Skipped` entry with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ptqjax.config import QuantizationConfig, Target, load_target
from ptqjax.config.rules import described, set_fields
from ptqjax.errors import ConfigError
from ptqjax.ir import Model, Node
from ptqjax.quantize.bias import BiasSite, bias_sites
from ptqjax.quantize.granularity import Use, parameter_site, rounded_parameters, stored_uses, weight_site, weight_uses
from ptqjax.quantize.groups import Groups, find_groups, shift_of
from ptqjax.quantize.movement import moves_data
from ptqjax.quantize.rules import Settings, Settled, settle
from ptqjax.quantize.sites import ACTIVATION, CONSTANT, WEIGHT, Placement, Site, Skipped, kind_of
from ptqjax.quantize.tables import is_transposed, transposed_tables
from ptqjax.quantize.tensors import check_not_quantized, check_types, floating_tensors
from ptqjax.quantize.ties import Decided, adopted_roots, differs, follow, passed_on, wanted_tensors

__all__ = ["ACTIVATION", "CONSTANT", "WEIGHT", "Placement", "Site", "Skipped", "kind_of", "place"]


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


def place(model: Model, config: QuantizationConfig | None = None) -> Placement:
    """Returns the plan for `model`: what is rounded, on which grid, what shares an encoding, what stays in float.

    Raises:
        ConfigError: The target's file is unreadable, a pattern or rule matches no tensor, or a rule is only for
            tensors that have no grid of their own.
        ModelError: The model is quantized already, or a tensor to be rounded is not float32.
    """
    check_not_quantized(model)
    config = QuantizationConfig() if config is None else config
    target = load_target(config.target)
    floating = floating_tensors(model)
    uses, others = _all_uses(model, target), rounded_parameters(model, target)
    settled = settle(model, config, target, floating, (*uses, *others))
    plan = _Plan(
        model=model,
        target=target,
        settings=settled.by_tensor,
        groups=find_groups(model, target, config.supergroups),
        weights=uses,
        transposed=transposed_tables(model, uses),
        parameters=others,
        wanted=wanted_tensors(model, target),
    )
    layers = {site.bias: site for site in bias_sites(model)}
    decided: dict[str, Site | Skipped] = {}
    for tensor in floating:
        if tensor not in layers:
            decided[tensor] = _decision(plan, tensor, decided)
    placement = _with_biases(plan, decided, layers, _float_biases_by(config, target))
    _check_effects(settled, placement)
    check_types(model, (*(site.tensor for site in placement.sites), *(site.bias for site in placement.biases)))
    return placement


def _with_biases(plan: _Plan, decided: Decided, layers: Mapping[str, BiasSite], by: str) -> Placement:
    """Returns the plan of all tensors, from what was decided of those that are no layer's bias.

    Args:
        plan: What decides.
        decided: The decisions.
        layers: The layers with a bias, by bias.
        by: What leaves all biases in float; "" where they are integers.
    """
    integers = tuple(site for site in layers.values() if _has_grids(site, decided))
    names = {site.bias for site in integers}
    _check_biases(plan, names)
    decided = {**decided, **_in_float(plan, layers, names, by)}
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
        return _weight(plan, tensor)
    if tensor in plan.parameters:
        return parameter_site(tensor, settings, f"parameter of {plan.parameters[tensor]}")
    if tensor in plan.model.params:
        return _constant(plan, tensor)
    return _activation(plan, tensor, decided)


def _all_uses(model: Model, target: Target) -> dict[str, list[Use]]:
    uses = weight_uses(model)
    for tensor, others in stored_uses(model, target).items():
        uses[tensor] = [*others, *uses.get(tensor, ())]
    return uses


def _weight(plan: _Plan, tensor: str) -> Site:
    """Returns the site of a weight; one that is a table transposed has the table's grid, if that is to be had."""
    site = weight_site(plan.model, tensor, plan.weights[tensor], plan.settings[tensor])
    table = plan.transposed.get(tensor)
    if table is None or plan.settings[table].off:
        return site
    other = weight_site(plan.model, table, plan.weights[table], plan.settings[table])
    is_same = is_transposed(site, other) and not differs(plan.settings[tensor], other)
    return replace(site, root=table, reason=f"{site.reason}; the table '{table}' transposed") if is_same else site


# Biases


def _has_grids(site: BiasSite, decided: Decided) -> bool:
    """Tells whether a bias's scale follows from those of its input and weight, one for each channel."""
    x, weight = decided.get(site.input), decided.get(site.weight)
    is_activation = isinstance(x, Site) and x.kind == ACTIVATION
    return is_activation and isinstance(weight, Site) and weight.kind == WEIGHT and weight.block_size is None


def _float_biases_by(config: QuantizationConfig, target: Target) -> str:
    """Returns what leaves all biases in float, for people; "" where they are integers."""
    if (config.biases or target.biases) == "int32":
        return ""
    return "biases='float'" if config.biases else f"target {target.name!r}"


def _check_biases(plan: _Plan, biases: set[str]) -> None:
    """Checks that nothing leaves biases alone in float: they follow their layers."""
    others = {found.off for tensor, found in plan.settings.items() if tensor not in biases}
    alone = {plan.settings[name].off for name in biases} - others - {""}
    if alone:
        raise ConfigError(
            f"what is {min(alone)} matches only biases; a bias follows its layer: leave the layer's weight or input in "
            "float, or all biases by biases='float'"
        )


def _in_float(plan: _Plan, layers: Iterable[str], integers: set[str], by: str) -> dict[str, Skipped]:
    """Returns the biases that stay in float, with the reason."""
    found: dict[str, Skipped] = {}
    for name in layers:
        if name in integers and not by:
            continue
        reason = f"bias, added in float by {by}" if name in integers else plan.settings[name].off
        reason = reason or "bias of a layer whose input or weight stays in float"
        found[name] = Skipped(tensor=name, reason=reason)
    return found


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
    if np.size(plan.model.params[tensor]) == 1:
        return "a single number"
    if not set(operators) <= plan.target.constant_operands:
        return f"parameter of {', '.join(operators)}"
    if all(node.op_type in ("Min", "Max") for node in readers):
        return "bounds of an activation, one per channel"
    if spelled := {plan.groups.spelled.get(node.output, "") for node in readers} - {""}:
        return f"parameter of {', '.join(sorted(spelled))}"
    if all(_is_of_affine(plan.model, node) for node in readers):
        return "parameter of an affine map per channel, like that of a BatchNormalization"
    return ""


def _is_of_affine(model: Model, node: Node) -> bool:
    """Tells whether the node is the Mul or the Add of an affine map per channel."""
    producers = (model.graph.producers.get(name) for name in node.inputs)
    products = [node, *(found for found in producers if found is not None and node.op_type == "Add")]
    return any(shift_of(model, product) for product in products)


# Activations


def _activation(plan: _Plan, tensor: str, decided: Decided) -> Site | Skipped:
    if reason := _reason_to_skip(plan, tensor, decided):
        return Skipped(tensor=tensor, reason=reason)
    node, settings = plan.model.graph.producers.get(tensor), plan.settings[tensor]
    if node is None:
        return _activation_site(tensor, settings, "graph input", tensor)
    if moves_data(plan.model, node, plan.target):
        source = node.inputs[0]
        return _tied(plan, tensor, source, f"{node.op_type} moves the values of '{source}'", decided)
    if tensor in plan.groups.bounded:
        root = plan.groups.bounded[tensor]
        return _activation_site(tensor, settings, f"bounded by Min or Max into '{root}', whose encoding it has", root)
    fixed = dict(plan.target.fixed_ranges).get(node.op_type)
    tie = passed_on(node, tensor, plan.target)
    if tie is not None and fixed is None and settings.fixed_range is None:
        return _tied(plan, tensor, *tie, decided)
    return _activation_site(tensor, settings, f"result of {node.op_type}", tensor, fixed)


def _reason_to_skip(plan: _Plan, tensor: str, decided: Decided) -> str:
    """Returns why an activation stays in float, for people; "" where it does not."""
    root, node = plan.groups.bounded.get(tensor), plan.model.graph.producers.get(tensor)
    if root is not None and plan.settings[root].off:
        return f"bounded into '{root}', which stays in float"
    if plan.settings[tensor].on:
        return ""
    if tensor in plan.groups.inside:
        return plan.groups.inside[tensor]
    if plan.wanted is not None and tensor not in plan.wanted:
        return f"no operator reads it that target {plan.target.name!r} rounds for"
    if (
        node is not None
        and moves_data(plan.model, node, plan.target)
        and isinstance(decided.get(node.inputs[0]), Skipped)
    ):
        return f"{node.op_type} of '{node.inputs[0]}', which stays in float"
    return ""


def _tied(plan: _Plan, tensor: str, root: str, reason: str, decided: Decided) -> Site:
    """Returns the site of a tensor that shares the encoding of `root`, if that has one for activations.

    And if no rule by name differs.
    """
    settings, source = plan.settings[tensor], decided.get(root)
    node = plan.model.graph.producers[tensor]
    if not isinstance(source, Site) or source.kind == WEIGHT:  # a table has scales for its rows
        return _activation_site(tensor, settings, f"result of {node.op_type}", tensor)
    if differs(settings, _root_of(source, decided)):
        return _activation_site(tensor, settings, f"result of {node.op_type}, apart from '{root}'", tensor)
    return _activation_site(tensor, settings, reason, root)


def _root_of(site: Site, decided: Decided) -> Site:
    while site.root != site.tensor and isinstance(following := decided.get(site.root), Site):
        site = following
    return site


def _activation_site(
    tensor: str, settings: Settings, reason: str, root: str, fixed: tuple[float, float] | None = None
) -> Site:
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
    )


def _check_effects(settled: Settled, placement: Placement) -> None:
    """Checks that each rule that sets a grid is for one tensor at least that has such a grid of its own."""
    own = {site.tensor: site for site in placement.sites if site.root == site.tensor}
    for rule, matches in settled.matches:
        wanted = set(set_fields(rule)) - {"enabled"}
        if rule.optional or not wanted or any(wanted & _settable(own[name]) for name in matches if name in own):
            continue
        why = _why_without_effect(matches[-1], own, placement)  # results come after parameters
        raise ConfigError(f"rules: the {described(rule)} changes no grid, because {why}")


def _settable(site: Site) -> set[str]:
    """Returns the fields of a rule that mean something for a site."""
    fields = {"dtype", "least_bits", "symmetric", "ranges", "power_of_two"}
    return fields | {"granularity" if site.kind == WEIGHT else "fixed_range"}


def _why_without_effect(tensor: str, own: Mapping[str, Site], placement: Placement) -> str:
    if tensor in own:
        lacks = "known range; its values are in hand" if own[tensor].kind == WEIGHT else "granularity; it has one scale"
        return f"'{tensor}' ({own[tensor].kind}) has no {lacks}"
    site = placement.site(tensor)
    if site is not None:
        return f"'{tensor}' has the encoding of '{site.root}'; set it where the grid is"
    reasons = {entry.tensor: entry.reason for entry in placement.skipped}
    return f"'{tensor}' stays in float: {reasons.get(tensor, 'it is a bias, which follows its layer')}"
