"""What is counted over batches: distances of integers, and how like two programs' outputs are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptqjax.agreement.findings import Distance, Likeness
from ptqjax.metrics import Metric, Seen, Tally
from ptqjax.metrics.classes import agreement
from ptqjax.metrics.records import fraction
from ptqjax.metrics.sums import sqnr_db

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


def _equal() -> Metric:
    """Returns the metric: fraction of elements of all outputs that are the same number."""

    def update(state: tuple[int, int], seen: Seen) -> tuple[int, int]:
        pairs = [(value, np.asarray(seen.found[name])) for name, value in seen.wanted.items()]
        same = sum(int(np.count_nonzero(y == z)) for y, z in pairs)
        return state[0] + same, state[1] + sum(y.size for y, _ in pairs)

    return Metric(name="equal", init=lambda: (0, 0), update=update, finish=fraction)


LIKENESS = (sqnr_db(), agreement(), _equal())
"""What tells how like two programs are."""


def likeness_of(tally: Tally) -> Likeness:
    """Returns what the metrics of `LIKENESS` say."""
    figures = tally.figures()
    return Likeness(sqnr=figures["sqnr_db"], agreement=figures["agreement"], equal=figures["equal"])
