"""What a caller feeds, held against what the graph declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from ptqjax.errors import DataError
from ptqjax.ir import Graph, TensorSpec
from ptqjax.ops import is_concrete
from ptqjax.ops.values import EMPTY, Empty, TensorSequence


def checked_inputs(graph: Graph, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the inputs as arrays, in the graph's order; a list becomes a sequence, None an empty optional.

    Raises:
        DataError: An input is missing, unknown, or of another type or shape than the graph declares.
    """
    declared = {spec.name: spec for spec in graph.inputs}
    for name in inputs:
        if name not in declared:
            raise DataError(f"input '{name}' is unknown; the graph '{graph.name}' has the inputs {sorted(declared)}")
    for name in declared:
        if name not in inputs:
            raise DataError(f"input '{name}' is missing; found {sorted(inputs)}, expected {sorted(declared)}")
    return {name: _checked_input(spec, inputs[name]) for name, spec in declared.items()}


def check_params(graph: Graph, params: Mapping[str, Any]) -> None:
    """Checks that all parameters of the graph are there.

    Raises:
        DataError: One is missing.
    """
    missing = [name for name in graph.parameters if name not in params]
    if missing:
        raise DataError(f"parameter '{missing[0]}' is missing; expected the params of the model that the graph is of")


def _checked_input(spec: TensorSpec, value: Any) -> Any:
    if isinstance(value, list | TensorSequence | Empty) or value is None:
        return _checked_container(spec, value)
    if np.dtype(spec.dtype).kind == "O":
        raise DataError(f"input '{spec.name}' is of strings, which no array of JAX holds; feed numbers, cut before it")
    array = value if hasattr(value, "dtype") and hasattr(value, "shape") else np.asarray(value)
    if array.dtype not in (spec.dtype, jax.dtypes.canonicalize_dtype(spec.dtype)):
        raise DataError(f"input '{spec.name}' is of type {array.dtype}; expected {spec.dtype}: convert it with astype")
    if array.dtype != spec.dtype and is_concrete(array):  # 32-bit JAX had narrowed it
        array = np.asarray(array).astype(spec.dtype)
    if spec.shape is None:
        return array
    fits = len(array.shape) == len(spec.shape) and all(
        found == size for found, size in zip(array.shape, spec.shape, strict=True) if isinstance(size, int)
    )
    if not fits:
        wanted = ", ".join("?" if size is None else str(size) for size in spec.shape)
        raise DataError(f"input '{spec.name}' has shape {list(array.shape)}; expected [{wanted}]")
    return array


def _checked_container(spec: TensorSpec, value: Any) -> Any:
    """Returns what a caller gives for a sequence or an optional, as it flows through the graph."""
    if spec.kind == "tensor" or (value is None and not spec.kind.startswith("optional")):
        raise DataError(f"input '{spec.name}' is a {type(value).__name__}; expected a {spec.kind} of {spec.dtype}")
    if value is None or isinstance(value, Empty):
        return EMPTY
    if spec.kind == "optional":
        raise DataError(f"input '{spec.name}' is a sequence; expected a tensor of {spec.dtype}, or None")
    elements = value if isinstance(value, list) else value.elements
    element = replace(spec, kind="tensor")
    return TensorSequence(tuple(_checked_input(element, element_value) for element_value in elements))
