"""Sums of products of bytes two by two in 16 bits, as x86 has them without VNNI: what saturates, and how not to.

VPMADDUBSW multiplies uint8 by int8 and adds two neighbouring products in int16, saturating. Inputs x reach 255, so a
pair of weights of one sign is safe where |w1| + |w2| <= 128 (255 * 128 = 32,640), one of unlike signs always.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

LARGEST_INPUT = 255
"""Largest integer of an input: int8 ones are made uint8 by the runtime."""
LARGEST_SUM = (2**15 - 1) // LARGEST_INPUT
"""Largest sum of the magnitudes of two weights of one sign that cannot saturate: 128."""

OPERATORS = "ptqjax.saturating"
"""The domain of integer operators whose sums are such (`ops.saturating`)."""

WEIGHT_OF_MOVES = 4.0
"""How many times errors of moved pairs count: few and large, they hurt more than rounding (SqueezeNet 30.9 dB with 1,
32.2 with 4; EfficientNet-Lite0 21.5 and 22.3)."""

_VALUES = 2**23  # that are rounded to try the scales of one weight
_FEWEST, _MOST = 32, 64  # scales tried


class Fitted(NamedTuple):
    """Weights that no pair of products saturates at."""

    factor: Float[np.ndarray, "s 1"]
    """What the scales are to be multiplied by, float32, 1 or more: of their shape."""
    error: Float[np.ndarray, "s 1"]
    """The sum of (w - s q)^2 under them, of the shape of the scales; errors of moved pairs times `WEIGHT_OF_MOVES`."""
    unraised: Float[np.ndarray, "s 1"]
    """The sum of squares, as `error` has it, under the scales as they are."""


def paired(terms: Shaped[Any, "n k"]) -> Shaped[Any, "n p 2"]:
    """Returns the terms of each sum in twos; an odd one is paired with zero."""
    terms = np.asarray(terms)
    return np.pad(terms, ((0, 0), (0, terms.shape[1] % 2))).reshape(len(terms), -1, 2)


def saturates(pairs: Shaped[np.ndarray, "*n 2"]) -> Shaped[np.ndarray, "*n"]:
    """Tells which pairs of int8 weights can saturate: |w1 + w2| > 128, which only those of one sign reach."""
    return np.abs(_sums(pairs)) > LARGEST_SUM


def _sums(pairs: np.ndarray) -> np.ndarray:
    return pairs[..., 0] + pairs[..., 1]


def without_saturation(codes: Float[np.ndarray, "*n 2"], quotients: Float[np.ndarray, "*n 2"]) -> np.ndarray:
    """Returns the codes with those of saturating pairs moved to the nearest pair of integers that does not saturate.

    Of a pair with |q1 + q2| > 128 each gives way by half of what the real quotients are too large by, to integers with
    |q1 + q2| = 128. No magnitude grows, so that weights shared by sums of other pairs stay safe there.

    Args:
        codes: Integers as they are rounded, int8's.
        quotients: What was rounded: w / s.
    """
    at = np.nonzero(saturates(codes))
    result = codes.copy()
    result[at] = _nearest_safe(codes[at], quotients[at])
    return result


def _nearest_safe(codes: Float[np.ndarray, "n 2"], quotients: Float[np.ndarray, "n 2"]) -> np.ndarray:
    sign = np.sign(codes[:, :1])
    first, second = (sign * quotients).T
    most = np.clip(np.round((LARGEST_SUM + first - second) / 2), 1, LARGEST_SUM - 1)
    return sign * np.stack([most, LARGEST_SUM - most], axis=-1)


def fitted(terms: Float[np.ndarray, "n k"], scale: Float[np.ndarray, "s 1"], smallest: float) -> Fitted:
    """Returns by how much to raise the scales so that the weights are nearest under `without_saturation`.

    Each scale is tried at 1 to 2 times its size in even steps. At 1, a few weights move by large steps; at 2 none has
    to, and all are on a grid twice as coarse. The best lies in between, most often; where weights are few, the more
    tries the better.

    Args:
        terms: The weights of each sum, in the order in which they are added.
        scale: Their scales: one for each sum, or one for all.
        smallest: The smallest code, -128 or -127.
    """
    pairs = paired(terms.astype(np.float32))
    unraised = _error(pairs, scale, smallest)
    best = Fitted(np.ones(scale.shape, np.float32), unraised, unraised)
    count = int(np.clip(_VALUES // terms.size, _FEWEST, _MOST))
    for i in range(1, count + 1):
        factor = np.float32(1 + i / count)
        error = _error(pairs, scale * factor, smallest)
        is_better = error < best.error
        factors, errors = np.where(is_better, factor, best.factor), np.where(is_better, error, best.error)
        best = Fitted(factors, errors, unraised)
    return best


def _error(pairs: np.ndarray, scale: np.ndarray, smallest: float) -> np.ndarray:
    codes, step = _rounded(pairs, scale, smallest), scale[..., None]
    at = np.nonzero(saturates(codes))
    steps = np.broadcast_to(step, codes.shape)[at]
    codes[at] = _nearest_safe(codes[at], pairs[at] / steps)
    codes *= step
    codes -= pairs
    codes[at] *= WEIGHT_OF_MOVES
    return _over(scale, np.einsum("npk,npk->n", codes, codes)[:, None], np.sum)


def _rounded(pairs: np.ndarray, scale: np.ndarray, smallest: float) -> np.ndarray:
    codes = pairs / scale[..., None]
    return np.clip(np.round(codes, out=codes), smallest, LARGEST_SUM - 1, out=codes)


def _over(scale: np.ndarray, per_row: np.ndarray, reduce: Any) -> np.ndarray:
    """Returns a number for each scale from one for each row, [n, 1]."""
    return per_row if len(scale) == len(per_row) else reduce(per_row, axis=0, keepdims=True)


def saturating_product(x: Int[Array, "*rows k"], w: Int[Array, "k m"]) -> Int[Array, "*rows m"]:
    """Returns the product of matrices as VPMADDUBSW gives it: pairs saturate in int16, sums of pairs are exact.

    Args:
        x: uint8 values, in int32.
        w: int8 values, in int32.
    """
    info = jnp.iinfo(jnp.int16)
    odd = x.shape[-1] % 2
    x = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, odd)))
    first, second, ones = x[..., 0::2], x[..., 1::2], (1,) * (x.ndim - 1)

    def summed(column: Array) -> Array:
        pairs = first * column[0::2].reshape(*ones, -1) + second * column[1::2].reshape(*ones, -1)
        return jnp.clip(pairs, int(info.min), int(info.max)).sum(axis=-1)

    return jnp.moveaxis(jax.lax.map(summed, jnp.pad(w, ((0, odd), (0, 0))).T), 0, -1)
