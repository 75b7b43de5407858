"""What the codes in a QDQ model stand for, gathered node by node: the first half of `unquantize`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ptqjax.encodings.encoding import Encodings, dequantize
from ptqjax.errors import ModelError
from ptqjax.ir import Graph, Model, Node, Record, captured, place_of, value_of
from ptqjax.qdq.quantizers import (
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
from ptqjax.qdq.stored_grids import CASTS

STORED = "_quantized"
"""What `insert_qdq` appends to the name of a tensor for that of its codes."""

_STORED_SUFFIXES = (STORED, "_q")
_BOUNDS = ("Min", "Max")
_MOVES = frozenset(
    ["Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Expand", "Tile", "MaxPool", "Identity"]
) | {"DepthToSpace", "SpaceToDepth", "Gather"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Codes:
    """What the codes of a tensor stand for."""

    source: str
    """The float tensor that was rounded to them."""
    grid: Quantizer
    """How."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """A dequantized activation."""

    grid: Quantizer
    """Its grid."""
    stored: str
    """The codes."""
    tensor: str
    """What DequantizeLinear wrote; "" where an operator reads the codes."""


@dataclass(kw_only=True, slots=True)
class Work:
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
    codes: dict[str, Codes] = field(default_factory=dict)
    """Tensors of codes."""
    uses: dict[str, list[Use]] = field(default_factory=dict)
    """The dequantized forms of each activation, by its float tensor."""
    encodings: Encodings = field(default_factory=dict)
    """Encodings by tensor."""
    biases: dict[str, Quantizer] = field(default_factory=dict)
    """The grids of int32 parameters, by name."""
    stored: dict[str, tuple[str, Quantizer]] = field(default_factory=dict)
    """For a parameter of codes, the float parameter that it became, and its grid."""
    report: list[Record] = field(default_factory=list)
    """What was done, and what was left."""


def take(work: Work, node: Node) -> None:
    """Adds to `work` what a node that is not left as it is tells of codes, or the node itself.

    Raises:
        ModelError: It works on integers, or dequantizes on another grid than was quantized on.
    """
    handlers = ((_quantizes, _take_quantize), (dequantizes, _take_dequantize))
    next((take for applies, take in handlers if applies(work, node)), _take_other)(work, node)


def _quantizes(work: Work, node: Node) -> bool:
    if is_quantize(node):
        return True
    if cast_format(node) is None or not node.output.endswith(STORED):
        return False
    readers = work.model.graph.readers.get(node.output, ())
    return bool(readers) and all(map(is_cast_back, readers)) and node.output not in work.model.graph.output_names


def dequantizes(work: Work, node: Node) -> bool:
    """Tells whether a node makes floats of codes: DequantizeLinear, or the second of a pair of Cast."""
    if is_dequantize(node):
        return True
    value = work.model.params.get(node.inputs[0]) if is_cast_back(node) else None
    narrow = value is not None and node.inputs[0].endswith(STORED)
    codes = work.codes.get(node.inputs[0]) if is_cast_back(node) else None
    return narrow or (codes is not None and codes.grid.dtype in CASTS)


def _take_quantize(work: Work, node: Node) -> None:
    dtype = cast_format(node)
    grid = quantizer_of(work.model, node) if dtype is None else cast_quantizer(dtype)
    assert grid is not None, "left otherwise"  # noqa: S101
    source, limits = _before_clip(work, node.inputs[0], grid)
    work.codes[node.output] = Codes(source=source, grid=replace(grid, limits=limits))


def _before_clip(work: Work, tensor: str, grid: Quantizer) -> tuple[str, tuple[float, float] | None]:
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


def _take_dequantize(work: Work, node: Node) -> None:
    stored = node.inputs[0]
    if stored in work.codes:
        _take_activation(work, node, work.codes[stored])
        return
    value = value_of(work.model, stored)
    if value is None:
        raise _between(node, stored)
    _take_parameter(work, node, np.asarray(value))


def _take_activation(work: Work, node: Node, codes: Codes) -> None:
    grid = codes.grid if is_cast_back(node) else quantizer_of(work.model, node)
    if grid is None or not grid.is_same(codes.grid):
        raise ModelError(
            f"{place_of(node)} dequantizes '{codes.source}' on another grid than it is quantized on; expected one grid "
            "for both: export the model with QuantizeLinear and DequantizeLinear in pairs"
        )
    work.uses.setdefault(codes.source, []).append(Use(grid=codes.grid, stored=node.inputs[0], tensor=node.output))


def _take_parameter(work: Work, node: Node, value: np.ndarray) -> None:
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
        work.encodings[name] = as_told(work, name, grid).encoding()
        work.report.append(record_of(name, "parameter in float, with its encoding"))


def _parameter_name(graph: Graph, stored: str, tensor: str) -> str:
    """Returns the name of a parameter before it was quantized: what its codes are named after, if that is free."""
    if any(tensor in captured(node) for node in graph.nodes) or tensor in graph.output_names:
        return tensor
    bases = (stored.removesuffix(suffix) for suffix in _STORED_SUFFIXES if stored.endswith(suffix))
    return next((base for base in bases if base and (base == tensor or is_free(graph, base))), tensor)


def as_told(work: Work, name: str, grid: Quantizer) -> Quantizer:
    """Returns the grid of a tensor with what the file's metadata tell of it.

    Raises:
        ModelError: They tell what no grid has.
    """
    told = work.told.get(name, {})
    limits = told.get("limits")
    try:
        found = grid.limits if limits is None else (float(limits[0]), float(limits[1]))
        bits = told.get("scale_bits")
        bits = bits if bits is None else operator.index(bits)
    except (TypeError, ValueError, LookupError) as error:
        raise ModelError(
            f"the file's metadata '{GRIDS}' are wrong for '{name}': {dict(told)}; export it again"
        ) from error
    return replace(grid, limits=found, scale_bits=bits)


def _take_other(work: Work, node: Node) -> None:
    held = [name for name in node.inputs if name in work.codes]
    if not held:
        work.nodes.append(node)
        return
    codes = work.codes[held[0]]
    moves = node.op_type in _MOVES and held == [node.inputs[0]]
    if node.domain or not (moves or (node.op_type in _BOUNDS and len(node.inputs) == len(held) + 1)):
        raise _between(node, held[0])
    for name in held:  # rounded as well, although nothing dequantizes it
        work.uses.setdefault(work.codes[name].source, []).append(Use(grid=codes.grid, stored=name, tensor=""))
    inputs = tuple(_float_of(work, name, codes) for name in node.inputs)
    work.nodes.append(replace(node, inputs=inputs, outputs=node.outputs[:1]))
    work.codes[node.output] = Codes(source=node.output, grid=codes.grid)


def _float_of(work: Work, name: str, codes: Codes) -> str:
    """Returns the float tensor for an operand of a node on codes: what was rounded to them, or a bound."""
    if name in work.codes:
        return work.codes[name].source
    value = value_of(work.model, name)
    if value is None or np.asarray(value).dtype.name != codes.grid.dtype:
        return name
    base = name.removesuffix(STORED)
    bound = base if base != name and is_free(work.model.graph, base) else f"{name}_bound"
    work.params[bound] = np.asarray(dequantize(np.asarray(value, np.float32), codes.grid.encoding()), np.float32)
    return bound


def _between(node: Node, tensor: str) -> ModelError:
    return ModelError(
        f"{place_of(node)} reads '{tensor}', which are integers; expected a DequantizeLinear in front of it: read the "
        "file in QDQ form that this one was made from"
    )


def is_free(graph: Graph, name: str) -> bool:
    """Tells whether no tensor has the name, or only one that goes: what DequantizeLinear writes."""
    taken = {spec.name for spec in graph.inputs} | set(graph.constant_values) | set(graph.parameters)
    producer = graph.producers.get(name)
    return name not in taken and (producer is None or is_dequantize(producer))


def record_of(tensor: str, what: str, reason: str = "") -> Record:
    """Returns the record of a place: done, or left for a reason."""
    return Record(transform="unquantize", done=not reason, what=what, where=(tensor,), reason=reason)
