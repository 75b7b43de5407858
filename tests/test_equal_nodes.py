"""Laws of nodes that are written once: the function stays to the bit, and what must stay apart does."""

import numpy as np
import onnx.helper as oh
import pytest
from onnx import TensorProto, numpy_helper

import ptqjax
from ptqjax.agreement import plain_session, validate
from ptqjax.exporting import quantized_model
from ptqjax.qdq.equal_nodes import merge_equal_nodes

RNG = np.random.default_rng(7)
CONFIG = ptqjax.QuantizationConfig(equalize=False, correct="none")
CUT = {"starts": [0], "ends": [4], "axes": [1]}


def model_of(nodes, outputs, opset=17, **more):
    weights = {name: RNG.normal(size=(4, 4)).astype(np.float32) for name in ("w0", "w1")}
    used = {name for node in nodes for name in node.input}
    tensors = {**weights, **{name: np.asarray(value, np.int64) for name, value in CUT.items()}, **more}
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [oh.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in tensors.items() if name in used],
    )
    return ptqjax.read(oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=8))


def halves(name):
    return oh.make_node("Slice", ["x", "starts", "ends", "axes"], [name])


def product(name, source, weight):
    return oh.make_node("MatMul", [source, weight], [name])


@pytest.fixture(scope="module")
def twice():
    """Two equal slices, and behind them layers that differ."""
    nodes = [halves("a"), halves("b"), product("p", "a", "w0"), product("q", "b", "w1")]
    return model_of(nodes, ["p", "q"])


def count(graph, op):
    return sum(node.op_type == op for node in graph.nodes)


def test_the_file_has_equal_nodes_once_and_is_the_simulation(twice, tmp_path):
    x = RNG.normal(size=(600, 8)).astype(np.float32)
    result = ptqjax.quantize(twice, [{"x": x}], CONFIG)
    ptqjax.export(result.model, result.encodings, tmp_path, "q")
    file = quantized_model(result.model, result.encodings)
    assert (count(result.model.graph, "Slice"), count(file.graph, "Slice")) == (2, 1)
    simulated = ptqjax.simulate(result.model, result.encodings, arithmetic="integer")
    wanted = simulated(result.model.params, result.encodings, {"x": x[:50]})
    found = plain_session(tmp_path / "q.onnx", exact=True).run(None, {"x": x[:50]})
    for one, other in zip(wanted.values(), found, strict=True):
        np.testing.assert_array_equal(np.asarray(one), other)
    agreement = validate(tmp_path / "q.onnx", [{"x": x[:50]}])
    assert agreement.integer.equal == 1
    model, encodings, _ = ptqjax.read_quantized(tmp_path / "q.onnx")
    assert set(encodings) < set(result.encodings)
    assert quantized_model(model, encodings).graph.nodes == file.graph.nodes


def test_merging_keeps_the_function_and_happens_once(twice):
    merged, report = merge_equal_nodes(twice)
    assert [record.where for record in report] == [("b", "a")]
    x = {"x": RNG.normal(size=(5, 8)).astype(np.float32)}
    one, other = (ptqjax.apply(model.graph, model.params, x) for model in (twice, merged))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert merge_equal_nodes(merged) == (merged, ())


def test_equality_goes_on_through_what_reads_equal_nodes():
    nodes = [halves("a"), halves("b"), oh.make_node("Relu", ["a"], ["c"]), oh.make_node("Relu", ["b"], ["d"])]
    merged, report = merge_equal_nodes(model_of([*nodes, oh.make_node("Add", ["c", "d"], ["y"])], ["y"]))
    assert [node.op_type for node in merged.graph.nodes] == ["Slice", "Relu", "Add"]
    assert len(report) == 2


def test_small_parameters_count_by_their_numbers():
    nodes = [oh.make_node("Clip", ["x", low, "high"], [name]) for low, name in (("l0", "a"), ("l1", "b"), ("l2", "c"))]
    bounds = {"l0": np.float32(0), "l1": np.float32(0), "l2": np.float32(-0.0), "high": np.float32(2)}
    model = model_of([*nodes, oh.make_node("Sum", ["a", "b", "c"], ["y"])], ["y"], **bounds)
    merged, _ = merge_equal_nodes(model)
    assert count(merged.graph, "Clip") == 2  # 0 and -0 are different bits


def unlike():
    relu = [oh.make_node("Relu", ["x"], [name]) for name in "ab"]
    yield "graph outputs keep their names", [*relu], ["a", "b"]
    elu = [oh.make_node("Elu", ["x"], [name], alpha=alpha) for name, alpha in (("a", 1.0), ("b", 0.5))]
    yield "attributes differ", [*elu, oh.make_node("Add", ["a", "b"], ["y"])], ["y"]
    draws = [oh.make_node("RandomNormalLike", ["x"], [name], seed=1.0) for name in "ab"]
    yield "draws differ each time", [*draws, oh.make_node("Add", ["a", "b"], ["y"])], ["y"]
    swapped = [oh.make_node("Sub", [one, other], [name]) for one, other, name in (("x", "r", "a"), ("r", "x", "b"))]
    yield (
        "operands in another order",
        [oh.make_node("Relu", ["x"], ["r"]), *swapped, oh.make_node("Add", ["a", "b"], ["y"])],
        ["y"],
    )


@pytest.mark.parametrize(("nodes", "outputs"), [pytest.param(*rest, id=name) for name, *rest in unlike()])
def test_what_is_not_equal_stays(nodes, outputs):
    assert merge_equal_nodes(model_of(nodes, outputs))[1] == ()


def test_weights_with_the_same_numbers_keep_their_own_copies():
    """ONNX Runtime refuses a weight that integer layers share."""
    nodes = [product("p", "a", "w0"), product("q", "b", "w0"), oh.make_node("Sub", ["p", "q"], ["y"])]
    ends = [halves("a"), oh.make_node("Slice", ["x", "ends", "eight", "axes"], ["b"])]
    model = model_of([*ends, *nodes], ["y"], eight=np.asarray([8], np.int64))
    result = ptqjax.quantize(model, [{"x": RNG.normal(size=(600, 8)).astype(np.float32)}], CONFIG)
    file = quantized_model(result.model, result.encodings)
    weights = [node.inputs[0] for node in file.graph.nodes if node.op_type == "DequantizeLinear"]
    assert sum(file.params[name].shape == (4, 4) for name in weights if name in file.params) == 2
