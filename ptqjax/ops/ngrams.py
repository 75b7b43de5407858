"""TfIdfVectorizer: how often each known n-gram occurs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.ops.interpolation import check_choice
from ptqjax.ops.registry import lowers


@lowers("TfIdfVectorizer", since=9)
def tf_idf_vectorizer(
    x: Any,
    /,
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: Sequence[int],
    ngram_indexes: Sequence[int],
    pool_int64s: Sequence[int] = (),
    pool_strings: Sequence[str] = (),
    weights: Sequence[float] = (),
) -> Any:
    """Returns counts of the n-grams of the pool in `x` [length] or [n, length] of integers, weighted by `mode`.

    The elements of an n-gram lie equally far apart, with up to `max_skip_count` others between. "TF" counts, "IDF"
    tells by its weight whether there is one, "TFIDF" is the count times the weight.

    Raises:
        UnsupportedOperatorError: The pool is of strings, or `mode` is unknown.
    """
    check_choice(mode, ("TF", "IDF", "TFIDF"), "mode")
    if pool_strings:
        raise UnsupportedOperatorError(
            "attribute 'pool_strings': n-grams of strings have no lowering, of integers have"
        )
    rows = jnp.asarray(x).reshape(-1, x.shape[-1])
    counts = jnp.zeros((len(rows), max(ngram_indexes) + 1), np.float32)
    indexes = np.asarray(ngram_indexes)
    factors = np.asarray(weights or np.ones(len(indexes)), np.float32)
    for first, grams in _pools(pool_int64s, ngram_counts):
        length = grams.shape[1]
        if not min_gram_length <= length <= max_gram_length:
            continue
        found = sum(
            _occurrences(rows, grams, distance) for distance in range(1, 2 + (max_skip_count if length > 1 else 0))
        )
        numbers = slice(first, first + len(grams))
        found = jnp.asarray(found, np.float32)
        valued = (
            found if mode == "TF" else (found if mode == "TFIDF" else jnp.minimum(found, 1)) * factors[None, numbers]
        )
        counts = counts.at[:, indexes[numbers]].add(valued)
    return counts.reshape(*x.shape[:-1], -1)


def _pools(pool: Sequence[int], starts: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields, for each length, the number of the first n-gram and all n-grams [grams, length]."""
    number = 0
    for length, (start, end) in enumerate(zip(starts, [*starts[1:], len(pool)], strict=True), start=1):
        grams = np.asarray(pool[start:end], np.int64).reshape(-1, length)
        if len(grams):
            yield number, grams
        number += len(grams)


def _occurrences(rows: Any, grams: np.ndarray, distance: int) -> Any:
    """Returns how often each n-gram occurs in each row with its elements `distance` apart, [rows, grams]."""
    num_starts = rows.shape[1] - distance * (grams.shape[1] - 1)
    if num_starts <= 0:
        return jnp.zeros((len(rows), len(grams)), np.int32)
    starts = np.arange(num_starts)
    same = jnp.ones((len(rows), num_starts, len(grams)), bool)
    for place, wanted in enumerate(grams.T):
        here = jnp.take(rows, starts + place * distance, axis=1, mode="clip")
        same = same & (here[:, :, None] == jnp.asarray(wanted, rows.dtype)[None, None])
    return jnp.sum(same, axis=1, dtype=np.int32)
