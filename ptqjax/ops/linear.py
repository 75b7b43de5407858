"""Matrix products."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from ptqjax.ops.layout import with_rank
from ptqjax.ops.registry import lowers

_EXACT = lax.Precision.HIGHEST  # float32 products, never TF32 or bfloat16


@lowers("MatMul", since=1)
def matmul(a: Any, b: Any, /) -> Any:
    """Returns the matrix product over the last two axes; those before are broadcast."""
    if b.ndim <= 2:  # noqa: PLR2004 (a matrix, or a vector)
        return jnp.dot(a, b, precision=_EXACT)
    rank = max(a.ndim, b.ndim)
    if a.ndim == 1:
        return jnp.matmul(with_rank(a, rank), with_rank(b, rank), precision=_EXACT)[..., 0, :]
    return jnp.matmul(with_rank(a, rank), with_rank(b, rank), precision=_EXACT)


@lowers("Gemm", since=7)
def gemm(
    a: Any,
    b: Any,
    c: Any = None,
    /,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Any:
    """Returns alpha a b + beta c, with `a` and `b` transposed where asked."""
    contract = (((0 if transA else 1,), (1 if transB else 0,)), ((), ()))
    y = lax.dot_general(a, b, contract, precision=_EXACT)
    y = y if alpha == 1 else y * y.dtype.type(alpha)
    if c is None or beta == 0:
        return y
    return y + with_rank(c if beta == 1 else c * y.dtype.type(beta), 2)
