"""From an ONNX model to the intermediate representation.

After reading, the many spellings of one thing are one: Constant nodes, initializers and initializers that are also
graph inputs are constants or parameters, what is computed from constants alone is a constant, Identity chains are gone,
functions are inlined, every attribute that has a default is present.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx

from ptqjax.errors import ModelError, UnsupportedOperatorError
from ptqjax.ir import Graph, Model, rebuild
from ptqjax.onnx_io.branches import with_fixed_inputs, without_known_branches
from ptqjax.onnx_io.constants import folded
from ptqjax.onnx_io.dequantizers import with_dequantizers
from ptqjax.onnx_io.functions import without_own_functions, without_schema_functions
from ptqjax.onnx_io.graphs import Source, graph_of, opsets_of
from ptqjax.onnx_io.identities import sorted_throughout, without_identities
from ptqjax.onnx_io.limits import as_text, check_opset, check_size, nodes_within
from ptqjax.onnx_io.parameters import with_parameters
from ptqjax.onnx_io.source import load
from ptqjax.onnx_io.tensors import Storage
from ptqjax.ops import find_lowering


def read(source: str | os.PathLike[str] | bytes | onnx.ModelProto, *, fixed: Mapping[str, Any] | None = None) -> Model:
    """Returns the model in `source`: a path, the bytes of a file, or a ModelProto (which is not changed).

    Attribute defaults are those of the model's operator set version. Floating tensors and the integer weights of a
    quantized file become `params` (NumPy); all other tensors become constants of the graph. Functions, those of the
    model and those by which ONNX defines operators, are inlined where no lowering is registered for them. `write` is
    the inverse.

    An If whose condition is known is replaced by its branch. So `fixed={"use_cache_branch": True}` gives the decoder
    with past out of a file that merges it with one without: what stands in branches is not quantized.

    External data is mapped into memory, read-only: the file must not be changed in place while the model is in use.
    It has to lie in the model's folder.

    Args:
        source: The model.
        fixed: Values of inputs, by name, which the model then has no more.

    Raises:
        ConfigError: `fixed` names no input, or gives a value that does not fit it.
        ModelError: The file is missing, not ONNX, truncated, of an operator set that is not known, lacks its external
            data, or its graph is dangling, cyclic, or too large or deep to be an exporter's. The message names the
            file and the cause.
    """
    label = "the model" if isinstance(source, bytes | onnx.ModelProto) else f"'{os.fspath(source)}'"
    proto, storage = load(source, label)
    if not proto.graph.output:
        raise ModelError(f"{label} is not an ONNX model: it has no graph outputs; expected a file of an ONNX exporter")
    if not proto.opset_import:
        raise ModelError(f"{label} names no operator set version (opset_import); it is damaged: export it again")
    try:
        return _model(proto, storage, fixed or {})
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error


def _model(proto: onnx.ModelProto, storage: Storage, fixed: Mapping[str, Any]) -> Model:
    check_opset(opsets_of(proto.opset_import))
    check_size(len(proto.graph.node))
    check_size(sum(1 for _ in nodes_within(proto.graph.node)))
    proto = without_schema_functions(without_own_functions(proto, _has_lowering), _has_lowering)
    opsets = opsets_of(proto.opset_import)
    graph = with_fixed_inputs(graph_of(proto.graph, Source(opsets=opsets, storage=storage)), fixed)
    graph = with_dequantizers(sorted_throughout(without_identities(graph)))
    graph = _without_known_branches(folded(graph, storage.num_bytes), storage)
    graph, params = with_parameters(graph)
    metadata = tuple(sorted((as_text(entry.key), as_text(entry.value)) for entry in proto.metadata_props))
    return rebuild(Model(graph=replace(graph, ir_version=proto.ir_version, metadata=metadata), params=params))


def _without_known_branches(graph: Graph, storage: Storage) -> Graph:
    """Returns the graph without an If whose condition is a constant, however deep they lie in each other."""
    while len((found := without_known_branches(graph)).nodes) and found.nodes != graph.nodes:
        graph = folded(sorted_throughout(without_identities(found)), storage.num_bytes)
    return graph


def _has_lowering(op_type: str, domain: str, opset: int) -> bool:
    try:
        find_lowering(op_type, opset=opset, domain=domain)
    except UnsupportedOperatorError:
        return False
    return True
