"""What is read and written again is valid ONNX and computes the same in ONNX Runtime."""

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import onnxruntime as ort
import pytest

from ptqjax import onnx_io
from tests import onnx_cases

EVERY = {"node": 7}  # one of ONNX's cases in so many; all of the other kinds
# A constant that is folded is rounded as NumPy rounds, which shows in half precision; sums may run in another order.
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2}


def session(model):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(model, feed):
    found = session(model)
    return found.run(None, {value.name: feed[value.name] for value in found.get_inputs()})


def assert_same(found, expected):
    if isinstance(expected, list):
        for one, wanted in zip(found, expected, strict=True):
            assert_same(one, wanted)
        return
    if expected is None:
        assert found is None
        return
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if expected.dtype.kind in "OUS":
        assert (found == expected).all()
        return
    tolerance = TOLERANCE.get(expected.dtype.name, 1e-5)
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * max(1.0, _largest(expected)))


def _largest(value):
    return float(np.abs(value[np.isfinite(value)]).max(initial=0.0))


def assert_survives(given, feed, path):
    """The written model passes the checker, which `write` asks, and computes what the given one does."""
    onnx_io.write(onnx_io.read(given), path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    for found, expected in zip(run(path, feed), run(given.SerializeToString(), feed), strict=True):
        assert_same(found, expected)


def is_run_by_onnxruntime(model, feed):
    try:
        onnx.checker.check_model(model, full_check=True)
        run(model.SerializeToString(), feed)
    except Exception:  # noqa: BLE001 (ONNX Runtime has no common ancestor of its errors)
        return False
    return True


@pytest.mark.parametrize("kind", onnx_cases.KINDS)
def test_onnx_s_own_cases_survive(kind, tmp_path):
    survived = 0
    for case in onnx_cases.load(kind)[:: EVERY.get(kind, 1)]:
        model = onnx_cases.model_of(case)
        inputs = next(iter(onnx_cases.data_sets(case, model)))[0]
        if model.opset_import[0].version < 6 or not is_run_by_onnxruntime(model, inputs):
            continue
        assert_survives(model, inputs, tmp_path / f"{case.name}.onnx")
        survived += 1
    assert survived > {"node": 150, "simple": 10}.get(kind, 20)


def test_every_real_model_survives(shared, tmp_path):
    for file in sorted((shared / "models").rglob("*.onnx")):
        model = onnx.load(file)
        assert_survives(model, _random_inputs(model), tmp_path / file.name)


def _random_inputs(model):
    random = np.random.default_rng(0)
    return {value.name: _random(value, random) for value in session(model.SerializeToString()).get_inputs()}


def _random(value, random):
    sizes = [size if isinstance(size, int) else 1 for size in value.shape]
    if sizes == [1, 1]:
        sizes = [1, 512]  # sound: a voice detector needs more than one sample of it
    if value.type == "tensor(int64)":  # ids and masks of text, or the rate of sound
        return np.full(sizes, 1 if sizes else 16000, np.int64)
    return random.uniform(0, 1, sizes).astype(np.float32)


def _of_opset(opset):
    """A model of operators whose attributes and inputs moved: each in the form of its operator set."""
    axes = np.array([1])
    given = {"axes": [1]} if opset < 13 else {}
    names = [] if opset < 13 else ["axes"]
    nodes = [
        oh.make_node("Constant", [], ["c"], value=onh.from_array(np.full((4, 3), 0.5, np.float32))),
        oh.make_node("Transpose", ["c"], ["w"], perm=[1, 0]),
        oh.make_node("MatMul", ["x", "w"], ["h"]),
        oh.make_node("Unsqueeze", ["h", *names], ["u"], **given),
        oh.make_node("Softmax", ["u"], ["s"], axis=-1 if opset >= 11 else 2),
        oh.make_node("Squeeze", ["s", *names], ["q"], **given),
        oh.make_node("ReduceSum", ["q", *names], ["r"], keepdims=1, **given),
        oh.make_node("Div", ["q", "r"], ["d"]),
        oh.make_node("Identity", ["d"], ["y"]),
    ]
    x, y = (oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size]) for name, size in (("x", 3), ("y", 4)))
    graph = oh.make_graph(nodes, "g", [x], [y], [onh.from_array(axes, "axes")] if names else [])
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)])


@pytest.mark.parametrize("opset", range(7, 29))
def test_every_operator_set_survives(opset, tmp_path):
    given = _of_opset(opset)
    given.ir_version = oh.find_min_ir_version_for(given.opset_import)
    feed = {"x": np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)}
    if is_run_by_onnxruntime(given, feed):
        assert_survives(given, feed, tmp_path / "m.onnx")
    else:  # newer than ONNX Runtime; the checker knows it
        assert opset > 20
        onnx_io.write(onnx_io.read(given), tmp_path / "m.onnx")
    assert [node.op_type for node in onnx_io.read(tmp_path / "m.onnx").graph.nodes[:2]] == ["MatMul", "Unsqueeze"]
