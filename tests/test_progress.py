"""Progress: passes give what their collections hold, a terminal gets bars with rates, a pipe gets a few plain lines."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ptqjax.progress import Follow, Lines, nothing, progress
from ptqjax.stopwatch import Stopwatch


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def batches(count: int, size: int = 32) -> list[dict[str, np.ndarray]]:
    return [{"input": np.zeros((size, 3), np.float32)} for _ in range(count)]


def passed(lines: Lines, clock: Clock, label: str, elements: list, seconds_each: float) -> None:
    shown = lines.begin(label, len(elements))
    for element in elements:
        clock.now += seconds_each
        shown.advance(element)
    shown.end()


def lines_of(work: Callable[[Lines, Clock], None]) -> list[str]:
    found, clock = [], Clock()
    lines = Lines(say=found.append, watch=Stopwatch(clock=clock))
    work(lines, clock)
    lines.close()
    return found


@pytest.mark.parametrize("is_quiet", [True, False])
def test_a_followed_collection_gives_its_elements_again_and_again(is_quiet):
    with progress(is_quiet=is_quiet) as follow:
        followed = follow([1, 2, 3], "counting")
        assert [list(followed), list(followed), len(followed)] == [[1, 2, 3], [1, 2, 3], 3]
        assert list(follow(iter("ab"), "of unknown length")) == ["a", "b"]
        assert list(follow(follow((i for i in "ab"), "within"), "around")) == ["a", "b"]


@pytest.mark.parametrize("is_quiet", [True, False])
def test_what_can_be_gone_through_once_does_not_seem_to_be_a_collection(is_quiet):
    with progress(is_quiet=is_quiet) as follow:
        assert isinstance(follow(iter([1]), "once"), Iterator)
        assert not isinstance(follow([1], "often"), Iterator)


def test_nothing_is_written_unless_asked(capfd):
    with progress(is_quiet=True) as follow:
        assert list(follow([1], "counting")) == [1]
    assert list(nothing([1], "counting")) == [1]
    assert capfd.readouterr() == ("", "")


def test_plain_lines_come_seconds_apart_and_one_at_the_end():
    found = lines_of(lambda lines, clock: passed(lines, clock, "measuring", batches(40), 1.0))
    assert len(found) == 9  # 40 seconds, a line every 5, and the last
    assert found[0] == "measuring: 5 of 40, 32 samples/s, 5 s"
    assert found[-1] == "measuring: done in 40.0 s, 32 samples/s"


def test_short_work_has_one_line_however_many_passes_it_takes():
    def work(lines: Lines, clock: Clock) -> None:
        for _ in range(10):
            passed(lines, clock, "quantizing", batches(4), 0.1)

    assert lines_of(work) == ["quantizing: done in 4.0 s, 10 passes, 320 samples/s"]


def test_another_label_ends_the_work_before_it():
    def work(lines: Lines, clock: Clock) -> None:
        passed(lines, clock, "calibrating", batches(2), 1.0)
        passed(lines, clock, "trying", ["a", "b", "c"], 0.5)

    assert lines_of(work) == ["calibrating: done in 2.0 s, 32 samples/s", "trying: done in 1.5 s, 2 it/s"]


def test_what_is_compiled_does_not_count_as_speed_and_says_nothing_where_it_is_most():
    found, clock = [], Clock()
    watch = Stopwatch(clock=clock)
    lines = Lines(say=found.append, watch=watch)
    for label, compiling in (("measuring", 1.0), ("quantizing", 3.9)):
        shown = lines.begin(label, 1)
        clock.now += compiling
        watch.hear("/jax/core/compile/backend_compile_duration", compiling, "jit(step)")
        clock.now += 5.0 - compiling - 1.0
        shown.advance(batches(1)[0])
        shown.end()
        clock.now += 1.0  # between passes
    lines.close()
    assert found == ["measuring: done in 5.0 s, 10.7 samples/s", "quantizing: done in 5.0 s"]  # 32 in 3 s


def test_what_is_compiled_is_said_while_nothing_else_is():
    found, clock = [], Clock()
    watch = Stopwatch(clock=clock)
    lines = Lines(say=found.append, watch=watch)

    def beat(seconds: int) -> None:
        for _ in range(seconds):
            clock.now += 1.0
            lines.beat()

    beat(10)  # no stage is open, nothing is compiled
    with watch("calibrate"):
        beat(6)
        watch.hear("/jax/core/compile/jaxpr_to_mlir_module_duration", 0.1, "jit(step)")
        beat(10)
        watch.hear("/jax/core/compile/backend_compile_duration", 10.0, "jit(step)")
        beat(5)
    assert found == [
        "calibrate: 6 s",
        "calibrate: 11 s, compiling step for 5 s",
        "calibrate: 16 s, compiling step for 10 s",
        "calibrate: 21 s",
    ]


def fail_in(follow: Follow) -> None:
    for number in follow([1, 2], "measuring"):
        raise ValueError(number)


def test_what_fails_is_not_done(capfd):
    with pytest.raises(ValueError, match="1"), progress() as follow:
        fail_in(follow)
    assert capfd.readouterr() == ("", "")


CODE = """
import time, numpy as np
from ptqjax.progress import progress
with progress() as follow:
    for batch in follow([{"input": np.zeros((8, 2))}] * 5, "measuring"):
        time.sleep(0.25)
"""


STAGES = """
import time
from ptqjax.progress import progress
from ptqjax.stopwatch import Stopwatch
watch = Stopwatch()
with progress(stopwatch=watch) as follow:
    with watch("calibrate"):
        watch.hear("/jax/core/compile/jaxpr_to_mlir_module_duration", 0.1, "jit(step)")
        time.sleep(2.2)
    with watch("correct"):
        time.sleep(0.7)
"""


def test_a_pipe_gets_no_control_characters():
    stderr = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, timeout=120).stderr.decode()
    assert stderr.startswith("measuring: done in ")
    assert stderr.endswith("samples/s\n")
    assert all(character.isprintable() for character in stderr.removesuffix("\n"))


def on_a_terminal(code: str) -> str:
    """What a process writes to stderr where that is a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        assert process.wait(120) == 0
    os.close(ours)
    return shown.decode()


def test_a_terminal_gets_a_bar_with_counts_and_rates():
    text = on_a_terminal(CODE)
    assert "measuring" in text
    assert "/5" in text
    assert "samples/s" in text
    assert "\x1b[2K" in text  # and is taken away at the end


def test_a_terminal_shows_the_stage_and_what_is_compiled():
    text = on_a_terminal(STAGES)
    assert "calibrate: compiling step for 1 s" in text
    assert "correct: compiling step for" in text  # it still is
