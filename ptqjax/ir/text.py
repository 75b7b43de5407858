"""A graph as text, one line a node: for tests, for `inspect`, for a person who wants to see."""

from __future__ import annotations

from ptqjax.ir.graph import Attribute, Constant, Graph, Model, Node, SparseConstant, TensorSpec

_SHOWN = 8  # elements of a constant that a line shows


def text(model: Model) -> str:
    """Returns the model as text: inputs, parameters with types, nodes in order, outputs; no values of parameters.

    The same model gives the same text, so two texts can be compared line by line.
    """
    graph = model.graph
    lines = [f"graph {graph.name}({', '.join(_spec(spec) for spec in graph.inputs)})"]
    lines += [f"  param {name}: {_array(model.params[name])}" for name in graph.parameters]
    lines += [f"  const {name}: {_array(value.value)} = {_short(value)}" for name, value in graph.constants]
    lines += [f"  {_node(node)}" for node in graph.nodes]
    lines += [f"  return {', '.join(_spec(spec) for spec in graph.outputs)}"]
    return "\n".join(lines) + "\n"


def _node(node: Node) -> str:
    domain = f"{node.domain}." if node.domain else ""
    attributes = ", ".join(f"{name}={_attribute(value)}" for name, value in node.attributes)
    settings = f" {{{attributes}}}" if attributes else ""
    return f"{', '.join(node.outputs)} = {domain}{node.op_type}({', '.join(node.inputs)}){settings}"


def _spec(spec: TensorSpec) -> str:
    shape = "?" if spec.shape is None else ",".join("?" if size is None else str(size) for size in spec.shape)
    kind = "" if spec.kind == "tensor" else f"{spec.kind} of "
    return f"{spec.name}: {kind}{spec.dtype.name}[{shape}]"


def _array(value: object) -> str:
    return f"{value.dtype.name}[{','.join(map(str, value.shape))}]"  # pyright: ignore[reportAttributeAccessIssue]


def _attribute(value: Attribute) -> str:
    if isinstance(value, Constant):
        return _short(value)
    if isinstance(value, SparseConstant):
        return f"{_short(value.values)} at {_short(value.indices)} of {list(value.shape)}"
    if isinstance(value, Graph):
        return f"graph {value.name} of {len(value.nodes)} nodes"
    if isinstance(value, TensorSpec):
        return _spec(value)
    return f"[{', '.join(map(_attribute, value))}]" if isinstance(value, tuple) else repr(value)


def _short(constant: Constant) -> str:
    values = constant.value.ravel().tolist()
    return (
        str(values) if len(values) <= _SHOWN else f"[{', '.join(map(str, values[:_SHOWN]))}, ... {len(values)} in all]"
    )
