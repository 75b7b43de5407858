"""A program for GPUs in two: what follows from parameters and encodings, and the pass over the inputs.

In one program, each rounded weight and each number made of scales would be a kernel of its own before every pass; and
XLA's compiler for GPUs takes into the kernel of a matrix product only what it is given, or computes from scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import jax
import numpy as np

from ptqjax.errors import DataDependentError
from ptqjax.kernels.fixed_part import in_two_parts
from ptqjax.kernels.platforms import Target, current, made_for, told
from ptqjax.ops import is_concrete, revision

_MOST_PROGRAMS = 64  # that are kept traced


def for_gpus_in_two_parts(program: Callable[..., Any], whole: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `program(static, *fixed, inputs)` for GPUs as what `fixed` decides, and then the rest; else `whole`.

    What the last `fixed` decided is kept, for calls with the same arrays: they must be JAX's, which cannot change. On
    other devices, and under a caller's transformation, it is one program, that of `whole` with the same arguments.
    """
    last = _Last()

    @wraps(program)
    def run(static: Any, *arguments: Any) -> Any:
        if current().platform != "gpu" or not is_concrete(*arguments) or _are_on_a_cpu(arguments):
            return whole(static, *arguments)
        *fixed, inputs = arguments
        try:
            prepare, finish = _parts(program, static, _meaning(), _described(fixed), _described(inputs))
        except DataDependentError:
            return whole(static, *arguments)
        return finish(last.prepared(prepare, fixed), inputs)

    return run


def _meaning() -> tuple[int, Target | None, bool]:
    """Returns what tells two programs of one graph apart beside their shapes."""
    return revision(), told(), bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


def _are_on_a_cpu(arguments: Any) -> bool:
    """Tells whether a caller put arrays on a CPU where programs are otherwise for GPUs, and did not say so."""
    held = (leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array))
    return told() is None and any(device.platform == "cpu" for leaf in held for device in leaf.devices())


class _Last:
    """What was prepared last, and of which arrays."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._prepared: Any = None

    def prepared(self, prepare: Callable[..., Any], fixed: Any) -> Any:
        """Returns `prepare(fixed)`, the same arrays again where `fixed` is made of the same as in the last call."""
        leaves = jax.tree.leaves(fixed)
        if not all(isinstance(leaf, jax.Array) for leaf in leaves):
            return prepare(fixed)
        key = (prepare, *leaves)
        if len(key) != len(self._key) or any(one is not other for one, other in zip(key, self._key, strict=True)):
            self._key, self._prepared = key, prepare(fixed)
        return self._prepared


@lru_cache(_MOST_PROGRAMS)
def _parts(
    program: Callable[..., Any], static: Any, meaning: tuple[int, Target | None, bool], fixed: Any, inputs: Any
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    del meaning  # two programs may differ in it alone

    def whole(fixed: Any, inputs: Any) -> Any:
        return program(static, *fixed, inputs)

    with made_for(current().platform):  # not for whatever it may be compiled for
        prepare, finish = in_two_parts(whole, *(_example(each) for each in (fixed, inputs)))
    name = getattr(program, "__name__", "program").strip("_")
    prepare.__name__, finish.__name__ = f"{name}_prepared", name  # what compiler logs and progress call them
    return jax.jit(prepare), jax.jit(finish)


def _described(tree: Any) -> tuple[Any, tuple[tuple[tuple[int, ...], Any], ...]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype)) for leaf in leaves)


def _example(described: tuple[Any, Any]) -> Any:
    structure, leaves = described
    return jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in leaves])
