"""What a transform did, or left alone, and why: one record per place that it looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True, kw_only=True)
class Record:
    """One place that a transform looked at."""

    transform: str
    """The transform, as its function is called: "fold_batch_norms"."""
    done: bool
    """Whether the place was changed."""
    what: str
    """What was done, or what was left alone, in a few words: "folded into Conv"."""
    where: tuple[str, ...]
    """Names of the tensors concerned; the first is the one that the place is known by."""
    reason: str = ""
    """Why not, where it was not done; else what the reader should know, or nothing."""
    before: Mapping[str, float] = field(default_factory=dict)
    """Figures before, by name: {"largest range ratio": 812.0}."""
    after: Mapping[str, float] = field(default_factory=dict)
    """The figures of `before`, after the change."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the record as plain data, for JSON."""
        return asdict(self)


Report: TypeAlias = tuple[Record, ...]
"""What a transform returns beside the model."""
