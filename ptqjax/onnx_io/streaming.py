"""A model written to one file tensor by tensor: byte for byte what protobuf would serialize, without a copy of it all.

In protobuf's encoding a message is its fields one after another, each a tag, and for bytes and messages a length: so a
model is what stands before its graph, the graph's own fields with its tensors between them, and what stands behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO, TypeVar

import numpy as np
import onnx
import onnx.helper

from ptqjax.ir import Model
from ptqjax.mapped import release
from ptqjax.onnx_io.protos import tensor_proto, to_proto

LARGE = 2**20
"""Bytes from which on a tensor is written by itself."""
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # numbers of the fields of ModelProto, GraphProto, TensorProto
_LENGTH_DELIMITED = 2
_BITS = {"int4": 4, "int2": 2, "float4_e2m1fn": 4}  # of an element of the types of which several share a byte
_Message = TypeVar("_Message", onnx.ModelProto, onnx.GraphProto)
_SEVEN_BITS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Apart:
    """A model's structure, and its large tensors beside it."""

    proto: onnx.ModelProto
    """The model without its large tensors; with types and shapes of all outputs, once they are known."""
    tensors: Mapping[str, np.ndarray]
    """The large tensors by name."""

    def stand_in(self) -> onnx.ModelProto:
        """Returns the model with inputs of the same types and shapes in place of its large tensors: for checks."""
        found = onnx.ModelProto()
        found.CopyFrom(self.proto)
        for name, value in self.tensors.items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            found.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))
        return found


def taken_apart(model: Model) -> Apart:
    """Returns the model's structure, and its large tensors as they lie in memory, apart."""
    large = {name: np.asarray(value) for name, value in model.params.items() if np.asarray(value).nbytes >= LARGE}
    params = {name: value for name, value in model.params.items() if name not in large}
    constants = tuple(entry for entry in model.graph.constants if not _is_large(entry[1].value))
    large |= {name: each.value for name, each in model.graph.constants if _is_large(each.value)}
    rest = model.replace(params=params, graph=replace(model.graph, constants=constants))
    return Apart(proto=to_proto(rest), tensors=large)


def _is_large(value: np.ndarray) -> bool:
    return value.dtype != object and value.nbytes >= LARGE


def write_apart(apart: Apart, file: BinaryIO) -> None:
    """Writes the model, each of its tensors in its place among the others, by name."""
    before, behind = _around(apart.proto, _GRAPH)
    ahead, after = _around(apart.proto.graph, _INITIALIZER)
    small = {tensor.name: tensor for tensor in apart.proto.graph.initializer}
    heads = {name: _head(name, value) for name, value in apart.tensors.items()}
    sizes = {name: len(head) + _num_bytes(apart.tensors[name]) for name, head in heads.items()}
    sizes |= {name: tensor.ByteSize() for name, tensor in small.items()}
    length = len(ahead) + len(after) + sum(len(_tag(_INITIALIZER, size)) + size for size in sizes.values())
    file.write(before + _tag(_GRAPH, length) + ahead)
    for name in sorted(sizes):
        file.write(_tag(_INITIALIZER, sizes[name]))
        if name in small:
            file.write(small[name].SerializeToString())
            continue
        file.write(heads[name])
        file.writelines(_parts(apart.tensors[name]))
        release(apart.tensors[name])
    file.write(after + behind)


def _around(message: _Message, field: int) -> tuple[bytes, bytes]:
    """Returns the bytes of the fields with smaller numbers than `field`, and of those with larger."""
    before, behind = (type(message).FromString(message.SerializeToString()) for _ in range(2))
    for descriptor, _ in message.ListFields():
        if descriptor.number >= field:
            before.ClearField(descriptor.name)
        if descriptor.number <= field:
            behind.ClearField(descriptor.name)
    return before.SerializeToString(), behind.SerializeToString()


def _head(name: str, value: np.ndarray) -> bytes:
    """Returns a tensor's message up to its contents, which are its last field."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    head = onnx.TensorProto(name=name, data_type=kind, dims=value.shape).SerializeToString()
    return head + _tag(_RAW_DATA, _num_bytes(value))


def _num_bytes(value: np.ndarray) -> int:
    """Returns how many bytes a tensor's contents take in a file, where elements of less than a byte share one."""
    bits = _BITS.get(value.dtype.name.removeprefix("u"), 8 * value.itemsize)
    return (value.size * bits + 7) // 8


def _parts(value: np.ndarray) -> Iterator[memoryview | bytes]:
    """Yields the bytes of a tensor as a file holds them."""
    flat = np.ascontiguousarray(value).reshape(-1)
    if value.dtype.isbuiltin == 1:
        yield flat.view(np.uint8).data
        return
    for start in range(0, flat.size, LARGE):  # narrow types are not NumPy's own: a copy of each part
        yield tensor_proto(flat[start : start + LARGE]).raw_data


def _tag(field: int, length: int) -> bytes:
    """Returns what stands before a field of `length` bytes."""
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number >> _SEVEN_BITS:
        found.append(number & 127 | 128)
        number >>= _SEVEN_BITS
    return bytes([*found, number])
