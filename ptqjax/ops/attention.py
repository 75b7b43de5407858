"""Attention and FlexAttention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ptqjax.kernels.attention import (
    after_past,
    capped,
    join_heads,
    mixture_of,
    scores_of,
    split_heads,
    weights_of,
    window,
)
from ptqjax.ops.element_types import element_type
from ptqjax.ops.layout import with_rank
from ptqjax.ops.registry import lowers

_RANK = 4  # [b, h, s, d]; with one axis less, the heads lie in the last


class _Scores(NamedTuple):
    """The stages of the scores, in the order of ONNX's `qk_matmul_output_mode`."""

    raw: Any
    capped: Any
    biased: Any
    weights: Any


class _Sides(NamedTuple):
    """How many keys before and behind a query it sees; -1: all of them."""

    left: int
    right: int


@lowers("Attention", since=23)  # since 24 with `nonpad_kv_seqlen`, since 25 with windows
def attention(  # noqa: PLR0917 - ONNX's operands
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    past_key: Any = None,
    past_value: Any = None,
    nonpad_kv_seqlen: Any = None,
    /,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Returns softmax(cap(scale q k^T) + bias) v, the keys and values with those of the past in front, and the scores.

    The bias forbids by -inf: what a boolean mask does not allow, keys behind a query (causal), outside its window or
    beyond the number of those that are not padding. A query to which all is forbidden gets 0.
    """
    is_packed = q.ndim < _RANK
    if is_packed:
        q, k, v = _split(q, q_num_heads), _split(k, kv_num_heads), _split(v, kv_num_heads)
    k, v = after_past(past_key, k), after_past(past_value, v)
    num_past = None if past_key is None else past_key.shape[2]
    sides = _Sides(left_window_size, 0 if is_causal else right_window_size)
    seen = _in_window(q.shape[2], k.shape[2], num_past=num_past, num_valid=nonpad_kv_seqlen, sides=sides)
    seen += _not_padding(k.shape[2], nonpad_kv_seqlen)
    bias = _bias(mask, seen, num_keys=k.shape[2], dtype=q.dtype)
    factor = math.sqrt(1 / math.sqrt(q.shape[3]) if scale is None else scale)
    scores = _scores(
        jnp.asarray(q) * factor, jnp.asarray(k) * factor, bias, softcap=softcap, softmax_precision=softmax_precision
    )
    y = mixture_of(scores.weights, jnp.asarray(v)).astype(q.dtype)
    return join_heads(y) if is_packed else y, k, v, scores[qk_matmul_output_mode]


def _scores(q: Any, k: Any, bias: Any, *, softcap: float, softmax_precision: int | None) -> _Scores:
    raw = scores_of(q, k)
    bounded = capped(raw, softcap)
    biased = bounded if bias is None else bounded + bias
    is_empty = None if bias is None else jnp.all(jnp.isneginf(bias), axis=-1, keepdims=True)
    weights = weights_of(biased.astype(_precision(softmax_precision, biased.dtype)), is_empty)
    return _Scores(raw, bounded, biased, weights.astype(raw.dtype))


def _split(x: Any, num_heads: int | None) -> Any:
    if num_heads is None:
        raise ValueError("inputs with three axes need the attributes q_num_heads and kv_num_heads")
    return split_heads(jnp.asarray(x), num_heads)


def _in_window(num_queries: int, num_keys: int, *, num_past: int | None, num_valid: Any, sides: _Sides) -> list[Any]:
    """Returns nothing where both sides are open, or which keys lie in the window of each query."""
    if max(sides) < 0:
        return []
    offset = (
        jnp.array([num_past or 0]) if num_valid is None or num_past is not None else jnp.ravel(num_valid) - num_queries
    )
    left, right = (None if size < 0 else size for size in sides)
    return [window(num_queries, num_keys, offset=offset, left=left, right=right)]


def _not_padding(num_keys: int, num_valid: Any) -> list[Any]:
    if num_valid is None:
        return []
    return [jnp.arange(num_keys)[None, None, None] < jnp.reshape(num_valid, (-1, 1, 1, 1))]


def _bias(mask: Any, seen: list[Any], *, num_keys: int, dtype: Any) -> Any:
    """Returns what is added to the scores, of rank 4, or None."""
    terms = [] if mask is None else [_as_bias(_padded(with_rank(mask, _RANK), num_keys), dtype)]
    terms += [_as_bias(allowed, dtype) for allowed in seen]
    return sum(terms[1:], terms[0]) if terms else None


def _padded(mask: Any, num_keys: int) -> Any:
    """Returns the mask; keys that it does not speak of are forbidden."""
    missing = num_keys - mask.shape[-1]
    fill = False if mask.dtype == bool else -jnp.inf
    return jnp.pad(mask, [(0, 0)] * (_RANK - 1) + [(0, missing)], constant_values=fill) if missing else mask


def _as_bias(mask: Any, dtype: Any) -> Any:
    if mask.dtype != bool:
        return jnp.asarray(mask).astype(dtype)
    return jnp.where(mask, jnp.zeros((), dtype), jnp.asarray(-jnp.inf, dtype))


def _precision(number: int | None, default: Any) -> Any:
    return default if number is None else jax.dtypes.canonicalize_dtype(element_type(number))


@lowers("FlexAttention", since=1, domain="ai.onnx.preview")
def flex_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    prob_mod: Callable[[Any], tuple[Any]] | None = None,
    scale: float | None = None,
    score_mod: Callable[[Any], tuple[Any]] | None = None,
    softmax_precision: int | None = None,
) -> Any:
    """Returns prob_mod(softmax(score_mod(scale q k^T))) v: q k^T in its inputs' type, all else in float32 at least."""
    factor = math.sqrt(1 / math.sqrt(q.shape[3]) if scale is None else scale)
    precision = _precision(softmax_precision, jnp.promote_types(q.dtype, jnp.float32))
    scores = scores_of(jnp.asarray(q) * factor, jnp.asarray(k) * factor).astype(precision)
    weights = weights_of(_modified(scores, score_mod), None)
    return mixture_of(_modified(weights, prob_mod), jnp.asarray(v).astype(precision)).astype(v.dtype)


def _modified(x: Any, graph: Callable[[Any], tuple[Any]] | None) -> Any:
    return x if graph is None else jnp.asarray(graph(x)[0], x.dtype)
