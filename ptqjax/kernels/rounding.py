"""Rounding of a layer's weights for the least output error: solvers on its second moments, row by row.

All minimize (V - T) G (V - T)^T over V = s q, q integers from `low` to `high`: G the moments of what the weights
multiply in the quantized network, with a ridge, and T the weights that would be best without a grid. Rows, the outputs
of a layer, are independent. Each weight has a step and ends of its own, so that channels, blocks and zero points are
one case. All float32; k = inputs x taps.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve, solve_triangular
from jaxtyping import Array, Float

BLOCK = 32
"""Columns that are rounded before the others learn of their errors; sizes must be multiples of it."""
EXHAUSTIVE = 9
"""Most columns whose roundings, two for each, are all tried."""

Gram = Float[Array | np.ndarray, "k k"]
Rows = Float[Array | np.ndarray, "n k"]


def with_ridge(gram: Gram, ridge: Any) -> Gram:
    """Returns the moments with `ridge` times their mean diagonal added to it; of no moments at all the identity."""
    size = gram.shape[0]
    mean = jnp.trace(gram) / size
    return gram + jnp.where(mean > 0, ridge * mean, 1.0) * jnp.eye(size, dtype=gram.dtype)


def best_without_grid(cross: Gram, gram: Gram, damped: Gram) -> Gram:
    """Returns A = (C^T + r I)(H + r I)^-1: T = W A imitates W x when it multiplies x', by ridge regression.

    Without errors before the layer A is the identity, and so it is for an endless ridge.

    Args:
        cross: C = E[x' x^T].
        gram: H = E[x' x'^T].
        damped: H + r I, see `with_ridge`.
    """
    return cho_solve(cho_factor(damped, lower=True), cross + (damped - gram)).T


class Grid(NamedTuple):
    """What each weight may become: `scale` times an integer."""

    scale: Any
    """The steps, [n, k]."""
    low: Any
    """The smallest integers, counted from the one that stands for 0, [n, k]."""
    high: Any
    """The largest ones, [n, k]."""

    def codes(self, values: Any) -> Any:
        """Returns the integers next to `values` [n, k]."""
        return jnp.clip(jnp.round(values / self.scale), self.low, self.high)

    def columns(self, start: Any, count: int) -> Grid:
        """Returns the grid of `count` columns from `start` on."""
        return Grid(*(lax.dynamic_slice_in_dim(each, start, count, axis=1) for each in self))

    def column(self, index: Any) -> Grid:
        """Returns the grid of one column, [n]."""
        return Grid(*(lax.dynamic_index_in_dim(each, index, axis=1, keepdims=False) for each in self))

    def sorted(self, order: Any) -> Grid:
        """Returns the grid with its columns in another order."""
        return Grid(*(each[:, order] for each in self))


def error_feedback(target: Rows, gram: Gram, grid: Grid) -> Rows:
    """Returns codes rounded column by column, those not yet rounded making up for the errors of those that are.

    Columns come in descending order of their moments, `BLOCK` at a time.

    Args:
        target: T.
        gram: G, positive definite.
        grid: What weights may become.

    Source:
        Frantar et al., "GPTQ", ICLR 2023. U with U^T U = G^-1 is found from the Cholesky factor of G in reversed order,
        without forming G^-1.
    """
    order, upper = feedback_factor(gram)
    codes = fed_back(target[:, order], upper, grid.sorted(order))
    return jnp.zeros_like(codes).at[:, order].set(codes)


def feedback_factor(gram: Gram) -> tuple[Any, Gram]:
    """Returns the order of columns, [k], and U for G with its columns in that order."""
    order = jnp.argsort(-jnp.diagonal(gram), stable=True)
    backwards = gram[order][:, order][::-1, ::-1]
    factor = jnp.linalg.cholesky(backwards)[::-1, ::-1]  # R R^T = G, R upper triangular
    return order, solve_triangular(factor, jnp.eye(gram.shape[0], dtype=gram.dtype), lower=False)


def fed_back(target: Rows, upper: Gram, grid: Grid) -> Rows:
    """Returns the codes of columns that come in their order; see `error_feedback`."""

    def round_block(rows: Any, start: Any) -> tuple[Any, Any]:
        square = lax.dynamic_slice(upper, (start, start), (BLOCK, BLOCK))
        part = grid.columns(start, BLOCK)

        def round_column(block: Any, column: Any) -> tuple[Any, tuple[Any, Any]]:
            factors = lax.dynamic_index_in_dim(square, column, keepdims=False)
            here = lax.dynamic_index_in_dim(block, column, axis=1, keepdims=False)
            own = part.column(column)
            code = own.codes(here)
            error = (here - code * own.scale) / factors[column]
            return block - error[:, None] * factors[None], (code, error)

        block = lax.dynamic_slice_in_dim(rows, start, BLOCK, axis=1)
        _, (codes, errors) = lax.scan(round_column, block, jnp.arange(BLOCK))
        behind = lax.dynamic_slice_in_dim(upper, start, BLOCK, axis=0)
        return rows - jnp.matmul(errors.T, behind, precision=lax.Precision.HIGHEST), codes.T

    starts = jnp.arange(0, target.shape[1], BLOCK)
    _, codes = lax.scan(round_block, target, starts)
    return jnp.moveaxis(codes, 0, 1).reshape(target.shape)


def descend(codes: Rows, target: Rows, gram: Gram, grid: Grid) -> Rows:
    """Returns codes after one sweep over the columns, each set to what is best beside the others: never worse.

    Source:
        Coordinate descent on the integers, as in Zhang et al., "COMQ", 2024.
    """
    diagonal = jnp.diagonal(gram)

    def improve(column: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        codes, pull = state
        old = lax.dynamic_index_in_dim(codes, column, axis=1, keepdims=False)
        force = lax.dynamic_index_in_dim(pull, column, axis=1, keepdims=False)
        own = grid.column(column)
        new = own.codes(old * own.scale + force / diagonal[column])
        row = lax.dynamic_index_in_dim(gram, column, keepdims=False)
        pull = pull - ((new - old) * own.scale)[:, None] * row[None]
        return lax.dynamic_update_slice_in_dim(codes, new[:, None], column, axis=1), pull

    pull = jnp.matmul(target - codes * grid.scale, gram, precision=lax.Precision.HIGHEST)
    return lax.fori_loop(0, target.shape[1], improve, (codes, pull))[0]


def exhaustive(target: Rows, gram: Gram, grid: Grid) -> Rows:
    """Returns the best codes of all that lie next to `target` on either side: 2^k roundings a row, k at most 9."""
    up = jnp.asarray(list(product((0.0, 1.0), repeat=target.shape[1])), target.dtype)  # [2^k, k]
    scale, low, high = (each[:, None] for each in grid)
    codes = jnp.clip(jnp.floor(target / grid.scale)[:, None] + up[None], low, high)
    errors = codes * scale - target[:, None]
    costs = jnp.einsum("nmk,kl,nml->nm", errors, gram, errors, precision=lax.Precision.HIGHEST)
    return jnp.take_along_axis(codes, jnp.argmin(costs, axis=1)[:, None, None], axis=1)[:, 0]
