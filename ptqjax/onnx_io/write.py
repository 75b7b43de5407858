"""Writes a checked model to an ONNX file atomically; past 2 GB, tensors go to a file beside it."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.shape_inference

from ptqjax.errors import ModelError, OutputError
from ptqjax.ir import Model
from ptqjax.onnx_io.protos import tensor_proto, to_proto

_LARGEST_PROTOBUF = 2**31 - 2**24  # bytes; beyond, tensors go to a file beside the model
_LARGE = 1024  # bytes of a tensor that goes there; shapes are read from the smaller ones
_ALIGNMENT = 4096  # bytes; so that tensors can be mapped


def write(model: Model, path: str | os.PathLike[str]) -> None:
    """Writes the model as an ONNX file; `read` is the inverse. Statistics are not stored.

    Nothing half-written is ever left under `path`: the file is written beside it and then renamed. Tensors of a model
    past 2 GB go into NAME.data beside it. Types and shapes that graph outputs lack are inferred and written.

    Raises:
        OutputError: The folder is missing or cannot be written.
        ModelError: The model does not pass ONNX's checker.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".ptqjax-") as folder:
            half, data = Path(folder) / path.name, Path(folder) / f"{path.name}.data"
            if _num_bytes(model) > _LARGEST_PROTOBUF:
                _write_in_two(model, half, data)
                _publish_in_two(half, data, path)
            else:
                proto = _with_output_types(to_proto(model))
                check(proto)
                half.write_bytes(proto.SerializeToString())
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
    _check(_with_declared_shapes(proto))


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


def _check(model: onnx.ModelProto | str) -> None:
    """Checks a model, or the file of one that has external data."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ModelError(f"the model is not valid ONNX: {error}") from error


def _num_bytes(model: Model) -> int:
    constants = sum(value.nbytes for value in model.graph.constant_values.values())
    return constants + sum(value.nbytes for value in model.params.values())


def _write_in_two(model: Model, path: Path, data: Path) -> None:
    """Writes the model's structure and its large tensors, one after another, as they lie in memory."""
    with data.open("wb") as file:
        proto = _with_output_types(to_proto(model, _Appended(file, data.name)))
    path.write_bytes(_with_declared_shapes(proto).SerializeToString())
    _check(str(path))
    path.write_bytes(proto.SerializeToString())


def _publish_in_two(half: Path, data: Path, path: Path) -> None:
    """Gives both files their places; where one cannot have it, an older model there keeps its own tensors."""
    place, older = path.parent / data.name, data.with_name("older")
    if place.is_file():
        place.replace(older)
    try:
        data.replace(place)
        half.replace(path)
    except OSError:
        if older.is_file():
            older.replace(place)
        else:
            place.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class _Appended:
    """Stores tensors at the end of a file."""

    file: BinaryIO
    """The file."""
    location: str
    """Its name, relative to the model's folder."""

    def __call__(self, value: np.ndarray, name: str) -> onnx.TensorProto:
        """Returns a tensor that says where its contents are; small ones and strings hold them."""
        if value.dtype == object or value.nbytes < _LARGE:
            return tensor_proto(value, name)
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        content = _packed(value)
        self.file.write(bytes(-self.file.tell() % _ALIGNMENT))
        offset = self.file.tell()
        self.file.write(content.data)
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=value.shape, data_location=onnx.TensorProto.EXTERNAL)
        for key, text in (("location", self.location), ("offset", offset), ("length", content.nbytes)):
            tensor.external_data.add(key=key, value=str(text))
        return tensor


def _packed(value: np.ndarray) -> np.ndarray:
    """Returns the bytes of a tensor as a file holds them; elements of less than a byte share one."""
    if value.dtype.isbuiltin != 1 and value.itemsize == 1:  # the narrow types are not NumPy's own
        return np.frombuffer(tensor_proto(value).raw_data, np.uint8)
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _with_output_types(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model with types and shapes for the outputs that lack them, where they can be inferred."""
    missing = [info for info in proto.graph.output if _lacks_shape(info)]
    if not missing:
        return proto
    found = {info.name: info.type for info in inferred(proto).graph.output}
    for info in missing:
        kind = found[info.name].WhichOneof("value")
        if not info.type.HasField("tensor_type"):
            info.type.CopyFrom(found[info.name])
        elif kind == "tensor_type" and found[info.name].tensor_type.HasField("shape"):
            info.type.tensor_type.shape.CopyFrom(found[info.name].tensor_type.shape)
        if info.type.WhichOneof("value") is None:
            info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return proto


def _lacks_shape(info: onnx.ValueInfoProto) -> bool:
    kind = info.type.WhichOneof("value")
    return kind is None or (kind == "tensor_type" and not info.type.tensor_type.HasField("shape"))


def _with_declared_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model as the checker wants it: it asks for output shapes, which files need not state.

    A shape that could not be inferred stands in no contradiction to anything: one without axes passes.
    """
    missing = [i for i, info in enumerate(proto.graph.output) if _lacks_shape(info)]
    if not missing:
        return proto
    stated = onnx.ModelProto()
    stated.CopyFrom(proto)
    for index in missing:
        stated.graph.output[index].type.tensor_type.shape.SetInParent()
    return stated
