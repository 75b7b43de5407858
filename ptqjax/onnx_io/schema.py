"""What ONNX's operator schemas say: attribute types and defaults, by operator set version."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import onnx
import onnx.defs


@cache
def schema(op_type: str, opset: int, domain: str) -> onnx.defs.OpSchema | None:
    """Returns the schema that holds for the operator at `opset`, or None where ONNX knows no such operator."""
    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None


@cache
def default_attributes(op_type: str, opset: int, domain: str) -> tuple[onnx.AttributeProto, ...]:
    """Returns the attributes that have a default in the operator's schema, as protobuf; none for unknown operators."""
    found = schema(op_type, opset, domain)
    if found is None:
        return ()
    defaults = ((name, attribute.default_value) for name, attribute in sorted(found.attributes.items()))
    return tuple(value for _, value in defaults if value.type != onnx.AttributeProto.UNDEFINED)


@cache
def attribute_type(op_type: str, opset: int, domain: str, name: str) -> int | None:
    """Returns the AttributeProto type that the schema gives to an attribute; None where there is no schema for it."""
    found = schema(op_type, opset, domain)
    if found is None or name not in found.attributes:
        return None
    kind: Any = found.attributes[name].type
    return int(kind.value)


class Arity(NamedTuple):
    """How many inputs and outputs an operator takes and gives."""

    min_inputs: int
    max_inputs: int
    max_outputs: int


@cache
def arity(op_type: str, opset: int, domain: str) -> Arity | None:
    """Returns the numbers of inputs and outputs that the schema allows; None where there is no schema."""
    found = schema(op_type, opset, domain)
    return None if found is None else Arity(found.min_input, found.max_input, found.max_output)
