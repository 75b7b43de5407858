"""RotaryEmbedding: positions as rotations of pairs of coordinates; ONNX's and ONNX Runtime's."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.kernels.attention import join_heads, rotated, split_heads
from ptqjax.ops.registry import lowers

_RANK = 4  # [b, h, s, d]; with one axis less, the heads lie in the last


@lowers("RotaryEmbedding", since=23)
def rotary_embedding(
    x: Any,
    cos: Any,
    sin: Any,
    position_ids: Any = None,
    /,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Any:
    """Returns `x` with the first coordinates of each head (0: all of them) rotated by the angles of their positions.

    `cos` and `sin` are [b, s, d / 2]; with `position_ids` [b, s] they are tables of all positions.
    """
    if x.ndim < _RANK:
        heads = split_heads(jnp.asarray(x), num_heads or 0)
        settings = {"interleaved": interleaved, "rotary_embedding_dim": rotary_embedding_dim}
        return join_heads(rotary_embedding(heads, cos, sin, position_ids, **settings))
    if position_ids is not None:
        cos, sin = jnp.asarray(cos)[position_ids], jnp.asarray(sin)[position_ids]
    size = rotary_embedding_dim or x.shape[3]
    turned = rotated(jnp.asarray(x[..., :size]), cos[:, None], sin[:, None], is_interleaved=bool(interleaved))
    return jnp.concatenate([turned, x[..., size:]], axis=-1)


@lowers("RotaryEmbedding", since=1, domain="com.microsoft")
def rotary_embedding_microsoft(
    x: Any,
    position_ids: Any,
    cos: Any,
    sin: Any,
    /,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Any:
    """Returns `rotary_embedding` by tables; one position id is that of the first token.

    Raises:
        UnsupportedOperatorError: The batch is packed, or a scale is given.
    """
    if is_packed_batching or scale != 1:
        raise UnsupportedOperatorError("is_packed_batching and scale have no lowering")
    if position_ids.ndim < 2:  # noqa: PLR2004 (not one per token)
        position_ids = position_ids.reshape(1, 1) + jnp.arange(x.shape[-2 if x.ndim == _RANK else 1])[None]
    num_heads = num_heads or (0 if rotary_embedding_dim else x.shape[-1] // (2 * cos.shape[1]))
    return rotary_embedding(
        x,
        cos,
        sin,
        position_ids,
        interleaved=interleaved,
        num_heads=num_heads,
        rotary_embedding_dim=rotary_embedding_dim,
    )
