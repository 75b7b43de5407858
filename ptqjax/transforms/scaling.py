"""Cross-layer scaling: channels are scaled between layers so that one weight range per tensor serves all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ptqjax.ir import Model, Record, Report, only_reader
from ptqjax.kernels.intervals import UNBOUNDED
from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.precision import is_traced, widened
from ptqjax.transforms.balance import Balance, balanced, imbalances, is_balanced, weight_balance
from ptqjax.transforms.moments import channel_ranges
from ptqjax.transforms.relaxation import relax_bounds
from ptqjax.transforms.rescale import rescale
from ptqjax.transforms.ties import TiedSet, Ties, find_ties

_NAME = "scale_channels"
_LIMITED = "limited by the activations"
_ACTIVATIONS = frozenset({"Clip", "LeakyRelu", "Max", "Min", "PRelu", "Relu"})
_STANDARD_DEVIATIONS = 6.0  # on real pictures channels reach beyond four, see `constant_channels`


def scale_channels(
    model: Model,
    *,
    limit: float | None = 2.0,
    magnitudes: Mapping[str, Any] | None = None,
    bounds: str = "exact",
    beyond: Mapping[str, float] | None = None,
) -> tuple[Model, Report]:
    """Returns the model with its channels scaled between layers, function kept, and for each tied set what was done.

    Each set of tied channels gets the scales of `kernels.equalization.log_scales`, in turn and again until none
    changes: so pairs, depthwise triples, longer chains and residual trunks balance as a whole. A Clip stays exact: its
    bounds become one per channel (Relu and Min, or Max and Min). Scales are not powers of two: the function is kept up
    to rounding.

    Args:
        model: The model; batch norms are best folded before, they tell how large activations become.
        limit: How far a channel's activation may reach above the median channel's; None to balance weights alone.
        magnitudes: Largest magnitude per channel of the tensors between layers, where it was observed on data; else
            it is |mean| + 6 std of `statistics`, through the activation, or the activation's own limits.
        bounds: See `relax_bounds`.
        beyond: See `relax_bounds`.

    Raises:
        ConfigError: `bounds` is unknown.
    """
    model, left, relaxed = relax_bounds(model, bounds=bounds, beyond=beyond)
    ties = find_ties(model, left=left)
    sizes = [None] * len(ties.sets) if limit is None else set_magnitudes(model, ties, magnitudes or {})
    balance = weight_balance(model, ties)
    is_done = is_balanced(balance, sizes, limit or 1.0)
    scales = None if is_done else balanced(balance, sizes, limit or 1.0)
    reasons = ["by weights alone: nothing is known of the activations" if size is None else _LIMITED for size in sizes]
    scaled = model if scales is None else rescale(model, ties, scales)
    return scaled, (*relaxed, *scaling_report(ties, balance, scales, reasons))


def scaling_report(ties: Ties, balance: Balance, scales: Any | None, reasons: Sequence[str]) -> Report:
    """Returns a record for each tied set, then one for each layer whose output channels cannot be scaled.

    Args:
        ties: The sets.
        balance: The weight ranges around them, before scaling.
        scales: Log scales that were applied; None where everything was balanced already.
        reasons: What decided, for each set.
    """
    records = [_record(ties, balance, scales, index, reason) for index, reason in enumerate(reasons)]
    left = [_left(ties, output, reason) for output, reason in ties.reasons.items()]
    return (*records, *left)


def set_magnitudes(model: Model, ties: Ties, observed: Mapping[str, Any]) -> list[Any | None]:
    """Returns for each tied set how large its channels' activations become; None where nothing is known.

    A row for each tensor of the set that a quantizer sees, zero where it lacks a channel.

    Args:
        model: The model.
        ties: Its ties.
        observed: Largest magnitude per channel, by tensor, where it was observed.
    """
    reached = {name: np.asarray(value) for name, value in observed.items()} or _reached(model)
    inside = inside_activations(model)
    return [_magnitudes(ties, found, reached, inside) for found in ties.sets]


def _reached(model: Model) -> dict[str, Any]:
    """Returns the largest magnitude of each channel that statistics or bounds imply."""
    ranges = channel_ranges(model, num_std=_STANDARD_DEVIATIONS)
    return {
        name: array_namespace(low, high).maximum(abs(low), abs(high))
        for name, (low, high) in ranges.items()
        if is_traced(high) or np.all((low > -UNBOUNDED) & (high < UNBOUNDED))
    }


def inside_activations(model: Model) -> frozenset[str]:
    """Returns the tensors that an activation function alone reads: no quantizer sees them."""
    readers = ((name, only_reader(model.graph, name)) for name in model.graph.producers)
    return frozenset(name for name, reader in readers if reader is not None and reader.op_type in _ACTIVATIONS)


def _magnitudes(ties: Ties, found: TiedSet, reached: Mapping[str, Any], inside: frozenset[str]) -> Any | None:
    final = [name for name in found.tensors if name in reached and name not in inside]
    final = [name for name in final if np.shape(reached[name]) == ties.channels[name].scales.shape]
    if not final:
        return None
    place = {number: index for index, number in enumerate(found.scales.tolist())}
    rows = []
    for name in final:
        numbers = [place.get(number, -1) for number in ties.channels[name].scales.tolist()]
        rows.append(_by_place(widened(reached[name]), np.array(numbers), len(place)))
    return array_namespace(*rows).stack(rows)


def _by_place(values: Any, places: np.ndarray, count: int) -> Any:
    xp = array_namespace(values)
    kept = places >= 0
    if xp is not np:
        return xp.zeros(count, values.dtype).at[places[kept]].max(values[kept])
    found = np.zeros(count)
    np.maximum.at(found, places[kept], values[kept])
    return found


def _record(ties: Ties, balance: Balance, scales: Any | None, index: int, reason: str) -> Record:
    found = ties.sets[index]
    weights = (ties.layers[name].layer.weight for name in (*found.producers, *found.consumers))
    record = Record(
        transform=_NAME,
        done=scales is not None,
        what="scaled channels",
        where=(found.place, *dict.fromkeys(weights)),
        reason=reason,
    )
    if is_traced(scales) or any(is_traced(value) for value in balance.ranges.values()):
        return replace(record, reason="traced: unmeasured")
    before, after = imbalances(balance, np.zeros(ties.num_scales) if scales is None else scales, index)
    figures = {"largest |log(r1 / r2)|": float(before)}
    if scales is None:
        return replace(record, what="left alone", reason="balanced already", before=figures, after=figures)
    spread = {"largest |log scale|": float(abs(balance.own(scales, index)).max())}
    return replace(record, before=figures, after={"largest |log(r1 / r2)|": float(after)} | spread)


def _left(ties: Ties, output: str, reason: str) -> Record:
    where = (output, ties.layers[output].layer.weight)
    return Record(transform=_NAME, done=False, what="left alone", where=where, reason=reason)
