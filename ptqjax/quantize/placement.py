"""Which tensors are rounded, on which grid, and why: one plan, used by calibration, simulation and export alike.

Every floating tensor of the graph gets exactly one of: a `Site` (it has an encoding, its own or a shared one), a
`BiasSite` (int32 with a scale that follows from input and weight), or a `Skipped` entry with the reason.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ptqjax.config import QuantizationConfig, Target, load_target, near_names
from ptqjax.errors import ConfigError
from ptqjax.ir import Graph, Model, Node, scalar_of
from ptqjax.kernels.ranges import GridKind, Symmetry, grid_kind
from ptqjax.quantize.bias import BiasSite, bias_sites
from ptqjax.quantize.groups import Groups, find_groups, shift_of
from ptqjax.quantize.tensors import check_not_quantized, check_types, floating_tensors

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
    """Type of the codes: an integer type, or one of `kernels.grid.FLOAT_FORMATS`."""
    symmetric: Symmetry
    """How 0 lies on the grid."""
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
    power_of_two: bool = False
    """Whether scales are powers of two."""
    scale_bits: int | None = None
    """For low-power blocks (LPBQ): bits of the integers that blocks' scales are multiples of the channel's by."""
    ranges: str = ""
    """The scheme that chooses the range, as `QuantizationConfig.ranges` has it; "": that of the configuration."""


def kind_of(site: Site) -> GridKind:
    """Returns what is known of a site's grid, which is of integers, before its range is."""
    return grid_kind(site.dtype, symmetric=site.symmetric, power_of_two=site.power_of_two)


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


@dataclass(frozen=True, slots=True)
class _Rules:
    """What decides about an activation."""

    config: QuantizationConfig
    target: Target
    groups: Groups
    excluded: Mapping[str, str]


def place(model: Model, config: QuantizationConfig | None = None) -> Placement:
    """Returns the plan for `model`: what is rounded, on which grid, what shares an encoding, what stays in float.

    Raises:
        ConfigError: The target's file is unreadable, or a pattern of `config.exclude` matches no tensor.
        ModelError: The model is quantized already, or a tensor to be rounded is not float32.
    """
    check_not_quantized(model)
    config = QuantizationConfig() if config is None else config
    target = load_target(config.target)
    floating = floating_tensors(model)
    excluded = _excluded(config.exclude, floating)
    weights = _weights(model, config)
    biases = _biases(model, weights, excluded)
    float_biases = {site.bias for site in bias_sites(model)} - {site.bias for site in biases}
    rules = _Rules(config, target, find_groups(model, target), excluded)
    decided: dict[str, Site | Skipped] = {}
    for tensor in floating:
        if tensor in excluded:
            decided[tensor] = Skipped(tensor=tensor, reason=f"excluded by the pattern {excluded[tensor]!r}")
        elif tensor in float_biases:
            decided[tensor] = Skipped(tensor=tensor, reason="bias of a layer whose input or weight stays in float")
        elif tensor in model.params:
            decided[tensor] = weights.get(tensor) or _constant(model, tensor, config, target)
        else:
            decided[tensor] = _activation(model, tensor, rules, decided)
    shared = _adopted_roots(model.graph, target, decided)
    sites = (_follow(site, decided, shared) for site in decided.values() if isinstance(site, Site))
    bias_names = {site.bias for site in biases}
    skipped = (entry for entry in decided.values() if isinstance(entry, Skipped) and entry.tensor not in bias_names)
    placement = Placement(
        sites=tuple(site for site in sites if site.tensor not in bias_names), biases=biases, skipped=tuple(skipped)
    )
    check_types(model, (*(site.tensor for site in placement.sites), *bias_names))
    return placement


def _excluded(patterns: tuple[str, ...], floating: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern in patterns:
        matches = fnmatch.filter(floating, pattern)
        if not matches:
            near = near_names(pattern, floating)
            raise ConfigError(f"exclude: the pattern {pattern!r} matches none of {len(floating)} tensors{near}")
        found.update(dict.fromkeys(matches, pattern))
    return found


def _weights(model: Model, config: QuantizationConfig) -> dict[str, Site]:
    uses: dict[str, list[tuple[Node, int, int]]] = {}
    for node in model.graph.nodes:
        for tensor, axis, summed in _operand_axes(node):
            if tensor in model.params:
                uses.setdefault(tensor, []).append((node, axis, summed))
    return {tensor: _weight(model, tensor, found, config) for tensor, found in uses.items()}


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


def _weight(model: Model, tensor: str, uses: list[tuple[Node, int, int]], config: QuantizationConfig) -> Site:
    reason = f"weight of {', '.join(sorted({node.op_type for node, _, _ in uses}))}"
    axis, block_size, exception = _granularity(model, tensor, uses, config)
    return Site(
        tensor=tensor,
        kind=WEIGHT,
        dtype=config.weights,
        symmetric=not config.weights.startswith("u"),
        root=tensor,
        reason=f"{reason}; {exception}" if exception else reason,
        axis=axis,
        block_size=block_size,
    )


def _granularity(
    model: Model, tensor: str, uses: list[tuple[Node, int, int]], config: QuantizationConfig
) -> tuple[int | None, int | None, str]:
    """Returns axis and block size of a weight's scales, and why they are not those of the configuration, if so."""
    if config.granularity == "tensor":
        return None, None, ""
    shape = np.shape(model.params[tensor])
    if len(shape) < 2:  # noqa: PLR2004 - a matrix or more
        return None, None, "one scale, because all values of a vector are summed: it has no channels"
    if len({(channel, summed) for _, channel, summed in uses}) > 1 or model.graph.num_readers(tensor) > len(uses):
        return None, None, "one scale, because its readers disagree on the channel axis"
    _, channel, summed = uses[0]
    if config.block_size is None:
        return channel, None, ""
    if shape[summed] <= config.block_size:  # blocks would only split a kernel's positions: a scale for each of them
        reason = f"a scale per channel, because {shape[summed]} summed values do not fill blocks of {config.block_size}"
        return channel, None, reason
    return summed, config.block_size, ""


def _biases(model: Model, weights: Mapping[str, Site], excluded: Mapping[str, str]) -> tuple[BiasSite, ...]:
    def is_placed(site: BiasSite) -> bool:
        in_float = site.input in excluded or site.weight in excluded or site.input in model.params
        return not in_float and site.weight in weights and weights[site.weight].block_size is None

    placed = tuple(site for site in bias_sites(model) if is_placed(site))
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
    if all(_is_of_affine(model, node) for node in readers):
        return Skipped(
            tensor=tensor, reason="parameter of an affine map per channel, like that of a BatchNormalization"
        )
    return Site(
        tensor=tensor,
        kind=CONSTANT,
        dtype=config.activations,
        symmetric=False,
        root=tensor,
        reason=f"constant operand of {', '.join(operators)}",
    )


def _is_of_affine(model: Model, node: Node) -> bool:
    """Tells whether the node is the Mul or the Add of an affine map per channel."""
    producers = (model.graph.producers.get(name) for name in node.inputs)
    products = [node, *(found for found in producers if found is not None and node.op_type == "Add")]
    return any(shift_of(model, product) for product in products)


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
