"""A model in QDQ form back into a float model and its encodings: the inverse of `insert_qdq`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ptqjax.encodings.biases import bias_encoding, bias_sites
from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import ModelError
from ptqjax.ir import Graph, Model, Node, Record, Report, captured, place_of, rebuild
from ptqjax.ir.query import all_nodes, first_quantized_node
from ptqjax.placement.tensor_axes import tensor_axes
from ptqjax.qdq.codes import STORED, Use, Work, as_told, dequantizes, is_free, record_of, take
from ptqjax.qdq.quantizers import GRIDS, Quantizer, cast_quantizer, is_dequantize, is_quantize, quantizer_of
from ptqjax.qdq.runtime_precision import without_empty_clips
from ptqjax.qdq.stored_grids import CASTS, MICROSOFT
from ptqjax.qdq.table_codes import gather_floats

_OURS = "ptqjax."
_STATIC = ("QLinear", "QGemm", "QAttention", "QEmbed", "QOrdered", "MulInteger")
_PACKED = ("MatMulNBits", "GatherBlockQuantized")


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
            or holds them packed (MatMulNBits, GatherBlockQuantized), or a tensor is quantized and dequantized on two
            different grids.
    """
    _check_operators(model.graph)
    model = gather_floats(without_empty_clips(model))
    work = Work(model=model, told=_told(model.graph), params=dict(model.params))
    left = _left(model)
    for node in model.graph.nodes:
        if node.output in left:
            work.report.append(record_of(node.output, f"{node.op_type} left", left[node.output]))
            work.nodes.append(node)
            continue
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
        if node.op_type in _PACKED:
            raise ModelError(
                f"{place_of(node)} holds its weight packed, which is not read back; expected MatMul or Gather behind "
                "DequantizeLinear: export with weights='integer' to read again, or keep the encodings file"
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


def _settle_activations(work: Work) -> None:
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
        work.encodings[name] = as_told(work, name, grids[0]).encoding()
        work.report.append(record_of(name, "activation with its encoding"))


def _may_be_rounded(work: Work, source: str, ends: list[str], uses: list[Use]) -> bool:
    """Tells whether nothing changes when a tensor itself is rounded; readers in subgraphs see it unrounded anyway."""
    graph = work.model.graph
    producer = graph.producers.get(source)
    unrounded = (node for node in work.nodes if node.output not in work.codes)
    if any(source in node.inputs for node in unrounded) or source in graph.output_names:
        return False
    if producer is not None and dequantizes(work, producer):
        return False
    if ends and (source in work.params or source not in {name for node in work.nodes for name in node.outputs}):
        return False
    inside = {name for node in graph.nodes for name in captured(node)}
    return not any(use.tensor in inside and use.tensor not in ends for use in uses)


def _activation_name(work: Work, source: str, stored: str) -> str:
    """Returns the name of an activation, or rounded parameter, before it was quantized: what its codes are named after.

    It differs from `source` where a Relu or Clip between the two is gone.
    """
    graph = work.model.graph
    base = stored.removesuffix(STORED)
    renamable = source in graph.producers or source in work.params
    return base if base != stored and renamable and is_free(graph, base) else source


def _keep_apart(work: Work, source: str, uses: Iterable[Use]) -> None:
    for use in (use for use in uses if use.tensor):
        work.nodes.append(Node(op_type="Identity", inputs=(source,), outputs=(use.tensor,)))
        work.encodings[use.tensor] = as_told(work, use.tensor, use.grid).encoding()
        reason = f"'{source}' is also read unrounded, or on another grid"
        work.report.append(replace(record_of(use.tensor, "Identity with its encoding", reason), done=True))


def _finished(work: Work) -> tuple[Model, Encodings, Report]:
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


def _told_of_parameters(work: Work, model: Model) -> Encodings:
    """Returns the encodings of parameters that were cast: reading a file computes these, and no Cast is left."""
    return {
        name: cast_quantizer(told["dtype"]).encoding()
        for name, told in work.told.items()
        if told.get("dtype") in CASTS and name in model.params and name not in work.encodings
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


def _of_biases(work: Work, model: Model, encodings: Encodings) -> Iterator[Record]:
    sites = {site.bias: site for site in bias_sites(model)}
    for name, grid in work.biases.items():
        follows = bias_encoding(encodings, sites[name]) if name in sites else None
        if follows is None:
            reason = "it stays in float: no layer's input and weight tell its scale"
        elif not np.allclose(np.ravel(follows.scale), np.ravel(grid.scale), rtol=1e-6, atol=0):
            reason = "its scale was another one than that of input times weight, which it has now"
        else:
            reason = ""
        yield replace(record_of(name, "bias in float", reason), done=True)


def _of_what_remains(model: Model, report: Iterable[Record]) -> Iterator[Record]:
    if first_quantized_node(model.graph) is None:
        return
    told = {record.where[0] for record in report}
    for node in all_nodes(model.graph):
        alone = model.replace(graph=replace(model.graph, nodes=(node,)))
        if node.output not in told and not node.subgraphs and first_quantized_node(alone.graph) is not None:
            yield record_of(node.output, f"{node.op_type} left", "it quantizes at run time, or stands in a subgraph")
