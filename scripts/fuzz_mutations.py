"""How `fuzz_read` changes models: in their bytes, and in their protobuf fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx

_MAX_FIELDS = 4  # that a trial changes
_NUMBERS = (0, 1, -1, 2, 7, 28, 2**7, 2**31 - 1, -(2**31), 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
_TEXTS = ("", "x", "y", "w", "../x", "/dev/zero", "/dev/stdin", "weights.bin", "\0here", "0:99999999999", "Constant")
_OPERATORS = (
    "Identity",
    "If",
    "Loop",
    "Constant",
    "ConstantOfShape",
    "Expand",
    "Tile",
    "Range",
    "Celu",
    "Inner",
    "Outer",
)


def mutated(models: list[bytes], random: np.random.Generator) -> bytes:
    """Returns one of the models with a few changes."""
    data = models[random.integers(len(models))]
    kind = random.random()
    if kind < 0.75:  # noqa: PLR2004 (fields reach further than bytes)
        data = _with_fields_changed(data, models, random)
    if kind > 0.7:  # noqa: PLR2004 (some trials do both)
        data = _with_bytes_changed(data, models, random)
    return data


def _with_bytes_changed(data: bytes, models: list[bytes], random: np.random.Generator) -> bytes:
    for _ in range(random.integers(1, 6)):
        start = int(random.integers(len(data) + 1))
        end = min(len(data), start + int(random.integers(1, 33)))
        other = models[random.integers(len(models))]
        at = int(random.integers(len(other)))
        data = (
            data[:start] + random.bytes(end - start) + data[end:],
            data[:start]
            + bytes([data[start] ^ 1 << random.integers(8)] if start < len(data) else [])
            + data[start + 1 :],
            data[:start] + data[end:],
            data[:end] + data[start:],
            data[:start] + other[at : at + 64] + data[start:],
            data[:start] + b"\xff" * int(random.integers(1, 12)) + data[end:],
            data[:start],
        )[random.integers(7)]
    return data


def _with_fields_changed(data: bytes, models: list[bytes], random: np.random.Generator) -> bytes:
    model = onnx.ModelProto.FromString(data)
    for _ in range(random.integers(1, _MAX_FIELDS + 1)):
        messages = list(_messages(model))
        message = messages[random.integers(len(messages))]
        fields = message.DESCRIPTOR.fields
        used = [field for field, _ in message.ListFields()]
        pool = used if used and random.random() < 0.8 else fields  # noqa: PLR2004 (mostly what is there)
        other = onnx.ModelProto.FromString(models[random.integers(len(models))]) if random.random() < 0.2 else model  # noqa: PLR2004
        _change(message, pool[random.integers(len(pool))], other, random)
    try:
        return model.SerializeToString()
    except (ValueError, UnicodeEncodeError):
        return data


def _change(message: Any, field: Any, other: onnx.ModelProto, random: np.random.Generator) -> None:
    if field.message_type is not None:
        _change_message(message, field, other, random)
        return
    value = _value(field, other, random)
    if not _is_repeated(field):
        setattr(message, field.name, value)
        return
    values = getattr(message, field.name)
    choice = random.integers(4)
    if choice == 0 or not values:
        values.append(value)
    elif choice == 1:
        del values[int(random.integers(len(values))) :]
    elif choice == 2:  # noqa: PLR2004 (one way in four)
        values.extend(list(values)[: 1 + int(random.integers(64))])
    else:
        values[int(random.integers(len(values)))] = value


def _change_message(message: Any, field: Any, other: onnx.ModelProto, random: np.random.Generator) -> None:
    donors = [found for found in _messages(other) if found.DESCRIPTOR is field.message_type]
    if not _is_repeated(field):
        if donors and random.random() < 0.7:  # noqa: PLR2004 (else it is emptied)
            donor = type(donors[0])()
            donor.CopyFrom(donors[random.integers(len(donors))])
            getattr(message, field.name).CopyFrom(donor)
        else:
            message.ClearField(field.name)
        return
    values = getattr(message, field.name)
    choice = random.integers(4)
    if choice == 0 and donors:
        donor = type(donors[0])()
        donor.CopyFrom(donors[random.integers(len(donors))])
        values.add().CopyFrom(donor)
    elif choice == 1 and values:
        del values[int(random.integers(len(values)))]
    elif choice == 2 and values:  # noqa: PLR2004 (one way in four)
        copy = type(values[0])()
        copy.CopyFrom(values[random.integers(len(values))])
        values.add().CopyFrom(copy)
    else:
        values.add()


def _value(field: Any, other: onnx.ModelProto, random: np.random.Generator) -> Any:
    kinds = field
    if field.cpp_type in {kinds.CPPTYPE_FLOAT, kinds.CPPTYPE_DOUBLE}:
        return float(random.choice([0.0, -1.0, 1e38, np.nan, np.inf, random.normal()]))
    if field.cpp_type == kinds.CPPTYPE_ENUM:
        return int(random.choice([value.number for value in field.enum_type.values]))
    if field.cpp_type == kinds.CPPTYPE_STRING:
        return _text(field, other, random)
    low, high = _RANGES[field.cpp_type](kinds)
    number = _NUMBERS[random.integers(len(_NUMBERS))] if random.random() < 0.5 else int(random.integers(0, 30))  # noqa: PLR2004
    return min(max(number, low), high)


_RANGES: dict[int, Callable[[Any], tuple[int, int]]] = {
    1: lambda _: (-(2**31), 2**31 - 1),
    2: lambda _: (-(2**63), 2**63 - 1),
    3: lambda _: (0, 2**32 - 1),
    4: lambda _: (0, 2**64 - 1),
    7: lambda _: (0, 1),
}  # protobuf's numbers for int32, int64, uint32, uint64 and bool


def _text(field: Any, other: onnx.ModelProto, random: np.random.Generator) -> Any:
    if field.type == field.TYPE_BYTES:
        return random.bytes(int(random.integers(0, 64)))
    if field.name == "op_type":
        return str(random.choice(_OPERATORS))
    names = [name for node in other.graph.node for name in (*node.input, *node.output)]
    pool = (*_TEXTS, *names)
    return pool[random.integers(len(pool))]


def _is_repeated(field: Any) -> bool:
    repeated = getattr(field, "is_repeated", None)
    return bool(repeated) if repeated is not None else field.label == field.LABEL_REPEATED


def _messages(message: Any) -> Iterator[Any]:
    """Yields a message and all within it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in value if _is_repeated(field) else (value,):
            yield from _messages(inner)
