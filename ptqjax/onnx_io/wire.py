"""An ONNX file without its large tensors: what protobuf has to parse of it, and where in the file the tensors lie.

A protobuf parser copies every tensor into objects of its own, from which NumPy copies it again. So before anything is
parsed, the bytes are walked once: the contents of each large tensor are left out, and a note takes their place that
says where they are. Then each tensor is copied once, straight out of the file.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import onnx

_LARGE = 1024  # bytes; smaller tensors stay where they are, because the parser reads shapes and axes from them

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types; its groups occur in no ONNX file
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT = 10  # bytes
_LAST_BYTE = 0x7F  # the largest byte that ends a varint: all before it have the highest bit set
_MAX_DEPTH = 100  # messages within messages; protobuf's own limit

# Which messages hold tensors, and in which of their fields: (message, field number) -> message in that field.
_FIELDS = {
    ("model", 7): "graph",
    ("model", 25): "function",
    ("function", 7): "node",
    ("graph", 1): "node",
    ("graph", 5): "tensor",
    ("graph", 15): "sparse",
    ("node", 5): "attribute",
    ("attribute", 5): "tensor",
    ("attribute", 6): "graph",
    ("attribute", 10): "tensor",
    ("attribute", 11): "graph",
    ("attribute", 22): "sparse",
    ("attribute", 23): "sparse",
    ("sparse", 1): "tensor",
    ("sparse", 2): "tensor",
}
_RAW_DATA = 9  # of a TensorProto
_DATA_LOCATION = 14

_HERE = f"\0{secrets.token_hex(16)}"  # marks a note; a file cannot contain one of its own, as it does not know this


class Malformed(Exception):  # noqa: N818 (it leaves this package as a ModelError)
    """The bytes are no protobuf message that a walk can follow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A part of a file."""

    start: int
    """Its first byte."""
    length: int
    """The number of its bytes."""


def without_large_tensors(data: memoryview) -> bytes:
    """Returns the model in `data`, serialized, with a note (`span_of`) in place of the contents of each large tensor.

    Raises:
        Malformed: A field reaches past the end of its message, or messages are nested too deeply.
    """
    try:
        return b"".join(_skeleton(data, "model", Span(start=0, length=len(data)), 0))
    except IndexError as error:
        raise Malformed from error


def span_of(tensor: onnx.TensorProto) -> Span | None:
    """Returns where the contents of a tensor lie that was left out; None for a tensor that was not."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL or not tensor.external_data:
        return None
    note = tensor.external_data[-1]
    if note.key != _HERE:
        return None
    start, length = map(int, note.value.split(":"))
    return Span(start=start, length=length)


def _skeleton(data: memoryview, message: str, span: Span, depth: int) -> Iterator[bytes | memoryview]:
    """Yields the parts of a message that stay."""
    if depth > _MAX_DEPTH:
        raise Malformed
    kept_from = span.start
    for number, start, content in _fields(data, span):
        inner = _FIELDS.get((message, number))
        if inner is None or content is None:
            continue
        yield data[kept_from:start]
        parts = _tensor(data, content) if inner == "tensor" else _skeleton(data, inner, content, depth + 1)
        body = b"".join(parts)
        yield _varint(number << 3 | _BYTES) + _varint(len(body))
        yield body
        kept_from = content.start + content.length
    yield data[kept_from : span.start + span.length]


def _tensor(data: memoryview, span: Span) -> Iterator[bytes | memoryview]:
    """Yields the parts of a tensor that stay, and the note."""
    fields = list(_fields(data, span))
    raw = [(start, content) for number, start, content in fields if number == _RAW_DATA and content is not None]
    is_external = any(number == _DATA_LOCATION for number, _, _ in fields)
    if len(raw) != 1 or raw[0][1].length < _LARGE or is_external:
        yield data[span.start : span.start + span.length]
        return
    start, content = raw[0]
    yield data[span.start : start]
    yield data[content.start + content.length : span.start + span.length]
    note = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    note.external_data.add(key=_HERE, value=f"{content.start}:{content.length}")
    yield note.SerializeToString()


def _fields(data: memoryview, span: Span) -> Iterator[tuple[int, int, Span | None]]:
    """Yields number, first byte (of the tag) and content of the fields that are large, or numbers, which have none."""
    position, end = span.start, span.start + span.length
    while position < end:
        start, tag = position, data[position]
        position += 1
        if tag > _LAST_BYTE:
            tag, position = _read_varint(data, start)
        if tag & 7 != _BYTES:
            position = _end_of_scalar(data, start)
            yield tag >> 3, start, None
            continue
        length = data[position]
        position += 1
        if length > _LAST_BYTE:
            length, position = _read_varint(data, position - 1)
        position += length
        if position > end:
            raise Malformed
        if length >= _LARGE:
            yield tag >> 3, start, Span(start=position - length, length=length)
    if position > end:
        raise Malformed


def _end_of_scalar(data: memoryview, start: int) -> int:
    """Returns where a field ends that is a number, from where its tag starts."""
    tag, position = _read_varint(data, start)
    if tag & 7 == _VARINT:
        return _read_varint(data, position)[1]
    if tag & 7 in _FIXED_SIZES:
        return position + _FIXED_SIZES[tag & 7]
    raise Malformed


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(data[position : position + _MAX_VARINT]):
        value |= (byte & 0x7F) << (7 * index)
        if byte <= _LAST_BYTE:
            return value, position + index + 1
    raise Malformed


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > _LAST_BYTE:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*parts, value))
