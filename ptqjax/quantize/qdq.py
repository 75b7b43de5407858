"""A quantized model as a graph: integer weights and biases, QuantizeLinear and DequantizeLinear around activations.

One function serves export (arrays concrete) and the integer program (arrays may be traced): it decides the graph from
the names, the types of the grids and the static parts of the encodings alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ptqjax.config import near_names
from ptqjax.errors import ConfigError
from ptqjax.ir import Graph, Model, Node, fresh_name, rebuild
from ptqjax.kernels.namespace import array_namespace
from ptqjax.quantize.bias import bias_encoding, bias_sites
from ptqjax.quantize.encodings import Encoding, quantize, storage_dtype

MICROSOFT = "com.microsoft"
"""The operator set in which ONNX Runtime has QuantizeLinear and DequantizeLinear for all types, at any opset."""

_BYTES = ("int8", "uint8", "int32")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """What one tensor's quantization adds to the model, and which names it changes."""

    nodes: tuple[Node, ...]
    """The nodes added."""
    params: Mapping[str, Any]
    """The parameters added."""
    reads: Mapping[str, str] = field(default_factory=dict)
    """For a tensor, the one that is to be read in its place."""
    writes: Mapping[str, str] = field(default_factory=dict)
    """For a tensor, the one that its producer is to write in its place."""


def grid_dtypes(encodings: Mapping[str, Encoding]) -> dict[str, str]:
    """Returns the integer type of each enabled encoding, by tensor; the leaves must be concrete."""
    return {name: encoding.dtype for name, encoding in encodings.items() if bool(encoding.enabled)}


def lowest_opset(dtype: str, encoding: Encoding) -> int:
    """Returns the first opset whose QuantizeLinear and DequantizeLinear have the type and granularity."""
    return lowest_opset_of(dtype, encoding.axis, encoding.block_size)


def lowest_opset_of(dtype: str, axis: int | None, block_size: int | None) -> int:
    """Returns `lowest_opset` of a grid of that type and granularity."""
    if dtype not in _BYTES or block_size is not None:
        return 21
    return 10 if axis is None else 13


def insert_qdq(model: Model, encodings: Mapping[str, Encoding], *, dtypes: Mapping[str, str] | None = None) -> Model:
    """Returns the quantized model in QDQ form.

    A weight W becomes the integer parameter W_quantized, whose DequantizeLinear writes W; a bias likewise, in int32
    with the scale s_x s_w, where input and weight are quantized. An activation X is read through QuantizeLinear
    (X_quantized) and DequantizeLinear (X_dequantized); where X is a graph output, it is the dequantized tensor that is
    called X. Each layer has its own copy of a weight or bias that several read: a bias's scale is its layer's, and ONNX
    Runtime refuses a weight shared by integer layers where session.x64quantprecision is set. Relu and Clip stay: a
    runtime removes them where the range implies them. Readers inside subgraphs read the float tensor. Nodes that the
    model's opset does not have yet are of the domain com.microsoft.

    Args:
        model: The float model; its arrays may be traced.
        encodings: The grids by tensor; leaves may be traced.
        dtypes: The integer type of each tensor to quantize; None: of all enabled encodings, whose leaves are concrete.

    Raises:
        ConfigError: An encoding is for a tensor that the model has not.
    """
    dtypes = grid_dtypes(encodings) if dtypes is None else dtypes
    check_tensors(model.graph, dtypes)
    chosen = {name: encodings[name] for name in sorted(dtypes)}
    model, sources = with_own_copies(model, set(dtypes) & set(model.params))
    chosen |= {copy: chosen[source] for copy, source in sources.items()}
    dtypes = {**dtypes, **{copy: dtypes[source] for copy, source in sources.items()}}
    model = with_own_biases(model, chosen)
    graph = model.graph
    pieces = [
        _parameter(graph, name, model.params[name], encoding, dtypes[name])
        if name in graph.parameters
        else _activation(graph, name, encoding, dtypes[name])
        for name, encoding in chosen.items()
    ]
    pieces += _biases(model, chosen)
    nodes = [*_renamed(graph.nodes, pieces), *(node for piece in pieces for node in piece.nodes)]
    params = dict(model.params)
    for piece in pieces:
        params.update(piece.params)
    return _with_microsoft(rebuild(model, nodes=nodes, params=_unwritten(params, nodes)))


def with_own_copies(model: Model, names: Iterable[str]) -> tuple[Model, dict[str, str]]:
    """Returns the model in which one node alone reads each parameter of `names`, and the source of each copy by name.

    The first reader keeps the name, and so do readers inside subgraphs.
    """
    sources: dict[str, str] = {}
    for name in sorted(names):
        for node in [each for each in model.graph.nodes if name in each.inputs][1:]:
            copy = fresh_name(model.graph, f"{name}_{node.output}")
            sources[copy] = name
            model = _with_copy(model, node, name, copy)
    return model, sources


def _with_copy(model: Model, reader: Node, name: str, copy: str) -> Model:
    graph = model.graph
    inputs = tuple(copy if each == name else each for each in reader.inputs)
    nodes = tuple(replace(node, inputs=inputs) if node is reader else node for node in graph.nodes)
    graph = replace(graph, nodes=nodes, parameters=tuple(sorted((*graph.parameters, copy))))
    return model.replace(graph=graph, params={**model.params, copy: model.params[name]})


def with_own_biases(model: Model, encodings: Mapping[str, Encoding]) -> Model:
    """Returns the model in which each layer has its own copy of a shared bias that is to be int32.

    Biases are told by names, shapes and the static parts of the encodings.
    """
    readers = model.graph.readers
    shared = {name for name in model.params if name not in encodings and len(readers.get(name, ())) > 1}
    if not shared:
        return model
    tentative, sources = with_own_copies(model, shared)
    placed = (site.bias for site in bias_sites(tentative) if bias_encoding(encodings, site) is not None)
    return with_own_copies(model, {sources.get(name, name) for name in placed} & shared)[0]


def check_tensors(graph: Graph, names: Iterable[str]) -> None:
    """Checks that the graph has all floating tensors that are named.

    Raises:
        ConfigError: It lacks one; the message has near names.
    """
    known = {spec.name for spec in graph.inputs} | set(graph.producers) | set(graph.parameters)
    unknown = sorted(set(names) - known)
    if unknown:
        raise ConfigError(
            f"there is an encoding for '{unknown[0]}', but the model has no such tensor"
            f"{near_names(unknown[0], known)}; calibrate this model, or drop the encoding"
        )


def _biases(model: Model, encodings: Mapping[str, Encoding]) -> list[_Piece]:
    sites = ((site, bias_encoding(encodings, site)) for site in bias_sites(model))
    return [
        _parameter(model.graph, site.bias, model.params[site.bias], encoding, "int32")
        for site, encoding in sites
        if encoding is not None
    ]


def _parameter(graph: Graph, name: str, value: Any, encoding: Encoding, dtype: str) -> _Piece:
    stored = fresh_name(graph, f"{name}_quantized")
    codes = quantize(value, encoding).astype(storage_dtype(dtype))
    ends, params = _grid(graph, name, encoding, dtype, np.shape(value))
    settings = _settings(graph, encoding, dtype)
    node = Node(op_type="DequantizeLinear", inputs=(stored, *ends), outputs=(name,), **settings)
    return _Piece(nodes=(node,), params={stored: codes, **params})


def _activation(graph: Graph, name: str, encoding: Encoding, dtype: str) -> _Piece:
    is_output = name in graph.output_names and name in graph.producers
    before = fresh_name(graph, f"{name}_float") if is_output else name
    after = name if is_output else fresh_name(graph, f"{name}_dequantized")
    stored = fresh_name(graph, f"{name}_quantized")
    ends, params = _grid(graph, name, encoding, dtype, ())
    settings = _settings(graph, encoding, dtype)
    nodes = (
        Node(op_type="QuantizeLinear", inputs=(before, *ends), outputs=(stored,), **settings),
        Node(op_type="DequantizeLinear", inputs=(stored, *ends), outputs=(after,), **settings),
    )
    return _Piece(
        nodes=nodes,
        params=params,
        reads={} if is_output else {name: after},
        writes={name: before} if is_output else {},
    )


def _grid(
    graph: Graph, name: str, encoding: Encoding, dtype: str, shape: tuple[int, ...]
) -> tuple[tuple[str, str], dict[str, Any]]:
    """Returns the names of scale and zero point, and their values in the shape and type that ONNX asks for."""
    ends = fresh_name(graph, f"{name}_scale"), fresh_name(graph, f"{name}_zero_point")
    xp = array_namespace(encoding.scale, encoding.zero_point)
    scale = xp.asarray(encoding.scale, dtype=np.float32)
    if encoding.axis is None:
        scale = scale.reshape(())
    elif encoding.block_size is not None:
        axis = encoding.axis % len(shape)
        scale = xp.broadcast_to(scale, (*shape[:axis], scale.shape[axis], *shape[axis + 1 :]))
    zero_point = xp.broadcast_to(xp.asarray(encoding.zero_point), scale.shape).astype(storage_dtype(dtype))
    return ends, dict(zip(ends, (scale, zero_point), strict=True))


def _settings(graph: Graph, encoding: Encoding, dtype: str) -> dict[str, Any]:
    """Returns domain and attributes of the nodes that quantize or dequantize so."""
    attributes = {"axis": encoding.axis, "block_size": encoding.block_size}
    return {
        "domain": "" if graph.opset() >= lowest_opset(dtype, encoding) else MICROSOFT,
        "attributes": tuple((name, value) for name, value in attributes.items() if value is not None),
    }


def _renamed(nodes: Iterable[Node], pieces: Iterable[_Piece]) -> list[Node]:
    reads: dict[str, str] = {}
    writes: dict[str, str] = {}
    for piece in pieces:
        reads.update(piece.reads)
        writes.update(piece.writes)
    return [
        replace(
            node,
            inputs=tuple(reads.get(name, name) for name in node.inputs),
            outputs=tuple(writes.get(name, name) for name in node.outputs),
        )
        for node in nodes
    ]


def _unwritten(params: Mapping[str, Any], nodes: Iterable[Node]) -> dict[str, Any]:
    """Returns the parameters that no node writes: a quantized weight's name is its DequantizeLinear's now."""
    written = {name for node in nodes for name in node.outputs}
    return {name: value for name, value in params.items() if name not in written}


def _with_microsoft(model: Model) -> Model:
    """Returns the model with the runtime's operator set declared, where a node is of it."""
    graph = model.graph
    if not any(node.domain == MICROSOFT for node in graph.nodes):
        return model
    opsets = tuple(sorted({**dict(graph.opsets), MICROSOFT: 1}.items()))
    return model.replace(graph=replace(graph, opsets=opsets))
