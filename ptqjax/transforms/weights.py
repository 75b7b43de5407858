"""Weights of many layers while a transform rewrites them: read at first use, written back where they changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from ptqjax.ir import Model
from ptqjax.kernels.precision import is_traced
from ptqjax.transforms.linear import Edit, Linear, bias_of, rewrite, weight_view

WeightAndBias: TypeAlias = "tuple[Any, Any]"
"""Weight view [groups, outputs, inputs, taps] and bias [outputs] of one layer."""


def weights_of(model: Model, layer: Linear, changed: Mapping[str, WeightAndBias]) -> WeightAndBias:
    """Returns the layer's weight and bias: those in `changed` (by the tensor that a layer produces), else its own."""
    return changed[layer.output] if layer.output in changed else (weight_view(model, layer), bias_of(model, layer))


def write_back(model: Model, layers: Mapping[str, Linear], changed: Mapping[str, WeightAndBias]) -> list[Edit]:
    """Returns the edits that store the changed weights; a layer without a bias gets one only for a bias not zero."""
    return [
        rewrite(model, layers[output], view, bias if _is_needed(layers[output], bias) else None)
        for output, (view, bias) in changed.items()
    ]


def _is_needed(layer: Linear, bias: Any) -> bool:
    return bool(layer.bias) or is_traced(bias) or bool(np.any(bias))
