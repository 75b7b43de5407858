"""How far the work is: bars with rates on a terminal, a line now and then elsewhere, nothing unless asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any, TypeAlias

import click

from ptqjax.stopwatch import Stopwatch

Follow: TypeAlias = Callable[[Any, str], Any]
"""`follow(collection, label)` returns a collection of the same elements whose passes are shown under `label`.

Long functions take `follow: Follow | None = None`, and show nothing where it is None.
"""

quiet_option = click.option("--quiet", is_flag=True, help="Show no progress.")
"""The option of commands that show progress."""
_SECONDS = 5.0  # between two plain lines
_BEAT = 0.5  # seconds between two looks at what is being done


def nothing(collection: Any, label: str) -> Any:  # noqa: ARG001 - a `Follow` has both
    """Returns the collection as it is: the `Follow` that shows nothing."""
    return collection


@contextmanager
def progress(*, is_quiet: bool = False, stopwatch: Stopwatch | None = None) -> Iterator[Follow]:
    """Yields a `Follow` that writes to stderr: bars where that is a terminal, else plain lines.

    A bar has the share done, the rate, and the time taken and left. Plain lines come every few seconds at most, and one
    at the end says what each label took, unless it failed; they hold no control characters. Rates are without the
    seconds of compilation that the stopwatch has heard of.

    Args:
        is_quiet: Whether nothing is written.
        stopwatch: Knows the stage that is open and what is being compiled: this is said where no pass says anything.
    """
    if is_quiet:
        yield nothing
        return
    from rich.console import Console

    console, watch = Console(stderr=True), stopwatch or Stopwatch()
    if console.is_terminal:
        with _bars(console) as bars, _beating(_Doing(bars, watch).beat):
            yield lambda collection, label: _followed(collection, lambda of: _Bar(bars, label, of, watch))
        return
    lines = Lines(watch=watch)
    with _beating(lines.beat):
        yield lambda collection, label: _followed(collection, lambda of: lines.begin(label, of))
    lines.close()  # where something failed, its error is all that is said


@contextmanager
def _beating(beat: Callable[[], object]) -> Iterator[None]:
    """Calls `beat` now and then in a thread of its own while the body runs, also while that waits for a compiler."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(_BEAT):
            beat()

    thread = threading.Thread(target=go_on, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _compiling(watch: Stopwatch) -> str:
    """Returns what is being compiled, and for how long; "" where nothing is, or for less than a second."""
    found = watch.compiling()
    return "" if found is None or found[1] < 1 else f"compiling {found[0]} for {found[1]:.0f} s"


def _bars(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    return Progress(*columns, TimeElapsedColumn(), Remaining(), console=console, transient=True)


def _followed(collection: Any, begin: Callable[[int | None], Any]) -> Any:
    """Returns the collection with passes that are shown; an iterator stays one, so that its callers notice."""
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

    def rate(self, seconds: float, compiling: float = 0.0) -> str:
        """Returns how fast it went, in samples a second where they are known: "410 samples/s".

        Args:
            seconds: What it took.
            compiling: The part of it that was compilation, which does not count; where it is most, "" is returned,
                since the little that is left says nothing.
        """
        if compiling > seconds / 2:
            return ""
        number, unit = (self.num_samples, "samples") if self.num_samples else (self.num_elements, "it")
        return f"{number / max(seconds - compiling, 1e-9):.3g} {unit}/s"


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


class _Doing:
    """The stage that is open, on a terminal."""

    def __init__(self, bars: Any, watch: Stopwatch) -> None:
        self._bars, self._watch, self._stage, self._task = bars, watch, "", None

    def beat(self) -> None:
        if self._watch.stage != self._stage and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        self._stage = self._watch.stage
        text = ": ".join(filter(None, (self._stage, _compiling(self._watch))))
        if self._task is None and text:
            self._task = self._bars.add_task(text, total=None, rate="")
        elif self._task is not None:
            self._bars.update(self._task, description=text)


class _Bar:
    """One pass on a terminal."""

    def __init__(self, bars: Any, label: str, total: int | None, watch: Stopwatch) -> None:
        self._bars, self._count, self._watch, self._began = bars, Count(), watch, watch.clock()
        self._task = bars.add_task(label, total=total, rate="")

    def advance(self, element: Any) -> None:
        self._count.add(element)
        now = self._watch.clock()
        rate = self._count.rate(now - self._began, self._watch.compiling_between(self._began, now))
        self._bars.update(self._task, advance=1, rate=rate)

    def end(self) -> None:
        self._bars.remove_task(self._task)


@dataclass(slots=True)
class _Work:
    """All passes under one label."""

    label: str
    began: float
    count: Count = field(default_factory=Count)
    num_passes: int = 0
    passing: float = 0.0
    """Seconds of passes that have ended."""
    compiling: float = 0.0
    """The stages of them in which something was compiled."""


def _to_stderr(line: str) -> None:
    click.echo(line, err=True)


@dataclass(slots=True)
class Lines:
    """Progress as plain lines: at most one every few seconds, and one for each label when its work is over."""

    say: Callable[[str], Any] = _to_stderr
    """Writes a line."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    """Tells the time, the stage that is open, and what is being compiled."""
    _work: _Work | None = None
    _said: float | None = None

    def begin(self, label: str, total: int | None) -> _Pass:
        """Begins a pass over `total` elements; another label than before ends what was done under that."""
        now = self.watch.clock()
        if self._work is None or self._work.label != label:
            self.close()
            self._work, self._said = _Work(label=label, began=now), now
        self._work.num_passes += 1
        return _Pass(lines=self, work=self._work, total=total, began=now)

    def close(self) -> None:
        """Says what the work took, if there was any."""
        if self._work is None:
            return
        work, seconds = self._work, self.watch.clock() - self._work.began
        passes = f", {work.num_passes} passes" if work.num_passes > 1 else ""
        self.say(f"{work.label}: done in {seconds:.1f} s{passes}{_after_comma(_rate(work))}")
        self._work = None

    def advance(self, work: _Work, done: int, total: int | None) -> None:
        """Says how far a pass is, unless something was said a moment ago."""
        if self._is_due():
            of = "" if total is None else f" of {total}"
            run = f"pass {work.num_passes}, " if work.num_passes > 1 else ""
            seconds = self.watch.clock() - work.began
            self.say(f"{work.label}: {run}{done}{of}{_after_comma(_rate(work))}, {seconds:.0f} s")

    def beat(self) -> None:
        """Says what is being done, unless something was said a moment ago or there is nothing to say."""
        seconds = self.watch.stage_seconds
        stage = f"{self.watch.stage}: {seconds:.0f} s" if seconds >= 1 else ""
        text = ", ".join(filter(None, (stage, _compiling(self.watch))))
        if text and self._is_due():
            self.say(text)

    def _is_due(self) -> bool:
        now = self.watch.clock()
        if self._said is None:
            self._said = now
        if now - self._said < _SECONDS:
            return False
        self._said = now
        return True


def _rate(work: _Work) -> str:
    return work.count.rate(work.passing, work.compiling)


def _after_comma(text: str) -> str:
    return f", {text}" if text else ""


@dataclass(slots=True)
class _Pass:
    """One pass, told in lines."""

    lines: Lines
    work: _Work
    total: int | None
    began: float
    done: int = 0

    def advance(self, element: Any) -> None:
        self.done += 1
        self.work.count.add(element)
        self._count()
        self.lines.advance(self.work, self.done, self.total)

    def end(self) -> None:
        """Leaves the last word to `Lines.close`."""
        self._count()

    def _count(self) -> None:
        """Counts the time since it was last counted: what is between passes does not count."""
        now = self.lines.watch.clock()
        self.work.passing += now - self.began
        self.work.compiling += self.lines.watch.compiling_between(self.began, now)
        self.began = now
