"""Types of graph inputs and outputs, and types as attributes: protobuf on one side, `TensorSpec` on the other."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper

from ptqjax.errors import ModelError
from ptqjax.ir import Dimension, TensorSpec
from ptqjax.onnx_io.limits import as_text

_UNKNOWN = np.dtype(np.float32)  # stands for an element type that is not declared
_CONTAINERS = {"sequence_type": "sequence", "optional_type": "optional"}


def spec_of(info: onnx.ValueInfoProto) -> TensorSpec:
    """Returns what a graph declares of one of its inputs or outputs.

    Raises:
        ModelError: It is of no type that ONNX has.
    """
    return spec_of_type(info.type, as_text(info.name))


def spec_of_type(kind: onnx.TypeProto, name: str = "") -> TensorSpec:
    """Returns a type as a `TensorSpec`, unnamed unless `name` is given.

    Raises:
        ModelError: See `spec_of`.
    """
    words: list[str] = []
    value = kind.WhichOneof("value")
    while value in {*_CONTAINERS, "map_type"}:
        inner = getattr(kind, value)
        words.append(_CONTAINERS.get(value) or f"map:{_dtype(inner.key_type, name).name}")
        kind = inner.value_type if value == "map_type" else inner.elem_type
        value = kind.WhichOneof("value")
    if value is None:
        return TensorSpec(name=name, dtype=_UNKNOWN, shape=None, kind=" ".join((*words, "unknown")))
    if value not in {"tensor_type", "sparse_tensor_type"}:
        raise ModelError(f"'{name}' is a {value}, which is not supported; expected tensors, sequences or optionals")
    words += ["sparse"] if value == "sparse_tensor_type" else []
    tensor = getattr(kind, value)
    if tensor.elem_type == onnx.TensorProto.UNDEFINED:
        return TensorSpec(name=name, dtype=_UNKNOWN, shape=None, kind=" ".join((*words, "unknown")))
    shape = tuple(_size(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
    dtype = _dtype(tensor.elem_type, name)
    return TensorSpec(name=name, dtype=dtype, shape=shape, kind=" ".join(words) or "tensor")


def value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    """Returns what a graph declares of an input or output, for protobuf."""
    info = onnx.ValueInfoProto(name=spec.name)
    if spec.kind != "unknown":
        info.type.CopyFrom(type_proto(spec))
    return info


def type_proto(spec: TensorSpec) -> onnx.TypeProto:
    """Returns the type in `spec` for protobuf: the inverse of `spec_of_type`."""
    outer, _, inner = spec.kind.partition(" ")
    rest = TensorSpec(name="", dtype=spec.dtype, shape=spec.shape, kind=inner or "tensor")
    element = onnx.helper.np_dtype_to_tensor_dtype(spec.dtype)
    if outer == "sequence":
        return onnx.helper.make_sequence_type_proto(type_proto(rest))
    if outer == "optional":
        return onnx.helper.make_optional_type_proto(type_proto(rest))
    if outer.startswith("map:"):
        key = onnx.helper.np_dtype_to_tensor_dtype(_named(outer.removeprefix("map:")))
        return onnx.helper.make_map_type_proto(key, type_proto(rest))
    if outer == "unknown":
        return onnx.TypeProto()
    if outer == "sparse":
        return onnx.helper.make_sparse_tensor_type_proto(element, spec.shape)
    return onnx.helper.make_tensor_type_proto(element, spec.shape)


def _named(name: str) -> np.dtype:
    return np.dtype(np.object_ if name == "object" else name)


def _dtype(element: int, name: str) -> np.dtype:
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"'{name}' is of the element type {element}, which ONNX does not have") from error


def _size(dim: onnx.TensorShapeProto.Dimension) -> Dimension:
    """Returns the size or its symbol; None where unknown, which some exporters write as 0 or -1."""
    return dim.dim_value if dim.dim_value > 0 else (as_text(dim.dim_param) or None)
