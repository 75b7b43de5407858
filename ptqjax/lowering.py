"""From a graph to the pure JAX function that it denotes.

The meaning is ONNX's; the program is what is fast on the platform. On a CPU, values flow with their channels last from
the first convolution to the first operator that needs ONNX's layout; each value says which layout it has, and
everything that leaves the graph is in ONNX's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.errors import DataError, UnsupportedOperatorError
from ptqjax.ir import Constant, Graph, Node, TensorSpec, place_of
from ptqjax.ops import Lowering, find_lowering, is_static
from ptqjax.ops.layout import to_channels_last, to_onnx, with_rank

Intercept: TypeAlias = Callable[[str, jax.Array, int | None], tuple[jax.Array, Any]]
"""Called with a tensor's name, its value and its channel axis; returns the value to use and what was observed."""

_NUM_OUTPUTS = "num_node_outputs"  # a lowering with this keyword is told how many outputs the node has
_FIRST_WITH_LAYOUT = 3  # a tensor of rank 2 is the same in both layouts


class _Value(NamedTuple):
    """A tensor as the interpreter holds it; a NumPy array is static."""

    array: Any
    channels_last: bool = False


def apply(graph: Graph, params: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns the graph's outputs by name: a pure function of parameters and inputs, compiled once for each shape.

    `jit`, `vmap` and `grad` work through it. On concrete arrays 64-bit types are computed in 64 bits, whatever the
    caller's setting; on tracers the caller's setting holds, with a warning where it narrows.

    Raises:
        DataError: An input is missing, unknown, or of another type or shape than the graph declares.
        UnsupportedOperatorError: A node has no lowering.
    """
    inputs = checked_inputs(graph, inputs)
    _check_params(graph, params)
    params = {name: params[name] for name in graph.parameters}
    with _precision(graph, params, inputs):
        return in_order(graph, _compiled(graph, params, inputs))


def in_order(graph: Graph, outputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the outputs in the graph's order: `jit` sorts the names of what it returns."""
    return {spec.name: outputs[spec.name] for spec in graph.outputs}


def interpret(
    graph: Graph,
    params: Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    intercept: Intercept | None = None,
    platform: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the graph's outputs, and what `intercept` observed, by tensor name; pure and not compiled.

    Args:
        graph: What to compute.
        params: The arrays that `graph.parameters` names.
        inputs: The graph's inputs by name, in ONNX's layout.
        intercept: Called once for each floating tensor when it comes into being (graph inputs, parameters when first
            read, outputs of nodes) as `intercept(name, value, channel_axis)`; returns the value to go on with, and an
            observation (None: nothing to report). `channel_axis` is where ONNX's axis 1 lies in `value`, which may
            have its channels last; None for parameters, which are in ONNX's layout, and where the rank is below 2.
        platform: What the program is made for: "cpu", or another; None: where JAX would run it.

    Raises:
        UnsupportedOperatorError: A node, or a use of one, has no lowering; the message names it.
    """
    platform = platform or _default_platform()
    observations: dict[str, Any] = {}
    values: dict[str, _Value] = {name: _Value(value) for name, value in graph.constant_values.items()}

    def define(name: str, value: _Value, *, is_param: bool = False) -> None:
        if intercept is not None and not is_static(value.array) and jnp.issubdtype(value.array.dtype, jnp.floating):
            array, observation = intercept(name, value.array, None if is_param else _channel_axis(value))
            value = value._replace(array=array)
            if observation is not None:
                observations[name] = observation
        values[name] = value

    def read(name: str) -> _Value | None:
        if name and name not in values:
            define(name, _Value(jnp.asarray(params[name])), is_param=True)
        return values[name] if name else None

    for spec in graph.inputs:
        define(spec.name, _Value(jnp.asarray(inputs[spec.name])))
    for node in graph.nodes:
        results = _lower(node, [read(name) for name in node.inputs], graph.opset(node.domain), platform)
        for name, result in zip(node.outputs, results, strict=False):
            if name:
                define(name, result)
    return {spec.name: _in_onnx_layout(read(spec.name)) for spec in graph.outputs}, observations


@partial(jax.jit, static_argnums=0)
def _compiled(graph: Graph, params: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    return interpret(graph, params, inputs)[0]


def _lower(node: Node, inputs: list[_Value | None], opset: int, platform: str) -> list[_Value]:
    """Returns the values of all outputs that the node names."""
    lowering = find_lowering(node.op_type, opset=opset, domain=node.domain, place=place_of(node))
    attributes = _attributes(node, lowering, opset)
    try:
        if all(value is None or is_static(value.array) for value in inputs):
            results = _computed_while_tracing(lowering, inputs, attributes)
        elif platform == "cpu" and _stays_channels_last(lowering, inputs, attributes):
            results = _computed_channels_last(lowering, inputs, attributes)
        else:
            arrays = [None if value is None else _in_onnx_layout(value) for value in inputs]
            results = [_Value(array) for array in _as_tuple(lowering.function(*arrays, **attributes))]
    except UnsupportedOperatorError as error:
        raise UnsupportedOperatorError(f"{place_of(node)}: {error}") from error
    absent = [name for name in node.outputs[len(results) :] if name]
    if absent:
        raise UnsupportedOperatorError(f"{place_of(node)}: its output '{absent[0]}' has no lowering, only earlier ones")
    return results


def _attributes(node: Node, lowering: Lowering, opset: int) -> dict[str, Any]:
    attributes = {name: value.value if isinstance(value, Constant) else value for name, value in node.attributes}
    unknown = sorted(set(attributes) - lowering.parameters)
    if unknown:
        raise UnsupportedOperatorError(
            f"{place_of(node)}: attribute '{unknown[0]}' = {attributes[unknown[0]]!r} has no lowering in opset {opset} "
            f"(since {lowering.since}); known are {sorted(lowering.parameters - {_NUM_OUTPUTS})}"
        )
    if _NUM_OUTPUTS in lowering.parameters:
        attributes[_NUM_OUTPUTS] = len(node.outputs)
    return attributes


def _computed_while_tracing(
    lowering: Lowering, inputs: list[_Value | None], attributes: dict[str, Any]
) -> list[_Value]:
    """Returns static results of static inputs: 64-bit integers stay what they are, and nothing is compiled in."""
    arrays = [None if value is None else value.array for value in inputs]
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        results = _as_tuple(lowering.function(*arrays, **attributes))
    return [_Value(np.asarray(array)) for array in results]


def _stays_channels_last(lowering: Lowering, inputs: list[_Value | None], attributes: dict[str, Any]) -> bool:
    variant = lowering.channels_last
    if variant is None or not variant.applies(attributes):
        return False
    values = [value for value in inputs[: variant.num_values] if value is not None]
    rank = max(value.array.ndim for value in values)
    if any(value.channels_last and value.array.ndim < rank for value in values):
        return False  # broadcasting puts axes in front of the batch
    return any(value.channels_last for value in values) or (variant.starts and rank >= _FIRST_WITH_LAYOUT)


def _computed_channels_last(
    lowering: Lowering, inputs: list[_Value | None], attributes: dict[str, Any]
) -> list[_Value]:
    variant = lowering.channels_last
    assert variant is not None  # noqa: S101 (the caller asked)
    num_values = len(inputs) if variant.num_values is None else variant.num_values
    rank = max(value.array.ndim for value in inputs[:num_values] if value is not None)
    arrays = [
        None
        if value is None
        else _in_channels_last_layout(value, rank)
        if position < num_values
        else _in_onnx_layout(value)
        for position, value in enumerate(inputs)
    ]
    results = _as_tuple(variant.function(*arrays, **attributes))
    return [_Value(array, channels_last=array.ndim >= _FIRST_WITH_LAYOUT) for array in results]


def _in_channels_last_layout(value: _Value, rank: int) -> Any:
    if value.channels_last or value.array.ndim == 0:
        return value.array
    return to_channels_last(with_rank(value.array, rank))


def _in_onnx_layout(value: _Value | None) -> Any:
    assert value is not None  # noqa: S101 (graph outputs have names)
    return to_onnx(value.array) if value.channels_last else value.array


def _channel_axis(value: _Value) -> int | None:
    if value.array.ndim < 2:  # noqa: PLR2004 (no axis 1)
        return None
    return value.array.ndim - 1 if value.channels_last else 1


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, tuple | list) else (results,)


def _default_platform() -> str:
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def checked_inputs(graph: Graph, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the inputs as arrays, in the graph's order.

    Raises:
        DataError: See `apply`.
    """
    declared = {spec.name: spec for spec in graph.inputs}
    for name in inputs:
        if name not in declared:
            raise DataError(f"input '{name}' is unknown; the graph '{graph.name}' has the inputs {sorted(declared)}")
    for name in declared:
        if name not in inputs:
            raise DataError(f"input '{name}' is missing; found {sorted(inputs)}, expected {sorted(declared)}")
    return {name: _checked_input(spec, inputs[name]) for name, spec in declared.items()}


def _checked_input(spec: TensorSpec, value: Any) -> Any:
    array = value if hasattr(value, "dtype") and hasattr(value, "shape") else np.asarray(value)
    if array.dtype not in (spec.dtype, jax.dtypes.canonicalize_dtype(spec.dtype)):
        raise DataError(f"input '{spec.name}' is of type {array.dtype}; expected {spec.dtype}: convert it with astype")
    if spec.shape is None:
        return array
    fits = len(array.shape) == len(spec.shape) and all(
        found == size for found, size in zip(array.shape, spec.shape, strict=True) if isinstance(size, int)
    )
    if not fits:
        wanted = ", ".join("?" if size is None else str(size) for size in spec.shape)
        raise DataError(f"input '{spec.name}' has shape {list(array.shape)}; expected [{wanted}]")
    return array


def _check_params(graph: Graph, params: Mapping[str, Any]) -> None:
    missing = [name for name in graph.parameters if name not in params]
    if missing:
        raise DataError(f"parameter '{missing[0]}' is missing; expected the params of the model that the graph is of")


@contextmanager
def _precision(graph: Graph, params: Mapping[str, Any], inputs: Mapping[str, Any]) -> Iterator[None]:
    wide = _has_64_bits(graph, params)
    tracer = jax.core.Tracer  # pyright: ignore[reportAttributeAccessIssue]
    traced = any(isinstance(leaf, tracer) for leaf in (*params.values(), *inputs.values()))
    if wide and traced and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        warnings.warn(
            f"tensor '{wide}' is of a 64-bit type and is computed in 32 bits under the caller's transformation; "
            "set jax_enable_x64 to keep its width",
            stacklevel=4,
        )
    with jax.enable_x64(True) if wide and not traced else nullcontext():
        yield


def _has_64_bits(graph: Graph, params: Mapping[str, Any]) -> str:
    """Returns the name of a tensor that takes part in arithmetic with 64 bits; "" where there is none."""
    types = {spec.name: np.dtype(spec.dtype) for spec in (*graph.inputs, *graph.outputs)}
    types |= {name: np.dtype(value.dtype) for name, value in params.items()}
    return next((name for name, dtype in types.items() if dtype.kind in "iuf" and dtype.itemsize == 8), "")  # noqa: PLR2004
