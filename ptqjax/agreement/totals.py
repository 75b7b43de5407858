"""What is counted over batches: distances of integers, and how like two programs' outputs are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptqjax.agreement.findings import Distance, Likeness

NO_DISTANCE = Distance(largest=0, num_equal=0, num_elements=0)
"""Of no elements at all."""
_SIGN = 128  # of a byte


def with_elements(total: Distance, found: np.ndarray, computed: Any) -> Distance:
    """Returns the distance of all elements of `total` and of these, whose codes the runtime `found`."""
    steps = np.abs(_ranks(found) - _ranks(np.asarray(computed)))
    return Distance(
        largest=max(total.largest, int(steps.max(initial=0))),
        num_equal=total.num_equal + int(np.count_nonzero(steps == 0)),
        num_elements=total.num_elements + steps.size,
    )


def _ranks(codes: np.ndarray) -> np.ndarray:
    """Returns integers that differ by 1 between neighbours on a grid: the codes, or for fp8 places in their order."""
    if not codes.dtype.name.startswith("float8"):
        return codes.astype(np.int64)
    bits = codes.view(np.uint8).astype(np.int64)  # sign and magnitude; both zeros are 0
    return np.where(bits < _SIGN, bits, _SIGN - bits)


@dataclass(frozen=True, slots=True)
class Sums:
    """What is summed over batches to say how like two programs are."""

    signal: float = 0.0
    noise: float = 0.0
    num_same_class: int = 0
    num_samples: int = 0
    num_equal: int = 0
    num_elements: int = 0

    def plus(self, found: Mapping[str, np.ndarray], computed: Mapping[str, Any]) -> Sums:
        """Returns the sums with those of one batch more, whose outputs the runtime `found`."""
        pairs = [(value.astype(np.float64), np.asarray(computed[name], np.float64)) for name, value in found.items()]
        first, other = (value.reshape(len(value), -1) if value.ndim else value.reshape(1, 1) for value in pairs[0])
        return Sums(
            signal=self.signal + sum(float(np.sum(y**2)) for y, _ in pairs),
            noise=self.noise + sum(float(np.sum((y - z) ** 2)) for y, z in pairs),
            num_same_class=self.num_same_class + int(np.count_nonzero(first.argmax(-1) == other.argmax(-1))),
            num_samples=self.num_samples + len(first),
            num_equal=self.num_equal + sum(int(np.count_nonzero(y == z)) for y, z in pairs),
            num_elements=self.num_elements + sum(y.size for y, _ in pairs),
        )

    def likeness(self) -> Likeness:
        """Returns what the sums say."""
        return Likeness(
            sqnr=decibels(self.signal, self.noise),
            agreement=self.num_same_class / self.num_samples,
            equal=self.num_equal / self.num_elements,
        )


def decibels(signal: float, noise: float) -> float:
    """Returns 10 log10(signal / noise): infinite without noise, minus infinity without signal."""
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal else float("-inf")
