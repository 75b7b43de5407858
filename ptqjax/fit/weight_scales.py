"""Scales of a weight to choose from where its grid has few integers: the given ones, shrunk, and who may choose them.

A grid of few integers is a trade: the whole range rounds coarsely, a shorter one cuts off. Which is better is a
question to the layer's output and not to the weight, so that candidates are only listed here; `layer_solution` judges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from ptqjax.encodings.encoding import Encoding, along_axis, concrete
from ptqjax.encodings.low_power import LowPowerScales, compose, decompose, low_power_scales
from ptqjax.kernels.ranges import SMALLEST_SCALE

SHRINKS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""By what the given scales are multiplied; those that are powers of two only by powers of two."""


def shrunk(encoding: Encoding, factors: Sequence[float] = SHRINKS) -> tuple[Encoding, ...]:
    """Returns the encodings with all scales multiplied by each of some factors, most of which are below 1.

    Zero points that do not stand in the middle are for ends that need not shrink together: each factor then also gives
    one encoding that cuts off above alone, and one that cuts off below alone.
    """
    encoding = concrete(encoding)
    if _are_powers_of_two(encoding.scale):
        factors = [factor for factor in factors if np.frexp(factor)[0] == 0.5]  # noqa: PLR2004 - exact
    both = [_scaled(encoding, factor) for factor in factors]
    if _is_centred(encoding) or encoding.scale_bits is not None:
        return tuple(both)
    return (*both, *(_cut(encoding, *ends) for factor in factors for ends in ((factor, 1.0), (1.0, factor))))


def whole(encoding: Encoding, weight: np.ndarray, cells: Int[np.ndarray, "*shape"]) -> Encoding:
    """Returns the encoding with each scale as large as it takes to cut nothing off; none gets smaller.

    Args:
        encoding: An encoding with the zero point in the middle; any other comes back as it is, and low-power blocks.
        weight: The weight.
        cells: The number of its scale for each element.
    """
    encoding = concrete(encoding)
    if not _is_centred(encoding) or encoding.scale_bits is not None:
        return encoding
    largest = np.zeros(np.size(encoding.scale), np.float32)
    np.maximum.at(largest, cells.ravel(), np.abs(weight, dtype=np.float32).ravel())
    needed = largest.reshape(np.shape(encoding.scale)) / np.float32(encoding.qmax - encoding.zero_point.ravel()[0])
    if _are_powers_of_two(encoding.scale):
        needed = np.exp2(np.ceil(np.log2(np.maximum(needed, SMALLEST_SCALE)))).astype(np.float32)
    return encoding.replace(scale=np.maximum(encoding.scale, needed))


def picked(encodings: Sequence[Encoding], choice: Int[np.ndarray, "..."]) -> Encoding:
    """Returns the first encoding with each scale from the one that `choice`, of the scales' shape, names.

    Low-power blocks whose scales come from several are products again: their scales are rounded to those.
    """
    first = concrete(encodings[0])
    scale, zero = (
        np.choose(choice, [np.asarray(getattr(each, name)) for each in encodings]).astype(np.float32)
        for name in ("scale", "zero_point")
    )
    if first.scale_bits is not None and first.axis is not None:
        scale = np.asarray(compose(low_power_scales(scale, scale_bits=first.scale_bits, axis=first.axis)))
    return first.replace(scale=scale, zero_point=zero)


@dataclass(frozen=True, kw_only=True, slots=True)
class Owners:
    """Which rows of a layer, its outputs, each scale serves."""

    shape: tuple[int, ...]
    """The shape of the scales."""
    rows: Int[np.ndarray, " scales"]
    """For each scale a row that it serves."""
    cells: Int[np.ndarray, "g n k"]
    """For each weight its scale."""
    are_alone: bool
    """Whether each scale serves one row alone, so that rows choose by themselves."""

    def choice(self, errors: np.ndarray) -> np.ndarray:
        """Returns for each scale the candidate of least error; of equal ones the first.

        Args:
            errors: Of each candidate in each row, [candidates, rows].
        """
        if self.are_alone:
            return errors.argmin(axis=0)[self.rows].reshape(self.shape)
        return np.full(self.shape, errors.sum(axis=1).argmin())


def owners(encoding: Encoding, shape: tuple[int, ...], view: Callable[[np.ndarray], np.ndarray]) -> Owners:
    """Returns which rows each scale serves.

    Args:
        encoding: The encoding of a weight.
        shape: The weight's shape.
        view: Returns an array of this shape as [g, n, k], a row for each output.
    """
    size = np.size(encoding.scale)
    ids = np.arange(size).reshape(np.shape(encoding.scale))
    cells = view(np.broadcast_to(along_axis(ids, encoding, shape), shape)).astype(np.int64)
    rows = np.broadcast_to(np.arange(cells[..., 0].size).reshape(*cells.shape[:2], 1), cells.shape)
    owner = np.zeros(size, np.int64)
    owner[cells] = rows
    are_alone = bool(np.all(owner[cells] == rows))
    return Owners(shape=np.shape(encoding.scale), rows=owner, cells=cells, are_alone=are_alone)


def _scaled(encoding: Encoding, factor: float) -> Encoding:
    if encoding.scale_bits is None:
        return encoding.replace(scale=np.maximum(encoding.scale * np.float32(factor), np.float32(SMALLEST_SCALE)))
    found = decompose(encoding)  # a multiple of a channel's stays the same multiple
    channel = np.maximum(found.per_channel * np.float32(factor), np.float32(SMALLEST_SCALE))
    return encoding.replace(scale=np.asarray(compose(LowPowerScales(channel, found.per_block))))


def _cut(encoding: Encoding, low_factor: float, high_factor: float) -> Encoding:
    """Returns the encoding with each end nearer to 0 by a factor of its own."""
    scale, zero = encoding.scale.astype(np.float64), encoding.zero_point.astype(np.float64)
    low, high = (encoding.qmin - zero) * scale * low_factor, (encoding.qmax - zero) * scale * high_factor
    steps = float(encoding.qmax - encoding.qmin)
    new = np.maximum((high - low) / steps, SMALLEST_SCALE)
    zero = np.clip(np.round(encoding.qmin - low / new), encoding.qmin, encoding.qmax)
    return encoding.replace(scale=new.astype(np.float32), zero_point=zero.astype(np.float32))


def _is_centred(encoding: Encoding) -> bool:
    middle = np.floor((encoding.qmin + encoding.qmax + 1) / 2)
    return bool(np.all(encoding.zero_point == middle))


def _are_powers_of_two(scale: np.ndarray) -> bool:
    return bool(np.all(np.frexp(scale)[0] == 0.5))  # noqa: PLR2004 - exact
