"""The rounding of one layer's weights as arrays: solved in pieces of a few sizes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ptqjax.encodings.encoding import Encoding, along_axis
from ptqjax.kernels import rounding
from ptqjax.kernels.gram import Moments
from ptqjax.kernels.grouped import grouped_view, ungrouped_view
from ptqjax.kernels.rounding import Grid
from ptqjax.transforms.linear import Linear

_SIZES = (rounding.EXHAUSTIVE, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024)
_STEP = 256  # between sizes beyond
_ROWS = (1, 4, 16, 64, 128)
_GROUPS = 32  # that are solved at a time, where a layer has several

Weights = Float[np.ndarray, "g n k"]
Prepared = tuple[tuple[Any, ...], ...]
"""What solutions under one ridge share, by piece of the groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A layer's weights, and what they may become; per group, k = inputs x taps."""

    weights: Weights
    grid: Grid
    shape: tuple[int, ...]
    """The weight's own shape."""
    inputs_first: bool
    """Whether the weight's first axis counts inputs."""
    taps: int
    """Taps of the kernel."""

    @staticmethod
    def of(layer: Linear, weight: np.ndarray, encoding: Encoding) -> Problem:
        """Returns the problem of a layer whose weight has this encoding."""
        scale, zero = (along_axis(np.asarray(v), encoding, weight.shape) for v in (encoding.scale, encoding.zero_point))

        def view(array: Any) -> np.ndarray:
            return _view(array, weight.shape, layer.groups, inputs_first=layer.inputs_first)

        grid = Grid(view(scale), view(encoding.qmin - zero), view(encoding.qmax - zero))
        taps = int(np.prod(weight.shape[2:])) if layer.kernel_rank else 1
        return Problem(weights=view(weight), grid=grid, shape=weight.shape, inputs_first=layer.inputs_first, taps=taps)

    def nearest(self) -> Weights:
        """Returns the codes next to the weights, on the host."""
        return self._codes(self.weights)

    def codes(self, weight: np.ndarray) -> Weights:
        """Returns the codes next to a weight in its own shape."""
        return self._codes(self.view(weight))

    def _codes(self, weights: Weights) -> Weights:
        scale, low, high = self.grid
        return np.clip(np.round(weights / scale), low, high)

    def weight_of(self, codes: Weights) -> np.ndarray:
        """Returns the weight, in its own shape, that the codes stand for."""
        groups, outputs, _ = codes.shape
        view = (codes * self.grid.scale).reshape(groups, outputs, -1, self.taps)
        return np.asarray(ungrouped_view(view, self.shape, inputs_first=self.inputs_first))

    def view(self, array: np.ndarray) -> Weights:
        """Returns an array of the weight's own shape as [g, n, k]."""
        return _view(array, self.shape, len(self.weights), inputs_first=self.inputs_first)

    def error(self, codes: Weights, found: Moments) -> float:
        """Returns E|W x - V x'|^2 over the rows of `found`, summed over the layer's outputs."""
        return float(self.row_errors(codes, found).sum())

    def row_errors(self, codes: Weights, found: Moments) -> Float[np.ndarray, " outputs"]:
        """Returns E|w x - v x'|^2 for each output w of the layer."""
        rounded, weights = ((codes * self.grid.scale).astype(np.float64), self.weights.astype(np.float64))
        pull = rounded @ found.gram - 2 * (weights @ np.swapaxes(found.cross, 1, 2))
        return (np.einsum("gnk,gnk->gn", pull, rounded) + self._signals(found)).reshape(-1)

    def errors_by_cell(
        self, codes: Weights, found: Moments, cells: Int[np.ndarray, "g n k"]
    ) -> Float[np.ndarray, " cells"]:
        """Returns (v - w) H (v - w)^T of each cell of weights by itself: without what cells do to each other.

        Args:
            codes: The codes.
            found: The moments.
            cells: For each weight its cell; those of a cell lie in a row, at the same columns in every row.
        """
        error = (codes * self.grid.scale - self.weights).astype(np.float64)
        gram = np.where(cells[:, :1, :, None] == cells[:, :1, None, :], found.gram[:, None], 0)[:, 0]
        powers = (error @ gram) * error
        return np.bincount(cells.ravel(), weights=powers.ravel(), minlength=int(cells.max()) + 1)

    def signal(self, found: Moments) -> float:
        """Returns E|W x|^2, summed over the layer's outputs."""
        return float(self._signals(found).sum())

    def _signals(self, found: Moments) -> Float[np.ndarray, "g n"]:
        weights = self.weights.astype(np.float64)
        return np.einsum("gnk,gnk->gn", weights @ found.float_gram, weights)

    def shift(self, codes: Weights, found: Moments) -> np.ndarray:
        """Returns what the bias must add for the mean outputs to stay what they are in float, [outputs]."""
        rounded = codes * self.grid.scale
        shift = np.einsum("gnk,gk->gn", self.weights, found.float_mean) - np.einsum("gnk,gk->gn", rounded, found.mean)
        return shift.reshape(-1)

    def solve(self, found: Moments, ridge: float) -> Weights:
        """Returns the codes of least error under a ridge, see `kernels.rounding`."""
        return self.solve_prepared(self.prepared(found, ridge))

    def prepared(self, found: Moments, ridge: float) -> Prepared:
        """Returns what the solutions of all grids of these weights share: for each piece of the groups its factors."""
        groups, _, inputs = self.weights.shape
        num_groups, size = _groups_at_once(groups), _padded_size(inputs)

        def of(some: slice) -> tuple[Any, ...]:
            moments = (_fitting(each[some], (num_groups, size, size)) for each in (found.gram, found.cross))
            return _prepared(*moments, np.float32(ridge))

        return tuple(of(some) for some in _pieces(groups, num_groups))

    def solve_prepared(self, prepared: Prepared) -> Weights:
        """Returns the codes of least error under the ridge that was prepared for."""
        groups, outputs, inputs = self.weights.shape
        size = _padded_size(inputs)
        num_rows = next((rows for rows in _ROWS if rows >= outputs or rows == _ROWS[-1]), _ROWS[-1])
        num_groups = _groups_at_once(groups)
        codes = np.zeros(self.weights.shape, np.float32)
        for factors, some in zip(prepared, _pieces(groups, num_groups), strict=True):
            for rows in _pieces(outputs, num_rows):
                shape = (num_groups, num_rows, size)
                weights, low, high = (
                    _fitting(each[some, rows], shape) for each in (self.weights, self.grid.low, self.grid.high)
                )
                scale = _fitting(self.grid.scale[some, rows], shape, fill=1.0)
                solved = np.asarray(_solved(factors, weights, Grid(scale, low, high)))
                here = codes[some, rows]
                codes[some, rows] = solved[: here.shape[0], : here.shape[1], :inputs]
        return codes


def _groups_at_once(groups: int) -> int:
    return 1 if groups == 1 else _GROUPS


def _view(array: Any, shape: tuple[int, ...], groups: int, *, inputs_first: bool) -> Weights:
    whole = np.broadcast_to(np.asarray(array, np.float32), shape)
    view = grouped_view(whole, groups=groups, inputs_first=inputs_first)
    return np.ascontiguousarray(view.reshape(*view.shape[:2], -1))


def _padded_size(inputs: int) -> int:
    return next((size for size in _SIZES if size >= inputs), -(-inputs // _STEP) * _STEP)


def _pieces(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _fitting(array: Any, shape: tuple[int, ...], *, fill: float = 0.0) -> np.ndarray:
    """Returns the array in a corner of one of `shape`."""
    whole = np.full(shape, fill, np.float32)
    whole[tuple(map(slice, array.shape))] = array
    return whole


@jax.jit
def _prepared(gram: Any, cross: Any, ridge: Any) -> tuple[Any, ...]:
    """Returns for each group what all rows share: G, A with T = W A, and the order and factor of error feedback."""

    def prepare(gram: Any, cross: Any) -> tuple[Any, ...]:
        damped = rounding.with_ridge(gram, ridge)
        best = rounding.best_without_grid(cross, gram, damped)
        is_small = gram.shape[0] <= rounding.EXHAUSTIVE
        return damped, best, *(() if is_small else rounding.feedback_factor(damped))

    return jax.vmap(prepare)(gram, cross)


@jax.jit
def _solved(prepared: tuple[Any, ...], weights: Any, grid: Grid) -> Any:
    def solve(prepared: tuple[Any, ...], weights: Any, grid: Grid) -> Any:
        damped, best, *feedback = prepared
        target = jnp.matmul(weights, best, precision=jax.lax.Precision.HIGHEST)
        if not feedback:
            return rounding.exhaustive(target, damped, grid)
        order, upper = feedback
        codes = rounding.fed_back(target[:, order], upper, grid.sorted(order))
        return jnp.zeros_like(codes).at[:, order].set(codes)

    return jax.vmap(solve)(prepared, weights, grid)
