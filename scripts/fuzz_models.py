"""The models that `fuzz_read` mutates: small, and with every part that the file format has."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
from onnx.backend.test.loader import load_model_tests

DATA_FILE = "weights.bin"
"""The external file that the models refer to; 2048 bytes."""

_LARGEST = 20_000  # bytes of a case of ONNX's that is used
_EVERY = 8  # one case in so many


def seeds() -> list[bytes]:
    """Returns models, serialized: some made for this, and a sample of ONNX's own cases."""
    cases = [case.model.SerializeToString() for case in load_model_tests(kind="node")[::_EVERY] if case.model]
    own = [make().SerializeToString() for make in (_arithmetic, _functions, _control, _types, _storage)]
    return own * 20 + [case for case in cases if len(case) < _LARGEST]


def _info(name: str, kind: int = onnx.TensorProto.FLOAT, shape: object = ("n", 3)) -> onnx.ValueInfoProto:
    return oh.make_tensor_value_info(name, kind, shape)  # pyright: ignore[reportArgumentType]


def _model(nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto], **parts: object) -> onnx.ModelProto:
    graph = oh.make_graph(nodes, "g", [_info("x")], [_info("y", shape=None)], tensors)
    opsets = [oh.make_opsetid("", 17), oh.make_opsetid("own", 1)]
    return oh.make_model(graph, opset_imports=opsets, ir_version=8, **parts)  # pyright: ignore[reportArgumentType]


def _arithmetic() -> onnx.ModelProto:
    """Constants of which others are computed: shapes, casts, weight norm."""
    nodes = [
        oh.make_node("Shape", ["w"], ["shape"]),
        oh.make_node("Constant", [], ["one"], value_int=1),
        oh.make_node("Gather", ["shape", "one"], ["size"], axis=0),
        oh.make_node("Unsqueeze", ["size", "axes"], ["sizes"]),
        oh.make_node("ConstantOfShape", ["sizes"], ["zeros"], value=onh.from_array(np.zeros(1, np.float32))),
        oh.make_node("Range", ["one", "size", "one"], ["range"]),
        oh.make_node("Tile", ["zeros", "sizes"], ["tiles"]),
        oh.make_node("Expand", ["zeros", "sizes"], ["wide"]),
        oh.make_node("Slice", ["w", "axes", "sizes"], ["part"]),
        oh.make_node("Pad", ["part", "pads"], ["padded"]),
        oh.make_node("Concat", ["part", "w"], ["both"], axis=0),
        oh.make_node("ReduceSum", ["both", "axes"], ["norm"], keepdims=0),
        oh.make_node("Div", ["w", "norm"], ["divided"]),
        oh.make_node("Transpose", ["divided"], ["turned"], perm=[1, 0]),
        oh.make_node("Cast", ["turned"], ["cast"], to=onnx.TensorProto.FLOAT16),
        oh.make_node("CastLike", ["cast", "w"], ["like"]),
        oh.make_node("Identity", ["like"], ["same"]),
        oh.make_node("MatMul", ["x", "same"], ["product"]),
        oh.make_node("Sum", ["product", "wide", "tiles"], ["h"]),
        oh.make_node("Resize", ["h", "", "norm"], ["y"], mode="nearest"),
    ]
    tensors = [onh.from_array(np.arange(1, 10, dtype=np.float32).reshape(3, 3), "w")]
    tensors += [onh.from_array(np.array([0]), "axes"), onh.from_array(np.array([0, 0, 1, 1]), "pads")]
    return _model(nodes, tensors)


def _functions() -> onnx.ModelProto:
    """Functions that call functions, with attributes; operators whose schemas are functions."""
    opsets = [oh.make_opsetid("", 17), oh.make_opsetid("own", 1)]
    leaky = oh.make_node("LeakyRelu", ["a"], ["b"])
    leaky.attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="slope")
    inner = oh.make_function("own", "Inner", ["a"], ["b"], [leaky], opsets, ["slope"])
    calls = [
        oh.make_node("Inner", ["a"], ["m"], domain="own", slope=0.1),
        oh.make_node("Inner", ["m"], ["b"], domain="own"),
    ]
    outer = oh.make_function("own", "Outer", ["a"], ["b"], calls, opsets, [])
    nodes = [oh.make_node("Outer", ["x"], ["h"], domain="own"), oh.make_node("Bernoulli", ["h"], ["i"])]
    nodes += [oh.make_node("NegativeLogLikelihoodLoss", ["i", "t"], ["j"]), oh.make_node("Celu", ["j"], ["y"])]
    return _model(nodes, [onh.from_array(np.array([0, 1, 2]), "t")], functions=[inner, outer])


def _control() -> onnx.ModelProto:
    """If, Loop and Scan, one within the other, with captured tensors and names that hide others."""
    weight = onh.from_array(np.ones(3, np.float32), "w")
    body = [oh.make_node("Add", ["state", "w"], ["state_out"]), oh.make_node("Identity", ["go"], ["go_out"])]
    kinds = onnx.TensorProto
    loop_inputs = [_info("i", kinds.INT64, []), _info("go", kinds.BOOL, []), _info("state")]
    loop_outputs = [_info("go_out", kinds.BOOL, []), _info("state_out")]
    loop = oh.make_graph(body, "loop", loop_inputs, loop_outputs, [weight])
    looped = [oh.make_node("Loop", ["count", "", "x"], ["out"], body=loop)]
    then = oh.make_graph(looped, "then", [], [_info("out")], [onh.from_array(np.array(3), "count")])
    other = [oh.make_node("Mul", ["x", "w"], ["out"])]
    otherwise = oh.make_graph(other, "else", [], [_info("out")])
    nodes = [
        oh.make_node("ReduceMax", ["x"], ["max"], keepdims=0),
        oh.make_node("Cast", ["max"], ["condition"], to=kinds.BOOL),
        oh.make_node("If", ["condition"], ["y"], then_branch=then, else_branch=otherwise),
    ]
    return _model(nodes, [weight])


def _types() -> onnx.ModelProto:
    """Sequences, optionals, types and strings."""
    kind = oh.make_tensor_type_proto(onnx.TensorProto.FLOAT, ["n", 3])
    nodes = [
        oh.make_node("SequenceConstruct", ["x", "x"], ["seq"]),
        oh.make_node("Optional", ["seq"], ["opt"]),
        oh.make_node("Optional", [], ["none"], type=oh.make_optional_type_proto(kind)),
        oh.make_node("OptionalGetElement", ["opt"], ["got"]),
        oh.make_node("ConcatFromSequence", ["got"], ["y"], axis=0),
    ]
    model = _model(nodes, [onh.from_array(np.array(["a", "b"], object), "texts")])
    model.graph.output.append(oh.make_value_info("seq", oh.make_sequence_type_proto(kind)))
    model.graph.output.append(oh.make_value_info("opt", oh.make_optional_type_proto(oh.make_sequence_type_proto(kind))))
    model.graph.output.append(_info("texts", onnx.TensorProto.STRING, [2]))
    return model


def _storage() -> onnx.ModelProto:
    """Tensors of every type, sparse, external, in raw bytes long and short, and in fields."""
    kinds = onnx.TensorProto
    tensors = [oh.make_tensor(f"t{kind}", kind, [3], [1, 0, 1]) for kind in (1, 2, 3, 5, 6, 7, 9, 10, 11, 12, 13, 16)]
    tensors += [oh.make_tensor(f"t{kind}", kind, [3], [1, 0, 1]) for kind in (17, 18, 19, 20, 21, 22, 23, 24, 25, 26)]
    tensors.append(onh.from_array(np.ones((20, 30), np.float32), "long"))
    external = tensors[-1].__class__(name="external", data_type=kinds.FLOAT, dims=[4, 3], data_location=kinds.EXTERNAL)
    for key, value in (("location", DATA_FILE), ("offset", "16"), ("length", "48")):
        external.external_data.add(key=key, value=value)
    nodes = [oh.make_node("Any", [tensor.name for tensor in (*tensors, external)] + ["few"], ["y"], domain="own")]
    model = _model(nodes, [*tensors, external])
    few = oh.make_sparse_tensor(onh.from_array(np.ones(2, np.float32), "few"), onh.from_array(np.array([1, 5])), [3, 3])
    model.graph.sparse_initializer.append(few)
    return model
