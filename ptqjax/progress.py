"""How far a pass over data is: a bar with rates on a terminal, a line now and then elsewhere, nothing unless asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any, TypeAlias

import click

Follow: TypeAlias = Callable[[Any, str], Any]
"""`follow(collection, label)` returns a collection of the same elements whose passes are shown under `label`.

Long functions take `follow: Follow | None = None`, and show nothing where it is None.
"""

quiet_option = click.option("--quiet", is_flag=True, help="Show no progress.")
"""The option of commands that show progress."""
_SECONDS = 5.0  # between two plain lines


def nothing(collection: Any, label: str) -> Any:  # noqa: ARG001 - a `Follow` has both
    """Returns the collection as it is: the `Follow` that shows nothing."""
    return collection


@contextmanager
def progress(*, is_quiet: bool = False) -> Iterator[Follow]:
    """Yields a `Follow` that writes to stderr: bars where that is a terminal, else plain lines.

    A bar has the share done, the rate, and the time taken and left. Plain lines come every few seconds at most, and one
    at the end says what each label took, unless it failed; they hold no control characters.

    Args:
        is_quiet: Whether nothing is written.
    """
    if is_quiet:
        yield nothing
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with _bars(console) as bars:
            yield lambda collection, label: _followed(collection, lambda of: _Bar(bars, label, of))
        return
    lines = Lines()
    yield lambda collection, label: _followed(collection, lambda of: lines.begin(label, of))
    lines.close()  # where something failed, its error is all that is said


def _bars(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    return Progress(*columns, TimeElapsedColumn(), Remaining(), console=console, transient=True)


def _followed(collection: Any, begin: Callable[[int | None], Any]) -> Any:
    """Returns the collection with passes that are shown; an iterator stays one: who needs it twice has to see that."""
    followed = _Followed(collection, begin)
    return iter(followed) if isinstance(collection, Iterator) else followed


@dataclass(frozen=True, slots=True)
class _Followed:
    """A collection whose passes are shown."""

    collection: Any
    begin: Callable[[int | None], Any]
    """Takes the number of elements where it is known; returns what `advance` and `end` of a pass are called on."""

    def __len__(self) -> int:
        return len(self.collection)

    def __iter__(self) -> Iterator[Any]:
        shown = self.begin(length_hint(self.collection) or None)
        try:
            for element in self.collection:
                yield element
                shown.advance(element)
        finally:
            shown.end()


@dataclass(slots=True)
class Count:
    """What passes have gone through."""

    num_elements: int = 0
    """Elements: batches, configurations, groups."""
    num_samples: int = 0
    """Samples in them, where they are batches; else 0."""

    def add(self, element: Any) -> None:
        """Counts one element more."""
        self.num_elements += 1
        if isinstance(element, Mapping):
            self.num_samples += next((shape[0] for shape in map(_shape, element.values()) if shape), 0)

    def rate(self, seconds: float) -> str:
        """Returns how fast it went, in samples a second where they are known: "410 samples/s"."""
        number, unit = (self.num_samples, "samples") if self.num_samples else (self.num_elements, "it")
        return f"{number / max(seconds, 1e-9):.3g} {unit}/s"


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


class _Bar:
    """One pass on a terminal."""

    def __init__(self, bars: Any, label: str, total: int | None) -> None:
        self._bars, self._count, self._began = bars, Count(), time.monotonic()
        self._task = bars.add_task(label, total=total, rate="")

    def advance(self, element: Any) -> None:
        self._count.add(element)
        self._bars.update(self._task, advance=1, rate=self._count.rate(time.monotonic() - self._began))

    def end(self) -> None:
        self._bars.remove_task(self._task)


@dataclass(slots=True)
class _Work:
    """All passes under one label."""

    label: str
    began: float
    count: Count = field(default_factory=Count)
    num_passes: int = 0


def _to_stderr(line: str) -> None:
    click.echo(line, err=True)


@dataclass(slots=True)
class Lines:
    """Progress as plain lines: at most one every few seconds, and one for each label when its work is over."""

    say: Callable[[str], Any] = _to_stderr
    """Writes a line."""
    clock: Callable[[], float] = time.monotonic
    """The time in seconds."""
    _work: _Work | None = None
    _said: float = 0.0

    def begin(self, label: str, total: int | None) -> _Pass:
        """Begins a pass over `total` elements; another label than before ends what was done under that."""
        now = self.clock()
        if self._work is None or self._work.label != label:
            self.close()
            self._work, self._said = _Work(label=label, began=now), now
        self._work.num_passes += 1
        return _Pass(lines=self, work=self._work, total=total)

    def close(self) -> None:
        """Says what the work took, if there was any."""
        if self._work is None:
            return
        work, seconds = self._work, self.clock() - self._work.began
        passes = f", {work.num_passes} passes" if work.num_passes > 1 else ""
        self.say(f"{work.label}: done in {seconds:.1f} s{passes}, {work.count.rate(seconds)}")
        self._work = None

    def advance(self, work: _Work, done: int, total: int | None) -> None:
        """Says how far a pass is, unless something was said a moment ago."""
        now = self.clock()
        if now - self._said >= _SECONDS:
            self._said = now
            of = "" if total is None else f" of {total}"
            run = f"pass {work.num_passes}, " if work.num_passes > 1 else ""
            seconds = now - work.began
            self.say(f"{work.label}: {run}{done}{of}, {work.count.rate(seconds)}, {seconds:.0f} s")


@dataclass(slots=True)
class _Pass:
    """One pass, told in lines."""

    lines: Lines
    work: _Work
    total: int | None
    done: int = 0

    def advance(self, element: Any) -> None:
        self.done += 1
        self.work.count.add(element)
        self.lines.advance(self.work, self.done, self.total)

    def end(self) -> None:
        """Leaves the last word to `Lines.close`."""
