"""Products that ONNX Runtime would compute more coarsely than the file says: far off as they are, equal as written."""

import numpy as np
import onnxruntime
import pytest

from ptqjax import apply, onnx_io, simulate
from ptqjax.agreement import run, session
from ptqjax.encodings.encoding import fake_quantize, make_encoding
from ptqjax.exporting import quantized_model
from ptqjax.ir import text
from ptqjax.kernels.ranges import grid_kind, grid_of_range
from ptqjax.onnx_io import to_proto
from ptqjax.qdq.insert import insert_qdq
from ptqjax.qdq.runtime_precision import keep_precision
from ptqjax.qdq.unquantize import unquantize
from tests.models import build, node


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def encode(value, dtype, *, axis=None, block_size=None):
    if block_size:
        blocks = value.reshape(-1, block_size, value.shape[-1])
        low, high = blocks.min(axis=1), blocks.max(axis=1)
    else:
        others = None if axis is None else tuple(i for i in range(value.ndim) if i != axis % value.ndim)
        low, high = value.min(axis=others), value.max(axis=others)
    scale, zero_point = grid_of_range(low, high, grid_kind(dtype, symmetric=dtype[0] == "i"))
    return make_encoding(scale, zero_point, dtype=dtype, axis=axis, block_size=block_size)


W, V = normal(24, 64, seed=1), normal(6, 8, 3, 3, seed=1)
# Nodes, the parameter w, the shape of x, and what is quantized beside x and y.
PLACES = {
    "Conv with a weight in float": ([node("Conv", ["x", "w"], "y")], V, (2, 8, 7, 7), None),
    "Gemm with a weight in float": ([node("Gemm", ["x", "w"], "y", transB=1)], W, (4, 64), None),
    "Gemm along axis 1": ([node("Gemm", ["x", "w"], "y")], W.T, (4, 64), {"dtype": "int8", "axis": 1}),
    "MatMul behind a Transpose": (
        [node("Transpose", ["w"], "t", perm=(1, 0)), node("MatMul", ["x", "t"], "y")],
        W,
        (4, 64),
        {"dtype": "int8", "axis": 0},
    ),
    "MatMul in blocks": (
        [node("MatMul", ["x", "w"], "y")],
        W.T,
        (4, 64),
        {"dtype": "int4", "axis": 0, "block_size": 16},
    ),
}


def quantized(name):
    """The model in 16 bits at opset 21, where no integer operator is in the way."""
    nodes, w, shape, grid = PLACES[name]
    w = np.ascontiguousarray(w)
    model = build(nodes, {"w": w}, input_shape=shape, outputs=["y"], opset=21)
    x = normal(*shape, seed=2)
    y = np.asarray(apply(model.graph, model.params, {"x": x})["y"])
    encodings = {"x": encode(x, "uint16"), "y": encode(y, "uint16")}
    encodings |= {"w": encode(w, **grid)} if grid else {}
    return model, encodings, {"x": x}


def as_users_run(model, batch):
    """What a session without options gives: MatMulNBits of products by blocks, at its own accuracy level."""
    opened = onnxruntime.InferenceSession(to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in opened.get_outputs()]
    return dict(zip(names, opened.run(names, batch), strict=True))


@pytest.mark.parametrize("name", PLACES)
def test_without_it_the_runtime_is_far_off_and_with_it_equal(name):
    model, encodings, batch = quantized(name)
    plain = insert_qdq(model, encodings)
    kept, report = keep_precision(plain)
    assert [record.where for record in report] == [("y_float",)]
    assert all(record.done and record.reason for record in report)
    expected = np.asarray(simulate(model, encodings)(model.params, encodings, batch)["y"])
    distance = {}
    for what, each in (("plain", plain), ("kept", kept)):
        found = as_users_run(each, batch)["y"]
        distance[what] = np.abs(found - expected).max() / float(encodings["y"].scale)
        np.testing.assert_array_equal(apply(each.graph, each.params, batch)["y"], expected)
    assert distance["kept"] <= 1.01  # a sum in another order
    assert distance["plain"] > 20  # steps of 16 bits; where this fails, the runtime no longer needs it


def test_eight_bit_blocks_whose_product_stays_in_float_are_run():
    w = np.ascontiguousarray(W.T)
    model = build([node("MatMul", ["x", "w"], "y")], {"w": w}, input_shape=(4, 64), outputs=["y"], opset=21)
    x = normal(4, 64, seed=2)
    encodings = {"x": encode(x, "uint8"), "w": encode(w, "int8", axis=-2, block_size=16)}
    plain = insert_qdq(model, encodings)
    with pytest.raises(Exception, match="MatMulIntegerToFloat"):
        run(session(plain), {"x": x})
    found = run(session(quantized_model(model, encodings)), {"x": x})["y"]
    expected = np.asarray(simulate(model, encodings)(model.params, encodings, {"x": x})["y"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["", "Relu"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_eight_bit_blocks_of_a_convolution_without_a_bias_are_run(dtype, activation):
    layer = [node("Conv", ["x", "w"], "c" if activation else "y")]
    layer += [node(activation, ["c"], "y")] if activation else []
    model = build(layer, {"w": V}, input_shape=(2, 8, 7, 7), outputs=["y"], opset=21)
    x = normal(2, 8, 7, 7, seed=2)
    kind = grid_kind(dtype, symmetric=dtype == "int8")
    scale, zero_point = grid_of_range(V[:, ::2], V[:, 1::2], kind)  # blocks of 2, a scale at each place
    encodings = {"x": encode(x, "uint8"), "w": make_encoding(scale, zero_point, dtype=dtype, axis=1, block_size=2)}
    encodings["y"] = encode(np.asarray(apply(model.graph, model.params, {"x": x})["y"]), "uint8")
    with pytest.raises(Exception, match="filter scale shape invalid"):
        run(session(insert_qdq(model, encodings)), {"x": x})
    found = run(session(quantized_model(model, encodings)), {"x": x})["y"]
    expected = np.asarray(simulate(model, encodings)(model.params, encodings, {"x": x})["y"])
    steps = np.abs(found - expected) / np.float32(encodings["y"].scale)
    assert steps.max() < 1.01  # a sum in another order may fall on the other side of a half
    assert np.mean(steps < 0.01) > 0.99


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("bounds", [None, [], ["low"], ["low", "high"], ["", "high"]], ids=str)
def test_activations_before_fp8_are_run(dtype, bounds):
    """A Relu would be dropped, a Clip refused."""
    op_type, inputs = ("Relu", []) if bounds is None else ("Clip", bounds)
    values = {"low": np.float32(-0.5), "high": np.float32(2)}
    params = {"w": normal(4, 3, 1, 1)} | {name: np.asarray(values[name]) for name in inputs if name}
    nodes = [node("Conv", ["x", "w"], "c"), node(op_type, ["c", *inputs], "y")]
    model = build(nodes, params, input_shape=(2, 3, 4, 4), outputs=["y"], opset=19)
    encodings = {name: make_encoding(np.float32(0.01), np.float32(0), dtype=dtype) for name in ("x", "w", "y")}
    batch = {"x": normal(2, 3, 4, 4)}
    plain = insert_qdq(model, encodings)
    expected = np.asarray(simulate(model, encodings)(model.params, encodings, batch)["y"])
    y = run(session(quantized_model(model, encodings)), batch)["y"]
    np.testing.assert_allclose(y, expected, rtol=0.26)  # a step of e5m2, where a sum falls the other way
    assert np.mean(y == expected) > 0.95
    assert [record.what for record in keep_precision(plain)[1]] == [f"Max and Min in place of {op_type}"]
    if bounds is None:
        assert run(session(plain), batch)["y"].min() < 0
    else:
        with pytest.raises(Exception, match="Unexpected data type for QuantizeLinear"):
            run(session(plain), batch)


def test_large_biases_beside_fp8_are_kept():
    """As int32 they would end at 2^31 s_x s_w = 0.65 max |x| max |w|."""
    params = {"w": 0.01 * normal(4, 3, 1, 1), "b": np.asarray([5, -5, 1, 0], np.float32)}
    model = build([node("Conv", ["x", "w", "b"], "y")], params, input_shape=(2, 3, 4, 4), outputs=["y"], opset=19)
    scale = {"x": 3 / 57344, "w": 0.03 / 57344}
    encodings = {
        name: make_encoding(np.float32(each), np.float32(0), dtype="float8_e5m2") for name, each in scale.items()
    }
    encodings["y"] = make_encoding(np.float32(0.05), np.float32(128), dtype="uint8")
    batch = {"x": normal(2, 3, 4, 4)}
    expected = np.asarray(simulate(model, encodings)(model.params, encodings, batch)["y"])
    assert np.abs(run(session(insert_qdq(model, encodings)), batch)["y"] - expected).max() > 3
    np.testing.assert_allclose(run(session(quantized_model(model, encodings)), batch)["y"], expected, atol=0.0501)


def test_a_weight_behind_a_transpose_keeps_its_name_and_comes_back():
    model, encodings, _ = quantized("MatMul behind a Transpose")
    written = quantized_model(model, encodings)
    assert written.graph.producers["w"].op_type == "DequantizeLinear"
    assert written.params["w_quantized"].shape == W.shape
    found, again, _ = unquantize(written)
    assert found.graph.nodes == model.graph.nodes
    assert {name: each.axis for name, each in again.items()} == {"w": 0, "x": None, "y": None}
    for name, expected in encodings.items():
        np.testing.assert_array_equal(again[name].scale, expected.scale)
    np.testing.assert_array_equal(found.params["w"], fake_quantize(W, encodings["w"]))


def test_what_is_computed_in_integers_is_left_as_it_is():
    nodes = [node("Conv", ["x", "w"], "c"), node("Flatten", ["c"], "f"), node("Gemm", ["f", "v"], "y")]
    params = {"w": normal(2, 3, 1, 1), "v": normal(8, 5)}
    model = build(nodes, params, input_shape=(2, 3, 2, 2), outputs=["y"], opset=13)
    activations = {name: make_encoding(np.float32(0.1), np.float32(9), dtype="uint8") for name in ("x", "c", "f", "y")}
    encodings = activations | {"w": encode(params["w"], "int8", axis=0), "v": encode(params["v"], "int8", axis=1)}
    plain = insert_qdq(model, encodings)
    kept, report = keep_precision(plain)
    assert not report
    assert text(kept) == text(plain)


def test_it_is_idempotent():
    for name in PLACES:
        model, encodings, _ = quantized(name)
        once, _ = keep_precision(insert_qdq(model, encodings))
        twice, report = keep_precision(once)
        assert not report
        assert onnx_io.to_proto(twice) == onnx_io.to_proto(once)
