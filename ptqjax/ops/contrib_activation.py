"""Activations of com.microsoft: what ONNX Runtime's optimizer and its exporters write for chains of ONNX's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ptqjax.ops.layout import with_rank
from ptqjax.ops.registry import MICROSOFT, lowers


@lowers("Gelu", since=1, domain=MICROSOFT, elementwise=True)
def gelu(x: Any, /) -> Any:
    """Returns x Phi(x), exactly."""
    return jax.nn.gelu(jnp.asarray(x), approximate=False)


@lowers("BiasGelu", since=1, domain=MICROSOFT, elementwise=True)
def bias_gelu(x: Any, bias: Any, /) -> Any:
    """Returns `gelu` of x + bias, which runs along the last axis."""
    return gelu(x + with_rank(bias, x.ndim))


@lowers("FastGelu", since=1, domain=MICROSOFT, elementwise=True)
def fast_gelu(x: Any, bias: Any = None, /) -> Any:
    """Returns the tanh formula for `gelu` of x + bias, which runs along the last axis."""
    return jax.nn.gelu(jnp.asarray(x if bias is None else x + with_rank(bias, x.ndim)), approximate=True)


@lowers("QuickGelu", since=1, domain=MICROSOFT, elementwise=True)
def quick_gelu(x: Any, /, *, alpha: float = 1.702) -> Any:
    """Returns x sigmoid(alpha x)."""
    return x * jax.nn.sigmoid(jnp.asarray(x) * alpha)
