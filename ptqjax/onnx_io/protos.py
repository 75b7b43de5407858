"""From the intermediate representation to protobuf."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from ptqjax.ir import Attribute, Constant, Graph, Model, Node, SparseConstant, TensorSpec
from ptqjax.onnx_io.schema import attribute_type
from ptqjax.onnx_io.specs import type_proto, value_info

_INITIALIZERS_ARE_NOT_INPUTS = 4  # the IR version since which an initializer need not be a graph input as well

Store: TypeAlias = Callable[[np.ndarray, str], onnx.TensorProto]
"""Turns an array and its name into a tensor: with its contents, or with where these are stored."""


def tensor_proto(value: np.ndarray, name: str = "") -> onnx.TensorProto:
    """Returns an array as a tensor that holds its contents."""
    if value.dtype != object:
        return onnx.numpy_helper.from_array(value, name)
    texts = [str(text).encode("utf-8", errors="surrogateescape") for text in value.ravel().tolist()]
    return onnx.TensorProto(name=name, data_type=onnx.TensorProto.STRING, dims=value.shape, string_data=texts)


def to_proto(model: Model, store: Store = tensor_proto) -> onnx.ModelProto:
    """Returns the model as a ModelProto, with the lowest IR version that carries its operator sets."""
    graph = model.graph
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opsets]
    tensors = {name: np.asarray(value) for name, value in model.params.items()} | dict(graph.constant_values)
    proto = onnx.ModelProto(
        ir_version=max(graph.ir_version, _lowest_ir_version(graph)),
        opset_import=opsets,
        graph=_graph(graph, tensors, store),
    )
    onnx.helper.set_model_props(proto, dict(graph.metadata))
    return proto


def _lowest_ir_version(graph: Graph) -> int:
    standard = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opsets if domain == ""]
    return max(onnx.helper.find_min_ir_version_for(standard, ignore_unknown=True), _INITIALIZERS_ARE_NOT_INPUTS)


def _graph(graph: Graph, tensors: Mapping[str, np.ndarray], store: Store) -> onnx.GraphProto:
    return onnx.GraphProto(
        name=graph.name or "graph",
        node=[node_proto(node, graph.opset(node.domain), store) for node in graph.nodes],
        input=map(value_info, graph.inputs),
        output=map(value_info, graph.outputs),
        initializer=[store(value, name) for name, value in sorted(tensors.items())],
    )


def node_proto(node: Node, opset: int, store: Store = tensor_proto) -> onnx.NodeProto:
    """Returns a node, written for a version of its operator set."""
    proto = onnx.NodeProto(op_type=node.op_type, input=node.inputs, output=node.outputs)
    if node.name:
        proto.name = node.name
    if node.domain:
        proto.domain = node.domain
    for name, value in node.attributes:
        kind = attribute_type(node.op_type, opset, node.domain, name)
        _set(proto.attribute.add(name=name), value, kind, store)
    return proto


def _set(proto: onnx.AttributeProto, value: Attribute, kind: Any, store: Store) -> None:
    """Gives an attribute its value; `kind` is the one of the schema, where there is one."""
    kinds = onnx.AttributeProto
    floats = kind in {kinds.FLOAT, kinds.FLOATS}
    if isinstance(value, tuple):
        first = value[0] if value else None
        found, field, convert = _FIELDS_OF_SEVERAL[_type_of(first, floats=floats)]
        proto.type = kind if kind is not None and first is None else found
        getattr(proto, field).extend(_converted(each, convert, store) for each in value)
        return
    found, field, convert = _FIELDS[_type_of(value, floats=floats)]
    proto.type = found
    converted = _converted(value, convert, store)
    if isinstance(value, Constant | SparseConstant | Graph | TensorSpec):
        getattr(proto, field).CopyFrom(converted)
    else:
        setattr(proto, field, converted)


def _type_of(value: Any, *, floats: bool) -> type:
    if isinstance(value, np.generic):
        value = value.item()
    found = next((kind for kind in _FIELDS if isinstance(value, kind)), int)
    return float if floats and found is int else found


def _converted(value: Any, convert: Callable[..., Any], store: Store) -> Any:
    return convert(value, store) if isinstance(value, Constant | SparseConstant | Graph) else convert(value)


def _sparse(value: SparseConstant, store: Store) -> onnx.SparseTensorProto:
    values, indices = store(value.values.value, ""), store(value.indices.value, "")
    return onnx.SparseTensorProto(values=values, indices=indices, dims=value.shape)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


_KINDS = onnx.AttributeProto
_Field: TypeAlias = tuple[Any, str, Callable[..., Any]]
_FIELDS: dict[type, _Field] = {
    int: (_KINDS.INT, "i", int),
    float: (_KINDS.FLOAT, "f", float),
    str: (_KINDS.STRING, "s", _encoded),
    Constant: (_KINDS.TENSOR, "t", lambda value, store: store(value.value, "")),
    SparseConstant: (_KINDS.SPARSE_TENSOR, "sparse_tensor", _sparse),
    Graph: (_KINDS.GRAPH, "g", lambda value, store: _graph(value, value.constant_values, store)),
    TensorSpec: (_KINDS.TYPE_PROTO, "tp", type_proto),
}
_SEVERAL = {
    int: (_KINDS.INTS, "ints"),
    float: (_KINDS.FLOATS, "floats"),
    str: (_KINDS.STRINGS, "strings"),
    Constant: (_KINDS.TENSORS, "tensors"),
    SparseConstant: (_KINDS.SPARSE_TENSORS, "sparse_tensors"),
    Graph: (_KINDS.GRAPHS, "graphs"),
    TensorSpec: (_KINDS.TYPE_PROTOS, "type_protos"),
}
_FIELDS_OF_SEVERAL: dict[type, _Field] = {
    kind: (number, field, _FIELDS[kind][2]) for kind, (number, field) in _SEVERAL.items()
}
