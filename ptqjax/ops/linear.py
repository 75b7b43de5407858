"""Matrix products, sums of products, determinants."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
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
    """Returns alpha a b + beta c, with `a` and `b` transposed where asked.

    Raises:
        ValueError: The elements are integers, and alpha or beta is not.
    """
    if not jnp.issubdtype(a.dtype, jnp.floating) and not (alpha.is_integer() and beta.is_integer()):
        raise ValueError(f"alpha = {alpha} and beta = {beta} scale integers; expected whole numbers")
    contract = (((0 if transA else 1,), (1 if transB else 0,)), ((), ()))
    y = lax.dot_general(a, b, contract, precision=_EXACT)
    y = y if alpha == 1 else y * y.dtype.type(alpha)
    if c is None or beta == 0:
        return y
    return y + with_rank(c if beta == 1 else c * y.dtype.type(beta), 2)


@lowers("Einsum", since=12)
def einsum(*operands: Any, equation: str) -> Any:
    """Returns the sums of products that the equation says, in NumPy's notation."""
    return jnp.einsum(equation, *operands, precision=_EXACT)


@lowers("Det", since=11)
def det(x: Any, /) -> Any:
    """Returns the determinants of the matrices in the last two axes."""
    return jnp.linalg.det(x.astype(jnp.promote_types(x.dtype, np.float32))).astype(x.dtype)
