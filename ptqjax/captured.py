"""The values of every tensor of a model, in float and quantized, in memory and on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import ConfigError
from ptqjax.ir import Model
from ptqjax.lowering import checked_inputs, interpret, precision
from ptqjax.publish import published
from ptqjax.qdq.insert import check_tensors, with_own_biases
from ptqjax.simulation import fake_quantization

_FLOAT, _QUANTIZED = "float/", "quantized/"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorValues:
    """What one call of a model computes on the way, in float and quantized."""

    exact: Mapping[str, np.ndarray]
    """The values of the float model, by tensor."""
    quantized: Mapping[str, np.ndarray]
    """The values of the quantized model, by tensor; rounded ones where the tensor has an encoding."""


def tensor_values(model: Model, encodings: Encodings, inputs: Mapping[str, Any]) -> TensorValues:
    """Returns every floating tensor that the model computes for `inputs`, in float and quantized.

    Values are those of `simulate` with arithmetic "float", in ONNX's layout, outside of subgraphs. All are held at
    once: for many samples call it batch by batch.

    Args:
        model: The float model.
        encodings: The grids by tensor.
        inputs: One batch, by name of input.

    Raises:
        DataError: The inputs do not fit the model.
        ConfigError: An encoding is for a tensor that the model has not.
    """
    check_tensors(model.graph, encodings)
    own = with_own_biases(model, encodings)
    return TensorValues(exact=_values(model, {}, inputs), quantized=_values(own, encodings, inputs))


def write_tensor_values(path: str | os.PathLike[str], values: TensorValues) -> None:
    """Writes the values as an .npz file with the arrays "float/NAME" and "quantized/NAME", whole or not at all.

    Raises:
        ConfigError: `path` does not end in .npz.
        OutputError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ConfigError(f"path='{path}': tensors are written as .npz; expected a name that ends so")
    arrays = {_FLOAT + name: value for name, value in values.exact.items()}
    arrays |= {_QUANTIZED + name: value for name, value in values.quantized.items()}
    with published(path.parent, (path.name,)) as folder:
        np.savez(folder / path.name, allow_pickle=False, **arrays)


def _values(model: Model, encodings: Encodings, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    checked = checked_inputs(model.graph, inputs)
    rounded = fake_quantization(model, encodings)

    def intercept(name: str, value: jax.Array, channel_axis: int | None) -> tuple[jax.Array, Any]:
        value, _ = rounded(name, value, channel_axis)
        return value, None if name in model.graph.parameters else _in_onnx_layout(value, channel_axis)

    def run(params: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
        return interpret(model.graph, params, arrays, intercept=intercept)[1]

    with precision(model.graph, model.params, checked):
        found = jax.jit(run)(dict(model.params), checked)
    return {name: np.asarray(value) for name, value in found.items()}


def _in_onnx_layout(value: jax.Array, channel_axis: int | None) -> jax.Array:
    return value if channel_axis is None else jnp.moveaxis(value, channel_axis, 1)
