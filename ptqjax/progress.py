"""How far a pass over data is, shown on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Follow = Callable[[Iterable[Any], str], Iterable[Any]]
"""Shows how far a pass over its first argument is, under the label that is its second; yields what the first does."""


@contextmanager
def progress() -> Iterator[Callable[[Any, str], Any]]:
    """Yields a function that shows, on a terminal, how far each pass over its first argument is."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bars:
        yield lambda batches, label: _Followed(batches, label, bars)


@dataclass(frozen=True, slots=True)
class _Followed:
    """A collection whose passes are shown."""

    collection: Any
    label: str
    progress: Any

    def __len__(self) -> int:
        return len(self.collection)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.progress.track(self.collection, description=self.label))
