"""From the intermediate representation to an ONNX model, and safely into a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
import onnx.shape_inference

from ptqjax.errors import ModelError, OutputError
from ptqjax.ir import Attribute, Constant, Graph, Model, Node
from ptqjax.onnx_io.schema import attribute_type
from ptqjax.onnx_io.specs import value_info

_LARGEST_PROTOBUF = 2**31 - 2**20  # bytes; beyond, tensors go to a file beside the model

_INITIALIZERS_ARE_NOT_INPUTS = 4  # the IR version since which an initializer need not be a graph input as well


def write(model: Model, path: str | os.PathLike[str]) -> None:
    """Writes the model as an ONNX file; `read` is the inverse. Statistics are not stored.

    Nothing half-written is ever left under `path`: the file is written beside it and then renamed. Tensors of a model
    past 2 GB go into NAME.data beside it. Shapes that graph outputs lack are inferred and written.

    Raises:
        OutputError: The folder is missing or cannot be written.
        ModelError: The model does not pass ONNX's checker.
    """
    path = Path(path)
    proto = _with_output_shapes(to_proto(model))
    external = proto.ByteSize() > _LARGEST_PROTOBUF
    if not external:
        check(proto)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".ptqjax-") as folder:
            half = Path(folder) / path.name
            data = f"{path.name}.data"
            onnx.save_model(proto, half, save_as_external_data=external, location=data if external else None)
            if external:
                (Path(folder) / data).replace(path.parent / data)
            half.replace(path)
    except OSError as error:
        raise OutputError(
            f"'{path}' cannot be written: {error.strerror}; expected an existing folder with write permission"
        ) from error


def check(proto: onnx.ModelProto) -> None:
    """Checks a model with ONNX's checker and full shape inference.

    Raises:
        ModelError: The model is not valid ONNX.
    """
    try:
        onnx.checker.check_model(_with_declared_shapes(proto), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ModelError(f"the model is not valid ONNX: {error}") from error


def inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model with the shapes of its tensors, as far as they can be inferred; types are not to be trusted.

    ONNX knows nothing of the runtime's own operators: those that quantize keep shapes, so Identity stands for them.
    """
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    for node in plain.graph.node:
        if node.domain and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            plain_node = onnx.helper.make_node("Identity", node.input[:1], node.output)
            node.CopyFrom(plain_node)
    return onnx.shape_inference.infer_shapes(plain)


def _with_output_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model with shapes for the outputs that declare none, where they can be inferred."""
    missing = [info for info in proto.graph.output if not info.type.tensor_type.HasField("shape")]
    if not missing or proto.ByteSize() > _LARGEST_PROTOBUF:
        return proto
    found = {info.name: info.type.tensor_type for info in inferred(proto).graph.output}
    for info in missing:
        if found[info.name].HasField("shape"):
            info.type.tensor_type.shape.CopyFrom(found[info.name].shape)
    return proto


def _with_declared_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model as the checker wants it: it asks for output shapes, which files need not state.

    A shape that could not be inferred stands in no contradiction to anything: one without axes passes.
    """
    missing = [i for i, info in enumerate(proto.graph.output) if not info.type.tensor_type.HasField("shape")]
    if not missing:
        return proto
    stated = onnx.ModelProto()
    stated.CopyFrom(proto)
    for index in missing:
        stated.graph.output[index].type.tensor_type.shape.SetInParent()
    return stated


def to_proto(model: Model) -> onnx.ModelProto:
    """Returns the model as a ModelProto, with the lowest IR version that carries its operator sets."""
    graph = model.graph
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opsets]
    tensors = {name: np.asarray(value) for name, value in model.params.items()} | dict(graph.constant_values)
    proto = onnx.helper.make_model(
        _graph(graph, tensors), opset_imports=opsets, ir_version=max(graph.ir_version, _lowest_ir_version(graph))
    )
    onnx.helper.set_model_props(proto, dict(graph.metadata))
    return proto


def _lowest_ir_version(graph: Graph) -> int:
    standard = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opsets if domain == ""]
    return max(onnx.helper.find_min_ir_version_for(standard, ignore_unknown=True), _INITIALIZERS_ARE_NOT_INPUTS)


def _graph(graph: Graph, tensors: Mapping[str, np.ndarray]) -> onnx.GraphProto:
    return onnx.helper.make_graph(
        [_node(node, graph) for node in graph.nodes],
        graph.name or "graph",
        [value_info(spec) for spec in graph.inputs],
        [value_info(spec) for spec in graph.outputs],
        initializer=[onnx.numpy_helper.from_array(value, name) for name, value in sorted(tensors.items())],
    )


def _node(node: Node, graph: Graph) -> onnx.NodeProto:
    proto = onnx.helper.make_node(
        node.op_type, list(node.inputs), list(node.outputs), name=node.name or None, domain=node.domain or None
    )
    for name, value in node.attributes:
        kind = attribute_type(node.op_type, graph.opset(node.domain), node.domain, name)
        proto.attribute.append(onnx.helper.make_attribute(name, _attribute(value, kind), attr_type=kind))
    return proto


def _attribute(value: Attribute, kind: int | None) -> Any:
    if isinstance(value, Constant):
        return onnx.numpy_helper.from_array(np.asarray(value.value))
    if isinstance(value, Graph):
        return _graph(value, dict(value.constant_values))
    if kind == onnx.AttributeProto.FLOAT and isinstance(value, int):
        return float(value)
    return list(value) if isinstance(value, tuple) else value
