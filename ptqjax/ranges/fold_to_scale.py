"""Batch norms fold into weights that have grids already: the grids are multiplied along, the integers stay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ptqjax.encodings.encoding import Encoding, Encodings, along_axis, quantize
from ptqjax.ir import Model, Node, Record, Report, place_of
from ptqjax.kernels.mirroring import mirrored_codes, mirrored_zero_point, multiplied_scale
from ptqjax.kernels.precision import is_traced
from ptqjax.transforms.fold import (
    Fold,
    Survey,
    check_values,
    fold_behind,
    implied_statistics,
    norms_of,
    survey_of,
    with_folds,
)
from ptqjax.transforms.linear import Linear

_NAME = "fold_to_scale"
_ULPS = 8  # products and scales are rounded once each: a tie is missed by two units in the last place, or three


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scaled:
    """A fold with the weight's grid multiplied along."""

    fold: Fold
    """The fold."""
    encoding: Encoding | None
    """The grid of the folded weight; None where it has none."""
    record: Record
    """What was done."""


def fold_to_scale(model: Model, encodings: Encodings) -> tuple[Model, Encodings, Report]:
    """Returns the model with batch norms folded, encodings that keep the weights' integers, and what was done.

    A batch norm y = k x + t behind a layer multiplies its weight by k per output channel. The weight's encoding becomes
    scale * |k|, mirrored where k < 0 (see `kernels.mirroring`), so that the integers of the folded weight are those of
    the unfolded one up to sign, and Q'(k w) = k Q(w) up to the rounding of float32: what was learned or searched before
    folding holds after it. Where k w falls beside a tie by its own rounding, the folded weight is moved by a few units
    in the last place ("moved" in the record). Inexact are the ends of a signed grid with zero point 0 where
    k < 0: qmin becomes qmax, a step less, and what was clipped to qmax may become qmin ("a step off" in the record).

    A weight without an encoding is folded all the same. A batch norm is left where its weight has one scale for the
    whole tensor or scales by blocks, where something between is rounded, where the bias has an encoding of its own, and
    where it would have to go into the layer behind it, whose scales run along outputs and not along k. Encodings of
    tensors that are gone are dropped. Under `jit` nothing is moved or counted.

    Args:
        model: The model with its batch norms.
        encodings: Encodings of that model's tensors.

    Raises:
        ModelError: See `fold_batch_norms`.
    """
    for norm in norms_of(model):
        check_values(model, norm)
    order = [norm.output for norm in norms_of(model)]
    model = model.replace(statistics=implied_statistics(model) | model.statistics)
    encodings, records = dict(encodings), []
    while True:
        survey = survey_of(model)
        attempts = [_attempt(survey, norm, encodings) for norm in norms_of(model)]
        found = [attempt for attempt in attempts if isinstance(attempt, _Scaled)]
        if not found:
            break
        encodings |= {one.fold.layer.weight: one.encoding for one in found if one.encoding is not None}
        records += [one.record for one in found]
        model = with_folds(model, [one.fold for one in found])
    records += [_left(norm, str(reason)) for norm, reason in zip(norms_of(model), attempts, strict=True)]
    report = tuple(sorted(records, key=lambda record: order.index(record.where[0])))
    return model, _living(model, encodings), report


def _attempt(survey: Survey, norm: Node, encodings: Encodings) -> _Scaled | str:
    fold = fold_behind(survey, norm)
    if isinstance(fold, str):
        return fold
    layer, encoding = fold.layer, encodings.get(fold.layer.weight)
    names = (norm.output, layer.weight, *norm.inputs[1:5])
    record = Record(transform=_NAME, done=True, what=f"folded into {place_of(layer.node)}", where=names)
    rounded = [name for name in fold.between if name in encodings]
    if rounded or layer.bias in encodings:
        return f"'{(*rounded, layer.bias)[0]}' has an encoding, which folding would make void"
    if encoding is None:
        return _Scaled(fold=fold, encoding=None, record=replace(record, reason="the weight has no encoding"))
    factor = _factor_along_axis(survey.model, fold, encoding)
    if isinstance(factor, str):
        return factor
    scale = multiplied_scale(encoding.scale, factor)
    if not is_traced(scale) and not np.all(np.isfinite(scale)):
        return f"the scales of '{layer.weight}' would exceed what float32 can hold"
    zero_point = mirrored_zero_point(encoding.zero_point, factor, encoding.qmin, encoding.qmax)
    new = encoding.replace(scale=scale, zero_point=zero_point)
    weight, figures = _with_the_same_codes(survey.model, fold, factor, encoding, new)
    edit = replace(fold.edit, params={**fold.edit.params, layer.weight: weight})
    return _Scaled(fold=replace(fold, edit=edit), encoding=new, record=replace(record, after=figures))


def _factor_along_axis(model: Model, fold: Fold, encoding: Encoding) -> Any | str:
    """Returns what multiplies the stored weight, index by index along the encoding's axis, or why that is no vector."""
    layer = fold.layer
    if encoding.block_size is not None:
        return f"the scales of '{layer.weight}' run by blocks of inputs, not along its output channels"
    rank = np.ndim(model.params[layer.weight])
    if encoding.axis is None or encoding.axis % rank != _output_axis(layer):
        along = "one scale serves all of" if encoding.axis is None else "the scales run along the inputs of"
        return f"{along} '{layer.weight}', and each of its output channels is multiplied by another number"
    factor = fold.factor * layer.node.attribute("alpha", 1.0)  # folding writes a Gemm's alpha into its weight
    if layer.groups == 1 or not layer.inputs_first:
        return factor
    rows = factor.reshape(layer.groups, -1)
    if is_traced(rows) or np.any(rows != rows[0]):
        return f"'{layer.weight}' has one scale for the same channel of all groups, which are multiplied differently"
    return rows[0]


def _output_axis(layer: Linear) -> int:
    """Returns the axis of the weight that counts outputs (those of one group, where inputs come first)."""
    return 1 if layer.inputs_first else 0


def _with_the_same_codes(
    model: Model, fold: Fold, factor: Any, old: Encoding, new: Encoding
) -> tuple[Any, dict[str, float]]:
    """Returns the folded weight, moved where its rounding would change a code, and how many were moved or clipped."""
    before, weight = model.params[fold.layer.weight], fold.edit.params[fold.layer.weight]
    if any(is_traced(value) for value in (before, weight, factor, *_leaves(old))):
        return weight, {}
    codes = np.asarray(quantize(np.asarray(before), old))
    zero_point, k = (along_axis(value, old, codes.shape) for value in (old.zero_point, factor))
    wanted = np.asarray(mirrored_codes(codes, zero_point, k, old.qmin, old.qmax))
    target = ((wanted - along_axis(new.zero_point, new, codes.shape)) * along_axis(new.scale, new, codes.shape)).astype(
        weight.dtype
    )
    is_mirrored = (k < 0) & (zero_point == 0) & (-old.qmin > old.qmax)  # on a grid that has no mirror image
    found = np.asarray(quantize(np.asarray(weight), new))
    is_end = is_mirrored & ((codes == old.qmin) | ((codes == old.qmax) & (found == old.qmin)))
    moved = weight = np.asarray(weight)
    for _ in range(_ULPS):
        is_off = (np.asarray(quantize(moved, new)) != wanted) & ~is_end
        if not np.any(is_off):
            break
        moved = np.where(is_off, np.nextafter(moved, target), moved)
    return moved, {
        "moved": float(np.count_nonzero(moved != weight)),
        "a step off": float(np.count_nonzero(np.broadcast_to(is_end, codes.shape))),
    }


def _leaves(encoding: Encoding) -> tuple[Any, ...]:
    """Returns the arrays of an encoding that decide its codes."""
    return encoding.scale, encoding.zero_point, encoding.qmin, encoding.qmax


def _living(model: Model, encodings: Encodings) -> Encodings:
    graph = model.graph
    names = {spec.name for spec in graph.inputs} | set(graph.producers) | set(graph.parameters)
    return {name: encoding for name, encoding in encodings.items() if name in names}


def _left(norm: Node, reason: str) -> Record:
    return Record(transform=_NAME, done=False, what="left alone", where=(norm.output,), reason=reason)
