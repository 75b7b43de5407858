"""The threshold at which clipping and rounding change a distribution least, by Kullback-Leibler divergence.

Source: Migacz, 8-bit Inference with TensorRT (GTC 2017), "Entropy calibration": of the counts h of |x|, the first i
    bins are kept. P is them, with the count of all others added to the last; Q is them without, summed over levels of
    equal numbers of bins and spread again evenly over the bins of a level that are not empty. T = i bins where
    sum P log(P / Q) is least. We differ in this: the first bin takes the count of the second, because zeros lie on
    every grid; the number of levels is the grid's; of equal divergences the largest T wins; every sixteenth i is tried,
    and then those around the best.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ptqjax.pytrees import PyTreeNode

STRIDE = 16
"""Bins from one threshold of the first round to the next; the second tries all between its neighbours."""


class Magnitudes(PyTreeNode):
    """What thresholds are chosen from: t distributions of |x|, in bins of width 1."""

    counts: Any
    """How many numbers lie in each bin, shape [t, b]."""
    lowest: Any
    """Smallest number or 0, shape [t]."""
    highest: Any
    """Largest number or 0, shape [t]."""


class _Sums(PyTreeNode):
    """Sums over the bins before each one, shape [t, b + 1]."""

    mass: Any
    filled: Any
    information: Any


@jax.jit
def least_divergent_threshold(magnitudes: Magnitudes, num_codes: Any, is_symmetric: Any) -> Int[Array, " t"]:
    """Returns the number of bins below the threshold, as many as hold all numbers where clipping gains nothing.

    Args:
        magnitudes: The distributions.
        num_codes: Codes of each grid, scalar or of shape [t]. A threshold has those levels of |x| which the grid has
            on the longer side. Where these are as many as bins, nothing is seen of rounding and nothing is clipped.
        is_symmetric: Whether the grid spends as many codes below 0 as above.
    """
    counts = magnitudes.counts.at[:, 0].set(magnitudes.counts[:, 1]).astype(jnp.float32)
    num_tensors, num_bins = counts.shape
    sums = _Sums(*(_before(each) for each in (counts, (counts > 0).astype(jnp.float32), _information(counts))))
    used = jnp.clip(jnp.ceil(jnp.maximum(magnitudes.highest, -magnitudes.lowest)), 1, num_bins).astype(jnp.int32)

    def best_of(thresholds: Any) -> Any:
        levels = jnp.clip(_levels(thresholds, magnitudes, num_codes, is_symmetric), 1, num_bins)
        divergence = _divergences(counts, sums, thresholds, levels)
        is_rounded = (thresholds > levels) | (thresholds == used[:, None])
        divergence = jnp.where(is_rounded & (thresholds <= used[:, None]), divergence, jnp.inf)
        # All thresholds run downwards, so that the largest of equal ones is the first.
        return jnp.take_along_axis(thresholds, jnp.argmin(divergence, axis=1)[:, None], axis=1)

    coarse = used[:, None] - STRIDE * jnp.arange(num_bins // STRIDE, dtype=jnp.int32)[None, :]
    best = best_of(jnp.maximum(coarse, 1))
    fine = jnp.clip(best + jnp.arange(STRIDE - 1, -STRIDE, -1, dtype=jnp.int32)[None, :], 1, used[:, None])
    return best_of(fine)[:, 0].reshape(num_tensors)


def _before(values: Float[Array, "t b"]) -> Float[Array, "t c"]:
    return jnp.pad(jnp.cumsum(values, axis=1), ((0, 0), (1, 0)))


def _information(counts: Any) -> Any:
    return jnp.where(counts > 0, counts * jnp.log(jnp.maximum(counts, 1)), 0.0)


def _levels(thresholds: Int[Array, "t c"], magnitudes: Magnitudes, num_codes: Any, is_symmetric: Any) -> Any:
    """Returns how many levels of |x| a grid of the range [max(lowest, -T), min(highest, T)] has."""
    t = thresholds.astype(jnp.float32)
    span = jnp.minimum(magnitudes.highest[:, None], t) - jnp.maximum(magnitudes.lowest[:, None], -t)
    longer = jnp.minimum(jnp.maximum(magnitudes.highest, -magnitudes.lowest)[:, None], t)
    codes, symmetric = (jnp.broadcast_to(v, magnitudes.lowest.shape)[:, None] for v in (num_codes, is_symmetric))
    share = jnp.where(symmetric, 0.5, longer / jnp.maximum(span, 1e-30))
    return jnp.round(codes * share).astype(jnp.int32)


def _divergences(
    counts: Float[Array, "t b"], sums: _Sums, thresholds: Int[Array, "t c"], levels: Int[Array, "t c"]
) -> Float[Array, "t c"]:
    """Returns sum P log(P / Q) for each threshold, P and Q scaled to the sum 1.

    With m the count and k the filled bins of a level, sum P log Q is the sum of m log(m / k) over levels, plus what
    lies beyond times log(m / k) of the last: two numbers of each level, which sums over the bins before give.
    Infinity where P alone has something in the last bin.
    """
    within = jnp.take_along_axis(sums.mass, thresholds, axis=1)
    total = sums.mass[:, -1:]
    beyond = total - within
    last = jnp.take_along_axis(counts, thresholds - 1, axis=1)
    information = jnp.take_along_axis(sums.information, thresholds, axis=1)
    information = information - _information(last) + _information(last + beyond)

    def add_level(level: Any, cross: Any) -> Any:
        mass, log_height = _level(sums, thresholds, levels, level)
        return cross + jnp.where(level < levels, mass * log_height, 0.0)

    cross = jax.lax.fori_loop(0, levels.max(), add_level, jnp.zeros_like(within))
    cross = cross + beyond * _level(sums, thresholds, levels, levels - 1)[1]
    divergence = (information - cross) / total - jnp.log(total) + jnp.log(jnp.maximum(within, 1e-30))
    return jnp.where((within > 0) & ((last > 0) | (beyond == 0)), divergence, jnp.inf)


def _level(sums: _Sums, thresholds: Any, levels: Any, level: Any) -> tuple[Any, Any]:
    """Returns the count of a level, and the logarithm of what it puts into each of its bins that are not empty."""
    ends = [(thresholds * jnp.minimum(level + i, levels)) // levels for i in (0, 1)]
    mass, filled = (
        jnp.take_along_axis(each, ends[1], axis=1) - jnp.take_along_axis(each, ends[0], axis=1)
        for each in (sums.mass, sums.filled)
    )
    return mass, jnp.log(jnp.maximum(mass, 1e-30)) - jnp.log(jnp.maximum(filled, 1))
