"""Which tensors are rounded, on which grid, and why: one plan, used by calibration, simulation and export alike.

Every floating tensor of the graph gets exactly one of: a `Site` (it has an encoding, its own or a shared one), a
`BiasSite` (int32 with a scale that follows from input and weight), or a `Skipped` entry with the reason.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from ptqjax.config import QuantizationConfig, near_names
from ptqjax.errors import ConfigError
from ptqjax.ir import Graph, Model, Node, only_reader, scalar_of
from ptqjax.quantize.bias import BiasSite, bias_sites
from ptqjax.quantize.target import Target, load_target
from ptqjax.quantize.tensors import floating_tensors

WEIGHT, ACTIVATION, CONSTANT = "weight", "activation", "constant"
"""Kinds of sites: a parameter that is multiplied and summed; what flows; a parameter treated like what flows."""

_SUMMED_AXIS = {"Conv": (0, 1), "ConvTranspose": (1, 0), "MatMul": (-1, -2)}  # (output channel, what is summed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A tensor that is rounded to a grid."""

    tensor: str
    """The tensor's name."""
    kind: str
    """`WEIGHT`, `ACTIVATION` or `CONSTANT`."""
    dtype: str
    """Integer type of the grid."""
    symmetric: bool
    """Whether 0 lies in the middle of the grid."""
    root: str
    """The tensor whose range decides: itself, or the one whose encoding is shared."""
    reason: str
    """Why the tensor has this grid, for people."""
    axis: int | None = None
    """Axis along which scales run; None for one scale."""
    block_size: int | None = None
    """Number of neighbours along `axis` that share a scale; None where not by blocks."""
    fixed_range: tuple[float, float] | None = None
    """The range where it is known beforehand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A floating tensor that stays as it is."""

    tensor: str
    """The tensor's name."""
    reason: str
    """Why it is not rounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The plan for one model under one configuration."""

    sites: tuple[Site, ...]
    """Tensors with an encoding: parameters by name, then graph inputs, then results in the order of the nodes."""
    biases: tuple[BiasSite, ...]
    """Biases that are int32 integers."""
    skipped: tuple[Skipped, ...]
    """Floating tensors that stay in float."""

    def site(self, tensor: str) -> Site | None:
        """Returns the site of `tensor`; None where it stays in float."""
        return next((site for site in self.sites if site.tensor == tensor), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Groups:
    """What supergroups decide about the tensors inside them."""

    inside: Mapping[str, str] = field(default_factory=dict)
    """Tensors that are not rounded -> the reason."""
    bounded: Mapping[str, str] = field(default_factory=dict)
    """Tensors that a Min or Max bounds -> the group's result, whose encoding they share."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """What decides about an activation."""

    config: QuantizationConfig
    target: Target
    groups: _Groups
    excluded: Mapping[str, str]


def place(model: Model, config: QuantizationConfig | None = None) -> Placement:
    """Returns the plan for `model`: what is rounded, on which grid, what shares an encoding, what stays in float.

    Raises:
        ConfigError: The target's file is unreadable, or a pattern of `config.exclude` matches no tensor.
    """
    config = QuantizationConfig() if config is None else config
    target = load_target(config.target)
    floating = floating_tensors(model)
    excluded = _excluded(config.exclude, floating)
    weights = _weights(model.graph, config)
    biases = _biases(model, weights, excluded)
    float_biases = {site.bias for site in bias_sites(model.graph)} - {site.bias for site in biases}
    rules = _Rules(config, target, _find_groups(model, target), excluded)
    decided: dict[str, Site | Skipped] = {}
    for tensor in floating:
        if tensor in excluded:
            decided[tensor] = Skipped(tensor=tensor, reason=f"excluded by the pattern {excluded[tensor]!r}")
        elif tensor in float_biases and _is_vector(model.params[tensor]):
            decided[tensor] = Skipped(tensor=tensor, reason="bias of a layer whose input or weight stays in float")
        elif tensor in model.params:
            decided[tensor] = weights.get(tensor) or _constant(model, tensor, config, target)
        else:
            decided[tensor] = _activation(model, tensor, rules, decided)
    shared = _adopted_roots(model.graph, target, decided)
    sites = (_follow(site, decided, shared) for site in decided.values() if isinstance(site, Site))
    bias_names = {site.bias for site in biases}
    skipped = (entry for entry in decided.values() if isinstance(entry, Skipped) and entry.tensor not in bias_names)
    return Placement(
        sites=tuple(site for site in sites if site.tensor not in bias_names), biases=biases, skipped=tuple(skipped)
    )


def _excluded(patterns: tuple[str, ...], floating: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern in patterns:
        matches = fnmatch.filter(floating, pattern)
        if not matches:
            near = near_names(pattern, floating)
            raise ConfigError(f"exclude: the pattern {pattern!r} matches none of {len(floating)} tensors{near}")
        found.update(dict.fromkeys(matches, pattern))
    return found


def _weights(graph: Graph, config: QuantizationConfig) -> dict[str, Site]:
    uses: dict[str, list[tuple[Node, int, int]]] = {}
    for node in graph.nodes:
        for tensor, axis, summed in _operand_axes(node):
            if tensor in graph.parameters:
                uses.setdefault(tensor, []).append((node, axis, summed))
    return {tensor: _weight(graph, tensor, found, config) for tensor, found in uses.items()}


def _operand_axes(node: Node) -> Iterator[tuple[str, int, int]]:
    """Yields the operands that may be weights, each with the axis of the output channel and the one that is summed."""
    if node.domain:
        return
    if node.op_type in _SUMMED_AXIS:
        channel, summed = _SUMMED_AXIS[node.op_type]
        yield node.inputs[1], channel, summed
    if node.op_type == "Gemm":
        channel = 0 if node.attribute("transB", 0) else 1
        yield node.inputs[1], channel, 1 - channel
        channel = 1 if node.attribute("transA", 0) else 0
        yield node.inputs[0], channel, 1 - channel
    if node.op_type == "MatMul":
        yield node.inputs[0], -2, -1


def _weight(graph: Graph, tensor: str, uses: list[tuple[Node, int, int]], config: QuantizationConfig) -> Site:
    nodes, axes = [node for node, _, _ in uses], {(axis, summed) for _, axis, summed in uses}
    channel, summed = uses[0][1:]
    reason = f"weight of {', '.join(sorted({node.op_type for node in nodes}))}"
    by_channel = config.granularity != "tensor"
    if by_channel and (len(axes) > 1 or graph.num_readers(tensor) > len(uses)):
        by_channel, reason = False, f"{reason}; one scale, because its readers disagree on the channel axis"
    block_size = config.block_size if by_channel else None
    return Site(
        tensor=tensor,
        kind=WEIGHT,
        dtype=config.weights,
        symmetric=not config.weights.startswith("u"),
        root=tensor,
        reason=reason,
        axis=None if not by_channel else channel if block_size is None else summed,
        block_size=block_size,
    )


def _biases(model: Model, weights: Mapping[str, Site], excluded: Mapping[str, str]) -> tuple[BiasSite, ...]:
    def is_placed(site: BiasSite) -> bool:
        in_float = site.input in excluded or site.weight in excluded or site.input in model.params
        return not in_float and site.weight in weights and weights[site.weight].block_size is None

    placed = tuple(site for site in bias_sites(model.graph) if is_placed(site) and _is_vector(model.params[site.bias]))
    alone = {excluded[site.bias] for site in placed if site.bias in excluded} - set(_reaching_others(placed, excluded))
    if alone:
        raise ConfigError(
            f"exclude: the pattern {min(alone)!r} matches only biases; a bias follows its layer: exclude the layer's "
            "weight or input"
        )
    return placed


def _reaching_others(placed: tuple[BiasSite, ...], excluded: Mapping[str, str]) -> Iterable[str]:
    biases = {site.bias for site in placed}
    return (pattern for tensor, pattern in excluded.items() if tensor not in biases)


def _is_vector(value: np.ndarray) -> bool:
    return value.ndim > 0 and value.size == value.shape[-1]


def _constant(model: Model, tensor: str, config: QuantizationConfig, target: Target) -> Site | Skipped:
    value = model.params[tensor]
    readers = model.graph.readers.get(tensor, ())
    operators = sorted({node.op_type for node in readers})
    if np.size(value) == 1:
        return Skipped(tensor=tensor, reason="a single number")
    if not set(operators) <= target.constant_operands:
        return Skipped(tensor=tensor, reason=f"parameter of {', '.join(operators)}")
    if _is_bound(model, tensor):
        return Skipped(tensor=tensor, reason="bounds of an activation, one per channel")
    return Site(
        tensor=tensor,
        kind=CONSTANT,
        dtype=config.activations,
        symmetric=False,
        root=tensor,
        reason=f"constant operand of {', '.join(operators)}",
    )


def _is_bound(model: Model, tensor: str) -> bool:
    return all(node.op_type in ("Min", "Max") for node in model.graph.readers.get(tensor, ()))


def _activation(model: Model, tensor: str, rules: _Rules, decided: Mapping[str, Site | Skipped]) -> Site | Skipped:
    config, target, groups = rules.config, rules.target, rules.groups
    node = model.graph.producers.get(tensor)
    if tensor in groups.inside:
        return Skipped(tensor=tensor, reason=groups.inside[tensor])
    if node is not None and _moves_data(model, node, target):
        source = node.inputs[0]
        if isinstance(decided.get(source), Skipped):
            return Skipped(tensor=tensor, reason=f"{node.op_type} of '{source}', which stays in float")
        return _activation_site(tensor, source, config, f"{node.op_type} moves the values of '{source}'")
    if tensor in groups.bounded:
        root = groups.bounded[tensor]
        if root in rules.excluded:
            return Skipped(tensor=tensor, reason=f"bounded into '{root}', which stays in float")
        return _activation_site(tensor, root, config, f"bounded by Min or Max into '{root}', whose encoding it has")
    reason = "graph input" if node is None else f"result of {node.op_type}"
    fixed = dict(target.fixed_ranges).get(node.op_type) if node is not None else None
    return _activation_site(tensor, tensor, config, reason, fixed)


def _activation_site(
    tensor: str, root: str, config: QuantizationConfig, reason: str, fixed: tuple[float, float] | None = None
) -> Site:
    return Site(
        tensor=tensor,
        kind=ACTIVATION,
        dtype=config.activations,
        symmetric=False,
        root=root,
        reason=reason,
        fixed_range=fixed,
    )


def _moves_data(model: Model, node: Node, target: Target) -> bool:
    if node.domain:
        return False
    if node.op_type != "Pad":
        return node.op_type in target.data_movement
    value = node.inputs[2] if len(node.inputs) > 2 else ""  # noqa: PLR2004 - Pad's third input
    is_zero = scalar_of(model, value) == 0 if value else node.attribute("value", 0.0) == 0
    return node.attribute("mode", "constant") != "constant" or is_zero


def _find_groups(model: Model, target: Target) -> _Groups:
    inside: dict[str, str] = dict(_find_gelus(model))
    bounded: dict[str, str] = {}
    used: set[str] = set(inside)
    for node in model.graph.nodes:
        if node.op_type not in target.heads or node.domain or node.output in used:
            continue
        chain = _chain(model, node, target)
        used.update(member.output for member in chain)
        label = "+".join(member.op_type for member in chain)
        for member, follower in pairwise(chain):
            if follower.op_type in ("Min", "Max"):
                bounded[member.output] = chain[-1].output
            else:
                inside[member.output] = f"inside {label}, which produces '{chain[-1].output}'"
    return _Groups(inside=inside, bounded=bounded)


def _chain(model: Model, head: Node, target: Target) -> list[Node]:
    """Returns the head and what follows it without rounding in between."""
    chain, has_curve = [head], False
    while (node := only_reader(model.graph, chain[-1].output)) is not None and not node.domain:
        previous = chain[-1]
        is_bias = previous.op_type == "MatMul" and node.op_type == "Add" and _adds_vector(model, node, previous.output)
        is_normalization = node.op_type == "BatchNormalization" and previous.op_type not in target.clamps
        is_bound = node.op_type in ("Min", "Max") and _other_is_parameter(model, node, previous.output)
        is_curve = node.op_type in target.activations and not has_curve and node.inputs[0] == previous.output
        is_clamp = node.op_type in target.clamps and node.inputs[0] == previous.output
        if not (is_bias or is_normalization or is_bound or is_curve or is_clamp):
            break
        has_curve = has_curve or is_curve
        chain.append(node)
    return chain


def _other_is_parameter(model: Model, node: Node, tensor: str) -> bool:
    others = [name for name in node.inputs if name != tensor]
    return len(others) == 1 and others[0] in model.params


def _adds_vector(model: Model, node: Node, tensor: str) -> bool:
    other = next((name for name in node.inputs if name != tensor), "")
    return other in model.params and _is_vector(model.params[other])


def _find_gelus(model: Model) -> Iterator[tuple[str, str]]:
    """Yields the tensors inside x * (1 + erf(x / sqrt 2)) / 2, in the ways that exporters spell it."""
    graph = model.graph
    for erf in graph.nodes:
        scaled = graph.producers.get(erf.inputs[0]) if erf.op_type == "Erf" else None
        plus_one = only_reader(graph, erf.output) if scaled is not None else None
        product = only_reader(graph, plus_one.output) if plus_one is not None else None
        if scaled is None or plus_one is None or product is None:
            continue
        if (scaled.op_type not in ("Div", "Mul")) or plus_one.op_type != "Add" or product.op_type != "Mul":
            continue
        x = scaled.inputs[0]
        other = next((name for name in product.inputs if name != plus_one.output), "")
        half = graph.producers.get(other)
        halved_before = half is not None and half.op_type == "Mul" and x in half.inputs
        if other != x and not halved_before:
            continue
        interior = [scaled.output, erf.output, plus_one.output]
        halved_after = None if halved_before else only_reader(graph, product.output)
        if halved_before:
            interior.append(other)
        elif halved_after is not None and halved_after.op_type == "Mul" and _has_number(model, halved_after):
            interior.append(product.output)
        result = halved_after.output if product.output in interior and halved_after is not None else product.output
        yield from ((name, f"inside GELU, which produces '{result}'") for name in interior)


def _has_number(model: Model, node: Node) -> bool:
    return any(scalar_of(model, name) is not None for name in node.inputs)


def _adopted_roots(graph: Graph, target: Target, decided: Mapping[str, Site | Skipped]) -> dict[str, str]:
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


def _movable_origin(graph: Graph, tensor: str, decided: Mapping[str, Site | Skipped]) -> str | None:
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


def _follow(site: Site, decided: Mapping[str, Site | Skipped], shared: Mapping[str, str]) -> Site:
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
    )


def _end_of_ties(
    site: Site, decided: Mapping[str, Site | Skipped], shared: Mapping[str, str]
) -> tuple[Site, str | None]:
    adopted = None
    while True:
        next_name = site.root if site.root != site.tensor else shared.get(site.tensor)
        following = decided.get(next_name) if next_name is not None else None
        if not isinstance(following, Site):
            return site, adopted
        adopted = next_name if site.root == site.tensor else adopted
        site = following
