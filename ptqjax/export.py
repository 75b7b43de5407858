"""A model and its encodings as files: NAME.onnx in QDQ form, and NAME.encodings for tools that read AIMET's format."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ptqjax import onnx_io
from ptqjax.errors import ConfigError, OutputError
from ptqjax.ir import Graph, Model, Node
from ptqjax.onnx_io.schema import schema
from ptqjax.quantize.encodings import Encoding, Encodings, concrete
from ptqjax.quantize.qdq import MICROSOFT, insert_qdq, lowest_opset

__all__ = ["encodings_json", "export", "insert_qdq", "quantized_model"]

_SAFE_TO_RAISE_FROM = 13  # before, raising changes what operators mean (Softmax) or where their settings stand
_SCHEMA = "1.0.0"


def export(
    model: Model,
    encodings: Encodings,
    directory: str | os.PathLike[str],
    name: str,
    *,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes NAME.onnx, the QDQ model, and NAME.encodings into `directory`, which is made if it is missing.

    Under the final names there is never a half-written file. The ONNX file states in its metadata_props where it comes
    from: the version of ptqjax, hashes of the model and of the encodings, and the settings.

    Args:
        model: The float model.
        encodings: The grids by tensor, concrete; those that are not enabled are left out.
        directory: Where to write.
        name: The files' name without suffix.
        settings: What else to state, such as the configuration; plain data.

    Raises:
        OutputError: `directory` cannot be made or written.
        ConfigError: An encoding is for a tensor that the model has not, or `name` is not a file's name.
        ModelError: The result does not pass ONNX's checker.
    """
    if not name or Path(name).name != name:
        raise ConfigError(f"name={name!r} is not the name of a file; expected one without folders, such as 'model'")
    quantized = with_provenance(quantized_model(model, encodings), model, encodings, settings or {})
    text = json.dumps(encodings_json(model, encodings), indent=1) + "\n"
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"'{folder}' cannot be made: {error.strerror}; expected a folder to write into") from error
    onnx_io.write(quantized, folder / f"{name}.onnx")
    _write_text(folder / f"{name}.encodings", text)


def quantized_model(model: Model, encodings: Encodings) -> Model:
    """Returns the QDQ model that `export` writes: with the lowest opset that has its types, where nodes allow it.

    Where raising the opset would change an operator, the opset stays, and QuantizeLinear and DequantizeLinear are those
    of ONNX Runtime's own operator set, which have all types.
    """
    held = {name: concrete(encoding) for name, encoding in encodings.items()}
    quantized = insert_qdq(model, held)
    enabled = [encoding for encoding in held.values() if encoding.enabled]
    opset = max((lowest_opset(encoding.dtype, encoding) for encoding in enabled), default=0)
    return _with_opset(quantized, opset) if _can_raise(quantized.graph, opset) else quantized


def encodings_json(model: Model, encodings: Encodings) -> dict[str, Any]:
    """Returns the encodings as AIMET's JSON schema 1.0.0 has them: offsets are those of unsigned integers, negated.

    The schema does not state the axis; tools take the operator's output channel.
    """
    entries = {name: _entry(name, concrete(encoding)) for name, encoding in sorted(encodings.items())}
    enabled = {name: entry for name, entry in entries.items() if bool(encodings[name].enabled)}
    return {
        "version": _SCHEMA,
        "producer": {"package": "ptqjax", "version": version("ptqjax")},
        "activation_encodings": [entry for name, entry in enabled.items() if name not in model.params],
        "param_encodings": [entry for name, entry in enabled.items() if name in model.params],
    }


def with_provenance(quantized: Model, model: Model, encodings: Encodings, settings: Mapping[str, Any]) -> Model:
    """Returns `quantized` with metadata that says where it comes from; other metadata stays."""
    stated = {
        "ptqjax.version": version("ptqjax"),
        "ptqjax.model_sha256": fingerprint(model),
        "ptqjax.encodings_sha256": _digest(json.dumps(encodings_json(model, encodings)).encode()),
        "ptqjax.settings": json.dumps(dict(settings), sort_keys=True, default=str),
    }
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
        digest.update(array.tobytes())
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _entry(name: str, encoding: Encoding) -> dict[str, Any]:
    qmin, qmax = int(encoding.qmin), int(encoding.qmax)
    blocks = encoding.block_size is not None
    kind = "PER_TENSOR" if encoding.axis is None else "PER_BLOCK" if blocks else "PER_CHANNEL"
    zero_points = np.asarray(encoding.zero_point, np.int64).ravel()
    entry = {
        "name": name,
        "enc_type": kind,
        "dtype": "INT",
        "bw": (qmax - qmin).bit_length(),
        "is_sym": bool(qmin < 0 and np.all(zero_points == 0)),
        "scale": [float(scale) for scale in np.asarray(encoding.scale).ravel()],
        "offset": [int(qmin - zero_point) for zero_point in zero_points],
    }
    return entry | ({"block_size": encoding.block_size} if blocks else {})


def _can_raise(graph: Graph, opset: int) -> bool:
    """Tells whether every operator means in `opset` what it means now, so that the number can simply be raised."""
    if opset <= graph.opset():
        return False
    nodes = [node for node in graph.nodes if not node.domain]
    return graph.opset() >= _SAFE_TO_RAISE_FROM and all(_means_the_same(node, graph.opset(), opset) for node in nodes)


def _means_the_same(node: Node, old: int, new: int) -> bool:
    before, after = schema(node.op_type, old, ""), schema(node.op_type, new, "")
    if before is None or after is None:
        return False
    if before.since_version == after.since_version:
        return True
    if node.op_type == "Split" and len(node.inputs) == 1:
        return False  # from 18 on it asks for num_outputs
    return all(name in after.attributes for name, _ in node.attributes) and len(node.inputs) <= after.max_input


def _with_opset(model: Model, opset: int) -> Model:
    """Returns the model at a newer opset, its QuantizeLinear and DequantizeLinear nodes all of ONNX's own set."""
    graph = model.graph
    own = ("QuantizeLinear", "DequantizeLinear")
    nodes = tuple(
        replace(node, domain="") if node.domain == MICROSOFT and node.op_type in own else node for node in graph.nodes
    )
    opsets = dict(graph.opsets) | {"": opset}
    if not any(node.domain == MICROSOFT for node in nodes):
        opsets.pop(MICROSOFT, None)
    return model.replace(graph=replace(graph, nodes=nodes, opsets=tuple(sorted(opsets.items()))))


def _write_text(path: Path, text: str) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".ptqjax-") as folder:
            half = Path(folder) / path.name
            half.write_text(text, encoding="utf-8")
            half.replace(path)
    except OSError as error:
        raise OutputError(
            f"'{path}' cannot be written: {error.strerror}; expected an existing folder with write permission"
        ) from error
