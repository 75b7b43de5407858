"""A model and its encodings as files: NAME.onnx in QDQ form, and NAME.encodings for tools that read AIMET's format."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ptqjax import onnx_io
from ptqjax.config import load_target
from ptqjax.encoding_files import encodings_json
from ptqjax.encodings.encoding import Encoding, Encodings, concrete
from ptqjax.encodings.taken import check_taken
from ptqjax.errors import ConfigError, ModelError
from ptqjax.ir import Model, Node, place_of
from ptqjax.mapped import release
from ptqjax.onnx_io.opset import CONVERTED, blocking_nodes, with_opset
from ptqjax.publish import published, write_text
from ptqjax.qdq.dynamic_products import with_dynamic_products
from ptqjax.qdq.equal_nodes import merge_equal_nodes
from ptqjax.qdq.implied_clips import drop_implied_clips
from ptqjax.qdq.insert import insert_qdq
from ptqjax.qdq.integer_bounds import bound_integers
from ptqjax.qdq.load_time import dequantize_at_load
from ptqjax.qdq.matmul_nbits import with_matmul_nbits
from ptqjax.qdq.quantizers import GRIDS, untold_grids
from ptqjax.qdq.runtime_precision import keep_precision
from ptqjax.qdq.stored_grids import (
    MICROSOFT,
    OWN,
    check_writable,
    lowest_opset,
    lowest_opset_of,
    needs_opset,
    stored_grids,
)
from ptqjax.qdq.stored_once import store_once
from ptqjax.qdq.table_codes import gather_codes
from ptqjax.versions import versions

__all__ = ["encodings_json", "export", "insert_qdq", "quantized_model"]

MATMUL_NBITS = "matmul-nbits"
"""How weights are written that floats are multiplied by, as ONNX Runtime's own operators."""

_STATED = ("jax", "jaxlib", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu")  # packages that a file names
_INTEGER_SINCE = 10  # the opset of QLinearConv, into which ONNX Runtime fuses
_PER_CHANNEL_SINCE = 13  # the opset of DequantizeLinear along an axis; biases in float need 11 for ONNX Runtime's Round


def export(
    model: Model,
    encodings: Encodings,
    directory: str | os.PathLike[str],
    name: str,
    *,
    settings: Mapping[str, Any] | None = None,
    encodings_version: str | None = None,
    target: str | None = None,
    weights: str | None = None,
) -> None:
    """Writes NAME.onnx, the QDQ model, and NAME.encodings into `directory`, which is made if it is missing.

    Both files reach their names together, or what was there before stays. The ONNX file states in its metadata_props
    where it comes from: versions of ptqjax, Python and packages, hashes of model and encodings, and the settings.

    Args:
        model: The float model.
        encodings: The grids by tensor, concrete; those that are not enabled are left out.
        directory: Where to write.
        name: The files' name without suffix.
        settings: What else to state, such as the configuration; plain data.
        encodings_version: The version of AIMET's schema that NAME.encodings has, see `write_encodings`; None: 1.0.0, or
            2.0.0 where that alone has all of the grids.
        target: The runtime that the file is for, as `QuantizationConfig.target` names it: decides how weights are
            written, and which grids are refused. None: ONNX Runtime, nothing refused.
        weights: How weights are written, see `quantized_model`; None: as `target` wants them.

    Raises:
        ConfigError: The target does not take a grid; the message names the tensor.
        OutputError: `directory` cannot be made or written; then it is as it was.
        ConfigError: `name` is not a file's name, an encoding cannot be written (`quantized_model`), or
            `encodings_version` is unknown or lacks a kind of grid.
        ModelError: The result does not pass ONNX's checker, or an operator bars the way to opset 10.
    """
    if not name or Path(name).name != name:
        raise ConfigError(f"name={name!r} is not the name of a file; expected one without folders, such as 'model'")
    form = weights or "integer"
    if target is not None:
        found = load_target(target)
        check_taken(model, encodings, found)
        form = weights or found.exported_weights
    quantized = with_provenance(quantized_model(model, encodings, weights=form), model, encodings, settings or {})
    text = json.dumps(encodings_json(model, encodings, encodings_version), indent=1) + "\n"
    files = f"{name}.onnx", f"{name}.encodings"
    with published(Path(directory), files) as folder:
        onnx_io.write(quantized, folder / files[0])
        write_text(folder / files[1], text)


def quantized_model(model: Model, encodings: Encodings, *, weights: str = "integer") -> Model:
    """Returns the QDQ model that `export` writes: with the lowest opset that has its types, where nodes allow it.

    Attributes that became inputs are converted on the way. Where raising the opset would change an operator, the opset
    stays, and QuantizeLinear and DequantizeLinear are those of ONNX Runtime's own operator set, which have all integer
    types. Equal nodes become one (`merge_equal_nodes`). Bounds per channel are applied to integers (`bound_integers`);
    Relu, Clip and bounds that the grid behind them implies are left out (`drop_implied_clips`), and ONNX Runtime is
    kept from rounding operands of products that the file has in more bits (`keep_precision`). Rows of tables are taken
    as integers (`gather_codes`), what a layer shares with a table is stored once (`store_once`), and what is no operand
    in integers is dequantized when the file is loaded (`dequantize_at_load`).

    Args:
        model: The float model.
        encodings: The grids by tensor, concrete; those that are not enabled are left out.
        weights: "integer": integers (or short floats) with DequantizeLinear, biases in int32. "float": floats on their
            grids with QuantizeLinear and DequantizeLinear behind them, biases floats on theirs: the form that TensorRT
            reads. "matmul-nbits": as "integer", but weights that floats are multiplied by, and tables, as ONNX
            Runtime's MatMulNBits and GatherBlockQuantized (`qdq.matmul_nbits`), where activations have no grids.

    Raises:
        ModelError: The model is of an opset below 10, which ONNX Runtime cannot fuse into integers, and an operator
            would change its meaning if it were raised.
        ConfigError: Weights are in blocks (opset 21) or tensors in float formats (19, 13 for bfloat16), which ONNX
            Runtime's own operators have not, and an operator would change its meaning there; no operator has an
            encoding's grid (the message says which); an encoding is for a tensor that the model has not; or `weights`
            is neither.
    """
    held = {name: concrete(encoding) for name, encoding in encodings.items()}
    enabled = {name: encoding for name, encoding in held.items() if encoding.enabled}
    check_writable(model, enabled)
    quantized = insert_qdq(model, held, weights="integer" if weights == MATMUL_NBITS else weights)
    if not enabled:
        return quantized
    quantized = with_dynamic_products(quantized)[0]
    has_grids = any(node.op_type == "QuantizeLinear" for node in quantized.graph.nodes)
    is_for_floats = weights == MATMUL_NBITS and not has_grids
    quantized = with_matmul_nbits(quantized)[0] if is_for_floats else quantized
    _check_own(quantized, weights)
    held_here = {name: encoding for name, encoding in enabled.items() if _is_held(quantized, name, model)}
    if not held_here:
        return quantized
    lowest, fixed = _opsets(model, held_here)
    lowest = max(lowest, _PER_CHANNEL_SINCE if weights == "float" else 0)
    raised = _raised(merge_equal_nodes(quantized)[0], lowest, fixed)
    precise = keep_precision(drop_implied_clips(bound_integers(raised)[0])[0])[0]
    at_load = dequantize_at_load(gather_codes(precise)[0], with_products=is_for_floats)[0]
    return store_once(at_load)[0]


def _is_held(quantized: Model, name: str, model: Model) -> bool:
    """Tells whether ONNX's own operators hold the grid of a tensor: all but those of weights in other operators."""
    return name not in model.params or name in quantized.graph.producers


def _check_own(quantized: Model, weights: str) -> None:
    """Checks that no operator of our own is left.

    Raises:
        ConfigError: One is: an activation that is rounded in blocks, which only MatMulNBits does.
    """
    node = next((each for each in quantized.graph.nodes if each.domain == OWN), None)
    if node is not None:
        raise ConfigError(
            f"'{node.inputs[0]}' is rounded in blocks of {node.attribute('block_size')} at run time, which no file "
            f"with weights={weights!r} says; export with weights='{MATMUL_NBITS}'"
        )


def with_provenance(quantized: Model, model: Model, encodings: Encodings, settings: Mapping[str, Any]) -> Model:
    """Returns `quantized` with metadata that says where it comes from; other metadata stays."""
    stated = {
        "ptqjax.version": version("ptqjax"),
        "ptqjax.versions": json.dumps(versions(_STATED)),
        "ptqjax.model_sha256": fingerprint(model),
        "ptqjax.encodings_sha256": _digest(json.dumps(encodings_json(model, encodings)).encode()),
        "ptqjax.settings": json.dumps(dict(settings), sort_keys=True, default=str),
    }
    untold = untold_grids(model, encodings)
    stated |= {GRIDS: json.dumps(untold, sort_keys=True)} if untold else {}
    metadata = tuple(sorted({**dict(quantized.graph.metadata), **stated}.items()))
    return quantized.replace(graph=replace(quantized.graph, metadata=metadata))


def fingerprint(model: Model) -> str:
    """Returns the SHA-256 of a model's operators and arrays: the same for the same content, however it was read."""
    digest = hashlib.sha256(
        onnx_io.to_proto(model.replace(params={}, graph=replace(model.graph, metadata=()))).SerializeToString(
            deterministic=True
        )
    )
    for name, value in sorted(model.params.items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{name}{array.dtype.name}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
        release(value)
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_opset(model: Model, encodings: Mapping[str, Encoding]) -> None:
    """Checks that `model` can be raised to an opset that has the grids of `encodings`, before anything is written.

    Args:
        model: The float model.
        encodings: What will be rounded; types, axes and blocks count, scales do not.

    Raises:
        ModelError, ConfigError: It cannot, as `quantized_model` would say in the end.
    """
    if encodings:
        _opset_for(model, *_opsets(model, encodings))


def _opsets(model: Model, encodings: Mapping[str, Encoding]) -> tuple[int, dict[str, int]]:
    """Returns the lowest opset that has all grids, and for each that ONNX's own operators alone have, theirs."""
    grids = stored_grids(model, encodings)
    opsets = {name: lowest_opset(grid, encodings[name]) for name, grid in grids.items()}
    return max(opsets.values()), {
        name: opset for name, opset in opsets.items() if needs_opset(grids[name], encodings[name])
    }


def _raised(model: Model, lowest: int, fixed: Mapping[str, int]) -> Model:
    """Returns the QDQ model at the opset that `_opset_for` finds."""
    reached = _opset_for(model, lowest, fixed)
    return _with_own_quantizers(with_opset(model, reached)) if reached > model.graph.opset() else model


def _opset_for(model: Model, lowest: int, fixed: Mapping[str, int]) -> int:
    """Returns the opset `lowest`, or the highest below it that keeps what nodes mean; the model's where that will do.

    Args:
        model: The model.
        lowest: The opset that has all its types.
        fixed: For each tensor that ONNX's own operators alone can round, the opset since which they can.

    Raises:
        ModelError: The opset cannot be raised to where ONNX Runtime has integer operators.
        ConfigError: It cannot be raised to an opset in `fixed`.
    """
    opset = model.graph.opset()
    wanted = max(lowest, _PER_CHANNEL_SINCE) if opset < _INTEGER_SINCE else lowest
    if opset >= wanted:
        return opset
    needed = max(fixed.values(), default=_INTEGER_SINCE)
    versions = sorted({each for each in (_INTEGER_SINCE, _PER_CHANNEL_SINCE, needed, wanted) if opset < each <= wanted})
    blocked = {version: tuple(blocking_nodes(model, version)) for version in versions}
    reached = max((version for version, nodes in blocked.items() if not nodes), default=opset)
    if reached < needed:
        nodes = blocked[min(version for version in versions if version >= needed)]
        tensor = next((name for name, since in fixed.items() if since == needed), None)
        raise _cannot_be_raised(opset, needed, nodes, tensor)
    return max(opset, reached)


def _cannot_be_raised(opset: int, needed: int, nodes: Sequence[Node], tensor: str | None) -> ModelError | ConfigError:
    place = place_of(nodes[0]) if nodes else "an operator"
    newer = max(needed, _PER_CHANNEL_SINCE)
    remedy = f"export the model anew with opset {newer} or later"
    if nodes and all(node.op_type in CONVERTED for node in nodes):
        remedy = f"convert it with onnx.version_converter.convert_version(model, {newer}) first"
    if tensor is not None:
        return ConfigError(
            f"the grid of '{tensor}' needs opset {needed}; the model is of opset {opset}, and {place} would change its "
            f"meaning there; {remedy}, or choose granularity='channel' and integers"
        )
    return ModelError(
        f"the model is of opset {opset}; ONNX Runtime has integer operators from opset {needed} on, where {place} "
        f"would change its meaning; {remedy}"
    )


def _with_own_quantizers(model: Model) -> Model:
    """Returns the model with its QuantizeLinear and DequantizeLinear nodes of ONNX's own set, as far as that has them.

    Which it has in the model's opset follows from the types of their integers.
    """
    graph = model.graph
    own = ("QuantizeLinear", "DequantizeLinear")
    nodes = tuple(
        replace(node, domain="")
        if node.domain == MICROSOFT and node.op_type in own and graph.opset() >= _since(model, node)
        else node
        for node in graph.nodes
    )
    opsets = dict(graph.opsets)
    if not any(node.domain == MICROSOFT for node in nodes):
        opsets.pop(MICROSOFT, None)
    return model.replace(graph=replace(graph, nodes=nodes, opsets=tuple(sorted(opsets.items()))))


def _since(model: Model, node: Node) -> int:
    scale, zero_point = (np.asarray(model.params[name]) for name in node.inputs[1:3])
    axis, block_size = (node.attribute(name) if scale.ndim else None for name in ("axis", "block_size"))
    return lowest_opset_of(zero_point.dtype.name, axis, block_size)
