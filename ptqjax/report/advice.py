"""One thing to do, as a report recommends it."""

from __future__ import annotations

from dataclasses import dataclass

MOST_NAMED = 5
"""Tensors in one recommendation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """One thing to do, and the figures that it follows from."""

    reason: str
    """Which of the reasons it is, one word or two: "dominant groups", "clipping"; the function that found it."""
    what: str
    """What to do, in a sentence."""
    where: tuple[str, ...] = ()
    """The tensors that it is about, the most important first; empty where it is about all."""
    why: str
    """The figures, in a sentence or two."""
    option: str
    """How to say it to `ptqjax quantize`: options, or tables of its --config FILE."""
    gain_db: float | None = None
    """SQNR of the output that it promises, in dB; None where that cannot be told."""


def count_of(number: int, one: str, many: str) -> str:
    """Returns a number and what it counts, in words."""
    return f"{number} {one if number == 1 else many}"
