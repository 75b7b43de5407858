"""For which kind of device a program is made, while it is traced: what is fast there differs.

The interpreter of graphs says it to the kernels that it calls. A caller may say it too: to inspect, on a machine
without a GPU, the program that a GPU would get, or to try another way to compute a kind of layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jax import lax

_GPU = frozenset({"gpu", "cuda", "rocm"})  # what JAX calls them in one place and another


class Target(NamedTuple):
    """What a program is made for."""

    platform: str
    """ "cpu", "gpu", or another of JAX's."""
    ways: tuple[tuple[str, str], ...] = ()
    """The ways that a caller chose, by kind of layer, see `kernels.ways`."""


_told: ContextVar[Target | None] = ContextVar("what programs are made for", default=None)


def kind_of(platform: str) -> str:
    """Returns the kind of device that one of JAX's names of platforms stands for: "cuda" is a "gpu"."""
    return "gpu" if platform in _GPU else platform


def told() -> Target | None:
    """Returns what a caller said that programs are made for; None where nobody did."""
    return _told.get()


def current() -> Target:
    """Returns what programs that are traced now are made for."""
    return _told.get() or Target(default_platform())


def default_platform() -> str:
    """Returns the kind of device on which JAX computes unless told otherwise."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return kind_of(jax.default_backend())
    return kind_of(device if isinstance(device, str) else device.platform)


@contextmanager
def made_for(platform: str, ways: Mapping[str, str] | None = None) -> Iterator[None]:
    """Returns a context in which programs are made for a platform, whatever machine this is.

    They run where JAX runs them: a program for GPUs runs on a CPU as well, slowly.

    Args:
        platform: One of JAX's names.
        ways: How to compute kinds of layers, where not as `kernels.ways` has it; None: as the surrounding context has.
    """
    outer = _told.get()
    chosen = tuple(sorted(ways.items())) if ways is not None else outer.ways if outer else ()
    token = _told.set(Target(kind_of(platform), chosen))
    try:
        yield
    finally:
        _told.reset(token)


def written_out(x: Any) -> Any:
    """Returns a tree of arrays that programs for GPUs hold in memory as they are; elsewhere nothing is changed.

    XLA's kernels of products take what orders their operands into themselves, and then find no tiles for some orders.
    """
    return lax.optimization_barrier(x) if current().platform == "gpu" else x
