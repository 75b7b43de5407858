"""What time goes into: seconds by stage, those in which JAX compiles apart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

_TRACED = "/jax/core/compile/jaxpr_trace_duration"
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # the compiler begins here
_COMPILED = "/jax/core/compile/backend_compile_duration"  # or was found on disk
_FOUND = "/jax/compilation_cache/cache_retrieval_time_sec"

Span = tuple[float, float]
"""When something began and ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """What a stage took."""

    stage: str
    """Its name."""
    seconds: float
    """The seconds that the clock shows."""
    processor_seconds: float
    """The processor seconds of all threads of the process."""
    compiling_seconds: float
    """The part of `seconds` in which something was traced or compiled, in whatever thread."""
    num_compiled: int
    """Programs that were compiled; JAX's own of a single operation count too."""
    num_found: int
    """Programs that were found on disk."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data."""
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self).items()}


@dataclass(slots=True)
class _Part:
    """A piece of a stage, without what was measured by itself inside."""

    stage: str
    begin: float
    processor_begin: float
    end: float = 0.0
    processor_end: float = 0.0


@dataclass(slots=True)
class Stopwatch:
    """Measures stages: `with stopwatch("calibrate"): ...`. A stage inside another is not counted to that.

    What the library is given as `stage=` may be one. It hears of compilations while it is one of `listening`.
    """

    clock: Callable[[], float] = time.monotonic
    """The time in seconds."""
    processor: Callable[[], float] = time.process_time
    """The processor time of all threads in seconds."""
    _parts: list[_Part] = field(default_factory=list)
    _open: list[tuple[str, float]] = field(default_factory=list)
    _compiling: list[Span] = field(default_factory=list)
    _compiled: list[float] = field(default_factory=list)
    _found: list[float] = field(default_factory=list)
    _current: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Counts the time of the body to `stage`."""
        self._open.append((stage, self.clock()))
        self._turn()
        try:
            yield
        finally:
            self._open.pop()
            self._turn()

    def _turn(self) -> None:
        """Ends the current part, and begins one of the stage that is open now."""
        now, processor = self.clock(), self.processor()
        if self._parts and not self._parts[-1].end:
            self._parts[-1].end, self._parts[-1].processor_end = now, processor
        if self._open:
            self._parts.append(_Part(stage=self._open[-1][0], begin=now, processor_begin=processor))

    def hear(self, event: str, seconds: float, program: str = "") -> None:
        """Notes what JAX says that it has done in the last `seconds`."""
        now = self.clock()
        if event in (_TRACED, _LOWERED, _COMPILED):
            with self._lock:
                self._cover(now - seconds, now)
        if event == _LOWERED:
            self._current[program] = now
        if event == _COMPILED:
            self._current.pop(program, None)
            self._compiled.append(now)
        if event == _FOUND:
            self._found.append(now)

    def _cover(self, begin: float, end: float) -> None:
        """Adds a span to those that have something compiled, which stay apart and in order: traces are nested."""
        while self._compiling and self._compiling[-1][1] >= begin:
            begin = min(begin, self._compiling.pop()[0])
        self._compiling.append((begin, end))

    @property
    def stage(self) -> str:
        """The stage that is open; "" where none is."""
        return self._open[-1][0] if self._open else ""

    @property
    def stage_seconds(self) -> float:
        """The seconds since it began; 0 where none is open."""
        return self.clock() - self._open[-1][1] if self._open else 0.0

    def compiling(self) -> tuple[str, float] | None:
        """Returns what the compiler works on and for how many seconds, the longest of all; None where it does not."""
        if not self._current:
            return None
        program, since = min(self._current.copy().items(), key=lambda item: item[1])
        return program.removeprefix("jit(").removesuffix(")"), self.clock() - since

    def compiling_between(self, begin: float, end: float) -> float:
        """Returns the seconds between two times in which something was traced or compiled."""
        total = 0.0
        with self._lock:
            for first, last in reversed(self._compiling):
                if last <= begin:
                    break
                total += max(min(last, end) - max(first, begin), 0.0)
        return total

    def spent(self) -> tuple[Spent, ...]:
        """Returns what each stage took so far, in the order in which they first began."""
        now, processor = self.clock(), self.processor()
        parts: dict[str, list[_Part]] = {}
        for part in self._parts:
            parts.setdefault(part.stage, []).append(part)
        found = []
        for stage, those in parts.items():
            spans = [(part.begin, part.end or now) for part in those]
            num_found = _count(self._found, spans)
            found.append(
                Spent(
                    stage=stage,
                    seconds=sum(end - begin for begin, end in spans),
                    processor_seconds=sum(
                        (part.processor_end if part.end else processor) - part.processor_begin for part in those
                    ),
                    compiling_seconds=sum(self.compiling_between(begin, end) for begin, end in spans),
                    num_compiled=_count(self._compiled, spans) - num_found,
                    num_found=num_found,
                )
            )
        return tuple(found)


def _count(moments: list[float], spans: list[Span]) -> int:
    return sum(begin <= moment < end for moment in moments for begin, end in spans)


_listeners: list[Stopwatch] = []


@contextmanager
def listening(stopwatch: Stopwatch) -> Iterator[None]:
    """Lets the stopwatch hear what JAX compiles while the body runs."""
    _register()
    _listeners.append(stopwatch)
    try:
        yield
    finally:
        _listeners.remove(stopwatch)


@cache
def _register() -> None:
    """Makes JAX tell this module, once: JAX of all versions adds listeners, not all remove them."""
    import jax  # noqa: PLC0415  (who shows progress does not wait for it)

    jax.monitoring.register_event_duration_secs_listener(_hear)


def _hear(event: str, duration_secs: float, **details: Any) -> None:
    for stopwatch in _listeners:
        stopwatch.hear(event, duration_secs, str(details.get("fun_name", "")))


def summary(spent: tuple[Spent, ...]) -> str:
    """Returns what the stages took in one line, for people."""
    total, compiling = sum(each.seconds for each in spent), sum(each.compiling_seconds for each in spent)
    compiled, found = sum(each.num_compiled for each in spent), sum(each.num_found for each in spent)
    stages = ", ".join(f"{each.stage} {each.seconds:.1f}" for each in spent)
    programs = f"{compiled} programs" + (f", {found} found on disk" if found else "")
    return f"{total:.1f} s: {stages}; {compiling:.1f} s of it tracing and compiling {programs}"
