"""A model in QDQ form back into a float model and its encodings: the inverse of `insert_qdq`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ptqjax.errors import ModelError
from ptqjax.ir import Graph, Model, Node, Record, Report, captured, place_of, rebuild, value_of
from ptqjax.ir.query import all_nodes, first_quantized_node
from ptqjax.quantize.bias import bias_encoding, bias_sites
from ptqjax.quantize.encodings import Encodings, dequantize
from ptqjax.quantize.opsets import CASTS, MICROSOFT
from ptqjax.quantize.quantizers import (
    BIAS,
    GRIDS,
    Quantizer,
    cast_format,
    cast_quantizer,
    is_cast_back,
    is_dequantize,
    is_quantize,
    quantizer_of,
)
from ptqjax.quantize.tensor_axes import tensor_axes

_OURS = "ptqjax."
_STORED_SUFFIXES = ("_quantized", "_q")
_BOUNDS = ("Min", "Max")
_MOVES = frozenset(
    ["Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Expand", "Tile", "MaxPool", "Identity"]
) | {"DepthToSpace", "SpaceToDepth", "Gather"}
_STATIC = ("QLinear", "QGemm", "QAttention", "QEmbed", "QOrdered", "MulInteger")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Codes:
    """What the codes of a tensor stand for."""

    source: str
    """The float tensor that was rounded to them."""
    grid: Quantizer
    """How."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Use:
    """A dequantized activation."""

    grid: Quantizer
    """Its grid."""
    stored: str
    """The codes."""
    tensor: str
    """What DequantizeLinear wrote; "" where an operator reads the codes."""


@dataclass(kw_only=True, slots=True)
class _Work:
    """What is gathered in one pass over the nodes."""

    model: Model
    """The quantized model."""
    told: Mapping[str, Mapping[str, Any]]
    """What the file's metadata tell of grids, by tensor."""
    nodes: list[Node] = field(default_factory=list)
    """Nodes of the float model, which read what they read before."""
    params: dict[str, Any] = field(default_factory=dict)
    """Its parameters."""
    renamed: dict[str, str] = field(default_factory=dict)
    """For a tensor of the quantized model, the one of the float model that stands for it."""
    codes: dict[str, _Codes] = field(default_factory=dict)
    """Tensors of codes."""
    uses: dict[str, list[_Use]] = field(default_factory=dict)
    """The dequantized forms of each activation, by its float tensor."""
    encodings: Encodings = field(default_factory=dict)
    """Encodings by tensor."""
    biases: dict[str, Quantizer] = field(default_factory=dict)
    """The grids of int32 parameters, by name."""
    stored: dict[str, tuple[str, Quantizer]] = field(default_factory=dict)
    """For a parameter of codes, the float parameter that it became, and its grid."""
    report: list[Record] = field(default_factory=list)
    """What was done, and what was left."""


def unquantize(model: Model) -> tuple[Model, Encodings, Report]:
    """Returns the float model behind a model in QDQ form, the encodings of its tensors, and a report.

    Integer parameters behind DequantizeLinear become float parameters: the numbers that the codes stand for, so that
    rounding them again gives the same codes. So do int32 biases, which have no encoding: theirs follows. QuantizeLinear
    and DequantizeLinear around an activation go, and it gets an encoding; shared and repeated pairs are one. Where a
    tensor is also read unrounded, or on several grids, an Identity per grid keeps these apart. Min and Max with a
    parameter, and operators that only move values, may stand between the two. Names are those before `insert_qdq`, and
    those before ONNX Runtime's `quantize_static`.

    Relu, Clip and bounds that the grid behind them implies are not in an exported file (`drop_implied_clips`), so they
    are not in the result: rounded, it is the same function; in float, it is not that of the model before.

    Left as they are, with a record: what is quantized at run time (DynamicQuantizeLinear and its kin), scales that are
    computed, codes that are inputs or outputs of the graph, and nodes in subgraphs. Arrays must be concrete.

    Raises:
        ModelError: An operator works on integers (QLinearConv, or another between QuantizeLinear and DequantizeLinear),
            or a tensor is quantized and dequantized on two different grids.
    """
    _check_operators(model.graph)
    work = _Work(model=model, told=_told(model.graph), params=dict(model.params))
    left = _left(model)
    handlers = ((_quantizes, _take_quantize), (_dequantizes, _take_dequantize))
    for node in model.graph.nodes:
        if node.output in left:
            work.report.append(_record(node.output, f"{node.op_type} left", left[node.output]))
            work.nodes.append(node)
            continue
        take = next((take for applies, take in handlers if applies(work, node)), _take_other)
        take(work, node)
    _settle_activations(work)
    return _finished(work)


def _told(graph: Graph) -> dict[str, dict[str, Any]]:
    text = dict(graph.metadata).get(GRIDS, "{}")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ModelError(f"the file's metadata '{GRIDS}' are not JSON: {error}; export the model again") from error
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise ModelError(f"the file's metadata '{GRIDS}' are {text[:60]}; expected an object of objects by tensor")
    return found


def _check_operators(graph: Graph) -> None:
    for node in all_nodes(graph):
        if node.op_type.startswith(_STATIC):
            raise ModelError(
                f"{place_of(node)} works on integers; expected QuantizeLinear and DequantizeLinear around operators on "
                "floats: read the file in QDQ form that this one was made from"
            )


def _left(model: Model) -> dict[str, str]:
    """Returns why nodes that quantize or dequantize are left as they are, by what they write."""
    graph = model.graph
    inputs = {spec.name for spec in graph.inputs}
    found: dict[str, str] = {}
    for node in graph.nodes:
        if not (is_quantize(node) or is_dequantize(node)):
            continue
        if quantizer_of(model, node) is None:
            found[node.output] = "its scale or zero point is computed, or its type is of no grid"
        elif is_quantize(node) and node.output in graph.output_names:
            found[node.output] = "its codes are an output of the graph"
        elif is_dequantize(node):
            before = graph.producers.get(node.inputs[0])
            dynamic = before is not None and before.op_type == "DynamicQuantizeLinear"
            if node.inputs[0] in inputs or dynamic or (before is not None and before.output in found):
                found[node.output] = "its codes come from outside, or are made at run time"
    return found


def _quantizes(work: _Work, node: Node) -> bool:
    if is_quantize(node):
        return True
    if cast_format(node) is None or not node.output.endswith(_STORED_SUFFIXES[0]):
        return False
    readers = work.model.graph.readers.get(node.output, ())
    return bool(readers) and all(map(is_cast_back, readers)) and node.output not in work.model.graph.output_names


def _dequantizes(work: _Work, node: Node) -> bool:
    if is_dequantize(node):
        return True
    value = work.model.params.get(node.inputs[0]) if is_cast_back(node) else None
    narrow = value is not None and node.inputs[0].endswith(_STORED_SUFFIXES[0])
    codes = work.codes.get(node.inputs[0]) if is_cast_back(node) else None
    return narrow or (codes is not None and codes.grid.dtype in CASTS)


def _take_quantize(work: _Work, node: Node) -> None:
    dtype = cast_format(node)
    grid = quantizer_of(work.model, node) if dtype is None else cast_quantizer(dtype)
    assert grid is not None, "left otherwise"  # noqa: S101
    source, limits = _before_clip(work, node.inputs[0], grid)
    work.codes[node.output] = _Codes(source=source, grid=replace(grid, limits=limits))


def _before_clip(work: _Work, tensor: str, grid: Quantizer) -> tuple[str, tuple[float, float] | None]:
    """Returns what is clipped to the ends of a grid that its type exceeds, and these, or the tensor itself.

    `insert_qdq` names that Clip, and the ends. Below opset 11 they are Max and Min.
    """
    name = tensor.removesuffix("_clipped")
    ends = [value_of(work.model, f"{name}_{end}") for end in ("lowest", "highest")]
    node = work.model.graph.producers.get(tensor)
    if name == tensor or node is None or any(end is None for end in ends):
        return tensor, None
    inner = work.model.graph.producers.get(node.inputs[0])
    source = inner.inputs[0] if node.op_type == "Min" and inner is not None else node.inputs[0]
    gone = {tensor, node.inputs[0]} if node.op_type == "Min" else {tensor}
    work.nodes[:] = [each for each in work.nodes if each.output not in gone]
    low, high = (float(np.rint(np.float32(end) / grid.scale) + grid.zero_point) for end in ends)
    return source, (low, high)


def _take_dequantize(work: _Work, node: Node) -> None:
    stored = node.inputs[0]
    if stored in work.codes:
        _take_activation(work, node, work.codes[stored])
        return
    value = value_of(work.model, stored)
    if value is None:
        raise _between(node, stored)
    _take_parameter(work, node, np.asarray(value))


def _take_activation(work: _Work, node: Node, codes: _Codes) -> None:
    grid = codes.grid if is_cast_back(node) else quantizer_of(work.model, node)
    if grid is None or not grid.is_same(codes.grid):
        raise ModelError(
            f"{place_of(node)} dequantizes '{codes.source}' on another grid than it is quantized on; expected one grid "
            "for both: export the model with QuantizeLinear and DequantizeLinear in pairs"
        )
    work.uses.setdefault(codes.source, []).append(_Use(grid=codes.grid, stored=node.inputs[0], tensor=node.output))


def _take_parameter(work: _Work, node: Node, value: np.ndarray) -> None:
    stored, tensor = node.inputs[0], node.output
    grid = cast_quantizer(value.dtype.name) if is_cast_back(node) else quantizer_of(work.model, node, value.shape)
    assert grid is not None, "left otherwise"  # noqa: S101
    if stored in work.stored and work.stored[stored][1].is_same(grid):
        work.renamed[tensor] = work.stored[stored][0]
        return
    name = _parameter_name(work.model.graph, stored, tensor)
    # The runtime dequantizes so, in float32.
    work.params[name] = np.asarray(dequantize(value.astype(np.float32), grid.encoding()), np.float32)
    work.renamed[tensor] = name
    work.stored.setdefault(stored, (name, grid))
    if grid.dtype == BIAS:
        work.biases[name] = grid
    else:
        work.encodings[name] = _as_told(work, name, grid).encoding()
        work.report.append(_record(name, "parameter in float, with its encoding"))


def _parameter_name(graph: Graph, stored: str, tensor: str) -> str:
    """Returns the name of a parameter before it was quantized: what its codes are named after, if that is free."""
    if any(tensor in captured(node) for node in graph.nodes) or tensor in graph.output_names:
        return tensor
    bases = (stored.removesuffix(suffix) for suffix in _STORED_SUFFIXES if stored.endswith(suffix))
    return next((base for base in bases if base and (base == tensor or _is_free(graph, base))), tensor)


def _as_told(work: _Work, name: str, grid: Quantizer) -> Quantizer:
    told = work.told.get(name, {})
    limits = told.get("limits")
    try:
        found = grid.limits if limits is None else (float(limits[0]), float(limits[1]))
    except (TypeError, ValueError, LookupError) as error:
        raise ModelError(f"the file's metadata '{GRIDS}' have wrong limits for '{name}': {limits}") from error
    return replace(grid, limits=found, scale_bits=told.get("scale_bits"))


def _take_other(work: _Work, node: Node) -> None:
    held = [name for name in node.inputs if name in work.codes]
    if not held:
        work.nodes.append(node)
        return
    codes = work.codes[held[0]]
    moves = node.op_type in _MOVES and held == [node.inputs[0]]
    if node.domain or not (moves or (node.op_type in _BOUNDS and len(node.inputs) == len(held) + 1)):
        raise _between(node, held[0])
    for name in held:  # rounded as well, although nothing dequantizes it
        work.uses.setdefault(work.codes[name].source, []).append(_Use(grid=codes.grid, stored=name, tensor=""))
    inputs = tuple(_float_of(work, name, codes) for name in node.inputs)
    work.nodes.append(replace(node, inputs=inputs, outputs=node.outputs[:1]))
    work.codes[node.output] = _Codes(source=node.output, grid=codes.grid)


def _float_of(work: _Work, name: str, codes: _Codes) -> str:
    """Returns the float tensor for an operand of a node on codes: what was rounded to them, or a bound."""
    if name in work.codes:
        return work.codes[name].source
    value = value_of(work.model, name)
    if value is None or np.asarray(value).dtype.name != codes.grid.dtype:
        return name
    base = name.removesuffix(_STORED_SUFFIXES[0])
    bound = base if base != name and _is_free(work.model.graph, base) else f"{name}_bound"
    work.params[bound] = np.asarray(dequantize(np.asarray(value, np.float32), codes.grid.encoding()), np.float32)
    return bound


def _between(node: Node, tensor: str) -> ModelError:
    return ModelError(
        f"{place_of(node)} reads '{tensor}', which are integers; expected a DequantizeLinear in front of it: read the "
        "file in QDQ form that this one was made from"
    )


def _is_free(graph: Graph, name: str) -> bool:
    """Tells whether no tensor has the name, or only one that goes: what DequantizeLinear writes."""
    taken = {spec.name for spec in graph.inputs} | set(graph.constant_values) | set(graph.parameters)
    producer = graph.producers.get(name)
    return name not in taken and (producer is None or is_dequantize(producer))


def _settle_activations(work: _Work) -> None:
    for source, uses in work.uses.items():
        grids: list[Quantizer] = []
        for use in uses:
            if not any(use.grid.is_same(grid) for grid in grids):
                grids.append(use.grid)
        ends = [use.tensor for use in uses if use.tensor in work.model.graph.output_names]
        if len(grids) > 1 or len(ends) > 1 or not _may_be_rounded(work, source, ends, uses):
            _keep_apart(work, source, uses)
            continue
        name = ends[0] if ends else _activation_name(work, source, uses[0].stored)
        work.renamed |= {source: name, **{use.tensor: name for use in uses if use.tensor}}
        work.encodings[name] = _as_told(work, name, grids[0]).encoding()
        work.report.append(_record(name, "activation with its encoding"))


def _may_be_rounded(work: _Work, source: str, ends: list[str], uses: list[_Use]) -> bool:
    """Tells whether nothing changes when a tensor itself is rounded; readers in subgraphs see it unrounded anyway."""
    graph = work.model.graph
    producer = graph.producers.get(source)
    unrounded = (node for node in work.nodes if node.output not in work.codes)
    if any(source in node.inputs for node in unrounded) or source in graph.output_names:
        return False
    if producer is not None and _dequantizes(work, producer):
        return False
    if ends and (source in work.params or source not in {name for node in work.nodes for name in node.outputs}):
        return False
    inside = {name for node in graph.nodes for name in captured(node)}
    return not any(use.tensor in inside and use.tensor not in ends for use in uses)


def _activation_name(work: _Work, source: str, stored: str) -> str:
    """Returns the name of an activation, or rounded parameter, before it was quantized: what its codes are named after.

    It differs from `source` where a Relu or Clip between the two is gone.
    """
    graph = work.model.graph
    base = stored.removesuffix(_STORED_SUFFIXES[0])
    renamable = source in graph.producers or source in work.params
    return base if base != stored and renamable and _is_free(graph, base) else source


def _keep_apart(work: _Work, source: str, uses: Iterable[_Use]) -> None:
    for use in (use for use in uses if use.tensor):
        work.nodes.append(Node(op_type="Identity", inputs=(source,), outputs=(use.tensor,)))
        work.encodings[use.tensor] = _as_told(work, use.tensor, use.grid).encoding()
        reason = f"'{source}' is also read unrounded, or on another grid"
        work.report.append(replace(_record(use.tensor, "Identity with its encoding", reason), done=True))


def _finished(work: _Work) -> tuple[Model, Encodings, Report]:
    model = work.model
    nodes = [_renamed(node, work.renamed) for node in work.nodes]
    params = {work.renamed.get(name, name): value for name, value in work.params.items()}
    written = {name for node in nodes for name in node.outputs}
    opsets = tuple(
        each for each in model.graph.opsets if each[0] != MICROSOFT or any(node.domain == MICROSOFT for node in nodes)
    )
    metadata = tuple(each for each in model.graph.metadata if not each[0].startswith(_OURS))
    bare = model.replace(graph=replace(model.graph, opsets=opsets, metadata=metadata))
    found = rebuild(bare, nodes=nodes, params={name: value for name, value in params.items() if name not in written})
    encodings = _spelled(found, {**work.encodings, **_told_of_parameters(work, found)})
    report = (*work.report, *_of_biases(work, found, encodings), *_of_what_remains(found, work.report))
    return found, dict(sorted(encodings.items())), report


def _told_of_parameters(work: _Work, model: Model) -> Encodings:
    """Returns the encodings of parameters that were cast: reading a file computes these, and no Cast is left."""
    return {
        name: cast_quantizer(told["dtype"]).encoding()
        for name, told in work.told.items()
        if "dtype" in told and name in model.params and name not in work.encodings
    }


def _spelled(model: Model, encodings: Encodings) -> Encodings:
    axes = tensor_axes(model)
    return {
        name: encoding.replace(axis=axes[name].spelled(encoding.axis, encoding.block_size))
        if name in axes
        else encoding
        for name, encoding in encodings.items()
    }


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    return replace(
        node,
        inputs=tuple(names.get(name, name) for name in node.inputs),
        outputs=tuple(names.get(name, name) for name in node.outputs),
    )


def _of_biases(work: _Work, model: Model, encodings: Encodings) -> Iterator[Record]:
    sites = {site.bias: site for site in bias_sites(model)}
    for name, grid in work.biases.items():
        follows = bias_encoding(encodings, sites[name]) if name in sites else None
        if follows is None:
            reason = "it stays in float: no layer's input and weight tell its scale"
        elif not np.allclose(np.ravel(follows.scale), np.ravel(grid.scale), rtol=1e-6, atol=0):
            reason = "its scale was another one than that of input times weight, which it has now"
        else:
            reason = ""
        yield replace(_record(name, "bias in float", reason), done=True)


def _of_what_remains(model: Model, report: Iterable[Record]) -> Iterator[Record]:
    if first_quantized_node(model.graph) is None:
        return
    told = {record.where[0] for record in report}
    for node in all_nodes(model.graph):
        alone = model.replace(graph=replace(model.graph, nodes=(node,)))
        if node.output not in told and not node.subgraphs and first_quantized_node(alone.graph) is not None:
            yield _record(node.output, f"{node.op_type} left", "it quantizes at run time, or stands in a subgraph")


def _record(tensor: str, what: str, reason: str = "") -> Record:
    return Record(transform="unquantize", done=not reason, what=what, where=(tensor,), reason=reason)
