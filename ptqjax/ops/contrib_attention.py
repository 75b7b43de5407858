"""Attention and MultiHeadAttention of com.microsoft: what ONNX Runtime's optimizer makes of transformers.

Keys are masked by adding `mask_filter_value`, so a query to which all are masked takes the mean of all values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.kernels.attention import after_past, join_heads, mixture_of, scores_of, split_heads, weights_of
from ptqjax.ops.layout import with_rank
from ptqjax.ops.registry import MICROSOFT, lowers

_RANK = 4  # [b, h, s, d]; with one axis less, the heads lie in the last
_PACKED = 5  # [b, s, h, 3, d]
_MASKED = -10000.0


@lowers("MultiHeadAttention", since=1, domain=MICROSOFT)
def multi_head_attention(  # noqa: PLR0917 - ONNX's operands
    query: Any,
    key: Any = None,
    value: Any = None,
    bias: Any = None,
    key_padding_mask: Any = None,
    attention_bias: Any = None,
    past_key: Any = None,
    past_value: Any = None,
    past_sequence_length: Any = None,
    cache_indirection: Any = None,
    /,
    *,
    num_heads: int,
    mask_filter_value: float = _MASKED,
    scale: float | None = None,
    unidirectional: int = 0,
) -> tuple[Any, Any, Any, Any]:
    """Returns softmax(scale q k^T + biases) v with the heads in the last axis, keys and values, and q k^T.

    Queries, keys and values may be packed into one, or keys and values into the second; keys and values may come with
    their heads split. `bias` is added to all three before.

    Raises:
        UnsupportedOperatorError: Keys and values lie in a shared buffer, or the beams of a search share them.
    """
    if past_sequence_length is not None or cache_indirection is not None:
        raise UnsupportedOperatorError("past_sequence_length and cache_indirection have no lowering")
    q, k, v = _heads(query, key, value, bias, num_heads)
    k, v = after_past(past_key, k), after_past(past_value, v)
    terms = [*_key_bias(key_padding_mask, k, mask_filter_value), *_given(attention_bias)]
    terms += _causal_bias(q.shape[2], k.shape[2]) if unidirectional else []
    y, scores = _attend(q, k, v, terms, scale)
    return y, k, v, scores


@lowers("Attention", since=1, domain=MICROSOFT)
def attention(  # noqa: PLR0917 - ONNX's operands
    x: Any,
    weights: Any,
    bias: Any = None,
    mask_index: Any = None,
    past: Any = None,
    attention_bias: Any = None,
    past_sequence_length: Any = None,
    /,
    *,
    num_heads: int,
    do_rotary: int = 0,
    mask_filter_value: float = _MASKED,
    past_present_share_buffer: int = 0,
    qkv_hidden_sizes: Sequence[int] = (),
    rotary_embedding_dim: int = 0,
    scale: float | None = None,
    unidirectional: int = 0,
) -> tuple[Any, ...]:
    """Returns the attention of `x` [b, s, i] to itself, projected by `weights` [i, q + k + v], and keys and values.

    Those are stacked, so only there where they have one size.

    Raises:
        UnsupportedOperatorError: It rotates, or keys and values lie in a shared buffer.
    """
    if do_rotary or rotary_embedding_dim or past_present_share_buffer or past_sequence_length is not None:
        raise UnsupportedOperatorError("do_rotary and past_present_share_buffer have no lowering")
    projected = jnp.dot(x, weights, precision=lax.Precision.HIGHEST)
    projected = projected if bias is None else projected + with_rank(bias, projected.ndim)
    sizes = qkv_hidden_sizes or (projected.shape[2] // 3,) * 3
    q, k, v = (split_heads(part, num_heads) for part in jnp.split(projected, np.cumsum(sizes)[:2].tolist(), axis=2))
    k, v = (after_past(None if past is None else past[at], new) for at, new in enumerate((k, v)))
    terms = [*_key_bias(mask_index, k, mask_filter_value), *_given(attention_bias)]
    terms += _causal_bias(q.shape[2], k.shape[2]) if unidirectional else []
    y, _ = _attend(q, k, v, terms, scale)
    return (y, jnp.stack([k, v])) if k.shape == v.shape else (y,)


def _attend(q: Any, k: Any, v: Any, terms: list[Any], scale: float | None) -> tuple[Any, Any]:
    scores = scores_of(q, k) * (scale or 1 / math.sqrt(q.shape[3]))
    biased = scores
    for term in terms:
        biased = biased + term.astype(scores.dtype)
    return join_heads(mixture_of(weights_of(biased, None), v)), scores


def _heads(query: Any, key: Any, value: Any, bias: Any, num_heads: int) -> tuple[Any, Any, Any]:
    """Returns queries, keys and values with the bias, [b, h, s, d]."""
    if query.ndim == _PACKED:
        given = [jnp.swapaxes(query[..., at, :], 1, 2) for at in range(3)]
    elif key is not None and key.ndim == _PACKED:
        given = [query, *(jnp.swapaxes(key[..., at, :], 1, 2) for at in range(2))]
    else:
        given = [query, key, value]
    parts = [x if x.ndim == _RANK else split_heads(jnp.asarray(x), num_heads) for x in given]
    if bias is None:
        return parts[0], parts[1], parts[2]
    sizes = [part.shape[1] * part.shape[3] for part in parts]
    biases = jnp.split(jnp.asarray(bias), np.cumsum(sizes)[:2].tolist())
    q, k, v = (part + one.reshape(1, num_heads, 1, -1) for part, one in zip(parts, biases, strict=True))
    return q, k, v


def _given(attention_bias: Any) -> list[Any]:
    return [] if attention_bias is None else [with_rank(attention_bias, _RANK)]


def _key_bias(mask: Any, k: Any, masked: float) -> list[Any]:
    """Returns nothing, or what masked keys get added, [b, 1, #s, t].

    The mask holds where the keys that count end, [b], or in [2 b] behind that where they begin, or for each key, or
    pair of query and key, whether it counts.

    Raises:
        UnsupportedOperatorError: It has another form.
    """
    if mask is None:
        return []
    mask = jnp.asarray(mask)
    batch, num_keys = k.shape[0], k.shape[2]
    if mask.ndim == 1 and mask.shape[0] in {batch, 2 * batch}:
        places = jnp.arange(num_keys)[None]
        counts = places < mask[:batch, None]
        if mask.shape[0] > batch:
            counts &= places >= jnp.minimum(mask[batch:, None], num_keys)
    elif mask.ndim in {2, 3}:
        counts = mask != 0
    else:
        raise UnsupportedOperatorError(
            f"a mask of shape {list(mask.shape)} has no lowering for {batch} sequences; expected [b], [2 b], [b, t], "
            "[b, s, t]"
        )
    counts = counts[:, None, None] if counts.ndim < 3 else counts[:, None]  # noqa: PLR2004 (without queries)
    return [jnp.where(counts, 0.0, masked)]


def _causal_bias(num_queries: int, num_keys: int) -> list[Any]:
    """Returns -inf for the keys behind each query; the last query sees all."""
    position = jnp.arange(num_queries)[:, None] + (num_keys - num_queries)
    return [jnp.where(jnp.arange(num_keys)[None] <= position, 0.0, -jnp.inf)[None, None]]
