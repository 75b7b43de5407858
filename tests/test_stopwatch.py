"""Seconds by stage: what is measured inside is not counted outside, compilation is told apart."""

from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from ptqjax.stopwatch import Stopwatch, listening, summary

TRACED, LOWERED, COMPILED = (
    f"/jax/core/compile/{name}_duration" for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)
FOUND = "/jax/compilation_cache/cache_retrieval_time_sec"


@pytest.fixture
def time() -> SimpleNamespace:
    """Seconds by the clock and of the processor, which pass when told."""
    return SimpleNamespace(clock=100.0, processor=7.0)


@pytest.fixture
def watch(time) -> Stopwatch:
    return Stopwatch(clock=lambda: time.clock, processor=lambda: time.processor)


def go_on(time: SimpleNamespace, seconds: float) -> None:
    time.clock += seconds
    time.processor += seconds / 2


def test_a_stage_inside_another_is_not_counted_to_that_and_one_that_comes_again_adds_up(time, watch):
    with watch("outer"):
        go_on(time, 1)
        with watch("inner"):
            go_on(time, 10)
        go_on(time, 2)
    go_on(time, 1000)  # in no stage
    with watch("outer"):
        go_on(time, 4)
        found = {each.stage: (each.seconds, each.processor_seconds) for each in watch.spent()}  # while it is open
        assert found == {"outer": (7, 3.5), "inner": (10, 5)}
        go_on(time, 1)
    assert [(each.stage, each.seconds) for each in watch.spent()] == [("outer", 8), ("inner", 10)]


def test_a_stage_that_fails_ends(time, watch):
    def fail() -> None:
        with watch("one"):
            go_on(time, 1)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    go_on(time, 5)
    assert watch.stage == ""
    assert watch.spent()[0].seconds == 1


def test_compilation_is_counted_once_where_traces_are_nested_and_where_it_happened(time, watch):
    with watch("one"):
        go_on(time, 3)
        watch.hear(TRACED, 1.0)  # within the next
        go_on(time, 1)
        watch.hear(TRACED, 3.0)
        go_on(time, 4)  # a thread compiles on
    with watch("two"):
        go_on(time, 2)
        watch.hear(COMPILED, 5.0, "jit(f)")
        watch.hear(COMPILED, 1.0, "jit(g)")  # in another thread, at the same time
        watch.hear(FOUND, 1.0)
        go_on(time, 2)
    one, two = watch.spent()
    assert (one.seconds, one.compiling_seconds, one.num_compiled, one.num_found) == (8, 3 + 3, 0, 0)
    assert (two.seconds, two.compiling_seconds, two.num_compiled, two.num_found) == (4, 2, 1, 1)
    assert summary(watch.spent()) == (
        "12.0 s: one 8.0, two 4.0; 8.0 s of it tracing and compiling 1 programs, 1 found on disk"
    )


def test_what_is_compiled_for_longest_is_known(time, watch):
    assert watch.compiling() is None
    watch.hear(LOWERED, 0.1, "jit(f)")
    go_on(time, 2)
    watch.hear(LOWERED, 0.1, "jit(g)")
    go_on(time, 1)
    assert watch.compiling() == ("f", 3)
    watch.hear(COMPILED, 3.0, "jit(f)")
    assert watch.compiling() == ("g", 1)
    watch.hear(COMPILED, 1.0, "jit(g)")
    assert watch.compiling() is None


class Noting(Stopwatch):
    """Keeps what it hears."""

    heard: ClassVar[list[tuple[str, str]]] = []

    def hear(self, event: str, seconds: float, program: str = "") -> None:
        self.heard.append((event, program))
        super().hear(event, seconds, program)


@jax.jit
def named(x: jax.Array) -> jax.Array:
    return x * 5.25


def test_jax_tells_of_what_it_compiles_and_only_while_it_is_listened_to():
    watch = Noting()
    with listening(Stopwatch()), listening(watch), watch("work"):
        named(jnp.ones(3)).block_until_ready()
    heard = tuple(watch.heard)
    named(jnp.ones(7))  # compiled again
    assert tuple(watch.heard) == heard
    (spent,) = watch.spent()
    assert 0 < spent.compiling_seconds <= spent.seconds
    assert heard.count((LOWERED, "jit(named)")) == heard.count((COMPILED, "jit(named)")) == 1
    assert spent.num_compiled + spent.num_found == len([event for event, _ in heard if event == COMPILED])
    assert watch.compiling() is None
