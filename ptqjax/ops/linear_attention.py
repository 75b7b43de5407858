"""LinearAttention: a state that tokens write into and queries read from."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from ptqjax.kernels.attention import linear_attention as run
from ptqjax.ops.registry import lowers

_HAS_DECAY = {"linear": False, "gated": True, "delta": False, "gated_delta": True}
_HAS_RATE = {"linear": False, "gated": False, "delta": True, "gated_delta": True}


@lowers("LinearAttention", since=27)
def linear_attention(  # noqa: PLR0917 - ONNX's operands
    query: Any,
    key: Any,
    value: Any,
    past_state: Any = None,
    decay: Any = None,
    beta: Any = None,
    /,
    *,
    kv_num_heads: int,
    q_num_heads: int,
    chunk_size: int = 64,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
) -> tuple[Any, Any]:
    """Returns what the queries read, [b, t, heads], and the last state; computed in float32.

    Raises:
        ValueError: The rule needs an input that is missing, or has one that it does not know.
    """
    del chunk_size  # how others compute it
    for name, given, wanted in (("decay", decay, _HAS_DECAY), ("beta", beta, _HAS_RATE)):
        if (given is not None) != wanted[update_rule]:
            verb = "needs" if wanted[update_rule] else "has no"
            raise ValueError(f"update rule '{update_rule}' {verb} input '{name}'")
    q, k, v = _moments(query, q_num_heads), _moments(key, kv_num_heads), _moments(value, kv_num_heads)
    shape = (k.shape[1], kv_num_heads, k.shape[3], v.shape[3])
    state = jnp.zeros(shape, query.dtype) if past_state is None else past_state
    outputs, final = run(
        q * (scale or 1 / math.sqrt(q.shape[3])),
        k,
        v,
        jnp.asarray(state).astype(jnp.float32),
        decay=None if decay is None else _moments(decay, kv_num_heads),
        rate=None if beta is None else _moments(beta, beta.shape[2]),
    )
    return jnp.swapaxes(outputs, 0, 1).reshape(*query.shape[:2], -1).astype(query.dtype), final.astype(state.dtype)


def _moments(x: Any, num_heads: int) -> Any:
    """Returns `x` [b, t, heads] as [t, b, head, element], in float32."""
    wide = jnp.asarray(x).astype(jnp.float32)
    return jnp.swapaxes(wide.reshape(*x.shape[:2], num_heads, -1), 0, 1)
