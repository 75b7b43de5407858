"""Metrics of sequences: what the scores [N, T, C] at every position are worth, and how far they are from float's.

Positions without a label (`IGNORED`) do not count; without labels all do. The model is not shifted here: labels[n, t]
is the class that the scores [n, t] are to name, of a language model the token that follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np
from jaxtyping import Float

from ptqjax.errors import ConfigError
from ptqjax.metrics.classes import Choice, counting, labelled_tokens, naming_output
from ptqjax.metrics.records import Metric, Seen, added, fraction, output_named

_AT_A_TIME = 1 << 22  # scores that are held in float64 at once: a vocabulary of 128,000 and a thousand tokens are 1 GB
_LARGEST = math.log(np.finfo(np.float64).max)

_Update = Callable[[tuple[float, int], Seen], tuple[float, int]]


def token_accuracy(output: str | None = None) -> Metric:
    """Returns the metric: fraction of labelled positions whose largest score is the label's."""
    name = _name("token_accuracy", output)

    def update(state: tuple[float, int], seen: Seen) -> tuple[float, int]:
        scores, labels = _labelled(seen, output, name)
        return state[0] + int(np.count_nonzero(scores.argmax(-1) == labels)), state[1] + len(labels)

    return _mean(name, update, needs_labels=True)


def cross_entropy(output: str | None = None) -> Metric:
    """Returns the metric: mean of -log softmax(scores)[label] over labelled positions, in nats."""
    return replace(
        _mean(_name("cross_entropy", output), _cross_entropies(output), needs_labels=True), higher_is_better=False
    )


def perplexity(output: str | None = None) -> Metric:
    """Returns the metric exp(cross-entropy): among how many equally likely classes the model is as unsure."""
    entropy = cross_entropy(output)
    return replace(entropy, name=_name("perplexity", output), finish=lambda state: _exp(entropy.finish(state)))


def kl(output: str | None = None, *, choose: Choice = naming_output) -> Metric:
    """Returns the metric: mean of sum p log(p / q) over positions, p the reference's softmax, in nats.

    Args:
        output: The output; of one [N, C], positions are samples. None: as `choose` says.
        choose: Says which output of a batch: unless told, the one that labels are of, else one that looks like scores
            of samples or tokens.
    """
    name = _name("kl", output)

    def update(state: tuple[float, int], seen: Seen) -> tuple[float, int]:
        chosen = output or choose(seen)
        if chosen is None or not seen.wanted:
            return state
        scores, wanted = (_rows(seen, output_named(some, chosen, name)) for some in (seen.found, seen.wanted))
        total = 0.0
        for rows in _slices(scores):
            p, q = log_softmax(wanted[rows]), log_softmax(scores[rows])
            total += float(np.sum(np.exp(p) * (p - q)))
        return state[0] + total, state[1] + len(scores)

    return replace(_mean(name, update), needs_reference=True, higher_is_better=False)


def cosine(output: str | None = None) -> Metric:
    """Returns the metric: mean cosine between vectors along the last axis and the reference's, of the first output.

    1 where both vectors are zero, 0 where one is. Of an output of tokens, those with a label where there are labels.
    """
    name = _name("cosine", output)

    def update(state: tuple[float, int], seen: Seen) -> tuple[float, int]:
        chosen = output or next(iter(seen.wanted))
        found, wanted = (_rows(seen, output_named(some, chosen, name)) for some in (seen.found, seen.wanted))
        total = sum(float(cosines(found[rows], wanted[rows]).sum()) for rows in _slices(found))
        return state[0] + total, state[1] + len(found)

    return replace(_mean(name, update), needs_reference=True)


def log_softmax(scores: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """Returns log softmax along the last axis, in float64."""
    wide = scores.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def cosines(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Returns x y / (|x| |y|) of each pair of rows, in float64: 1 of two zeros, 0 of one."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    both_zero = ~x.any(-1) & ~y.any(-1)
    return np.where(both_zero, 1.0, np.sum(x * y, -1) / np.where(lengths > 0, lengths, 1.0))


@cache
def _cross_entropies(output: str | None) -> _Update:
    """Returns the update that cross-entropy and perplexity share."""
    name = _name("cross_entropy", output)

    def update(state: tuple[float, int], seen: Seen) -> tuple[float, int]:
        scores, labels = _labelled(seen, output, name)
        total = 0.0
        for rows in _slices(scores):
            logs = log_softmax(scores[rows])
            total -= float(logs[np.arange(len(logs)), labels[rows]].sum())
        return state[0] + total, state[1] + len(labels)

    return update


def _labelled(seen: Seen, output: str | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scores [R, C] at labelled positions, and their labels [R]; of a label a sample, R counts samples."""
    labels = seen.labels
    chosen = output or (
        labelled_tokens(seen.found) if labels is not None and labels.ndim > 1 else next(iter(seen.found))
    )
    value = output_named(seen.found, chosen or "", name)
    scores = value.reshape(len(value), -1) if labels is not None and labels.ndim == 1 else value
    if labels is None or scores.shape[:-1] != labels.shape:
        found = None if labels is None else list(labels.shape)
        raise ConfigError(
            f"metric '{name}': output '{chosen}' has the shape {list(value.shape)}, and labels {found}; expected a "
            "label for each of its positions: name an output that has as many as labels"
        )
    return scores[labels >= 0], labels[labels >= 0]


def _rows(seen: Seen, value: np.ndarray) -> np.ndarray:
    """Returns the vectors [R, C] of an output that count."""
    if value.ndim > 2 and seen.labels is not None and seen.labels.shape == value.shape[:2]:  # noqa: PLR2004
        return value[counting(seen, value)].reshape(-1, value.shape[-1])
    return value.reshape(-1, value.shape[-1]) if value.ndim > 1 else value[:, None]


def _slices(scores: np.ndarray) -> Iterator[slice]:
    size = max(_AT_A_TIME // max(scores.shape[-1], 1), 1)
    return (slice(start, start + size) for start in range(0, len(scores), size))


def _mean(name: str, update: _Update, *, needs_labels: bool = False) -> Metric:
    return Metric(
        name=name, init=lambda: (0.0, 0), update=update, finish=fraction, needs_labels=needs_labels, merge=added
    )


def _exp(entropy: float) -> float:
    return math.exp(entropy) if not entropy > _LARGEST else math.inf


def _name(kind: str, output: str | None) -> str:
    return f"{kind}:{output}" if output else kind
