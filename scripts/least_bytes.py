"""The fewest bytes that a pass of a network can move: each activation written once and read once, weights read once.

Layers are taken with all that follows element by element as one: batch norm, bound, the sum with a residual.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ptqjax.ir import Model, Node
from ptqjax.lowering import interpret
from ptqjax.ops import find_lowering

_MOVES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze", "Dropout", "Cast"})


def least_bytes(model: Model, inputs: dict[str, Any]) -> int:
    """Returns the fewest bytes of one pass over inputs (arrays or their shapes)."""
    sizes = _sizes(model, inputs)
    group: dict[str, int] = {spec.name: -1 - index for index, spec in enumerate(model.graph.inputs)}
    known = set(model.graph.parameters) | set(model.graph.constant_values)
    reads: set[tuple[str, int]] = set()
    for number, node in enumerate(model.graph.nodes):
        data = [name for name in node.inputs if name in group]
        if not data:
            known.update(node.outputs)
            continue
        own = max(group[name] for name in data)
        joins = _is_cheap(node, model.graph.opset(node.domain)) and own >= 0
        here = own if joins else number
        group |= dict.fromkeys(node.outputs, here)
        reads |= {(name, here) for name in data if group[name] != here}
    outputs = {spec.name for spec in model.graph.outputs}
    written = ({name for name, _ in reads} | outputs) - {spec.name for spec in model.graph.inputs}
    weights = sum(np.asarray(value).nbytes for value in model.params.values())
    moved = [name for name, _ in reads] + list(written)  # shapes are not among the sizes, and are little
    return weights + sum(sizes.get(name, 0) for name in moved)


def _is_cheap(node: Node, opset: int) -> bool:
    if node.op_type in _MOVES or node.op_type == "BatchNormalization":
        return True
    lowering = find_lowering(node.op_type, opset=opset, domain=node.domain)
    return lowering.channels_last is not None and lowering.channels_last.function is lowering.function


def _sizes(model: Model, inputs: dict[str, Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}

    def watch(name: str, value: jax.Array, channel_axis: int | None) -> tuple[jax.Array, None]:
        del channel_axis
        sizes[name] = value.size * value.dtype.itemsize
        return value, None

    jax.eval_shape(lambda x: interpret(model.graph, model.params, x, intercept=watch, platform="gpu")[0], inputs)
    return {name: int(np.prod(np.shape(value))) * value.dtype.itemsize for name, value in inputs.items()} | sizes
