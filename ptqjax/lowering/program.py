"""The function that a graph denotes, compiled where its shapes are known, else run operator by operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache, wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.errors import DataDependentError
from ptqjax.ir import Graph, captured
from ptqjax.kernels.brief import SOON, are_taken, brief_options
from ptqjax.kernels.platforms import Target, told
from ptqjax.lowering.inputs import check_params, checked_inputs
from ptqjax.lowering.interpreter import interpret
from ptqjax.lowering.partition import cut_before
from ptqjax.lowering.samples import interpret_by_samples
from ptqjax.lowering.two_parts import for_gpus_in_two_parts
from ptqjax.ops import is_concrete, revision
from ptqjax.ops.values import Empty, TensorSequence

_WIDE_CASTS = {7, 11, 13}  # ONNX's numbers of int64, float64 and uint64
_T = TypeVar("_T")


def apply(graph: Graph, params: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the graph's outputs by name: a pure function of parameters and inputs, compiled once for each shape.

    `jit`, `vmap` and `grad` work through it. On concrete arrays 64-bit types are computed in 64 bits, whatever the
    caller's setting; on tracers the caller's setting holds, with a warning where it narrows. Where a shape depends on
    data (NonZero, a Reshape to a computed shape), concrete arrays are computed operator by operator from there on.

    Args:
        graph: The function.
        params: The arrays that `graph.parameters` names.
        inputs: An array for each of the graph's inputs, by name; for a sequence a list of arrays, for an optional None
            or its value.

    Raises:
        DataError: An input is missing, unknown, or of another type or shape than the graph declares.
        UnsupportedOperatorError: A node has no lowering.
        DataDependentError: A shape depends on data, and the data are traced.
    """
    return _applied(graph, params, inputs, _program)


def apply_few_times(graph: Graph, params: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `apply` returns, by a program that compiles in half the time, for what does not run often.

    The first layers run on the whole batch, not on a few samples at a time: see `lowering.samples`.
    """
    return _applied(graph, params, inputs, _plain_program)


def _applied(
    graph: Graph, params: Mapping[str, Any], inputs: Mapping[str, Any], program: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    inputs = checked_inputs(graph, inputs)
    check_params(graph, params)
    params = {name: params[name] for name in graph.parameters}
    with precision(graph, params, inputs, stacklevel=5):
        outputs = _outputs(graph, params, inputs, program)
    return {spec.name: _as_given(outputs[spec.name]) for spec in graph.outputs}  # `jit` had sorted the names


def _as_given(output: Any) -> Any:
    """Returns an output as a caller would give it: a sequence as a list, an empty optional as None."""
    if isinstance(output, TensorSequence):
        return list(output.elements)
    return None if isinstance(output, Empty) else output


def compiled(
    program: Callable[..., _T],
    *,
    num_static: int = 1,
    donated: int | tuple[int, ...] = (),
    is_brief: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., _T]:
    """Returns `program(*static, *arrays)` compiled, or, where a shape depends on concrete data, uncompiled.

    Args:
        program: A pure function of positional arguments, the static (hashable) ones first.
        num_static: How many of them are static.
        donated: Positions of the arguments whose memory the results may take.
        is_brief: Whether it runs a few times only, so that on few numbers compiling is most of the work, see
            `brief_options`. Not for what is to equal another program to the bit.
        options: The compiler's options on a CPU, where the numbers are not few; None: the usual ones.

    Raises (when called):
        DataDependentError: A shape depends on data, and some of the arrays are traced.
    """
    positions = (donated,) if isinstance(donated, int) else donated
    jitted = _jitted(program, num_static=num_static, donated=positions)
    soon = _jitted(program, num_static=num_static, donated=positions, options=SOON) if is_brief else jitted
    on_cpu = _jitted(program, num_static=num_static, donated=positions, options=options) if options else jitted
    in_vain: set[Any] = set()  # what was traced without success, so that it is not traced again

    @wraps(program)
    def run(*arguments: Any) -> _T:
        static, arrays = arguments[:num_static], arguments[num_static:]
        key = (_meaning(), static, _shapes(arrays)) if in_vain else None
        if key not in in_vain or not is_concrete(*arrays):
            try:
                usual = on_cpu if options and are_taken(options) else jitted
                return (soon if is_brief and brief_options(arrays) else usual)(_meaning(), *arguments)
            except DataDependentError:
                if not is_concrete(*arrays):
                    raise
            in_vain.add((_meaning(), static, _shapes(arrays)))
        return program(*static, *jax.tree.map(jnp.asarray, arrays))

    return run


def compiled_in_two_parts(program: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `program(static, *fixed, inputs)` as `compiled` does; for GPUs in two, see `lowering.two_parts`."""
    return for_gpus_in_two_parts(program, compiled(program))


def _meaning() -> tuple[int, Target | None]:
    """Returns what tells two programs of one graph apart: which operators were registered, and what they are for."""
    return revision(), told()


def _shapes(arrays: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(np.shape(leaf) for leaf in jax.tree.leaves(arrays))


def _jitted(
    program: Callable[..., _T],
    *,
    num_static: int,
    donated: tuple[int, ...] = (),
    options: Mapping[str, Any] | None = None,
) -> Callable[..., _T]:
    """Returns (meaning, *arguments) -> program(*arguments), compiled once for each meaning of the operators."""

    def run(_: Any, *arguments: Any) -> _T:
        return program(*arguments)

    run.__name__ = getattr(program, "__name__", "program").strip("_")  # what compiler logs and progress call it
    return jax.jit(
        run,
        static_argnums=tuple(range(num_static + 1)),
        donate_argnums=tuple(position + 1 for position in donated),
        compiler_options=None if options is None else dict(options),
    )


_cuts: dict[Any, frozenset[str]] = {}
"""Where graphs were cut, by graph and input shapes: what was traced without success is not traced again."""


def _outputs(
    graph: Graph, params: dict[str, Any], inputs: dict[str, Any], program: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Returns the outputs; where a shape depends on concrete data, all that does not depend on it is compiled."""
    key = (_meaning(), graph, _shapes(inputs))
    if key not in _cuts or not is_concrete(params, inputs):
        try:
            return program(graph, params, inputs)
        except DataDependentError as error:
            if not is_concrete(params, inputs):
                raise
            _cuts[key] = frozenset({error.tensor})
    with jax.enable_x64(True):  # what crosses may be a shape
        while True:
            first, second = cut_before(graph, _cuts[key])
            try:
                reached = program(first, {name: params[name] for name in first.parameters}, inputs)
            except DataDependentError as error:
                if error.tensor in _cuts[key]:
                    raise  # by our own fault: without that node the graph cannot fail at it
                _cuts[key] |= {error.tensor}
            else:
                return interpret(second, params, reached)[0]


def _interpret_whole(graph: Graph, params: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    return interpret(graph, params, inputs)[0]


def _for_each_meaning(program: Callable[..., Any]) -> Callable[..., Any]:
    jitted = _jitted(program, num_static=1)
    return lambda *arguments: jitted(_meaning(), *arguments)


_program = for_gpus_in_two_parts(interpret_by_samples, _for_each_meaning(interpret_by_samples))
_plain_program = _for_each_meaning(_interpret_whole)


@contextmanager
def precision(
    graph: Graph, params: Mapping[str, Any], inputs: Mapping[str, Any], *, stacklevel: int = 4
) -> Iterator[None]:
    """Returns a context in which 64-bit tensors keep their width, if no value is traced; else a warning says so."""
    wide = _wide_tensor(graph, params)
    traced = not is_concrete(params, inputs)
    if wide and traced and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        warnings.warn(
            f"tensor '{wide}' is of a 64-bit type and is computed in 32 bits under the caller's transformation; "
            "set jax_enable_x64 to keep its width",
            stacklevel=stacklevel,
        )
    with jax.enable_x64(True) if (wide or _casts_widely(graph)) and not traced else nullcontext():
        yield


def _wide_tensor(graph: Graph, params: Mapping[str, Any]) -> str:
    """Returns the name of a tensor that takes part in arithmetic with 64 bits; "" where there is none."""
    types = {spec.name: np.dtype(spec.dtype) for spec in (*graph.inputs, *graph.outputs)}
    types |= {name: np.dtype(value.dtype) for name, value in params.items()}
    wide = (name for name, dtype in types.items() if dtype.kind in "iuf" and dtype.itemsize == 8)  # noqa: PLR2004
    return next(wide, "") or _large_constant(graph)


@lru_cache
def _large_constant(graph: Graph) -> str:
    """Returns the name of a constant beyond 32 bits that is no end of a Slice and no number of trips; "" for none."""
    large = {name for name, value in graph.constant_values.items() if value.dtype.kind in "iu" and not _fits(value)}
    nodes = [node for node in graph.nodes if (node.domain, node.op_type) not in (("", "Slice"), ("", "Loop"))]
    read = (name for node in nodes for name in (*node.inputs, *captured(node)) if name in large)
    within = (_large_constant(inner) for node in graph.nodes for inner in node.subgraphs)
    return next(read, "") or next(filter(None, within), "")


def _fits(integers: np.ndarray) -> bool:
    """Tells whether the type of 32 bits and the same kind holds them all."""
    info = np.iinfo(np.uint32 if integers.dtype.kind == "u" else np.int32)
    return not integers.size or bool(info.min <= integers.min() and integers.max() <= info.max)


@lru_cache
def _casts_widely(graph: Graph) -> bool:
    return any(
        (node.op_type == "Cast" and node.attribute("to") in _WIDE_CASTS) or any(map(_casts_widely, node.subgraphs))
        for node in graph.nodes
    )
