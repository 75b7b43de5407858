"""Applies scales to the channels of a model: the one place where scaling touches weights, bounds and statistics."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptqjax.ir import Model, Statistics
from ptqjax.kernels.grouped import scale_inputs, scale_outputs
from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.precision import widened
from ptqjax.transforms.activations import limits_of, with_limits
from ptqjax.transforms.linear import Edit, edited
from ptqjax.transforms.scale_numbers import FIXED
from ptqjax.transforms.ties import Limited, Ties, find_ties
from ptqjax.transforms.weights import WeightAndBias, weights_of, write_back


def rescale(model: Model, ties: Ties, log_scales: Any) -> Model:
    """Returns the model with each channel divided by exp of its log scale, function kept up to rounding.

    Weights are divided by row and multiplied by column, biases, bounds and added parameters divided; a Clip becomes
    Relu (or Max) and Min with a bound for each channel. Statistics follow.

    Args:
        model: The model.
        ties: Its ties.
        log_scales: One per number of a scale, [num_scales]; that of `FIXED` must be 0.
    """
    xp = array_namespace(log_scales)
    scale = xp.exp(log_scales)
    changed: dict[str, WeightAndBias] = {}
    for output, tied in ties.layers.items():
        if not (tied.inputs.any() or tied.outputs.any()):
            continue
        view, bias = weights_of(model, tied.layer, changed)
        rows, columns = scale[tied.outputs], scale[tied.inputs]
        changed[output] = scale_outputs(scale_inputs(view, columns), 1 / rows), bias / rows
    edits = [*_limits(model, ties, scale), *_shifts(model, ties, scale)]
    edits += write_back(model, {output: tied.layer for output, tied in ties.layers.items()}, changed)
    return edited(model, edits, _statistics(model, ties, scale))


def with_free_bounds(model: Model) -> Model:
    """Returns the model with a bound per channel wherever scaling would need one: the structure of all scaled ones."""
    ties = find_ties(model)
    return rescale(model, ties, np.zeros(ties.num_scales))


def _limits(model: Model, ties: Ties, scale: Any) -> list[Edit]:
    edits: list[Edit] = []
    for found in ties.limited:
        divisor = scale[found.scales]
        low, high = (limit / divisor for limit in limits_of(model, found.node))
        dtype = _dtype_of(model, ties, found)
        edits.append(with_limits(model, found.node, low, high, kernel_rank=found.kernel_rank, dtype=dtype))
    return edits


def _dtype_of(model: Model, ties: Ties, found: Limited) -> Any:
    """Returns the element type of what is bounded: that of the weights around it; padded channels have none before."""
    numbers = set(found.scales.tolist()) - {FIXED}
    around = (
        tied.layer.weight
        for tied in ties.layers.values()
        if not numbers.isdisjoint((*tied.outputs.tolist(), *tied.inputs.tolist()))
    )
    return next((model.params[name].dtype for name in around), np.dtype(np.float32))


def _shifts(model: Model, ties: Ties, scale: Any) -> list[Edit]:
    params: dict[str, Any] = {}
    for name, axis, scales in ties.shifts:
        old = model.params[name]
        shape = tuple(-1 if i == axis else 1 for i in range(old.ndim))
        params[name] = (widened(old) / scale[scales].reshape(shape)).astype(old.dtype)
    return [Edit(params=params)] if params else []


def _statistics(model: Model, ties: Ties, scale: Any) -> dict[str, Statistics]:
    carried = ((name, ties.channels[name].scales) for name in model.statistics if name in ties.channels)
    divisors = {name: scale[scales] for name, scales in carried if scales.any()}
    return {
        name: Statistics(mean=model.statistics[name].mean / divisor, std=model.statistics[name].std / divisor)
        for name, divisor in divisors.items()
    }
