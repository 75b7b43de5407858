"""High-bias absorption: a part of a channel that is always there moves from its bias into the next layer's bias.

Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019), section 4.1.3.
There the part is mean - 3 std, and what falls below is lost: "statistics". By default it is what provably never is
missing: "exact".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ptqjax.errors import ConfigError, DataError
from ptqjax.ir import Model, Record, Report, Statistics
from ptqjax.kernels.absorption import mass_below, nearly_always_there
from ptqjax.kernels.grouped import respond_to_constant
from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.precision import is_traced, widened
from ptqjax.transforms.activations import limits_of, with_limits
from ptqjax.transforms.bounds import Bounds, channel_bounds
from ptqjax.transforms.interfaces import Interface, find_interfaces
from ptqjax.transforms.linear import Edit, edited, linear_layers
from ptqjax.transforms.weights import WeightAndBias, weights_of, write_back

NAME = "absorb_biases"
"""What records of absorption are called."""
_WAYS = ("exact", "statistics")
_WORTHWHILE = 1e-3  # of the channel's own magnitude: less is rounding, or what an earlier run left


@dataclass(frozen=True, kw_only=True)
class _Amount:
    """How much of each channel moves, and what that costs."""

    channels: Any
    """The amount, per channel."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What else the record tells."""
    reason: str = ""
    """What the reader should know."""


def absorb_biases(model: Model, *, by: str = "exact", minima: Mapping[str, Any] | None = None) -> tuple[Model, Report]:
    """Returns the model with biases moved into the next layer, and what was moved or left, interface by interface.

    Between two layers without an activation the mean is moved (where `statistics` know it): any amount keeps the
    function. Behind Relu, Clip and the like a channel's amount must pass the activation unchanged (upper limits move
    along). The next layer must not pad: zeros at the border would stay.

    Args:
        model: The model, its batch norms folded.
        by: "exact" moves the least value that a channel can have: the function is kept. "statistics" moves
            max(0, mean - 3 std) by the model's `statistics`: approximate, the part of a channel below that is lost.
            The record then tells the largest "clipped mass": the probability, for a normal variable, to lie below.
        minima: With "statistics": least value per channel [c] seen on data, by the name of the tensor that a layer
            produces; there max(0, minimum) is moved in place of mean - 3 std, which loses nothing of that data.

    Raises:
        ConfigError: `by` is unknown, or `minima` are given with "exact".
        DataError: The minima of a tensor are not one finite number per channel.
    """
    _check(by, minima)
    layers = linear_layers(model)
    interfaces, _ = find_interfaces(model, layers)
    bounds = channel_bounds(model, layers) if interfaces and by == "exact" else {}
    changed: dict[str, WeightAndBias] = {}
    edits: list[Edit] = []
    statistics: dict[str, Statistics] = {}
    records: list[Record] = []
    for interface in interfaces:
        found = _movable(model, interface, bounds if by == "exact" else None, minima or {})
        records.append(_record(interface, found))
        if isinstance(found, str) or not records[-1].done:
            continue
        amount = found.channels
        view, bias = weights_of(model, interface.producer, changed)
        changed[interface.producer.output] = view, bias - amount
        view, bias = weights_of(model, interface.consumer, changed)
        changed[interface.consumer.output] = view, bias + respond_to_constant(view, amount)
        edits += _shifted_limits(model, interface, amount)
        known = {name: model.statistics[name] for name in interface.tensors if name in model.statistics}
        statistics |= {name: Statistics(mean=was.mean - amount, std=was.std) for name, was in known.items()}
    return edited(model, [*edits, *write_back(model, layers, changed)], statistics), tuple(records)


def _check(by: str, minima: Mapping[str, Any] | None) -> None:
    if by not in _WAYS:
        raise ConfigError(f"by={by!r} is unknown; expected one of {', '.join(map(repr, _WAYS))}")
    if minima is not None and by == "exact":
        raise ConfigError("minima are what data showed, and by='exact' moves what is proven; pass by='statistics'")


def _movable(
    model: Model, interface: Interface, bounds: Mapping[str, Bounds] | None, minima: Mapping[str, Any]
) -> _Amount | str:
    """Returns how much of each channel can move, or why nothing can; by bounds, by statistics where there are none."""
    if interface.consumer.pads:
        return "the next layer pads with zeros, which would have to be shifted as well"
    if not interface.activations:
        return _mean(model, interface)
    return _seen(model, interface, minima) if bounds is None else _proven(model, interface, bounds)


def _mean(model: Model, interface: Interface) -> _Amount | str:
    known = model.statistics.get(interface.producer.output)
    if known is None:
        return "nothing is known of the mean: no batch norm was folded here"
    xp = array_namespace(known.mean, known.std)
    amount = xp.where(xp.abs(known.mean) > _WORTHWHILE * known.std, known.mean, 0.0)
    return _Amount(channels=amount, reason="the mean: exact, since no activation lies between")


def _proven(model: Model, interface: Interface, bounds: Mapping[str, Bounds]) -> _Amount:
    low, high = bounds[interface.producer.output]
    xp = array_namespace(low)
    is_free = (low > _lower_limit(model, interface, low * 0.0)) & (low > _WORTHWHILE * high)
    return _Amount(channels=xp.where(is_free, low, 0.0))


def _seen(model: Model, interface: Interface, minima: Mapping[str, Any]) -> _Amount | str:
    """Returns what is there nearly always, by statistics, or always as far as data showed; it passes the activation."""
    tensor = interface.producer.output
    known = model.statistics.get(tensor)
    if tensor in minima:
        wanted = _checked_minimum(tensor, minima[tensor], interface.num_channels)
        wanted, least = array_namespace(wanted).maximum(wanted, 0.0), 0.0
    elif known is None:
        return "nothing is known of the channels: no batch norm was folded here, and no minima were observed"
    else:
        wanted, least = nearly_always_there(known.mean, known.std), _WORTHWHILE * (known.std + abs(known.mean))
    xp = array_namespace(wanted)
    upper = wanted * 0.0 + np.inf
    for node in interface.activations:
        upper = xp.minimum(upper, limits_of(model, node)[1])
    passes = (wanted > _lower_limit(model, interface, wanted * 0.0)) & (wanted < upper) & (wanted > least)
    amount = xp.where(passes, wanted, 0.0)
    if tensor in minima:
        reason = "minima observed on data: what lies below is lost"
        return _Amount(channels=amount, figures={"clipped mass": 0.0}, reason=reason)
    reason = "mean - 3 std: what lies below is lost"
    mass = 0.0 if is_traced(amount) else mass_below(amount, known.mean, known.std)  # pyright: ignore[reportOptionalMemberAccess]
    figures = {} if is_traced(amount) else {"clipped mass": float(np.max(np.where(amount > 0, mass, 0.0)))}
    return _Amount(channels=amount, figures=figures, reason=reason)


def _checked_minimum(tensor: str, minimum: Any, num_channels: int) -> Any:
    if np.shape(minimum) != (num_channels,) or not (is_traced(minimum) or np.all(np.isfinite(minimum))):
        raise DataError(
            f"the minima of '{tensor}' have the shape {np.shape(minimum)}, or are not finite; expected a finite number "
            f"for each of its {num_channels} channels"
        )
    return widened(minimum if is_traced(minimum) else np.asarray(minimum))


def _lower_limit(model: Model, interface: Interface, zeros: Any) -> Any:
    """Returns what a value must exceed, per channel, to pass the activations unchanged from below."""
    xp = array_namespace(zeros)
    needed = zeros
    for node in interface.activations:
        low = limits_of(model, node)[0]
        needed = xp.maximum(needed, xp.where(xp.isfinite(low), low, 0.0))
    return needed


def _shifted_limits(model: Model, interface: Interface, amount: Any) -> list[Edit]:
    """Returns the edits that keep the activations' limits where they were, for channels that are lower by `amount`."""
    xp = array_namespace(amount)
    edits: list[Edit] = []
    for node in interface.activations:
        low, high = (xp.broadcast_to(xp.asarray(limit), amount.shape) for limit in limits_of(model, node))
        if node.op_type not in {"Clip", "Min", "Max"} or not (is_traced(amount) or np.any(amount)):
            continue
        # A lower limit never binds where something was moved: zero stays, so that Clip becomes Relu and not Max.
        low = xp.where(amount > 0, xp.minimum(low, 0.0), low)
        kernel_rank = interface.producer.kernel_rank
        dtype = model.params[interface.producer.weight].dtype
        edits.append(with_limits(model, node, low, high - amount, kernel_rank=kernel_rank, dtype=dtype))
    return edits


def _record(interface: Interface, amount: _Amount | str) -> Record:
    where = (interface.tensors[-1], interface.producer.weight, interface.consumer.weight)
    left = Record(transform=NAME, done=False, what="left alone", where=where)
    if isinstance(amount, str):
        return replace(left, reason=amount)
    channels = amount.channels
    if is_traced(channels):
        return replace(left, done=True, what="absorbed biases", reason="traced: uncounted")
    if not np.any(channels):
        kind = "no channel has a part to move" if amount.reason else "no channel has a provable part to move"
        return replace(left, reason=kind)
    after = {"channels": float(np.count_nonzero(channels)), "largest": float(abs(channels).max()), **amount.figures}
    return replace(left, done=True, what="absorbed biases", reason=amount.reason, after=after)
