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
from ptqjax.encodings.biases import bias_encoding, bias_sites
from ptqjax.encodings.encoding import Encoding, dequantize, fake_quantize, quantize, storage_dtype
from ptqjax.errors import ConfigError
from ptqjax.ir import Graph, Model, Node, fresh_name, rebuild
from ptqjax.kernels.namespace import array_namespace
from ptqjax.mapped import release
from ptqjax.qdq.stored_grids import CASTS, MICROSOFT, OWN, StoredGrid, lowest_opset, stored_grids

WEIGHTS = ("integer", "float")
"""How weights are written: as integers, or as rounded floats with both operators behind them."""

_FLOAT = 1  # the number of float32 as an element type in ONNX
_CLIP_TAKES_INPUTS_SINCE = 11


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


def insert_qdq(
    model: Model,
    encodings: Mapping[str, Encoding],
    *,
    grids: Mapping[str, StoredGrid] | None = None,
    weights: str = "integer",
) -> Model:
    """Returns the quantized model in QDQ form.

    A weight W becomes the integer parameter W_quantized, whose DequantizeLinear writes W; a bias likewise, in int32
    with the scale s_x s_w, where input and weight are quantized and it is not left in float (`float_bias`). An
    activation X is read through QuantizeLinear (X_quantized) and DequantizeLinear (X_dequantized); where X is a graph
    output, it is the dequantized tensor that is called X. For formats of 16 bits, a Cast stands for each of the two.
    Each layer has its own copy of a weight or bias that several read: a bias's scale is its layer's, and ONNX Runtime
    refuses a weight shared by integer layers where session.x64quantprecision is set. Relu and Clip stay: a runtime
    removes them where the range implies them. Readers inside subgraphs read the float tensor. Nodes that the model's
    opset does not have yet are of the domain com.microsoft.

    An activation whose grid is found at run time is read through DynamicQuantizeLinear and DequantizeLinear
    (`dynamic_products` makes products of integers of what reads them); in blocks through RoundInBlocks, an operator of
    our own that `matmul_nbits` takes up.

    A grid that ends before its type does (6 bits in int8; int8 without -128) has a Clip at its ends before the
    QuantizeLinear, to the same integers: with n an end, fl(n s) / s rounds to n, and rounding is monotone.

    Args:
        model: The float model; its arrays may be traced.
        encodings: The grids by tensor; leaves may be traced.
        grids: How each tensor to quantize is held; None: all enabled encodings, whose leaves are concrete.
        weights: "integer", or "float": weights are parameters in float, rounded to their grids (W_rounded), with
            QuantizeLinear and DequantizeLinear behind them, and biases are rounded floats, as TensorRT reads them.

    Raises:
        ConfigError: An encoding is for a tensor that the model has not, or `weights` is neither.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights!r} is unknown; expected one of {', '.join(WEIGHTS)}")
    grids = stored_grids(model, encodings) if grids is None else grids
    check_tensors(model.graph, grids)
    chosen = {name: encodings[name] for name in sorted(grids)}
    model, sources = with_own_copies(model, set(grids) & set(model.params))
    chosen |= {copy: chosen[source] for copy, source in sources.items()}
    grids = {**grids, **{copy: grids[source] for copy, source in sources.items()}}
    kept = {site.bias: encodings[site.bias] for site in bias_sites(model) if site.bias in set(encodings) - set(chosen)}
    model = with_own_biases(model, chosen | kept)
    graph = model.graph
    parameter = _parameter if weights == "integer" else _rounded_parameter
    pieces = [
        parameter(graph, name, model.params[name], encoding, grids[name])
        if name in graph.parameters
        else _activation(graph, name, encoding, grids[name])
        for name, encoding in chosen.items()
    ]
    pieces += _biases(model, chosen | kept, weights)
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


def _biases(model: Model, encodings: Mapping[str, Encoding], weights: str) -> list[_Piece]:
    found = ((site.bias, bias_encoding(encodings, site)) for site in bias_sites(model))
    biases = {name: encoding for name, encoding in found if encoding is not None}
    if weights == "float":
        rounded = {name: fake_quantize(model.params[name], encoding) for name, encoding in biases.items()}
        return [_Piece(nodes=(), params=rounded)]
    return [
        _parameter(model.graph, name, model.params[name], encoding, StoredGrid("int32"))
        for name, encoding in biases.items()
    ]


def _parameter(graph: Graph, name: str, value: Any, encoding: Encoding, grid: StoredGrid) -> _Piece:
    stored = fresh_name(graph, f"{name}_quantized")
    codes = quantize(value, encoding).astype(storage_dtype(grid.dtype))
    release(value)
    if grid.dtype in CASTS:
        return _Piece(nodes=(_cast(stored, name, _FLOAT),), params={stored: codes})
    ends, params = _grid(graph, name, encoding, grid, np.shape(value))
    settings = _settings(graph, encoding, grid)
    node = Node(op_type="DequantizeLinear", inputs=(stored, *ends), outputs=(name,), **settings)
    return _Piece(nodes=(node,), params={stored: codes, **params})


def _rounded_parameter(graph: Graph, name: str, value: Any, encoding: Encoding, grid: StoredGrid) -> _Piece:
    """Returns a parameter in float, on its grid, and the operators that would round it."""
    before, stored = (fresh_name(graph, f"{name}_{what}") for what in ("rounded", "quantized"))
    ends, params = _grid(graph, name, encoding, grid, np.shape(value))
    nodes = _round_trip(graph, (before, stored, name), ends, encoding, grid)
    rounded = dequantize(quantize(value, encoding), encoding)
    return _Piece(nodes=nodes, params={before: rounded} | ({} if grid.dtype in CASTS else params))


def _activation(graph: Graph, name: str, encoding: Encoding, grid: StoredGrid) -> _Piece:
    if encoding.is_dynamic:
        return _dynamic(graph, name, encoding)
    is_output = name in graph.output_names and name in graph.producers
    before = fresh_name(graph, f"{name}_float") if is_output else name
    after = name if is_output else fresh_name(graph, f"{name}_dequantized")
    stored = fresh_name(graph, f"{name}_quantized")
    ends, params = _grid(graph, name, encoding, grid, ())
    clip = _clip(graph, name, before, encoding) if grid.is_clipped else _Piece(nodes=(), params={})
    clipped = clip.nodes[-1].output if clip.nodes else before
    nodes = _round_trip(graph, (clipped, stored, after), ends, encoding, grid)
    return _Piece(
        nodes=(*clip.nodes, *nodes),
        params=clip.params if grid.dtype in CASTS else {**params, **clip.params},
        reads={} if is_output else {name: after},
        writes={name: before} if is_output else {},
    )


def _dynamic(graph: Graph, name: str, encoding: Encoding) -> _Piece:
    """Returns what rounds a tensor, which is no output, on a grid that is found at run time."""
    if encoding.block_size is not None:
        after = fresh_name(graph, f"{name}_rounded")
        size = (("block_size", encoding.block_size),)
        node = Node(op_type="RoundInBlocks", inputs=(name,), outputs=(after,), attributes=size, domain=OWN)
        return _Piece(nodes=(node,), params={}, reads={name: after})
    codes = tuple(fresh_name(graph, f"{name}_{what}") for what in ("quantized", "scale", "zero_point"))
    after = fresh_name(graph, f"{name}_dequantized")
    nodes = (
        Node(op_type="DynamicQuantizeLinear", inputs=(name,), outputs=codes),
        Node(op_type="DequantizeLinear", inputs=codes, outputs=(after,)),
    )
    return _Piece(nodes=nodes, params={}, reads={name: after})


def _round_trip(
    graph: Graph, names: tuple[str, str, str], ends: tuple[str, str], encoding: Encoding, grid: StoredGrid
) -> tuple[Node, Node]:
    """Returns what turns the first tensor into codes, the second, and these into the third."""
    before, stored, after = names
    if grid.dtype in CASTS:
        return _cast(before, stored, CASTS[grid.dtype]), _cast(stored, after, _FLOAT)
    settings = _settings(graph, encoding, grid)
    return (
        Node(op_type="QuantizeLinear", inputs=(before, *ends), outputs=(stored,), **settings),
        Node(op_type="DequantizeLinear", inputs=(stored, *ends), outputs=(after,), **settings),
    )


def _cast(before: str, after: str, element: int) -> Node:
    return Node(op_type="Cast", inputs=(before,), outputs=(after,), attributes=(("to", element),))


def _clip(graph: Graph, name: str, before: str, encoding: Encoding) -> _Piece:
    """Returns what saturates a tensor at the ends of its grid."""
    after, low, high = (fresh_name(graph, f"{name}_{what}") for what in ("clipped", "lowest", "highest"))
    xp = array_namespace(encoding.scale, encoding.zero_point)
    ends = {low: encoding.qmin, high: encoding.qmax}
    params = {key: xp.asarray(dequantize(end, encoding), np.float32).reshape(()) for key, end in ends.items()}
    if graph.opset() >= _CLIP_TAKES_INPUTS_SINCE:
        return _Piece(nodes=(Node(op_type="Clip", inputs=(before, low, high), outputs=(after,)),), params=params)
    bounded = fresh_name(graph, f"{name}_bounded")  # attributes would have to be concrete
    nodes = (
        Node(op_type="Max", inputs=(before, low), outputs=(bounded,)),
        Node(op_type="Min", inputs=(bounded, high), outputs=(after,)),
    )
    return _Piece(nodes=nodes, params=params)


def _grid(
    graph: Graph, name: str, encoding: Encoding, grid: StoredGrid, shape: tuple[int, ...]
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
    zero_point = xp.broadcast_to(xp.asarray(encoding.zero_point), scale.shape).astype(storage_dtype(grid.dtype))
    return ends, dict(zip(ends, (scale, zero_point), strict=True))


def _settings(graph: Graph, encoding: Encoding, grid: StoredGrid) -> dict[str, Any]:
    """Returns domain and attributes of the nodes that quantize or dequantize so."""
    attributes = {"axis": encoding.axis, "block_size": encoding.block_size}
    return {
        "domain": "" if graph.opset() >= lowest_opset(grid, encoding) else MICROSOFT,
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
    domains = {node.domain for node in graph.nodes} & {MICROSOFT, OWN}
    if not domains:
        return model
    opsets = tuple(sorted({**dict(graph.opsets), **dict.fromkeys(domains, 1)}.items()))
    return model.replace(graph=replace(graph, opsets=opsets))
