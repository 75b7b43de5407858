"""The interpreter of graphs: node by node, from arrays to arrays.

The meaning is ONNX's; the program is what is fast on the platform (`layout`). A NumPy array is static, known while
tracing: what depends on static values alone is computed at once, so that shape arithmetic leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.backend import backends

from ptqjax.errors import DataDependentError, ModelError, PtqjaxError, UnsupportedOperatorError
from ptqjax.ir import Constant, Graph, Node, captured, place_of
from ptqjax.kernels.platforms import current, default_platform, kind_of, made_for, told
from ptqjax.lowering.layout import (
    CHANNELS_LAST,
    Value,
    channel_axis,
    channels_last_inputs,
    channels_last_value,
    in_onnx_layout,
    relabelled,
    stays_channels_last,
)
from ptqjax.ops import Lowering, find_lowering, is_concrete, is_static

Intercept: TypeAlias = Callable[[str, jax.Array, int | None], tuple[jax.Array, Any]]
"""Called with a tensor's name, its value and its channel axis; returns the value to use and what was observed."""

_NUM_OUTPUTS = "num_node_outputs"  # a lowering with this keyword is told how many outputs the node has

# What fusion makes of groups, in graphs of older opsets as well, which export raises.
_MADE_BY_FUSION = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
_INTEGER_SINCE = 10

_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
)


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
            read, outputs of nodes; not for floats of 8 bits and fewer, which are quantized already) as
            `intercept(name, value, channel_axis)`; returns the value to go on with, and an observation (None: nothing
            to report). `channel_axis` is where ONNX's axis 1 lies in `value`, which may
            have its channels last; None for parameters, which are in ONNX's layout, and where the rank is below 2.
            Tensors inside the subgraphs of If, Loop and Scan are not among them.
        platform: What the program is made for: "cpu", "gpu", or another; None: what `made_for` said, else that for
            which it is compiled.

    Raises:
        UnsupportedOperatorError: A node, or a use of one, has no lowering; the message names it.
        DataDependentError: A shape, or the path through the graph, depends on values that are being traced.
    """

    def run(program_platform: str, params: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
        with made_for(program_platform):
            return _run(graph, params, inputs, intercept=intercept, platform=kind_of(program_platform))

    chosen = told()
    if platform is None and chosen is not None:
        platform = chosen.platform
    if platform is not None:
        return run(platform, params, inputs)
    platforms = set(backends())
    if len(platforms) == 1 or is_concrete(params, inputs):
        return run(default_platform(), params, inputs)
    return lax.platform_dependent(
        dict(params), dict(inputs), cpu=partial(run, "cpu"), default=partial(run, min(platforms - {"cpu"}))
    )


def interpret_in_layout(
    graph: Graph, params: Mapping[str, Any], values: Mapping[str, Value], *, intercept: Intercept | None = None
) -> dict[str, Value]:
    """Returns the graph's outputs in the layouts that they have: for parts of a graph, see `stretches`.

    The other arguments are those of `interpret`.

    Args:
        graph: What to compute.
        params: The arrays that `graph.parameters` names.
        values: The graph's inputs by name, in whatever layout; they have met `intercept` already.
        intercept: As `interpret` takes it.
    """
    platform = current().platform
    scope = _Scope(values=_constants(graph) | dict(values), params=params, intercept=intercept, platform=platform)
    with made_for(platform):
        _run_nodes(graph, scope)
    return {spec.name: scope.values[spec.name] for spec in graph.outputs}


@dataclass(kw_only=True, slots=True)
class _Scope:
    """The tensors that exist at one place of a run: of a graph, and around them those of the graph that holds it."""

    values: dict[str, Value]
    """What has come into being."""
    params: Mapping[str, Any]
    """The parameters that are still to be read, in ONNX's layout."""
    platform: str
    """What the program is made for."""
    intercept: Intercept | None = None
    """The hook that every floating tensor meets, see `interpret`."""
    observations: dict[str, Any] = field(default_factory=dict)
    """What `intercept` observed."""
    outer: _Scope | None = None
    """The scope of the graph that holds this one."""

    def read(self, name: str) -> Value | None:
        """Returns the tensor `name`; None for "", which is an input left out."""
        if not name:
            return None
        if name in self.values:
            return self.values[name]
        if self.outer is not None:
            return self.outer.read(name)
        self.define(name, Value(jnp.asarray(self.params[name])), is_param=True)
        return self.values[name]

    def define(self, name: str, value: Value, *, is_param: bool = False) -> None:
        """Adds the tensor `name`; here it meets `intercept`."""
        if self.intercept is not None and _is_floating(value.array):
            array, observation = self.intercept(name, value.array, None if is_param else channel_axis(value))
            value = value._replace(array=array)
            if observation is not None:
                self.observations[name] = observation
        self.values[name] = value

    def read_in_onnx_layout(self, name: str) -> Any:
        """Returns the array of the tensor `name`, in ONNX's layout; None for ""."""
        value = self.read(name)
        return None if value is None else in_onnx_layout(value)


def _run(
    graph: Graph,
    params: Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    intercept: Intercept | None,
    platform: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    scope = _Scope(values=_constants(graph), params=params, intercept=intercept, platform=platform)
    for spec in graph.inputs:
        scope.define(spec.name, Value(jax.tree.map(jnp.asarray, inputs[spec.name])))
    _run_nodes(graph, scope)
    return {spec.name: scope.read_in_onnx_layout(spec.name) for spec in graph.outputs}, scope.observations


def _run_nodes(graph: Graph, scope: _Scope) -> None:
    for node in graph.nodes:
        for name, result in zip(node.outputs, _lower(node, scope, graph.opset(node.domain)), strict=False):
            if name:
                scope.define(name, result)


def _constants(graph: Graph) -> dict[str, Value]:
    """Returns the graph's constants, in objects of their own.

    JAX 0.10 remembers by identity how it lowered a scalar: one seen in 32 bits would be lowered so in 64 bits as well.
    """
    return {name: Value(value.view()) for name, value in graph.constant_values.items()}


def _function(graph: Graph, scope: _Scope) -> Callable[..., tuple[Any, ...]]:
    """Returns a subgraph as a function of its inputs; what it captures is looked up in `scope`."""

    def body(*arguments: Any) -> tuple[Any, ...]:
        values = _constants(graph) | {
            spec.name: Value(argument) for spec, argument in zip(graph.inputs, arguments, strict=True)
        }
        inner = _Scope(values=values, params={}, platform=scope.platform, outer=scope)
        _run_nodes(graph, inner)
        return tuple(inner.read_in_onnx_layout(spec.name) for spec in graph.outputs)

    return body


def _lower(node: Node, scope: _Scope, opset: int) -> list[Value]:
    """Returns the values of all outputs that the node names."""
    opset = max(opset, _INTEGER_SINCE) if node.op_type in _MADE_BY_FUSION and not node.domain else opset
    lowering = find_lowering(node.op_type, opset=opset, domain=node.domain, place=place_of(node))
    for name in captured(node):
        scope.read(name)  # comes into being outside of the loop or branch that reads it
    inputs = [scope.read(name) for name in node.inputs]
    attributes = _attributes(node, lowering, opset, scope)
    with _errors_that_name(node, inputs):
        results = _results(node, lowering, inputs, attributes, scope.platform)
    absent = [name for name in node.outputs[len(results) :] if name]
    if absent:
        raise UnsupportedOperatorError(f"{place_of(node)}: its output '{absent[0]}' has no lowering, only earlier ones")
    return results


def _results(
    node: Node, lowering: Lowering, inputs: list[Value | None], attributes: dict[str, Any], platform: str
) -> list[Value]:
    has_subgraphs = any(isinstance(value, Graph) for _, value in node.attributes)
    if not has_subgraphs and all(value is None or is_static(value.array) for value in inputs):
        return _computed_while_tracing(lowering, inputs, attributes)
    is_last = platform in CHANNELS_LAST
    if is_last and (value := relabelled(node, inputs)) is not None:
        return [value]
    if is_last and stays_channels_last(lowering, inputs, attributes):
        arrays = _as_tuple(_variant(lowering)(*channels_last_inputs(lowering, inputs), **attributes))
        return [channels_last_value(array) for array in arrays]
    arrays = [None if value is None else in_onnx_layout(value) for value in inputs]
    return [Value(_as_data(array)) for array in _as_tuple(lowering.function(*arrays, **attributes))]


@contextmanager
def _errors_that_name(node: Node, inputs: list[Value | None]) -> Iterator[None]:
    """Makes each error inside one of ours that names the node and what it was given."""
    try:
        yield
    except DataDependentError as error:
        raise _data_dependent(node, f"{place_of(node)}: {error}") from error
    except UnsupportedOperatorError as error:
        if place_of(node) in str(error):
            raise
        raise UnsupportedOperatorError(f"{place_of(node)}: {error}") from error
    except PtqjaxError:
        raise
    except _NEEDS_VALUES as error:
        message = (
            f"{place_of(node)} depends on values that are being traced; call ptqjax.apply on concrete arrays, outside "
            f"jit, vmap and grad ({error})"
        )
        raise _data_dependent(node, message) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, NotImplementedError) as error:
        given = ", ".join("nothing" if value is None else _described(value.array) for value in inputs)
        raise ModelError(
            f"{place_of(node)} cannot be computed on {given or 'no inputs'}: {error}; check the node's attributes and "
            "the shapes and types that reach it"
        ) from error


def _data_dependent(node: Node, message: str) -> DataDependentError:
    error = DataDependentError(message)
    error.tensor = node.output
    return error


def _described(array: Any) -> str:
    if not hasattr(array, "dtype"):
        return type(array).__name__
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"


def _attributes(node: Node, lowering: Lowering, opset: int, scope: _Scope) -> dict[str, Any]:
    attributes = {name: _attribute(value, scope) for name, value in node.attributes}
    unknown = sorted(set(attributes) - lowering.parameters)
    if unknown:
        raise UnsupportedOperatorError(
            f"{place_of(node)}: attribute '{unknown[0]}' = {attributes[unknown[0]]!r} has no lowering in opset {opset} "
            f"(since {lowering.since}); known are {sorted(lowering.parameters - {_NUM_OUTPUTS})}"
        )
    if _NUM_OUTPUTS in lowering.parameters:
        attributes[_NUM_OUTPUTS] = len(node.outputs)
    return attributes


def _attribute(value: Any, scope: _Scope) -> Any:
    if isinstance(value, Graph):
        return _function(value, scope)
    return value.value if isinstance(value, Constant) else value


def _computed_while_tracing(lowering: Lowering, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    """Returns static results of static inputs: 64-bit integers stay what they are, and nothing is compiled in."""
    arrays = [None if value is None else value.array for value in inputs]
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        results = _as_tuple(lowering.function(*arrays, **attributes))
    return [Value(jax.tree.map(np.asarray, array)) for array in results]


def _as_data(result: Any) -> Any:
    """Returns a result that was computed from data: floats are data as well, though they may be known (`known`)."""
    return jnp.asarray(result) if isinstance(result, np.ndarray) and result.dtype.kind == "f" else result


def _is_floating(array: Any) -> bool:
    """Tells whether a tensor is of floats to calculate with: narrower ones are quantized already."""
    return isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize > 1


def _variant(lowering: Lowering) -> Callable[..., Any]:
    assert lowering.channels_last is not None  # noqa: S101 (the caller asked `stays_channels_last`)
    return lowering.channels_last.function


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, tuple | list) else (results,)
