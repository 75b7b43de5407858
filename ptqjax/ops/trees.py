"""TreeEnsemble: many decision trees at once, all samples descending together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.ops.registry import lowers

_MEMBER = 6  # the mode of a node that asks whether a value is in a set
_AVERAGE, _SUM, _MIN, _MAX = range(4)
_NONE, _SOFTMAX, _LOGISTIC, _SOFTMAX_ZERO, _PROBIT = range(5)


@lowers("TreeEnsemble", since=5, domain="ai.onnx.ml")
def tree_ensemble(
    x: Any,
    /,
    *,
    leaf_targetids: Sequence[int],
    leaf_weights: Any,
    nodes_falseleafs: Sequence[int],
    nodes_falsenodeids: Sequence[int],
    nodes_featureids: Sequence[int],
    nodes_modes: Any,
    nodes_splits: Any,
    nodes_trueleafs: Sequence[int],
    nodes_truenodeids: Sequence[int],
    tree_roots: Sequence[int],
    aggregate_function: int = _SUM,
    membership_values: Any = None,
    n_targets: int = 1,
    nodes_hitrates: Any = None,
    nodes_missing_value_tracks_true: Sequence[int] = (),
    post_transform: int = _NONE,
) -> Any:
    """Returns for each row of `x` [n, features] what the leaves that it reaches say of each target, [n, n_targets].

    Raises:
        UnsupportedOperatorError: `post_transform` is PROBIT, or the nodes make no trees.
    """
    del nodes_hitrates  # how often a node is reached matters to speed alone
    num_nodes = len(nodes_modes)
    # Leaves come behind the nodes, and lead to themselves.
    true, false = (
        np.concatenate([np.asarray(ids) + num_nodes * np.asarray(leaves), num_nodes + np.arange(len(leaf_weights))])
        for ids, leaves in ((nodes_truenodeids, nodes_trueleafs), (nodes_falsenodeids, nodes_falseleafs))
    )
    x = jnp.asarray(x)
    goes_true = _decisions(
        x,
        features=np.asarray(nodes_featureids),
        modes=np.asarray(nodes_modes),
        splits=np.asarray(nodes_splits, x.dtype),
        members=np.zeros(0, x.dtype) if membership_values is None else np.asarray(membership_values, x.dtype),
        missing_is_true=np.asarray(nodes_missing_value_tracks_true or np.zeros(num_nodes), bool),
    )
    place = jnp.broadcast_to(jnp.asarray(tree_roots, np.int32)[None], (len(x), len(tree_roots)))
    for _ in range(_depth(true, false, tree_roots, num_nodes)):
        decided = jnp.take_along_axis(goes_true, jnp.minimum(place, num_nodes - 1), axis=1)
        place = jnp.where(decided, jnp.asarray(true, np.int32)[place], jnp.asarray(false, np.int32)[place])
    leaves = place - num_nodes
    weights = jnp.asarray(np.asarray(leaf_weights, x.dtype))[leaves]
    hits = jnp.asarray(np.asarray(leaf_targetids))[leaves][..., None] == np.arange(n_targets)[None, None]
    return _post_transformed(_aggregated(weights[..., None], hits, aggregate_function), post_transform)


def _decisions(
    x: jax.Array,
    *,
    features: np.ndarray,
    modes: np.ndarray,
    splits: np.ndarray,
    members: np.ndarray,
    missing_is_true: np.ndarray,
) -> jax.Array:
    """Returns whether each sample would take the true branch of each node, [n, nodes]."""
    values = x[:, features]
    against = jnp.asarray(splits)[None]
    comparisons = (jnp.less_equal, jnp.less, jnp.greater_equal, jnp.greater, jnp.equal, jnp.not_equal)
    result = jnp.zeros(values.shape, bool)
    for mode, compare in enumerate(comparisons):
        result = jnp.where(jnp.asarray(modes == mode)[None], compare(values, against), result)
    ends = np.flatnonzero(np.isnan(members))
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    for node, start, end in zip(np.flatnonzero(modes == _MEMBER), starts, ends, strict=True):
        is_member = jnp.any(values[:, node, None] == jnp.asarray(members[start:end])[None], axis=1)
        result = result.at[:, node].set(is_member)
    return result | (jnp.isnan(values) & jnp.asarray(missing_is_true)[None])


def _depth(true: np.ndarray, false: np.ndarray, roots: Sequence[int], num_nodes: int) -> int:
    """Returns how many decisions the longest path makes."""
    level = np.unique(np.asarray(roots))
    for depth in range(num_nodes + 1):
        level = level[level < num_nodes]
        if not level.size:
            return depth
        level = np.unique(np.concatenate([true[level], false[level]]))
    raise UnsupportedOperatorError("the nodes make no trees: a path from a root comes back to itself")


def _aggregated(weights: jax.Array, hits: jax.Array, function: int) -> jax.Array:
    """Returns each target's sum, mean, least or largest of its leaves: [n, trees, 1], `hits` [n, trees, targets]."""
    if function == _MIN:
        return jnp.min(jnp.where(hits, weights, jnp.finfo(weights.dtype).max), axis=1)
    if function == _MAX:
        return jnp.max(jnp.where(hits, weights, jnp.finfo(weights.dtype).min), axis=1)
    total = jnp.sum(jnp.where(hits, weights, 0), axis=1)
    return total / hits.shape[1] if function == _AVERAGE else total


def _post_transformed(y: jax.Array, transform: int) -> jax.Array:
    if transform == _SOFTMAX:
        return jax.nn.softmax(y, axis=1)
    if transform == _LOGISTIC:
        return jax.nn.sigmoid(y)
    if transform == _SOFTMAX_ZERO:
        return jnp.where(y == 0, 0, jax.nn.softmax(y, axis=1, where=y != 0))
    if transform == _PROBIT:
        raise UnsupportedOperatorError("attribute 'post_transform' = 4 (PROBIT) has no lowering")
    return y
