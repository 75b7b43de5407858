"""From a path, bytes or a ModelProto to a ModelProto that is small: large tensors stay where they are."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError

from ptqjax.errors import ModelError
from ptqjax.onnx_io.tensors import Storage
from ptqjax.onnx_io.wire import Malformed, without_large_tensors
from ptqjax.places import require_model


def load(source: str | os.PathLike[str] | bytes | onnx.ModelProto, label: str) -> tuple[onnx.ModelProto, Storage]:
    """Returns the model without the contents of its large tensors, and where these lie. A ModelProto stays as it is.

    Raises:
        ModelError: The file is missing, empty, truncated or not ONNX; the message begins with `label`.
    """
    if isinstance(source, onnx.ModelProto):
        return _loaded_proto(source, label)
    path = None if isinstance(source, bytes) else Path(source)
    data = memoryview(source) if isinstance(source, bytes) else _mapped(Path(source), label)
    if not data:
        raise ModelError(f"{label} is empty; expected an ONNX file")
    return _parsed(data, label), Storage(data=data, path=path)


def _loaded_proto(proto: onnx.ModelProto, label: str) -> tuple[onnx.ModelProto, Storage]:
    """Returns the model itself; where functions have to be inlined, which copies it, one without its large tensors."""
    if not proto.functions:
        return proto, Storage()
    try:
        data = memoryview(proto.SerializeToString())
    except (EncodeError, ValueError) as error:
        raise ModelError(f"{label} is too large for protobuf ({error}); save it with external data") from error
    return _parsed(data, label), Storage(data=data)


def _mapped(path: Path, label: str) -> memoryview:
    """Returns the bytes of a file, mapped: what is not copied out of it takes no memory."""
    require_model(path, label)
    try:
        if not path.stat().st_size:
            return memoryview(b"")
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{label} cannot be opened: {reason}; expected the path of an ONNX file") from error


def _parsed(data: memoryview, label: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        try:
            proto.ParseFromString(without_large_tensors(data))
        except Malformed:
            proto.ParseFromString(bytes(data))
    except (DecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{label} cannot be read as ONNX ({error}): it is truncated or another kind of file; export it again"
        ) from error
    return proto
