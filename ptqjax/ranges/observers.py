"""What is kept of streamed data: bounded, mergeable state of many tensors at once, as records of pure functions.

What ranges are made of it is told in `ranges.schemes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ptqjax.kernels.exact_sums import MOST_TERMS, add_terms, empty_sums
from ptqjax.kernels.histogram import Histogram, add_values, empty_histogram, merge_histograms
from ptqjax.kernels.ranges import GridKind
from ptqjax.pytrees import PyTreeNode

SAMPLES = 4096
"""Values of a tensor that a histogram counts for each sample of a batch; extremes are of all values.

Where fewer are counted than there are, the tail beyond the largest one counted may be clipped unseen. SQNR of the
logits with 32 calibration samples and the scheme "sqnr", in dB, with 1,024, 4,096 and (nearly) all values counted:
MobileNetV2 12.6, 12.8, 12.7; ResNet-20 21.1, 21.9, 21.9; SqueezeNet 29.6, 30.3, 31.4 (with 96 samples and 4,096, 16,384
and 65,536 values: 31.6, 32.0, 32.0). A batch of 16 through MobileNetV2 takes 157 ms, 250 with extremes alone, 285 with
4,096 values counted, 373 with 16,384 (2 cores)."""

_GOLDEN = (math.sqrt(5) - 1) / 2


class Extremes(PyTreeNode):
    """Smallest and largest value of t tensors; inf and -inf before any is seen, -inf and inf after a NaN."""

    lowest: Any
    """Shape [t]."""
    highest: Any
    """Shape [t]."""


class MeanExtremes(PyTreeNode):
    """Extremes of all values of t tensors, and the sums of the extremes of each sample."""

    extremes: Extremes
    """The extremes of all values."""
    sums: Any
    """Sums of the smallest and the largest values, as `kernels.exact_sums` has sums: shape [t, 2, e, p]."""
    counts: Any
    """Number of samples, int32, shape [t]; a tensor that does not divide into samples counts once a batch."""


class Distribution(PyTreeNode):
    """Extremes of all values of t tensors, and a histogram of a sample of them."""

    extremes: Extremes
    """The extremes of all values."""
    histogram: Histogram
    """The histogram of the same places of each sample of a batch, `SAMPLES` at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observer:
    """A way to look at streamed data, with a state of bounded size.

    Schemes that differ in what they make of the same state share the observer, and with it the compiled program.
    """

    name: str
    """What is kept, in words."""
    init: Callable[[int], Any]
    """(number of tensors) -> state before any data, its leaves NumPy arrays, each with memory of its own."""
    look: Callable[[Sequence[Any], int], Any]
    """(one array per tensor, samples in this batch) -> what is to be kept of them, a pytree of arrays. Traced as part
    of the program that runs the model, so it is to be little, and quick to compile for each tensor."""
    absorb: Callable[[Any, Any], Any]
    """(state, what was looked at) -> state; traced as a program of its own, which no model is part of."""
    merge: Callable[[Any, Any], Any]
    """(state, state) -> the state after the data of both, in any order."""
    extremes: Callable[[Any], Extremes]
    """(state) -> the extremes of all values so far."""
    most_samples: int | None = None
    """Samples that a state has room for, merged ones included: its sums are in int32. None: any number."""
    is_ordered: bool = False
    """Whether batches count one by one and in their order: then states of several devices do not merge."""

    def update(self, state: Any, values: Sequence[Any], num_samples: int) -> Any:
        """Returns the state after one array per tensor, of a batch of so many samples; traces under `jit`."""
        return self.absorb(state, self.look(values, num_samples))


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeScheme:
    """A way to choose grids: what is kept of streamed data, and what is made of it."""

    name: str
    """The scheme's name in `QuantizationConfig.ranges`."""
    observer: Observer
    """What is kept of streamed data."""
    finish: Callable[[Any, GridKind], tuple[Any, Any]]
    """(state, grids) -> scale and zero point of each tensor."""
    in_hand: Callable[[list[np.ndarray], GridKind], tuple[np.ndarray, np.ndarray]]
    """(matrices, grids) -> scale and zero point of each row of each matrix; one grid for each row."""


def sampled(
    value: Float[Array | np.ndarray, "..."], num_samples: int, limit: int = SAMPLES
) -> Float[Array | np.ndarray, " k"]:
    """Returns at most `limit` values of each of `num_samples` samples: always the same places, spread over all.

    The places are i * s modulo the sample's size n, with s coprime to n and near n times the golden ratio: evenly
    spread in space and over channels, wherever the channel axis is. A tensor that does not divide into samples is one.
    """
    rows = _by_samples(value, num_samples).astype(jnp.float32)
    size, wanted = rows.shape[1], limit * num_samples // rows.shape[0]
    return rows.reshape(-1) if size <= wanted else rows[:, _places(size, wanted)].reshape(-1)


def _by_samples(value: Any, num_samples: int) -> Any:
    return value.reshape(num_samples if num_samples and value.size % num_samples == 0 else 1, -1)


def _places(size: int, wanted: int) -> np.ndarray:
    stride = round(size * _GOLDEN)
    while math.gcd(stride, size) > 1:
        stride += 1
    return np.sort(np.arange(wanted, dtype=np.int64) * stride % size).astype(np.int32)


def _init_extremes(num_tensors: int) -> Extremes:
    nothing = np.full((num_tensors,), np.inf, dtype=np.float32)
    return Extremes(lowest=nothing, highest=-nothing)


def _batch_extremes(values: Sequence[Any], num_samples: int = 1) -> Extremes:
    del num_samples  # extremes do not depend on how the values are grouped
    ends = [_ends(value, tuple(range(value.ndim))) for value in map(_or_zero, values)]
    lowest, highest = (jnp.stack([each[i] for each in ends]).astype(jnp.float32) for i in range(2))
    return Extremes(lowest=_beyond(lowest, -jnp.inf), highest=_beyond(highest, jnp.inf))


def _ends(value: Float[Array, "..."], axes: tuple[int, ...]) -> tuple[Any, Any]:
    """Returns the smallest and the largest value over some axes; NaN where there is one.

    In one reduction of two results: XLA's vectors of single extremes pass over NaN on some CPUs, and to look at each
    element first doubles the time to compile.
    """
    infinity = np.asarray(np.inf, value.dtype)
    return lax.reduce((value, value), (infinity, -infinity), _smaller_and_larger, axes)


def _smaller_and_larger(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
    return lax.min(left[0], right[0]), lax.max(left[1], right[1])


def _beyond(values: Float[Array, "..."], end: float) -> Float[Array, "..."]:
    """Returns `values` with `end` in place of NaN: what is not finite is told by its extremes."""
    return jnp.where(jnp.isnan(values), jnp.asarray(end, values.dtype), values)


def _or_zero(value: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns a value; of one without elements, as a past of length 0 has none, a zero, which every grid has."""
    return value if value.size else jnp.zeros((1,), value.dtype)


def _merge_extremes(first: Extremes, second: Extremes) -> Extremes:
    return Extremes(lowest=jnp.minimum(first.lowest, second.lowest), highest=jnp.maximum(first.highest, second.highest))


def _init_mean_extremes(num_tensors: int) -> MeanExtremes:
    return MeanExtremes(
        extremes=_init_extremes(num_tensors),
        sums=empty_sums(num_tensors, 2),
        counts=np.zeros((num_tensors,), dtype=np.int32),
    )


def _look_at_means(values: Sequence[Any], num_samples: int) -> MeanExtremes:
    """Returns the extremes of each sample, [t, 2, n], in place of their sums, and how many there are of each tensor."""
    each = [
        _ends_of_samples(_by_samples(value, num_samples)) if value.size else jnp.zeros((2, 0), jnp.float32)
        for value in values
    ]
    whole = [ends if ends.size else jnp.zeros((2, 1), jnp.float32) for ends in each]
    longest = max(ends.shape[1] for ends in each)
    return MeanExtremes(
        extremes=Extremes(
            lowest=jnp.stack([ends[0].min() for ends in whole]), highest=jnp.stack([ends[1].max() for ends in whole])
        ),
        sums=jnp.stack([jnp.pad(ends, ((0, 0), (0, longest - ends.shape[1]))) for ends in each]),  # zeros add nothing
        counts=jnp.asarray([ends.shape[1] for ends in each], dtype=jnp.int32),
    )


def _ends_of_samples(rows: Float[Array, "n k"]) -> Float[Array, "2 n"]:
    lowest, highest = _ends(rows, (1,))
    return jnp.stack([_beyond(lowest, -jnp.inf), _beyond(highest, jnp.inf)]).astype(jnp.float32)


def _absorb_means(state: MeanExtremes, batch: MeanExtremes) -> MeanExtremes:
    sums = add_terms(state.sums.reshape(-1, *state.sums.shape[2:]), batch.sums.reshape(-1, batch.sums.shape[2]))
    return MeanExtremes(
        extremes=_merge_extremes(state.extremes, batch.extremes),
        sums=sums.reshape(state.sums.shape),
        counts=state.counts + batch.counts,
    )


def _merge_mean_extremes(first: MeanExtremes, second: MeanExtremes) -> MeanExtremes:
    return MeanExtremes(
        extremes=_merge_extremes(first.extremes, second.extremes),
        sums=first.sums + second.sums,
        counts=first.counts + second.counts,
    )


def _init_distribution(num_tensors: int) -> Distribution:
    return Distribution(extremes=_init_extremes(num_tensors), histogram=empty_histogram(num_tensors))


class _SampledValues(PyTreeNode):
    """What a distribution takes from one batch."""

    extremes: Extremes
    """The extremes of all values."""
    values: Any
    """A row of sampled values for each tensor, all of one length: filled up where there are fewer."""
    sizes: Any
    """How many of them are values, int32, shape [t]."""


def _look_at_values(values: Sequence[Any], num_samples: int) -> _SampledValues:
    chosen = [sampled(_or_zero(value), num_samples) for value in values]
    length = _row_length(max(value.shape[0] for value in chosen), num_samples)
    return _SampledValues(
        extremes=_batch_extremes(values),
        values=[jnp.pad(value, (0, length - value.shape[0])) for value in chosen],
        sizes=jnp.asarray([value.shape[0] for value in chosen], dtype=jnp.int32),
    )


def _row_length(longest: int, num_samples: int) -> int:
    """Returns the length of rows that hold `longest` values: one of few, for `absorb` is compiled for each."""
    return min(max(SAMPLES, 1 << max(longest - 1, 0).bit_length()), SAMPLES * max(num_samples, 1))


def _absorb_values(state: Distribution, batch: _SampledValues) -> Distribution:
    rows = jnp.stack(batch.values)
    counted = jnp.arange(rows.shape[1], dtype=jnp.int32)[None, :] < batch.sizes[:, None]
    largest = jnp.maximum(jnp.abs(batch.extremes.lowest), jnp.abs(batch.extremes.highest))
    return Distribution(
        extremes=_merge_extremes(state.extremes, batch.extremes),
        histogram=add_values(state.histogram, rows, counted, largest),
    )


def _merge_distributions(first: Distribution, second: Distribution) -> Distribution:
    return Distribution(
        extremes=_merge_extremes(first.extremes, second.extremes),
        histogram=merge_histograms(first.histogram, second.histogram),
    )


EXTREMES = Observer(
    name="extremes",
    init=_init_extremes,
    look=_batch_extremes,
    absorb=_merge_extremes,
    merge=_merge_extremes,
    extremes=lambda state: state,
)
"""Keeps the smallest and the largest value."""

MEAN_EXTREMES = Observer(
    name="extremes of each sample",
    init=_init_mean_extremes,
    look=_look_at_means,
    absorb=_absorb_means,
    merge=_merge_mean_extremes,
    extremes=lambda state: state.extremes,
    most_samples=MOST_TERMS,
)
"""Keeps the sums of each sample's smallest and largest value."""

DISTRIBUTION = Observer(
    name="distribution",
    init=_init_distribution,
    look=_look_at_values,
    absorb=_absorb_values,
    merge=_merge_distributions,
    extremes=lambda state: state.extremes,
    most_samples=(2**31 - 1) // SAMPLES,  # all values of a tensor may lie in one bin
)
"""Keeps the extremes, and counts of a sample of the values."""
