"""Reading graphs: subgraphs and their scopes, functions, and every kind of value and attribute, there and back."""

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import onnxruntime as ort
import pytest

from ptqjax import onnx_io
from ptqjax.errors import ModelError
from ptqjax.ir import Constant, Graph, SparseConstant, TensorSpec, text
from ptqjax.ops import lowers, registry

FLOAT, BOOL, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL, onnx.TensorProto.INT64
W = np.arange(1, 4, dtype=np.float32)
X = np.array([[1, -2, 3], [4, 5, -6]], np.float32)


def info(name, kind=FLOAT, shape=("n", 3)):
    return oh.make_tensor_value_info(name, kind, shape)


def body(name, nodes, tensors=(), inputs=(), outputs=("out",)):
    return oh.make_graph(nodes, name, list(inputs), [info(out) for out in outputs], list(tensors))


def proto(nodes, tensors=(), *, opsets=(("", 17), ("own", 1)), outputs=("y",), **parts):
    graph = oh.make_graph(nodes, "g", [info("x")], [info(name) for name in outputs], list(tensors))
    return oh.make_model(graph, opset_imports=[oh.make_opsetid(*opset) for opset in opsets], ir_version=8, **parts)


def chosen(then, other, tensors=()):
    """A model that takes one branch where the largest input is positive."""
    nodes = [
        oh.make_node("ReduceMax", ["x"], ["max"], keepdims=0),
        oh.make_node("Cast", ["max"], ["condition"], to=BOOL),
        oh.make_node("If", ["condition"], ["y"], then_branch=then, else_branch=other),
    ]
    return proto(nodes, tensors)


def run(model, feed=None):
    data = model.SerializeToString()
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": X} if feed is None else feed)


def assert_survives(given, tmp_path):
    """The model is the same function after reading and writing, and a second reading finds the same graph."""
    model = onnx_io.read(given)
    onnx_io.write(model, tmp_path / "m.onnx")
    for found, expected in zip(run(onnx.load(tmp_path / "m.onnx")), run(given), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert text(onnx_io.read(tmp_path / "m.onnx")) == text(model)
    return model


def test_branches_with_weights_of_one_name_keep_them_apart(tmp_path):
    add = [oh.make_node("Add", ["x", "w"], ["out"])]
    mul = [oh.make_node("Mul", ["x", "w"], ["out"])]
    given = chosen(body("then", add, [onh.from_array(W, "w")]), body("else", mul, [onh.from_array(-W, "w")]))
    model = assert_survives(given, tmp_path)
    assert sorted(value[0] for value in model.params.values()) == [-1, 1]
    assert all(not graph.constants for graph in model.graph.nodes[-1].subgraphs)


def test_an_inner_name_that_hides_an_outer_one_is_another_tensor():
    then = [oh.make_node("Relu", ["x"], ["h"]), oh.make_node("Add", ["h", "w"], ["out"])]
    other = [oh.make_node("Identity", ["h"], ["out"])]
    given = chosen(body("then", then, [onh.from_array(W, "w")]), body("else", other), [onh.from_array(-W, "w")])
    given.graph.node.insert(0, oh.make_node("Mul", ["x", "w"], ["h"]))
    model = onnx_io.read(given)
    (branch,) = [graph for graph in model.graph.nodes[-1].subgraphs if graph.name == "then"]
    assert branch.nodes[0].outputs[0] not in model.graph.producers
    captured = next(name for name in branch.nodes[1].inputs if name in model.params)
    np.testing.assert_array_equal(model.params[captured], W)


def test_a_branch_that_reads_through_identities_reads_their_source(tmp_path):
    nodes = [oh.make_node("Identity", ["v"], ["u"]), oh.make_node("Add", ["x", "u"], ["out"])]
    given = chosen(
        body("then", nodes), body("else", [oh.make_node("Mul", ["x", "v"], ["out"])]), [onh.from_array(W, "w")]
    )
    given.graph.node.insert(0, oh.make_node("Identity", ["w"], ["v"]))
    model = assert_survives(given, tmp_path)
    assert set(model.params) == {"w"}
    assert [node.op_type for graph in model.graph.nodes[-1].subgraphs for node in graph.nodes] == ["Mul", "Add"]


def test_a_branch_that_returns_a_constant_keeps_it(tmp_path):
    value = np.full((2, 3), 7, np.float32)
    constant = [oh.make_node("Constant", [], ["out"], value=onh.from_array(value))]
    given = chosen(body("then", constant), body("else", [oh.make_node("Neg", ["x"], ["out"])]))
    assert_survives(given, tmp_path)


def test_loops_within_branches_within_loops(tmp_path):
    inner = body(
        "inner",
        [oh.make_node("Add", ["state", "w"], ["next"]), oh.make_node("Identity", ["go"], ["go_on"])],
        inputs=[info("i", INT64, []), info("go", BOOL, []), info("state")],
        outputs=[],
    )
    inner.output.extend([info("go_on", BOOL, []), info("next")])
    then = body(
        "then", [oh.make_node("Loop", ["count", "", "x"], ["out"], body=inner)], [onh.from_array(np.array(3), "count")]
    )
    other = body("else", [oh.make_node("Sub", ["x", "w"], ["out"])])
    model = assert_survives(chosen(then, other, [onh.from_array(W, "w")]), tmp_path)
    assert "w" in model.params
    assert model.graph.num_readers("w") == 2


def with_functions(opset):
    """A model of operator set 17 with functions, written for `opset`, that call each other."""
    opsets = [oh.make_opsetid("", opset), oh.make_opsetid("own", 1)]
    leaky = oh.make_node("LeakyRelu", ["a"], ["t"])
    leaky.attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="slope")
    inner = oh.make_function("own", "Inner", ["a"], ["t"], [leaky], opsets, ["slope"])
    calls = [oh.make_node("Inner", ["a"], ["t"], domain="own", slope=0.5), oh.make_node("Neg", ["t"], ["b"])]
    outer = oh.make_function("own", "Outer", ["a"], ["b"], calls, opsets, [])
    nodes = [oh.make_node("Outer", ["x"], ["h"], domain="own"), oh.make_node("Outer", ["h"], ["y"], domain="own")]
    return proto(nodes, functions=[inner, outer])


@pytest.mark.parametrize("opset", [16, 17, 18])
def test_functions_are_inlined(tmp_path, opset):
    given = with_functions(opset)
    before = given.SerializeToString(deterministic=True)
    model = onnx_io.read(given)
    assert given.SerializeToString(deterministic=True) == before
    assert [node.op_type for node in model.graph.nodes] == ["LeakyRelu", "Neg"] * 2
    assert model.graph.nodes[0].attribute("alpha") == 0.5
    if opset == 17:  # ONNX Runtime takes functions of the model's own operator set only
        assert_survives(given, tmp_path)


def test_a_function_in_which_operators_mean_something_else_is_an_error():
    with pytest.raises(ModelError, match=r"'Inner'.*LeakyRelu means something else"):
        onnx_io.read(with_functions(15))


def test_an_operator_that_onnx_defines_by_others_is_inlined_unless_it_has_a_lowering(monkeypatch):
    given = proto([oh.make_node("Celu", ["x"], ["y"], alpha=2.0)])
    without = {key: value for key, value in registry._lowerings.items() if key != ("", "Celu")}
    monkeypatch.setattr(registry, "_lowerings", without)
    inlined = onnx_io.read(given)
    assert "Celu" not in {node.op_type for node in inlined.graph.nodes}
    np.testing.assert_allclose(run(onnx_io.to_proto(inlined))[0], run(given)[0], rtol=1e-6)
    lowers("Celu", since=12)(lambda x, /, *, alpha=1.0: x * alpha)
    assert [node.op_type for node in onnx_io.read(given).graph.nodes] == ["Celu"]


def test_a_function_with_a_lowering_of_its_own_is_not_inlined(monkeypatch):
    opsets = [oh.make_opsetid("", 17)]
    function = oh.make_function("own", "Swish2", ["a"], ["b"], [oh.make_node("Relu", ["a"], ["b"])], opsets, [])
    given = proto([oh.make_node("Swish2", ["x"], ["y"], domain="own")], functions=[function])
    assert [node.op_type for node in onnx_io.read(given).graph.nodes] == ["Relu"]
    monkeypatch.setattr(registry, "_lowerings", dict(registry._lowerings))
    lowers("Swish2", since=1, domain="own")(lambda x, /: x)
    assert [node.op_type for node in onnx_io.read(given).graph.nodes] == ["Swish2"]


TENSOR = oh.make_tensor_type_proto(FLOAT, ["n", 3])
KINDS = {
    "tensor": TENSOR,
    "sequence": oh.make_sequence_type_proto(TENSOR),
    "optional": oh.make_optional_type_proto(TENSOR),
    "optional sequence": oh.make_optional_type_proto(oh.make_sequence_type_proto(TENSOR)),
    "sequence map:int64": oh.make_sequence_type_proto(oh.make_map_type_proto(INT64, TENSOR)),
    "sparse": oh.make_sparse_tensor_type_proto(FLOAT, ["n", 3]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs_of_every_kind_survive(kind):
    given = proto([oh.make_node("Any", ["x"], ["y"], domain="own")])
    for value in (given.graph.input[0], given.graph.output[0]):
        value.type.CopyFrom(KINDS[kind])
    model = onnx_io.read(given)
    assert model.graph.inputs == (TensorSpec(name="x", dtype=np.dtype("f4"), shape=("n", 3), kind=kind),)
    again = onnx_io.to_proto(model).graph
    assert (again.input[0].type, again.output[0].type) == (KINDS[kind], KINDS[kind])


def test_sequences_run_after_a_round_trip(tmp_path):
    nodes = [
        oh.make_node("SequenceConstruct", ["x", "x"], ["s"]),
        oh.make_node("SequenceInsert", ["s", "x"], ["t"]),
        oh.make_node("ConcatFromSequence", ["t"], ["y"], axis=0),
    ]
    given = proto(nodes)
    given.graph.output.append(oh.make_value_info("t", KINDS["sequence"]))
    onnx_io.write(onnx_io.read(given), tmp_path / "m.onnx")
    y, t = run(onnx.load(tmp_path / "m.onnx"))
    assert y.shape == (6, 3)
    assert len(t) == 3


def attributes():
    graph = body("body", [oh.make_node("Relu", ["x"], ["out"])])
    sparse = oh.make_sparse_tensor(onh.from_array(W), onh.from_array(np.array([0, 2, 4])), [2, 3])
    yield "i", -(2**63), int
    yield "f", 0.5, float
    yield "s", "text", str
    yield "ints", [1, 2, 3], tuple
    yield "floats", [1.0, 2.0], tuple
    yield "strings", ["a", "b"], tuple
    yield "t", onh.from_array(W), Constant
    yield "ts", [onh.from_array(W), onh.from_array(-W)], tuple
    yield "g", graph, Graph
    yield "gs", [graph, graph], tuple
    yield "sparse", sparse, SparseConstant
    yield "sparses", [sparse], tuple
    yield "tp", TENSOR, TensorSpec
    yield "tps", [TENSOR, KINDS["sequence"]], tuple


@pytest.mark.parametrize(
    ("name", "value", "kind"), list(attributes()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_attributes_of_every_kind_survive(name, value, kind):
    given = proto([oh.make_node("Any", ["x"], ["y"], domain="own", **{name: value})])
    model = onnx_io.read(given)
    assert isinstance(model.graph.nodes[0].attribute(name), kind)
    hash(model.graph)
    text(model)
    assert onnx_io.read(onnx_io.to_proto(model)).graph == model.graph
    (again,) = onnx_io.to_proto(model).graph.node[0].attribute
    assert again.type == given.graph.node[0].attribute[0].type


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in onnx.TensorProto.DataType.values() if kind not in {0, 8}])
def test_tensors_of_every_type_survive(kind, raw):
    dtype = oh.tensor_dtype_to_np_dtype(kind)
    values = np.array([1, 2, 1, 1, 2], np.float32).astype(dtype)
    tensor = onh.from_array(values, "w") if raw else oh.make_tensor("w", kind, [5], [1, 2, 1, 1, 2])
    values = onh.to_array(tensor)
    model = onnx_io.read(proto([oh.make_node("Any", ["x", "w"], ["y"], domain="own")], [tensor]))
    again = onnx_io.read(onnx_io.to_proto(model).SerializeToString())
    for read in (model, again):
        found = read.params.get("w", read.graph.constant_values.get("w"))
        assert found.dtype == dtype
        assert found.tobytes() == values.tobytes()
        assert not found.flags.writeable


def test_text_survives_even_where_it_is_no_utf_8():
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.STRING, dims=[2], string_data=[b"\xff\xfe", b"text"])
    given = proto([oh.make_node("Any", ["x", "w"], ["y"], domain="own", s=b"\xff")], [tensor])
    again = onnx_io.to_proto(onnx_io.read(given)).graph
    assert list(again.initializer[0].string_data) == [b"\xff\xfe", b"text"]
    assert again.node[0].attribute[0].s == b"\xff"


def test_tensors_without_elements_survive(tmp_path):
    tensors = [onh.from_array(np.zeros((0, 3), np.float32), "none")]
    assert_survives(proto([oh.make_node("Concat", ["x", "none"], ["y"], axis=0)], tensors), tmp_path)


def test_outputs_that_are_inputs_or_initializers_survive(tmp_path):
    given = proto([oh.make_node("Relu", ["x"], ["y"])], [onh.from_array(X, "w")], outputs=("y", "x", "w"))
    model = assert_survives(given, tmp_path)
    assert [spec.name for spec in model.graph.outputs] == ["y", "x", "w"]


def test_a_node_whose_first_output_is_left_out_is_known_by_the_next():
    model = onnx_io.read(proto([oh.make_node("GRU", ["x", "w", "r"], ["", "y"], hidden_size=1)], _gru()))
    assert model.graph.nodes[0].output == "y"


def _gru():
    return [onh.from_array(np.ones((1, 3, size), np.float32), name) for name, size in (("w", 3), ("r", 1))]


def test_a_node_without_outputs_is_dropped():
    model = onnx_io.read(proto([oh.make_node("Relu", ["x"], ["y"]), oh.make_node("Print", ["x"], [], domain="own")]))
    assert len(model.graph.nodes) == 1
