"""Mean and variance of a normal variable behind a piecewise linear activation: what batch norms tell without data.

All functions are element by element and broadcast; NumPy in, NumPy out, else JAX. Gradients are finite everywhere,
where the standard deviation is zero too. A standard deviation is taken without its sign, since a batch norm's gamma has
one.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from ptqjax.kernels.namespace import array_namespace

_FAR = 40.0  # standard deviations at which both density and tail are zero in float64


def clipped_normal(mean: Any, std: Any, low: Any, high: Any) -> tuple[Any, Any]:
    """Returns mean and variance of clip(x, low, high), x normal; the limits may be infinite.

    In standard units, z ~ N(0, 1), a = (low - mean) / std, b = (high - mean) / std, y = clip(z, a, b) - c, where the
    point c = clip(0, a, b) is subtracted so that no digits are lost where std is small or the clip saturates:

    E[y] = phi(a) - phi(b) + a Phi(a) + b Phi(-b) - c,
    E[y^2] = (1 + c^2) (Phi(b) - Phi(a)) + a phi(a) - b phi(b) - 2 c (phi(a) - phi(b)) + (a - c)^2 Phi(a)
    + (b - c)^2 Phi(-b).

    With std = 0 the mean is clip(mean, low, high) exactly and the variance zero.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, appendix
    C, which gives the mean; the variance is by the same integrals.
    """
    xp = array_namespace(mean, std, low, high)
    std = xp.abs(std)
    a, b = _standardized(low, mean, std, -_FAR), _standardized(high, mean, std, _FAR)
    c = xp.clip(0.0, a, b)
    phi_a, phi_b, below, above = _density(a), _density(b), _cdf(a), _cdf(-b)
    inside = xp.where(a > 0, _cdf(-a) - above, _cdf(b) - below)  # the difference of the smaller two keeps its digits
    first = phi_a - phi_b + a * below + b * above - c
    second = (1 + c**2) * inside + a * phi_a - b * phi_b - 2 * c * (phi_a - phi_b)
    second = second + (a - c) ** 2 * below + (b - c) ** 2 * above
    variance = xp.clip(second - first**2, 0.0, 1.0)
    return xp.clip(mean, low, high) + std * first, std**2 * variance


def leaky_normal(mean: Any, std: Any, slope: Any, low: Any = -np.inf, high: Any = np.inf) -> tuple[Any, Any]:
    """Returns mean and variance of clip(f(x), low, high), x normal, f(x) = x above zero and slope x below; slope >= 0.

    The result is p + slope n: p, what lies above zero, is a clip of x, and n, what lies below, another; one of them is
    always zero, so that E[p n] = 0. Without limits a negative slope is right as well.
    """
    xp = array_namespace(mean, std, slope, low, high)
    has_slope = slope > 0
    divisor = xp.where(has_slope, slope, 1.0)
    lowest = xp.where(has_slope, xp.minimum(low, 0.0) / divisor, -np.inf)
    highest = xp.where(has_slope, xp.minimum(high, 0.0) / divisor, 0.0)
    above = clipped_normal(mean, std, xp.maximum(low, 0.0), xp.maximum(high, 0.0))
    below = clipped_normal(mean, std, lowest, highest)
    flat = xp.where(slope == 0, xp.minimum(high, 0.0), slope * below[0])
    variance = above[1] + slope**2 * below[1] - 2 * above[0] * flat
    return above[0] + flat, xp.maximum(variance, 0.0)


def passing_probability(mean: Any, std: Any, low: Any, high: Any) -> Any:
    """Returns the probability that a normal variable lies between low and high, so that a clip lets changes through.

    With std = 0: one where low < mean < high, else zero.
    """
    xp = array_namespace(mean, std, low, high)
    a, b = (_standardized(limit, mean, xp.abs(std), sign * _FAR) for limit, sign in ((low, -1), (high, 1)))
    return xp.clip(xp.where(a > 0, _cdf(-a) - _cdf(-b), _cdf(b) - _cdf(a)), 0.0, 1.0)


def cumulative_normal(value: Any, mean: Any, std: Any) -> Any:
    """Returns the probability that a normal variable is at most `value`, which may be infinite."""
    xp = array_namespace(value, mean, std)
    far = xp.where(xp.asarray(value) > 0, _FAR, -_FAR)
    return xp.where((xp.abs(std) == 0) & (value == mean), 1.0, _cdf(_standardized(value, mean, xp.abs(std), far)))


def _standardized(limit: Any, mean: Any, std: Any, far: Any) -> Any:
    """Returns (limit - mean) / std within +-`_FAR`, `far` where the limit is infinite."""
    xp = array_namespace(limit, mean, std)
    is_finite, has_std = xp.isfinite(limit), std > 0
    distance = xp.where(is_finite, limit, 0.0) - mean
    certain = xp.where(distance > 0, _FAR, xp.where(distance < 0, -_FAR, 0.0))
    ratio = xp.clip(distance / xp.where(has_std, std, 1.0), -_FAR, _FAR)
    return xp.where(is_finite, xp.where(has_std, ratio, certain), far)


def _density(z: Any) -> Any:
    """phi(z)."""
    return array_namespace(z).exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _cdf(z: Any) -> Any:
    """Phi(z)."""
    if isinstance(z, jax.Array):
        return jax.scipy.special.ndtr(z)
    import scipy.special  # noqa: PLC0415  (half as slow to import as JAX, and not always needed)

    return scipy.special.ndtr(z)
