"""Which parameters are weights, and along which of their axes scales run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ptqjax.config import FLOAT_DTYPES, Target
from ptqjax.config.settings import block_size_of
from ptqjax.errors import ConfigError
from ptqjax.ir import Model, Node
from ptqjax.ir.query import all_nodes
from ptqjax.kernels.float_formats import float_format
from ptqjax.kernels.grid import FLOAT_FORMATS
from ptqjax.placement.rules import Settings, num_bits
from ptqjax.placement.sites import CONSTANT, WEIGHT, Site

_RECURRENT = {"GRU": 3, "LSTM": 4, "RNN": 1}  # -> the number of gates
_SMALLEST_TABLE = 256  # numbers: of fewer, the scales weigh more than the rounding saves
_SHORTEST_ROW = 4  # numbers that a scale is worth
_SUMMED_AXIS = {"Conv": (0, 1), "ConvTranspose": (1, 0), "MatMul": (-1, -2)}  # (output channel, what is summed)


@dataclass(frozen=True, slots=True)
class Use:
    """How an operator uses a weight."""

    node: Node
    """The operator."""
    channel: int
    """The weight's axis of output channels."""
    summed: int
    """The weight's axis that is summed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scales:
    axis: int | None = None
    block_size: int | None = None
    why: str = ""


def weight_uses(model: Model) -> dict[str, list[Use]]:
    """Returns the parameters that operators multiply and sum, each with all its uses."""
    uses: dict[str, list[Use]] = {}
    for node in model.graph.nodes:
        for tensor, channel, summed in operand_axes(node):
            if tensor in model.params:
                uses.setdefault(tensor, []).append(Use(node, channel, summed))
    return uses


def stored_uses(model: Model, target: Target) -> dict[str, list[Use]]:
    """Returns the parameters that `target` has kept in integers beside `weight_uses`, each with all its uses.

    They are tables that Gather takes rows of, whose grid goes through it: Gather(Q(E)) = Q(Gather(E)); and what
    recurrent operators, those in subgraphs too, multiply inputs and states by.
    """
    uses: dict[str, list[Use]] = {}
    for node in all_nodes(model.graph):
        if node.op_type in target.stored_weights and not node.domain:
            for tensor, channel, summed in _stored_operands(model, node):
                uses.setdefault(tensor, []).append(Use(node, channel, summed))
    return uses


def _stored_operands(model: Model, node: Node) -> Iterator[tuple[str, int, int]]:
    if node.op_type in _RECURRENT:  # [directions, gates x hidden, inputs]
        yield from ((name, 1, 2) for name in node.inputs[1:3] if name in model.params)
    elif node.op_type == "Gather" and node.inputs[0] in model.params:
        shape = np.shape(model.params[node.inputs[0]])
        if math.prod(shape) >= _SMALLEST_TABLE:
            axis = int(node.attribute("axis", 0)) % len(shape)
            yield node.inputs[0], axis, len(shape) - (2 if axis == len(shape) - 1 else 1)


def rounded_parameters(model: Model, target: Target) -> dict[str, str]:
    """Returns the other parameters that `target` has rounded like weights -> the operator that reads them."""
    positions = dict(target.rounded_parameters)
    found: dict[str, str] = {}
    for node in model.graph.nodes:
        for position in positions.get(node.op_type, ()) if not node.domain else ():
            if position < len(node.inputs) and node.inputs[position] in model.params:
                found[node.inputs[position]] = node.op_type
    return found


def weight_site(model: Model, tensor: str, uses: list[Use], settings: Settings) -> Site:
    """Returns the site of a weight; a cast to 16 bits has no scales, whatever the granularity.

    Raises:
        ConfigError: Low-power blocks of floating-point codes are asked for.
    """
    scales = _scales(model, tensor, uses, settings.granularity)
    is_low_power = scales.block_size is not None and settings.granularity.startswith("lpbq")
    if is_low_power and settings.dtype in FLOAT_DTYPES:
        raise ConfigError(
            f"'{tensor}': granularity {settings.granularity!r} is for integers; {settings.dtype} has block:N"
        )
    if settings.dtype in FLOAT_FORMATS and not float_format(settings.dtype).has_scale:
        scales = _Scales()
    reason = f"weight of {', '.join(sorted({use.node.op_type for use in uses}))}"
    return Site(
        tensor=tensor,
        kind=WEIGHT,
        dtype=settings.dtype,
        symmetric=settings.symmetric,
        root=tensor,
        reason="; ".join(filter(None, (reason, scales.why, *settings.rules))),
        axis=scales.axis,
        block_size=scales.block_size,
        power_of_two=settings.power_of_two,
        scale_bits=num_bits(settings.dtype) if is_low_power else None,
        ranges=settings.ranges,
    )


def parameter_site(tensor: str, settings: Settings, reason: str) -> Site:
    """Returns the site of a parameter that has one scale."""
    return Site(
        tensor=tensor,
        kind=CONSTANT,
        dtype=settings.dtype,
        symmetric=settings.symmetric,
        root=tensor,
        reason="; ".join((reason, *settings.rules)),
        fixed_range=settings.fixed_range,
        power_of_two=settings.power_of_two,
        ranges=settings.ranges,
    )


def operand_axes(node: Node) -> Iterator[tuple[str, int, int]]:
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


def _scales(model: Model, tensor: str, uses: list[Use], granularity: str) -> _Scales:
    """Returns axis and block size of a weight's scales, and why they are not those asked for, if so."""
    if granularity == "tensor":
        return _Scales()
    if objection := _objection_to_several(model, tensor, uses):
        return _Scales(why=f"one scale, because {objection}")
    shape, size, use = np.shape(model.params[tensor]), block_size_of(granularity), uses[0]
    if size is None:
        return _Scales(axis=use.channel)
    if shape[use.summed] <= size:  # blocks would only split a kernel's positions: a scale for each of them
        reason = f"a scale per channel, because {shape[use.summed]} summed values do not fill blocks of {size}"
        return _Scales(axis=use.channel, why=reason)
    return _Scales(axis=use.summed, block_size=size)


def _objection_to_several(model: Model, tensor: str, uses: list[Use]) -> str:
    """Returns why a weight has one scale alone, or nothing."""
    shape = np.shape(model.params[tensor])
    if len(shape) < 2:  # noqa: PLR2004 - a matrix or more
        return "a vector has no channels"
    disagree = len({(use.channel, use.summed) for use in uses}) > 1
    if disagree or model.graph.num_readers(tensor) > len(uses):
        return "its readers disagree on the channel axis"
    is_table = uses[0].node.op_type == "Gather"
    has_short_rows = is_table and math.prod(shape) < _SHORTEST_ROW * shape[uses[0].channel]
    return f"a row of fewer than {_SHORTEST_ROW} numbers is not worth a scale" if has_short_rows else ""


def all_uses(model: Model, target: Target) -> dict[str, list[Use]]:
    """Returns `weight_uses` together with `stored_uses`, these first."""
    uses = weight_uses(model)
    for tensor, others in stored_uses(model, target).items():
        uses[tensor] = [*others, *uses.get(tensor, ())]
    return uses
