"""From an ONNX model to the intermediate representation.

After reading, the many spellings of one thing are one: Constant nodes, initializers and initializers that are also
graph inputs are constants or parameters, Identity chains are gone, every attribute that has a default is present.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.inliner
import onnx.numpy_helper
from google.protobuf.message import DecodeError

from ptqjax.errors import ModelError
from ptqjax.ir import Attribute, Constant, Graph, Model, Node, TensorSpec, rebuild, sort_topologically
from ptqjax.onnx_io.schema import default_attributes

_STANDARD_DOMAIN = "ai.onnx"  # another spelling of "", ONNX's own domain

# Floating inputs that decide shapes: constants of the graph, not parameters.
_SHAPE_INPUTS = {("Resize", 1), ("Resize", 2), ("Upsample", 1), ("Range", 0), ("Range", 1), ("Range", 2)}

# Integer inputs that hold quantized weights and their zero points: parameters, not constants of the graph.
_WEIGHT_INPUTS = {("DequantizeLinear", 0), ("DequantizeLinear", 2), ("QuantizeLinear", 2)}

_FLOATS = {np.dtype(kind) for kind in ("float16", "float32", "float64", ml_dtypes.bfloat16)}


def read(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> Model:
    """Returns the model in `source`: a path, the bytes of a file, or a ModelProto (which is not changed).

    Attribute defaults are those of the model's operator set version. Floating tensors and the integer weights of a
    quantized file become `params` (NumPy); all other tensors become constants of the graph. `write` is the inverse.

    Raises:
        ModelError: The file is missing, not ONNX, truncated, lacks its external data, or its graph is dangling or
            cyclic. The message names the file and the cause.
    """
    label = "the model" if isinstance(source, bytes | onnx.ModelProto) else f"'{os.fspath(source)}'"
    folder = None if isinstance(source, bytes | onnx.ModelProto) else Path(source).parent
    proto = _load(source, label)
    if not proto.graph.output:
        raise ModelError(f"{label} is not an ONNX model: it has no graph outputs; expected a file of an ONNX exporter")
    if not proto.opset_import:
        raise ModelError(f"{label} names no operator set version (opset_import); it is damaged: export it again")
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    try:
        return _model(proto, folder)
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error


def _load(source: str | os.PathLike[str] | bytes | onnx.ModelProto, label: str) -> onnx.ModelProto:
    if isinstance(source, onnx.ModelProto):
        return source
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ModelError(f"{label} cannot be opened: {error.strerror}; expected the path of an ONNX file") from error
    if not data:
        raise ModelError(f"{label} is empty; expected an ONNX file")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except (DecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{label} cannot be read as ONNX ({error}): it is truncated or another kind of file; export it again"
        ) from error
    return proto


def _model(proto: onnx.ModelProto, folder: Path | None) -> Model:
    opsets = {_domain(opset.domain): opset.version for opset in proto.opset_import}
    nodes = tuple(_node(node, opsets) for node in proto.graph.node)
    initializers = {tensor.name: _array(tensor, folder) for tensor in proto.graph.initializer}
    if proto.graph.sparse_initializer:
        name = proto.graph.sparse_initializer[0].values.name
        raise ModelError(f"initializer '{name}' is sparse, which is not supported; export it dense")
    inputs = tuple(_spec(info) for info in proto.graph.input if info.name not in initializers)
    outputs = tuple(_spec(info) for info in proto.graph.output)
    tensors = initializers | {node.output: _constant_value(node) for node in nodes if node.op_type == "Constant"}
    nodes = tuple(node for node in nodes if node.op_type != "Constant")
    nodes = sort_topologically(_without_identities(nodes, {spec.name for spec in outputs}))
    params = {name: tensors[name] for name in _parameter_names(nodes, tensors)}
    graph = Graph(
        name=proto.graph.name,
        inputs=inputs,
        outputs=outputs,
        nodes=nodes,
        constants=tuple(sorted((name, Constant(value)) for name, value in tensors.items() if name not in params)),
        parameters=tuple(sorted(params)),
        opsets=tuple(sorted(opsets.items())),
        ir_version=proto.ir_version,
        metadata=tuple(sorted((entry.key, entry.value) for entry in proto.metadata_props)),
    )
    return rebuild(Model(graph=graph, params=params))


def _parameter_names(nodes: Iterable[Node], tensors: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Returns the tensors that take part in arithmetic: floating ones that decide no shape, and quantized weights."""
    shapes: set[str] = set()
    weights: set[str] = set()
    for node in nodes:
        for index, name in enumerate(node.inputs):
            if (node.op_type, index) in _SHAPE_INPUTS:
                shapes.add(name)
            if (node.op_type, index) in _WEIGHT_INPUTS:
                weights.add(name)
    floats = {name for name, value in tensors.items() if value.dtype in _FLOATS}
    return tuple(sorted((floats - shapes) | (weights & tensors.keys())))


def _without_identities(nodes: tuple[Node, ...], outputs: set[str]) -> tuple[Node, ...]:
    """Returns the nodes with Identity bypassed, save where it gives a graph output its name."""
    sources = {
        node.output: node.inputs[0] for node in nodes if node.op_type == "Identity" and node.output not in outputs
    }

    def resolve(name: str) -> str:
        seen: set[str] = set()
        while name in sources and name not in seen:
            seen.add(name)
            name = sources[name]
        return name

    kept = (node for node in nodes if node.output not in sources)
    return tuple(_with_inputs(node, resolve) for node in kept)


def _with_inputs(node: Node, resolve: Callable[[str], str]) -> Node:
    inputs = tuple(resolve(name) for name in node.inputs)
    attributes = tuple(
        (name, _subgraph_with_inputs(value, resolve) if isinstance(value, Graph) else value)
        for name, value in node.attributes
    )
    return replace(node, inputs=inputs, attributes=attributes)


def _subgraph_with_inputs(graph: Graph, resolve: Callable[[str], str]) -> Graph:
    return replace(graph, nodes=tuple(_with_inputs(node, resolve) for node in graph.nodes))


def _node(proto: onnx.NodeProto, opsets: Mapping[str, int]) -> Node:
    domain = _domain(proto.domain)
    given = {attribute.name: attribute for attribute in proto.attribute}
    defaults = {value.name: value for value in default_attributes(proto.op_type, opsets.get(domain, 1), domain)}
    attributes = tuple((name, _attribute(value, opsets)) for name, value in sorted((defaults | given).items()))
    return Node(
        op_type=proto.op_type,
        inputs=tuple(proto.input),
        outputs=tuple(proto.output),
        attributes=attributes,
        domain=domain,
        name=proto.name,
    )


def _domain(domain: str) -> str:
    return "" if domain == _STANDARD_DOMAIN else domain


def _attribute(proto: onnx.AttributeProto, opsets: Mapping[str, int]) -> Attribute:
    kinds = onnx.AttributeProto
    if proto.type == kinds.TENSOR:
        return Constant(_array(proto.t, None))
    if proto.type == kinds.GRAPH:
        return _subgraph(proto.g, opsets)
    if proto.type == kinds.STRING:
        return _text(proto.s)
    if proto.type == kinds.STRINGS:
        return tuple(_text(value) for value in proto.strings)
    if proto.type in {kinds.INT, kinds.FLOAT}:
        return onnx.helper.get_attribute_value(proto)
    if proto.type in {kinds.INTS, kinds.FLOATS}:
        return tuple(onnx.helper.get_attribute_value(proto))
    kind = onnx.AttributeProto.AttributeType.Name(proto.type)
    raise ModelError(f"attribute '{proto.name}' is of kind {kind}, which is not supported")


def _text(value: bytes) -> str:
    return value.decode("utf-8", errors="surrogateescape")


def _subgraph(proto: onnx.GraphProto, opsets: Mapping[str, int]) -> Graph:
    return Graph(
        name=proto.name,
        inputs=tuple(_spec(info) for info in proto.input),
        outputs=tuple(_spec(info) for info in proto.output),
        nodes=tuple(_node(node, opsets) for node in proto.node),
        constants=tuple(sorted((tensor.name, Constant(_array(tensor, None))) for tensor in proto.initializer)),
        opsets=tuple(sorted(opsets.items())),
    )


def _constant_value(node: Node) -> np.ndarray:
    """Returns the tensor of a Constant node, whichever of its attributes holds it."""
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    kinds |= {"value_string": np.object_, "value_strings": np.object_}
    for name, value in node.attributes:
        if isinstance(value, Constant):
            return value.value
        if name in kinds:
            return np.array(value, dtype=kinds[name])
    raise ModelError(f"the Constant node that produces '{node.output}' holds no value; the file is damaged")


def _array(tensor: onnx.TensorProto, folder: Path | None) -> np.ndarray:
    """Returns the values of an initializer as a read-only array.

    Raises:
        ModelError: Its external data is missing or outside the model's folder, or its size contradicts its shape.
    """
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    if external and folder is None:
        raise ModelError(f"initializer '{tensor.name}' lies in another file; pass the model's path, not its bytes")
    try:
        copied = onnx.TensorProto.FromString(tensor.SerializeToString()) if external else tensor
        array = onnx.numpy_helper.to_array(copied, base_dir=str(folder or ""))
    except (OSError, ValueError, TypeError, KeyError, onnx.checker.ValidationError) as error:
        place = {entry.key: entry.value for entry in tensor.external_data}.get("location")
        where = f" in the external file '{place}'" if external else ""
        raise ModelError(
            f"initializer '{tensor.name}' (shape {list(tensor.dims)}){where} cannot be read: {error}; "
            "keep external data beside the model, or export it again"
        ) from error
    array.flags.writeable = False
    return array


def _spec(info: onnx.ValueInfoProto) -> TensorSpec:
    kind = info.type.WhichOneof("value")
    if kind not in {"tensor_type", None}:
        raise ModelError(f"graph input or output '{info.name}' is a {kind}, only tensors are supported")
    tensor = info.type.tensor_type
    if tensor.elem_type == onnx.TensorProto.UNDEFINED:
        return TensorSpec(name=info.name, dtype=np.dtype(np.float32), shape=None)
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    if not tensor.HasField("shape"):
        return TensorSpec(name=info.name, dtype=dtype, shape=None)
    return TensorSpec(name=info.name, dtype=dtype, shape=tuple(_size(dim) for dim in tensor.shape.dim))


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    """Returns the size or its symbol; None where unknown, which some exporters write as 0 or -1."""
    return dim.dim_value if dim.dim_value > 0 else (dim.dim_param or None)
