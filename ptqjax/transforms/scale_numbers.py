"""Numbers that stand for the scales of channels, while it is found out which of them must be one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptqjax.transforms.routes import Lying
from ptqjax.transforms.sizes import ONE, Size

FIXED = 0
"""The number of the scale that is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Channels:
    """The channels of a tensor."""

    axis: int
    """The axis that counts them, from the front."""
    scales: np.ndarray
    """The number of each channel's scale; `FIXED` where it is one."""
    repeats: Size = ONE
    """How many neighbours on the axis belong to one channel, as behind a Flatten."""

    @property
    def lying(self) -> Lying:
        """How they lie."""
        return Lying(self.axis, len(self.scales), self.repeats)


class Scales:
    """Numbers of scales while they are being tied (a union of sets); a set may be fixed for a reason."""

    def __init__(self) -> None:
        self._parents: list[int] = [FIXED]
        self._reasons: dict[int, str] = {FIXED: "its scale is fixed"}

    def new(self, count: int) -> np.ndarray:
        """Returns so many new numbers."""
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, number: int) -> int:
        """Returns the number that stands for all that are tied to this one."""
        parents = self._parents
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    def tie(self, first: np.ndarray, second: np.ndarray, reason: str = "") -> None:
        """Makes the scales of two rows of channels one, pair by pair; `reason` is why the other's may be fixed."""
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            a, b = sorted((self.root(one), self.root(other)))
            if a == b:
                continue
            if a == FIXED:
                self._reasons.setdefault(b, reason or self._reasons[FIXED])
                continue
            self._parents[b] = a
            fixed = self._reasons.get(a) or self._reasons.get(b)
            if fixed:
                self._reasons[a] = fixed

    def fix(self, numbers: np.ndarray, reason: str) -> None:
        """Fixes scales to one."""
        for number in np.unique(numbers).tolist():
            self._reasons.setdefault(self.root(number), reason)

    def is_fixed(self, numbers: np.ndarray) -> bool:
        """Tells whether all these scales are fixed."""
        return all(self.root(number) in self._reasons for number in np.unique(numbers).tolist())

    def reason(self, numbers: np.ndarray) -> str:
        """Returns why the first fixed one of these scales is fixed."""
        return next((self._reasons[root] for n in numbers.tolist() if (root := self.root(n)) in self._reasons), "")

    def compressed(self) -> tuple[np.ndarray, int]:
        """Returns the final number of each number, and how many there are."""
        roots = [self.root(number) for number in range(len(self._parents))]
        free = sorted({root for root in roots if root not in self._reasons})
        final = {root: index + 1 for index, root in enumerate(free)}
        return np.array([final.get(root, FIXED) for root in roots]), len(free) + 1
