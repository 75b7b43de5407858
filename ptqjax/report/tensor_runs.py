"""Tensors of a model and of its quantized form, as ONNX Runtime computes them, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from ptqjax.agreement import as_written
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.errors import PtqjaxError
from ptqjax.ir import Model, TensorSpec
from ptqjax.qdq.insert import insert_qdq

Pairs: TypeAlias = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Tensors by name, each before and after its rounding."""


class Runs(NamedTuple):
    """Two models as functions of a batch that hand out their tensors."""

    in_float: Callable[[Mapping[str, Any]], Pairs]
    """The float model; nothing is rounded."""
    quantized: Callable[[Mapping[str, Any]], Pairs]
    """The quantized one."""


def runs_in_runtime(
    reference: Model, model: Model, encodings: Encodings, names: Sequence[str], batch: Mapping[str, Any]
) -> Runs | None:
    """Returns both models in ONNX Runtime; None where JAX computes on another device, or one of them does not run.

    Args:
        reference: The float model.
        model: The float model that the encodings belong to.
        encodings: The grids.
        names: The activations that are handed out, of both models.
        batch: What is tried first.
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        rounded = insert_qdq(model, encodings)
        places = {name: _places(rounded, name, encodings.get(name)) for name in names}
        if None in places.values():
            return None
        found = Runs(
            in_float=_handing_out(reference, {name: (name, name) for name in names}),
            quantized=_handing_out(rounded, {name: place for name, place in places.items() if place is not None}),
        )
        for function in found:
            function(batch)
    except (PtqjaxError, ValueError):  # a ValueError: more than protobuf holds
        return None
    return found


def _places(rounded: Model, name: str, encoding: Encoding | None) -> tuple[str, str] | None:
    """Returns where a tensor stands before and after its rounding, as `insert_qdq` names it; None where nowhere."""
    graph = rounded.graph
    known = {*graph.producers, *(spec.name for spec in graph.inputs)}
    if encoding is None or not np.all(np.asarray(encoding.enabled)):
        return (name, name) if name in known else None
    is_output = name in graph.output_names
    before, after = (f"{name}_float", name) if is_output else (name, f"{name}_dequantized")
    return (before, after) if {before, after} <= known else None


def _handing_out(model: Model, places: Mapping[str, tuple[str, str]]) -> Callable[[Mapping[str, Any]], Pairs]:
    graph = model.graph
    inputs, outputs = {spec.name for spec in graph.inputs}, set(graph.output_names)
    wanted = {each for place in places.values() for each in place} - inputs - outputs
    more = tuple(TensorSpec(name=name, dtype=np.dtype(np.float32), shape=None) for name in sorted(wanted))
    function = as_written(model.replace(graph=replace(graph, outputs=(*graph.outputs, *more))))

    def run(batch: Mapping[str, Any]) -> Pairs:
        found = {name: np.asarray(value) for name, value in batch.items()} | dict(function(batch))
        return {name: (found[before], found[after]) for name, (before, after) in places.items()}

    return run
