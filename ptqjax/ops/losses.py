"""Losses of classification; a target that is `ignore_index` counts for nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ptqjax.ops.registry import lowers


@lowers("NegativeLogLikelihoodLoss", since=12)
def negative_log_likelihood_loss(
    log_probabilities: Any,
    target: Any,
    weight: Any = None,
    /,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Any:
    """Returns -weight[target] log_probabilities[target] of each place, or their sum, or that over the sum of weights.

    `log_probabilities` are [n, classes, *places] and `target` is [n, *places].
    """
    counts = jnp.ones(target.shape, bool) if ignore_index is None else jnp.asarray(target != ignore_index)
    target = jnp.where(counts, target, 0)
    of_place = counts.astype(log_probabilities.dtype) * (1 if weight is None else jnp.asarray(weight)[target])
    chosen = jnp.take_along_axis(jnp.asarray(log_probabilities), target[:, None], axis=1)[:, 0]
    losses = jnp.where(counts, -chosen * of_place, jnp.zeros((), chosen.dtype))
    if reduction == "none":
        return losses
    return jnp.sum(losses) if reduction == "sum" else jnp.sum(losses) / jnp.sum(of_place)


@lowers("SoftmaxCrossEntropyLoss", since=12)
def softmax_cross_entropy_loss(
    scores: Any,
    labels: Any,
    weights: Any = None,
    /,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> tuple[Any, Any]:
    """Returns `negative_log_likelihood_loss` of the logarithm of the softmax along axis 1, and that logarithm."""
    log_probabilities = jax.nn.log_softmax(jnp.asarray(scores), axis=1)
    loss = negative_log_likelihood_loss(
        log_probabilities, labels, weights, ignore_index=ignore_index, reduction=reduction
    )
    return loss, log_probabilities
