"""What outputs are: parts that a Concat strings together.

One figure over an output of boxes in pixels and scores says what the boxes are worth. So an output is followed back,
through operators that keep its elements apart, to the Concat that made it; each element then has a label, the number of
its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from ptqjax.agreement import run, session
from ptqjax.errors import PtqjaxError
from ptqjax.ir import Model, Node, TensorSpec

UNLIKE = 8.0
"""Times that one part's root mean square is another's, from which on they are told apart."""

_ELEMENTWISE = frozenset(
    {"Add", "Cast", "Clip", "Div", "Exp", "HardSigmoid", "Identity", "Mul", "Relu", "Sigmoid", "Softmax", "Sub", "Tanh"}
)
_MOVING = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_MOST_PARTS = 64
_FLOAT = np.dtype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The parts of an output, and which element is of which."""

    names: tuple[str, ...]
    """The tensors that are strung together."""
    labels: Int[np.ndarray, "..."]
    """The place of its part among these, for each element of the output."""


@dataclass(frozen=True, kw_only=True)
class Strung:
    """The outputs of a model that have parts, found on its graph; where the parts lie is asked of ONNX Runtime."""

    model: Model
    """The model, whose outputs are those and all tensors on the way to their parts."""
    outputs: tuple[str, ...]
    """The outputs that have parts."""
    _known: dict[Any, Mapping[str, Parts]] = field(default_factory=dict)

    def parts(self, batch: Mapping[str, Any]) -> Mapping[str, Parts]:
        """Returns the parts of outputs for a batch, by output; none where the model cannot be run by itself."""
        given = {name: np.shape(value) for name, value in (*self.model.params.items(), *batch.items())}
        key = tuple(sorted((name, np.shape(value)) for name, value in batch.items()))
        if self.outputs and key not in self._known:
            try:
                values = run(session(self.model), batch)
            except PtqjaxError:
                values = {}
            shapes = given | {name: value.shape for name, value in values.items()}
            self._known[key] = dict(_located(self.model, self.outputs, shapes)) if values else {}
        return self._known.get(key, {})


def strung_outputs(model: Model) -> Strung:
    """Returns the outputs of a model that join parts, if need be through what keeps their elements apart."""
    outputs = model.graph.outputs
    found = [spec.name for spec in outputs if 1 < len(_leaves(model, spec.name)) <= _MOST_PARTS]
    wanted = {name: None for output in found for name in _tree(model, output) if name in model.graph.producers}
    known = {spec.name: spec for spec in outputs}
    specs = tuple(known.get(name) or TensorSpec(name=name, dtype=_FLOAT, shape=None) for name in wanted)
    return Strung(model=model.replace(graph=replace(model.graph, outputs=specs)), outputs=tuple(found))


def _located(model: Model, outputs: tuple[str, ...], shapes: Mapping[str, Any]) -> Iterator[tuple[str, Parts]]:
    for output in outputs:
        names: list[str] = []
        labels = _labels(model, output, shapes, names)
        if labels is not None and labels.shape == shapes[output]:
            yield output, Parts(names=tuple(names), labels=labels)


def _labels(model: Model, tensor: str, shapes: Mapping[str, Any], names: list[str]) -> np.ndarray | None:
    """Returns the place of its part in `names` for each element of a tensor; None where a shape does not tell."""
    path = _path(model, tensor)
    if not path:
        names.append(tensor)
        return np.full(shapes[tensor], len(names) - 1)
    *moves, join = path
    parts = [part for name in join.inputs if (part := _labels(model, name, shapes, names)) is not None]
    found = np.concatenate(parts, axis=join.attribute("axis")) if len(parts) == len(join.inputs) else None
    for node in reversed(moves):
        found = None if found is None else _moved(found, node, shapes[node.output])
    return found


def _moved(labels: np.ndarray, node: Node, shape: tuple[int, ...]) -> np.ndarray | None:
    if node.op_type == "Transpose":
        return labels.transpose(node.attribute("perm", tuple(reversed(range(labels.ndim)))))
    return labels.reshape(shape) if labels.size == np.prod(shape) else None


def _leaves(model: Model, tensor: str) -> tuple[str, ...]:
    path = _path(model, tensor)
    return tuple(leaf for name in path[-1].inputs for leaf in _leaves(model, name)) if path else (tensor,)


def _tree(model: Model, tensor: str) -> tuple[str, ...]:
    """Returns a tensor and all on the way to its parts."""
    path = _path(model, tensor)
    further = (found for name in path[-1].inputs for found in _tree(model, name)) if path else ()
    return (tensor, *(node.output for node in path), *further)


def _path(model: Model, tensor: str) -> list[Node]:
    """Returns the nodes from a tensor back to the Concat that strung it together, that one included; [] without one."""
    path: list[Node] = []
    while (node := model.graph.producers.get(tensor)) is not None and not node.domain:
        path.append(node)
        if node.op_type == "Concat":
            return path
        source = _source(model, node)
        if source is None:
            break
        tensor = source
    return []


def _source(model: Model, node: Node) -> str | None:
    """Returns the input whose elements a node keeps apart."""
    if node.op_type in _MOVING:
        return node.inputs[0]
    known = {*model.graph.producers, *(spec.name for spec in model.graph.inputs)}
    computed = [name for name in node.inputs if name in known]
    return computed[0] if node.op_type in _ELEMENTWISE and len(computed) == 1 else None
