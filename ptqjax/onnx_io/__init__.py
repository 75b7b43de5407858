"""Protobuf on one side, the intermediate representation on the other: the only place that knows `onnx`."""

from ptqjax.onnx_io.protos import to_proto
from ptqjax.onnx_io.read import read
from ptqjax.onnx_io.write import write

__all__ = ["read", "to_proto", "write"]
