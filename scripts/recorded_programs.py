"""The programs that a piece of code compiles, taken down in place of being run.

Importing this replaces `jax.jit`, so it must come before what is watched. While recording, a call of a compiled
function with concrete arrays is taken down, and gives ones of the right shapes: whole flows go through on arrays of any
size, as they hold one number, in the time that tracing takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

_jit = jax.jit
_TRACER = jax.core.Tracer  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A program that was called."""

    name: str
    """The function's."""
    lower: Callable[[Callable[[Any], Any]], Any]
    """(what puts a tree of arrays somewhere) -> the program lowered for arrays there."""
    key: Any
    """Equal for two calls that are one program."""


_taken: list[Program] | None = None


@contextmanager
def recording() -> Iterator[list[Program]]:
    """Returns a context in which programs are taken down, and their list, each once."""
    global _taken  # noqa: PLW0603 - `jax.jit` is one for the process
    _taken = []
    try:
        yield _taken
    finally:
        _taken = None


class _Watched:
    """What `jax.jit` gives, and what it was given."""

    def __init__(self, function: Callable[..., Any], **settings: Any) -> None:
        self.__wrapped__ = function
        self.__name__ = getattr(function, "__name__", "program")
        self._settings = settings
        self._compiled = _jit(function, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        leaves = jax.tree.leaves((arguments, named))
        if _taken is None or any(isinstance(leaf, _TRACER) for leaf in leaves):
            return self._compiled(*arguments, **named)
        return self._taken_down(_taken, arguments, named)

    def _taken_down(self, programs: list[Program], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        settings = {key: value for key, value in self._settings.items() if key != "compiler_options"}  # for CPUs
        static = settings.get("static_argnums", ())
        static = {static} if isinstance(static, int) else set(static)
        names = settings.get("static_argnames", ())
        names = {names} if isinstance(names, str) else set(names)

        is_wide = bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]

        def lower(place: Callable[[Any], Any]) -> Any:
            with jax.enable_x64(is_wide):
                return lowered(place)

        def lowered(place: Callable[[Any], Any]) -> Any:
            placed = [each if index in static else place(each) for index, each in enumerate(arguments)]
            also = {name: each if name in names else place(each) for name, each in named.items()}
            return _jit(self.__wrapped__, **settings).lower(*placed, **also)

        fixed = tuple(each for index, each in enumerate(arguments) if index in static)
        shapes = tuple(
            (np.shape(leaf), str(getattr(leaf, "dtype", ""))) for leaf in jax.tree.leaves((arguments, named))
        )
        key = (self.__name__, id(self), repr(fixed) if not _is_hashable(fixed) else hash(fixed), shapes)
        if all(each.key != key for each in programs):
            programs.append(Program(name=self.__name__, lower=lower, key=key))
        found = jax.eval_shape(self._compiled, *arguments, **named) if not static else lower(_shape_of).out_info
        return jax.tree.map(lambda leaf: np.broadcast_to(np.ones((), leaf.dtype), leaf.shape), found)


def _shape_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), tree)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _watching_jit(function: Callable[..., Any] | None = None, **settings: Any) -> Any:
    if function is None:
        return lambda given: _Watched(given, **settings)
    return _Watched(function, **settings)


jax.jit = _watching_jit
