"""From a tensor in protobuf to a read-only array: sizes are checked before memory is taken, large ones are mapped."""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from ptqjax.errors import ModelError
from ptqjax.onnx_io.limits import as_text
from ptqjax.onnx_io.wire import Span, span_of

_KINDS = onnx.TensorProto
_BITS = {
    kind: bits
    for bits, names in (
        (2, ("UINT2", "INT2")),
        (4, ("UINT4", "INT4", "FLOAT4E2M1")),
        (6, ("FLOAT6E2M3", "FLOAT6E3M2")),
    )
    for name in names
    if (kind := getattr(_KINDS, name, None)) is not None  # older releases of onnx do not have them all
}
"""Bits of an element of the types of which several share a byte."""

_MAX_RANK = 64  # NumPy's own limit
_DENSE_FOR_FREE = 2**24  # bytes that a sparse tensor may become, however few elements it stores
_DENSE_FACTOR = 64  # and how often larger than what is stored it may become beyond
_GROWN_FOR_FREE = 2**27  # bytes that all sparse tensors and those of narrow types may take
_GROWN_FACTOR = 8  # or how often the size of the files


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """Where the contents of a model's tensors lie, besides in its protobuf messages."""

    data: memoryview | None = None
    """The bytes of the model's own file, where tensors were left out of the messages (`wire`)."""
    path: Path | None = None
    """The model's file; None for a model that has none, which cannot refer to others either."""
    _mapped: dict[Path, np.ndarray] = field(default_factory=dict, repr=False)
    _copied: dict[Span, np.ndarray] = field(default_factory=dict, repr=False)
    _grown: list[int] = field(default_factory=list, repr=False)

    @property
    def num_bytes(self) -> int | None:
        """The size of the files that have been touched; None for a model that came without its bytes."""
        return None if self.data is None else len(self.data) + sum(file.nbytes for file in self._mapped.values())

    def copied(self, span: Span) -> np.ndarray:
        """Returns bytes of the model's own file, copied once however many tensors hold them."""
        assert self.data is not None  # noqa: S101 (a span is of a file)
        if span not in self._copied:
            self._copied[span] = np.frombuffer(self.data, np.uint8, span.length, span.start).copy()
            self._copied[span].flags.writeable = False
        return self._copied[span]

    def grow(self, num_bytes: int, where: str) -> None:
        """Notes that a tensor takes more memory than its file.

        Raises:
            ModelError: All such tensors together take far more than the files.
        """
        self._grown.append(num_bytes)
        if sum(self._grown) > _GROWN_FOR_FREE + _GROWN_FACTOR * (self.num_bytes or 0):
            raise ModelError(f"{where}: its tensors take {sum(self._grown)} bytes, far more than the file stores")

    def mapped(self, path: Path) -> np.ndarray:
        """Returns the bytes of another file, mapped into memory once and read when touched."""
        if path not in self._mapped:
            self._mapped[path] = np.asarray(np.memmap(path, np.uint8, mode="r"))
        return self._mapped[path]


def array_of(tensor: onnx.TensorProto, storage: Storage) -> np.ndarray:
    """Returns the values of a tensor as a read-only array: external data as a view of the mapped file, else a copy.

    A file that is mapped must not be changed in place while the array is in use.

    Raises:
        ModelError: Its external data is missing, outside the model's folder or shorter than said, or its contents
            contradict its type and shape. The message names the tensor.
    """
    array = _array(tensor, storage)
    array.flags.writeable = False
    return array


def dense(tensor: onnx.SparseTensorProto, storage: Storage) -> np.ndarray:
    """Returns the values of a sparse tensor as an ordinary array.

    Raises:
        ModelError: It would become far larger than what is stored, or its parts contradict each other.
    """
    values, indices = array_of(tensor.values, storage), array_of(tensor.indices, storage)
    shape, where = tuple(tensor.dims), f"sparse tensor '{tensor.values.name}' (shape {list(tensor.dims)})"
    size = _num_elements(shape, where) * values.dtype.itemsize
    if size > _DENSE_FOR_FREE and size > _DENSE_FACTOR * (values.nbytes + indices.nbytes):
        raise ModelError(f"{where} would take {size} bytes, far more than it stores; export it dense")
    if values.ndim != 1 or indices.dtype != np.int64 or indices.shape[:1] != values.shape:
        raise ModelError(f"{where}: {values.shape} values do not fit {indices.dtype} indices {indices.shape}")
    storage.grow(size, where)
    array = np.zeros(shape, values.dtype)
    places = (indices,) if indices.ndim == 1 else tuple(indices.T)
    try:
        flat = places[0] if indices.ndim == 1 else np.ravel_multi_index(places, shape)
        array.reshape(-1)[flat] = values
    except (ValueError, IndexError) as error:
        raise ModelError(f"{where}: an index is outside of the tensor ({error})") from error
    array.flags.writeable = False
    return array


def _array(tensor: onnx.TensorProto, storage: Storage) -> np.ndarray:
    where = f"initializer '{tensor.name}' (shape {list(tensor.dims)})"
    shape = tuple(tensor.dims)
    count = _num_elements(shape, where)
    if tensor.HasField("segment"):
        raise ModelError(f"{where} is a segment of a larger tensor, which is not supported; export it whole")
    if tensor.data_type == _KINDS.STRING:
        _expect(len(tensor.string_data), count, where, "strings")
        texts = [text.decode("utf-8", errors="surrogateescape") for text in tensor.string_data]
        return np.array(texts, dtype=object).reshape(shape)
    dtype = _dtype(tensor, where)
    bits = _BITS.get(tensor.data_type, 8 * dtype.itemsize)
    num_bytes = (count * bits + 7) // 8
    if tensor.data_location == _KINDS.EXTERNAL:
        span = span_of(tensor)
        content = _external(tensor, num_bytes, storage, where) if span is None else storage.copied(span)
    elif tensor.HasField("raw_data"):
        content = np.frombuffer(tensor.raw_data, np.uint8)
    else:
        _expect(_num_stored(tensor), _num_entries(count, bits, dtype), where, "numbers")
        return _from_numbers(tensor, shape, where)
    _expect(content.size, num_bytes, where, "bytes")
    if tensor.data_type in _BITS:
        storage.grow(2 * count, where)
        packed = onnx.TensorProto(data_type=tensor.data_type, dims=shape, raw_data=content.tobytes())
        return _from_numbers(packed, shape, where)
    return content.view(dtype).reshape(shape)


def _from_numbers(tensor: onnx.TensorProto, shape: tuple[int, ...], where: str) -> np.ndarray:
    try:
        return np.array(onnx.numpy_helper.to_array(tensor)).reshape(shape)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ModelError(f"{where} cannot be read: {error}; export it again") from error


def _num_elements(shape: tuple[int, ...], where: str) -> int:
    if len(shape) > _MAX_RANK or any(size < 0 for size in shape):
        raise ModelError(f"{where}: a shape has at most {_MAX_RANK} sizes, none of them negative")
    if math.prod(max(size, 1) for size in shape) > np.iinfo(np.int64).max // 16:
        raise ModelError(f"{where}: no tensor is that large; the file is damaged")
    return math.prod(shape)


def _dtype(tensor: onnx.TensorProto, where: str) -> np.dtype:
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where} is of the element type {tensor.data_type}, which ONNX does not have") from error


def _num_stored(tensor: onnx.TensorProto) -> int:
    """Returns how many numbers the message holds in the field for its type."""
    return len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))


def _num_entries(count: int, bits: int, dtype: np.dtype) -> int:
    """Returns how many numbers a message holds for `count` elements: elements of 2 and 4 bits share a byte."""
    if bits in {2, 4}:
        return (count * bits + 7) // 8
    return 2 * count if dtype.kind == "c" else count


def _expect(found: int, expected: int, where: str, what: str) -> None:
    if found != expected:
        raise ModelError(
            f"{where} cannot be read: it holds {found} {what}, its type and shape ask for {expected}; export it again"
        )


def _external(tensor: onnx.TensorProto, num_bytes: int, storage: Storage, where: str) -> np.ndarray:
    """Returns the bytes of a tensor in another file, mapped."""
    if storage.path is None:
        raise ModelError(f"{where} lies in another file; pass the model's path, not its bytes")
    entries = {as_text(entry.key): as_text(entry.value) for entry in tensor.external_data}
    where = f"{where} in the external file '{entries.get('location', '')}'"
    path = _beside(storage.path, entries.get("location", ""), where)
    offset, length = _number(entries, "offset", 0, where), _number(entries, "length", num_bytes, where)
    _expect(length, num_bytes, where, "bytes")
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"{where} cannot be read: '{path}' is no regular file")
        if offset + length > found.st_size:
            raise ModelError(
                f"{where} cannot be read: it ends at byte {offset + length}, the file at byte {found.st_size}; "
                "the file is truncated or of another model"
            )
        return storage.mapped(path)[offset : offset + length] if length else np.empty(0, np.uint8)
    except OSError as error:
        reason = error.strerror or error
        raise ModelError(f"{where} cannot be read: {reason}; keep external data beside the model") from error


def _beside(model: Path, location: str, where: str) -> Path:
    """Returns the real path of a file that a model refers to; it has to lie in the model's folder or below.

    A model that is itself a link into a store of files may refer to links into the same store.
    """
    try:
        unfit = not location or Path(location).is_absolute() or ".." in Path(location).parts or "\\" in location
        path = Path(os.path.realpath(model.parent / location))
        folders = (Path(os.path.realpath(model.parent)), Path(os.path.realpath(model)).parent)
    except (OSError, ValueError) as error:
        raise ModelError(f"{where} cannot be read: the file has no proper name ({error})") from error
    if unfit or not any(path.is_relative_to(folder) for folder in folders):
        raise ModelError(
            f"{where} cannot be read: it lies outside of the model's folder; keep external data beside the model"
        )
    return path


def _number(entries: dict[str, str], key: str, default: int, where: str) -> int:
    text = entries.get(key)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20):  # noqa: PLR2004 (digits of the largest file)
        raise ModelError(f"{where} cannot be read: its {key} is '{text}'; expected a number of bytes")
    return int(text)
