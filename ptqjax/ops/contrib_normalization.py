"""Normalizations of com.microsoft with the sum in front of them; its LayerNormalization is in `normalization`."""

from __future__ import annotations

from typing import Any

from ptqjax.ops.layout import with_rank
from ptqjax.ops.normalization import layer_normalization, simplified_layer_normalization
from ptqjax.ops.registry import MICROSOFT, lowers


@lowers("SkipLayerNormalization", since=1, domain=MICROSOFT)
def skip_layer_normalization(
    x: Any, skip: Any, gamma: Any, beta: Any = None, bias: Any = None, /, *, epsilon: float = 1e-12
) -> tuple[Any, Any, Any, Any]:
    """Returns the layer norm over the last axis of x + skip + bias, its mean and 1 / deviation, and that sum."""
    total = _total(x, skip, bias)
    return *layer_normalization(total, gamma, beta, epsilon=epsilon), total


@lowers("SkipSimplifiedLayerNormalization", since=1, domain=MICROSOFT)
def skip_simplified_layer_normalization(
    x: Any, skip: Any, gamma: Any, bias: Any = None, /, *, epsilon: float = 1e-12
) -> tuple[Any, Any, Any, Any]:
    """Returns the root-mean-square norm over the last axis of x + skip + bias, 1 / that root twice, and that sum.

    The runtime has no mean to give in the second place; nothing reads it.
    """
    total = _total(x, skip, bias)
    y, inverse = simplified_layer_normalization(total, gamma, epsilon=epsilon)
    return y, inverse, inverse, total


def _total(x: Any, skip: Any, bias: Any) -> Any:
    total = x + with_rank(skip, x.ndim)
    return total if bias is None else total + with_rank(bias, x.ndim)
