"""Attention: how much each query takes of each value.

Queries are [b, h, s, d], keys [b, k, t, d] and values [b, k, t, e]: a head of keys serves h / k consecutive heads of
queries. A bias of -inf forbids a key to a query.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_EXACT = lax.Precision.HIGHEST  # float32 products, never TF32 or bfloat16


def split_heads(x: Float[Array, "b s hidden"], num_heads: int) -> Float[Array, "b h s d"]:
    """Returns the heads, which lie one after another in the last axis, as an axis of their own."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads), 1, 2)


def join_heads(x: Float[Array, "b h s d"]) -> Float[Array, "b s hidden"]:
    """Returns the inverse of `split_heads`."""
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def after_past(past: Any, new: Any) -> Any:
    """Returns the keys or values [b, k, t, d] of earlier calls, if any, with the new ones behind them."""
    return new if past is None else jnp.concatenate([past, new], axis=2)


def scores_of(q: Float[Array, "b h s d"], k: Float[Array, "b k t d"]) -> Float[Array, "b h s t"]:
    """Returns q . k for each query and key of a head."""
    per_head = q.shape[1] // k.shape[1] * q.shape[2]
    grouped = q.reshape(*k.shape[:2], per_head, q.shape[3])  # the queries of one head of keys, one after another
    return jnp.matmul(grouped, jnp.swapaxes(k, 2, 3), precision=_EXACT).reshape(*q.shape[:3], k.shape[2])


def mixture_of(weights: Float[Array, "b h s t"], v: Float[Array, "b k t e"]) -> Float[Array, "b h s e"]:
    """Returns the sum of the values with their weights, for each query."""
    grouped = weights.reshape(*v.shape[:2], weights.shape[1] // v.shape[1] * weights.shape[2], v.shape[2])
    return jnp.matmul(grouped, v, precision=_EXACT).reshape(*weights.shape[:3], v.shape[3])


def capped(scores: Float[Array, "b h s t"], cap: float) -> Float[Array, "b h s t"]:
    """Returns cap tanh(scores / cap); a cap of 0 leaves them alone."""
    return jnp.tanh(scores / cap) * cap if cap > 0 else scores


def weights_of(scores: Float[Array, "b h s t"], is_empty: Bool[Array, "#b #h #s 1"] | None) -> Float[Array, "b h s t"]:
    """Returns the softmax over keys; 0 for queries to which all keys are forbidden, also in the gradient."""
    if is_empty is None:
        return jax.nn.softmax(scores, axis=-1)
    zero = jnp.zeros((), scores.dtype)
    return jnp.where(is_empty, zero, jax.nn.softmax(jnp.where(is_empty, zero, scores), axis=-1))


def window(
    num_queries: int, num_keys: int, *, offset: Int[Array, " b"], left: int | None, right: int | None
) -> Bool[Array, "b 1 s t"]:
    """Returns which keys lie at most `left` before and `right` behind a query; None: any number.

    Args:
        num_queries: How many there are.
        num_keys: How many there are.
        offset: The position of the first query among the keys.
        left: See above.
        right: See above.
    """
    position = offset[:, None, None, None] + jnp.arange(num_queries)[None, None, :, None]
    distance = jnp.arange(num_keys)[None, None, None] - position
    seen = jnp.ones(distance.shape, bool)
    if left is not None:
        seen &= distance >= -left
    return seen if right is None else seen & (distance <= right)


def rotated(
    x: Float[Array, "*rows d"],
    cos: Float[Array, "*#rows d/2"],
    sin: Float[Array, "*#rows d/2"],
    *,
    is_interleaved: bool,
) -> Float[Array, "*rows d"]:
    """Returns `x` as pairs of coordinates, rotated by angles with these cosines and sines.

    A pair lies half the axis apart, or, interleaved, side by side.
    """
    a, b = (x[..., ::2], x[..., 1::2]) if is_interleaved else jnp.split(x, 2, axis=-1)
    pair = (cos * a - sin * b, sin * a + cos * b)
    return jnp.stack(pair, axis=-1).reshape(x.shape) if is_interleaved else jnp.concatenate(pair, axis=-1)


def linear_attention(
    q: Float[Array, "t b h d"],
    k: Float[Array, "t b k d"],
    v: Float[Array, "t b k e"],
    state: Float[Array, "b k d e"],
    *,
    decay: Float[Array, "t b k #d"] | None,
    rate: Float[Array, "t b #k 1"] | None,
) -> tuple[Float[Array, "t b h e"], Float[Array, "b k d e"]]:
    """Returns q^T S at each moment and the last S, which is exp(decay) S' + k u^T.

    S' is the state before; u is v, or with a `rate` the correction rate (v - (exp(decay) S')^T k). Without decay the
    factor is 1.
    """

    def advance(before: Any, moment: tuple[Any, Any, Any, Any, Any]) -> tuple[Any, Any]:
        query, key, value, log_factor, share = moment
        kept = before if log_factor is None else before * jnp.exp(log_factor)[..., None]
        if share is not None:
            value = share * (value - jnp.einsum("bkde,bkd->bke", kept, key, precision=_EXACT))
        after = kept + key[..., :, None] * value[..., None, :]
        grouped = query.reshape(*key.shape[:2], -1, key.shape[2])
        return after, jnp.einsum("bkgd,bkde->bkge", grouped, after, precision=_EXACT).reshape(*query.shape[:2], -1)

    final, outputs = lax.scan(advance, state, (q, k, v, decay, rate))
    return outputs.reshape(*q.shape[:3], -1), final
