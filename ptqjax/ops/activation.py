"""Activations: nonlinear functions of one tensor, element by element, with their settings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.ops.pointwise import lower_broadcast, lower_unary
from ptqjax.ops.registry import lowers

lower_unary("HardSwish", lambda x: x * jnp.clip(x * x.dtype.type(1 / 6) + x.dtype.type(0.5), 0, 1))
lower_unary("Mish", jax.nn.mish)
lower_unary("Relu", lambda x: jnp.maximum(x, jnp.zeros((), x.dtype)))
lower_unary("Sigmoid", jax.nn.sigmoid)
lower_unary("Softplus", jax.nn.softplus)
lower_unary("Softsign", jax.nn.soft_sign)
lower_broadcast("PRelu", lambda xp, x, slope: xp.where(x < 0, x * slope, x), since=7)


@lowers("Celu", since=12, elementwise=True)
def celu(x: Any, /, *, alpha: float = 1.0) -> Any:
    """Returns max(0, x) + min(0, alpha (exp(x / alpha) - 1))."""
    return jax.nn.celu(jnp.asarray(x), alpha)


@lowers("Elu", since=6, elementwise=True)
def elu(x: Any, /, *, alpha: float = 1.0) -> Any:
    """Returns `x` where it is positive, else alpha (exp(x) - 1)."""
    return jax.nn.elu(jnp.asarray(x), alpha)


@lowers("Gelu", since=20, elementwise=True)
def gelu(x: Any, /, *, approximate: str = "none") -> Any:
    """Returns x Phi(x), exactly or by the tanh formula."""
    return jax.nn.gelu(x, approximate=approximate == "tanh")


@lowers("HardSigmoid", since=1, elementwise=True)
def hard_sigmoid(x: Any, /, *, alpha: float = 0.2, beta: float = 0.5) -> Any:
    """Returns alpha x + beta, brought into [0, 1]."""
    return jnp.clip(x * x.dtype.type(alpha) + x.dtype.type(beta), 0, 1)


@lowers("LeakyRelu", since=1, elementwise=True)
def leaky_relu(x: Any, /, *, alpha: float = 0.01) -> Any:
    """Returns `x` where it is not negative, else alpha x."""
    return jnp.where(x < 0, x * x.dtype.type(alpha), x)


@lowers("Selu", since=6, elementwise=True)
def selu(x: Any, /, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Any:
    """Returns gamma `elu(x)`."""
    return gamma * elu(x, alpha=alpha)


@lowers("Shrink", since=9, elementwise=True)
def shrink(x: Any, /, *, bias: float = 0.0, lambd: float = 0.5) -> Any:
    """Returns `x` moved towards 0 by `bias` where it is beyond lambd, else 0; integers without fraction."""
    x = jnp.asarray(x)
    return jnp.where(x < -lambd, x + bias, jnp.where(x > lambd, x - bias, 0)).astype(x.dtype)


@lowers("Swish", since=24, elementwise=True)
def swish(x: Any, /, *, alpha: float = 1.0) -> Any:
    """Returns x sigmoid(alpha x)."""
    x = jnp.asarray(x)
    return x * jax.nn.sigmoid(alpha * x)


@lowers("SwiGLU", since=28, elementwise=True)
def swiglu(gate: Any, x: Any, /, *, alpha: float = 1.0) -> Any:
    """Returns swish(gate) x, of one shape."""
    return swish(gate, alpha=alpha) * x


@lowers("ThresholdedRelu", since=10, elementwise=True)
def thresholded_relu(x: Any, /, *, alpha: float = 1.0) -> Any:
    """Returns `x` where it is above alpha, else 0."""
    return jnp.where(x > alpha, x, np.zeros((), x.dtype))
