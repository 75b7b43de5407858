"""From a range of real numbers to scale and zero point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from ptqjax.kernels.float_formats import float_format
from ptqjax.kernels.grid import integer_range
from ptqjax.kernels.namespace import array_namespace
from ptqjax.pytrees import PyTreeNode

Symmetry: TypeAlias = bool | str
"""How 0 lies on a grid: `False`, anywhere; `True`, in the middle of the integers; "strict", in the middle, and the
smallest integer of a signed type is left out; "unsigned", at the smallest integer where no value is negative, else in
the middle; "strict unsigned", both."""
SYMMETRIES = (False, True, "strict", "unsigned", "strict unsigned")
"""The values of `Symmetry`."""

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""Smallest step of a grid: below it float32 arithmetic flushes to zero."""
LARGEST_VALUE = float(np.finfo(np.float32).max) * (1 - 2.0**-20)
"""Largest magnitude that a code may stand for; leaves room for rounding errors."""


_END_OF_EXPONENTS = 128  # float32 ends below 2^128
_EXACT_UP_TO = 2**24  # float32 holds integers up to here


class GridKind(PyTreeNode):
    """What is known of a grid before its range is: arrays, scalar or one element a range."""

    qmin: Any
    """Smallest integer."""
    qmax: Any
    """Largest integer."""
    symmetric: Any
    """Boolean: the zero point is the middle of the integers, and the range the same on both sides."""
    unsigned: Any = False
    """Boolean: where a symmetric range has no negative value, the zero point is the smallest integer instead."""
    power_of_two: Any = False
    """Boolean: scales are powers of two: the next above, or the largest that keeps all codes finite."""


def grid_kind(dtype: str, *, symmetric: Symmetry = False, power_of_two: bool = False) -> GridKind:
    """Returns what is known of a grid of the integer type `dtype`, as NumPy scalars.

    The ends of 32 bits are 2^31 - 128 on both sides (2^32 - 256 above, unsigned): float32 has none nearer to all of it.

    Raises:
        ConfigError: `dtype` is no integer type.
    """
    qmin, qmax = _exact_limits(dtype)
    is_strict, is_unsigned = (isinstance(symmetric, str) and word in symmetric for word in ("strict", "unsigned"))
    return GridKind(
        qmin=np.float32(qmin + is_strict),
        qmax=np.float32(qmax),
        symmetric=np.asarray(bool(symmetric)),
        unsigned=np.asarray(is_unsigned),
        power_of_two=np.asarray(power_of_two),
    )


def _exact_limits(dtype: str) -> tuple[int, int]:
    """Returns the ends of a type's grid, which float32 holds exactly; those of signed 32 bits lie around 0."""
    qmin, qmax = integer_range(dtype)
    largest = int(np.nextafter(np.float32(qmax), np.float32(0))) if qmax > _EXACT_UP_TO else qmax
    return (-largest if largest < qmax and qmin < 0 else qmin), largest


def stack_kinds(kinds: Sequence[GridKind]) -> GridKind:
    """Returns several kinds as one, an element of each array a kind."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *kinds)


def grid_of_range(lowest: Any, highest: Any, kind: GridKind) -> tuple[Any, Any]:
    """Returns (scale, zero_point), float32, of the grid that spans [lowest, highest], extended to hold 0.

    With n = qmax - qmin: scale = (highest - lowest) / n and zero_point = round(qmin - lowest / scale); symmetric, with
    the middle m = (qmin + qmax + 1) / 2: scale = max(highest, -lowest) / (qmax - m) and zero_point = m, so that the
    smallest integer of a signed type is not used. An empty range (all values 0) gives scale 1. A range below the normal
    float32 numbers gives `SMALLEST_SCALE`; a range near the largest ones is cut so that each code stands for a finite
    number (by powers of two down to half of it). Computed in float64 on NumPy, in float32 under JAX.
    """
    xp = array_namespace(lowest, highest, kind.qmin, kind.qmax, kind.symmetric)
    wide = np.float64 if xp is np else np.float32
    qmin, qmax = (xp.asarray(limit, dtype=wide) for limit in (kind.qmin, kind.qmax))
    middle = xp.floor((qmin + qmax + 1) / 2)
    symmetric = xp.logical_and(kind.symmetric, xp.logical_not(xp.logical_and(kind.unsigned, xp.asarray(lowest) >= 0)))
    steps = qmax - qmin
    limit = LARGEST_VALUE * (steps / (steps + 1))  # rounding the zero point moves an end by half a step
    low = xp.clip(xp.asarray(lowest, dtype=wide), -limit, 0)
    high = xp.clip(xp.asarray(highest, dtype=wide), 0, limit)
    scale = xp.where(symmetric, xp.maximum(high, -low) / (qmax - middle), high / steps - low / steps)
    scale = xp.where(scale > 0, xp.maximum(scale, SMALLEST_SCALE), 1.0).astype(np.float32)
    farthest = xp.where(symmetric, xp.maximum(qmax - middle, middle - qmin), steps)
    scale = xp.where(symmetric, xp.minimum(scale, (LARGEST_VALUE / farthest).astype(np.float32)), scale)
    scale = xp.where(kind.power_of_two, _power_of_two_above(scale, farthest, xp), scale)
    zero_point = xp.clip(xp.round(qmin - low / scale), qmin, qmax)
    return scale, xp.where(symmetric, middle, zero_point).astype(np.float32)


def _power_of_two_above(scale: Any, farthest: Any, xp: Any) -> Any:
    """Returns the power of two at `scale` or next above it that keeps `farthest` steps finite."""
    significand, exponent = xp.frexp(scale)  # scale = significand * 2^exponent, 0.5 <= significand < 1
    _, num_bits = xp.frexp(farthest)  # farthest < 2^num_bits
    wanted = xp.where(significand == 0.5, exponent - 1, exponent)  # noqa: PLR2004 - exact
    return xp.ldexp(xp.ones_like(scale), xp.minimum(wanted, _END_OF_EXPONENTS - num_bits))


def scale_of_float_range(lowest: Any, highest: Any, name: str, *, power_of_two: bool = False) -> Any:
    """Returns the scale, float32, by which [lowest, highest] fills a floating-point format: amax / its largest number.

    1 for formats of 16 bits, which have a range of their own, and for empty ranges. A range below the normal float32
    numbers gives `SMALLEST_SCALE`.
    """
    xp = array_namespace(lowest, highest)
    amax = xp.maximum(xp.abs(xp.asarray(lowest, dtype=np.float32)), xp.abs(xp.asarray(highest, dtype=np.float32)))
    kind = float_format(name)
    if not kind.has_scale:
        return xp.ones_like(amax)
    scale = xp.minimum(amax, np.float32(LARGEST_VALUE)) / np.float32(kind.largest)
    scale = xp.where(amax > 0, xp.maximum(scale, np.float32(SMALLEST_SCALE)), np.float32(1))
    return _power_of_two_above(scale, xp.full_like(scale, kind.largest), xp) if power_of_two else scale
