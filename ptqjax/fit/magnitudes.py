"""How large each channel of an activation becomes on data: what scaling between layers is limited by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.ir import Graph, Model
from ptqjax.lowering import compiled, interpret
from ptqjax.quantize.batches import checked_batches

_LAYERS = ("Conv", "ConvTranspose", "Gemm")


def observe_magnitudes(model: Model, batches: Iterable[Mapping[str, Any]] | None) -> dict[str, np.ndarray]:
    """Returns the largest magnitude of each channel (axis 1) of the tensors that linear layers read, by tensor.

    What `equalize` takes as `magnitudes`. One pass over the data, memory of one batch.

    Raises:
        DataError: The batches do not fit the model, or there are none.
    """
    tensors = frozenset(node.inputs[0] for node in model.graph.nodes if node.op_type in _LAYERS)
    params = jax.device_put(dict(model.params))
    found: dict[str, np.ndarray] = {}
    for batch in checked_batches(model.graph, batches):
        observed = jax.device_get(_largest(model.graph, tensors, params, batch))
        found = {name: np.maximum(value, found.get(name, 0)) for name, value in observed.items()}
    return found


@partial(compiled, num_static=2)
def _largest(
    graph: Graph, tensors: frozenset[str], params: Mapping[str, Any], batch: Mapping[str, Any]
) -> dict[str, jax.Array]:
    def measure(name: str, value: jax.Array, channel_axis: int | None) -> tuple[jax.Array, jax.Array | None]:
        if name not in tensors or channel_axis is None:
            return value, None
        others = tuple(axis for axis in range(value.ndim) if axis != channel_axis)
        return value, jnp.max(jnp.abs(value), axis=others)

    return interpret(graph, params, batch, intercept=measure)[1]
