"""Exact sums of float32 numbers in integers: the same bits for any order and grouping.

A number is its significand, an integer of 24 bits, times a power of two. Significands are summed apart for each
exponent, in three parts of 8 bits, so that an int32 holds the sums of `MOST_TERMS` of them.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MOST_TERMS = 2**23
"""Numbers that a sum may have: 2^23 parts below 2^8 stay below 2^31."""

_EXPONENTS = 256
_PARTS = 3
_PART_BITS = 8
_SIGNIFICAND_BITS = 23
_SMALLEST = Fraction(1, 2**149)  # the unit of the significands of subnormal numbers


def empty_sums(*shape: int) -> Int[np.ndarray, "*shape e p"]:
    """Returns sums without a term, on NumPy; two of the same shape are merged by addition."""
    return np.zeros((*shape, _EXPONENTS, _PARTS), dtype=np.int32)


def add_terms(sums: Int[Array | np.ndarray, "t e p"], terms: Float[Array, "t n"]) -> Int[Array, "t e p"]:
    """Returns the sums with n terms more each, which are finite."""
    bits = jax.lax.bitcast_convert_type(terms.astype(jnp.float32), jnp.int32)
    exponent = (bits >> _SIGNIFICAND_BITS) & (_EXPONENTS - 1)
    fraction = bits & (2**_SIGNIFICAND_BITS - 1)
    significand = jnp.where(exponent > 0, fraction | 2**_SIGNIFICAND_BITS, fraction)
    parts = jnp.stack([(significand >> (_PART_BITS * i)) & (2**_PART_BITS - 1) for i in range(_PARTS)], axis=-1)
    rows = jnp.arange(terms.shape[0], dtype=jnp.int32)[:, None]
    return jnp.asarray(sums).at[rows, exponent].add(jnp.where(bits[..., None] < 0, -parts, parts))


def means_of(sums: Any, counts: Any) -> np.ndarray:
    """Returns the sums divided by the counts [t], correctly rounded to float64, shape [t]."""
    pairs = zip(np.asarray(sums), np.asarray(counts), strict=True)
    return np.asarray([float(_total(each) / int(count)) for each, count in pairs], dtype=np.float64)


def _total(sums: np.ndarray) -> Fraction:
    used = np.flatnonzero(sums.any(axis=1))
    parts = ((int(sums[e, p]) << (_PART_BITS * p)) << max(int(e) - 1, 0) for e in used for p in range(_PARTS))
    return sum(parts, 0) * _SMALLEST
