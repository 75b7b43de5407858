"""Folding while reading: what is computed from constants alone is a constant, and nothing else is."""

import subprocess
import sys
import time

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import pytest

import ptqjax
from ptqjax import onnx_io
from ptqjax.ir import value_of
from ptqjax.onnx_io.result_size import is_bounded
from tests import onnx_cases

W = np.arange(1, 7, dtype=np.float32).reshape(2, 3)


def read(nodes, tensors, *, shape=("n", 3), outputs=("y",), opset=17):
    info = oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
    results = [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    initializers = [onh.from_array(np.asarray(value), name) for name, value in tensors.items()]
    graph = oh.make_graph(nodes, "g", [info], results, initializers)
    return onnx_io.read(oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=8))


def operators(model):
    return [node.op_type for node in model.graph.nodes]


def is_of_constants(case):
    nodes = case.model.graph.node
    single = len(nodes) == 1 and not nodes[0].domain and is_bounded(nodes[0].op_type)
    tensors = single and all(isinstance(value, np.ndarray) and value.dtype != object for value in case.data_sets[0][0])
    return tensors and case.model.opset_import[0].version >= 7


@pytest.mark.parametrize(
    "case", [case for case in onnx_cases.load("node") if is_of_constants(case)], ids=lambda c: c.name
)
def test_a_node_of_constants_becomes_what_onnx_says_it_computes(case):
    inputs, outputs = case.data_sets[0]
    given = onnx.ModelProto()
    given.CopyFrom(case.model)
    names = [info.name for info in given.graph.input]
    given.graph.initializer.extend(onh.from_array(x, name) for x, name in zip(inputs, names, strict=True))
    model = onnx_io.read(given)
    assert model.graph.nodes == ()
    for spec, expected in zip(model.graph.outputs, outputs, strict=True):
        found = value_of(model, spec.name)
        assert (found.dtype, found.shape) == (np.asarray(expected).dtype, np.shape(expected))
        np.testing.assert_allclose(found.astype(np.float64), np.asarray(expected).astype(np.float64), rtol=1e-5)


def test_weight_norm_becomes_one_weight():
    nodes = [
        oh.make_node("ReduceL2", ["v"], ["norm"], axes=[1], keepdims=1),
        oh.make_node("Div", ["v", "norm"], ["direction"]),
        oh.make_node("Mul", ["direction", "g"], ["w"]),
        oh.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        oh.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    g = np.array([[2.0], [3.0]], np.float32)
    model = read(nodes, {"v": W, "g": g})
    assert operators(model) == ["MatMul"]
    np.testing.assert_allclose(model.params["t"], (g * W / np.linalg.norm(W, axis=1, keepdims=True)).T, rtol=1e-6)


def test_a_tensor_that_others_read_as_well_stays():
    nodes = [
        oh.make_node("Transpose", ["w"], ["t"]),
        oh.make_node("MatMul", ["x", "t"], ["h"]),
        oh.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    assert set(read(nodes, {"w": W}).params) == {"t", "w"}


def test_shapes_that_are_declared_are_constants_and_symbols_are_not():
    nodes = [oh.make_node("Shape", ["x"], ["s"]), oh.make_node("Expand", ["one", "s"], ["y"])]
    static = read(nodes, {"one": np.float32(1)}, shape=(4, 3))
    assert operators(static) == []
    np.testing.assert_array_equal(value_of(static, "y"), np.ones((4, 3)))
    assert operators(read(nodes, {"one": np.float32(1)})) == ["Shape", "Expand"]


def test_constants_of_constants_fold_inside_subgraphs():
    inner = [oh.make_node("Neg", ["w"], ["m"]), oh.make_node("Add", ["x", "m"], ["out"])]
    out = oh.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    bodies = {name: oh.make_graph(inner, name, [], [out]) for name in ("then_branch", "else_branch")}
    nodes = [oh.make_node("If", ["condition"], ["y"], **bodies)]
    nodes = [
        oh.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        oh.make_node("Cast", ["largest"], ["condition"], to=onnx.TensorProto.BOOL),
        oh.make_node("If", ["condition"], ["y"], **bodies),
    ]
    model = read(nodes, {"w": W[:1]})
    assert [node.op_type for graph in model.graph.nodes[-1].subgraphs for node in graph.nodes] == ["Add", "Add"]
    assert len(model.params) == 2
    for value in model.params.values():
        np.testing.assert_array_equal(value, -W[:1])


def test_a_quantized_file_keeps_its_form():
    nodes = [
        oh.make_node("Transpose", ["w"], ["t"]),
        oh.make_node("QuantizeLinear", ["t", "s", "z"], ["q"]),
        oh.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        oh.make_node("Neg", ["d"], ["n"]),
        oh.make_node("MatMul", ["x", "n"], ["y"]),
    ]
    model = read(nodes, {"w": W, "s": np.float32(0.5), "z": np.int8(0)})
    assert operators(model) == ["QuantizeLinear", "DequantizeLinear", "Neg", "MatMul"]


def test_random_numbers_stay():
    node = oh.make_node("RandomNormal", [], ["y"], shape=[2, 3])
    assert operators(read([node], {})) == ["RandomNormal"]
    like = oh.make_node("RandomNormalLike", ["w"], ["y"])
    assert operators(read([like], {"w": W})) == ["RandomNormalLike"]


HUGE = 2**40
BOMBS = {
    "ConstantOfShape": [np.array([HUGE])],
    "Expand": [W[0, 0], np.array([HUGE // 2**20, 2**20])],
    "Tile": [W, np.array([HUGE, 1])],
    "Range": [np.int64(0), np.int64(HUGE), np.int64(1)],
    "Pad": [W, np.array([0, 0, HUGE, 0])],
    "Gather": [np.zeros((1, 2**16), np.float32), np.zeros(2**16, np.int64)],
    "Add": [np.zeros((2**17, 1), np.float32), np.zeros((1, 2**17), np.float32)],
    "MatMul": [np.zeros((2**17, 1), np.float32), np.zeros((1, 2**17), np.float32)],
    "OneHot": [np.arange(4), np.int64(HUGE), np.array([0.0, 1.0], np.float32)],
}


@pytest.mark.parametrize("op_type", BOMBS)
def test_a_result_without_measure_is_not_computed(op_type):
    tensors = {f"i{index}": value for index, value in enumerate(BOMBS[op_type])}
    start = time.perf_counter()
    assert operators(read([oh.make_node(op_type, list(tensors), ["y"])], tensors)) == [op_type]
    assert time.perf_counter() - start < 2  # seconds; computing any of them takes far longer, or all memory


def test_many_results_of_moderate_size_are_not_all_computed():
    nodes = [oh.make_node("Expand", ["one", "size"], [f"t{i}"]) for i in range(400)]
    nodes.append(oh.make_node("Sum", ["x", *(f"t{i}" for i in range(400))], ["y"]))
    model = read(nodes, {"one": np.float32(1), "size": np.array([2**20])})
    assert 300 < operators(model).count("Expand") < 400
    assert sum(value.nbytes for value in model.params.values()) <= 2**28


def test_a_node_that_cannot_be_evaluated_stays():
    nodes = [oh.make_node("Reshape", ["w", "s"], ["h"]), oh.make_node("Add", ["x", "h"], ["y"])]
    assert operators(read(nodes, {"w": W, "s": np.array([4, 4])})) == ["Reshape", "Add"]
    division = [oh.make_node("Div", ["a", "b"], ["y"])]
    assert operators(read(division, {"a": np.array([1]), "b": np.array([0])})) == ["Div"]


def test_shapes_that_meet_along_an_axis_are_not_broadcast_from_the_right():
    square, vector = np.arange(9, dtype=np.float32).reshape(3, 3), np.array([1, 2, 4], np.float32)
    node = oh.make_node("Add", ["a", "b"], ["y"], broadcast=1, axis=0)
    model = read([node], {"a": square, "b": vector}, opset=6)
    found = ptqjax.apply(model.graph, model.params, {"x": np.zeros((1, 3), np.float32)})["y"]
    np.testing.assert_array_equal(found, square + vector[:, None])


def test_a_constant_has_the_element_type_that_onnx_says():
    node = oh.make_node("ReduceSumSquare", ["a"], ["y"], axes=[0])
    model = read([node], {"a": np.array([1, 2, 3], np.int32)})
    found = ptqjax.apply(model.graph, model.params, {"x": np.zeros((1, 3), np.float32)})["y"]
    assert (found.dtype, found.tolist()) == (np.int32, [14])


@pytest.mark.parametrize("delta", [0, 0.0, np.nan])
def test_a_range_without_end_stays(delta):
    tensors = {name: np.asarray(value) for name, value in (("a", delta * 0), ("b", delta * 0 + 9), ("d", delta))}
    assert operators(read([oh.make_node("Range", list(tensors), ["y"])], tensors)) == ["Range"]


def test_a_float_that_decides_a_shape_is_a_constant_and_others_are_parameters():
    nodes = [
        oh.make_node("Shape", ["x"], ["s"]),
        oh.make_node("Cast", ["s"], ["f"], to=onnx.TensorProto.FLOAT),
        oh.make_node("Mul", ["f", "factor"], ["scaled"]),
        oh.make_node("Cast", ["scaled"], ["sizes"], to=onnx.TensorProto.INT64),
        oh.make_node("Expand", ["x", "sizes"], ["h"]),
        oh.make_node("Mul", ["h", "gain"], ["y"]),
    ]
    model = read(nodes, {"factor": np.array([1.0, 1.0], np.float32), "gain": np.float32(2)})
    assert set(model.params) == {"gain"}
    assert set(model.graph.constant_values) == {"factor"}


def test_reading_does_not_start_a_backend():
    program = """
import jax, onnx, numpy, onnx.helper as oh, onnx.numpy_helper as onh
import ptqjax
from ptqjax import onnx_io
y = oh.make_tensor_value_info("y", 1, [2])
graph = oh.make_graph([oh.make_node("Neg", ["w"], ["y"])], "g", [], [y], [onh.from_array(numpy.ones(2, "f"), "w")])
jax.config.update("jax_platforms", "none")
assert not onnx_io.read(oh.make_model(graph)).graph.nodes
"""
    subprocess.run([sys.executable, "-c", program], check=True)
