"""Grids that do not fill their type: stored in the next wider one, simulated as stored, told apart in the encodings."""

import json

import numpy as np
import onnx
import pytest

from ptqjax import QuantizationConfig, calibrate, choose_encoding, export, simulate, validate
from ptqjax.agreement import run, session
from ptqjax.encodings.encoding import fake_quantize, integers, make_encoding
from ptqjax.exporting import quantized_model
from ptqjax.kernels.grid import integer_range
from tests.models import Chain, build, node


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network():
    chain = Chain(3, dtype=np.float32)
    chain.conv(6, pad=1, bias=True).clip().depthwise(pad=1, bias=True).add("Relu")
    return chain.add("GlobalAveragePool").add("Flatten").gemm(5).build()


def quantized(granularity="channel"):
    model = network()
    batch = {"x": normal(4, 3, 8, 8)}
    return model, calibrate(model, [batch], QuantizationConfig(weights="int6", granularity=granularity)), batch


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_file_computes_what_the_integer_program_does(tmp_path, granularity):
    model, encodings, batch = quantized(granularity)
    export(model, encodings, tmp_path, "model")
    (y,) = run(session(tmp_path / "model.onnx"), batch).values()
    (simulated,) = simulate(model, encodings, arithmetic="integer")(model.params, encodings, batch).values()
    np.testing.assert_array_equal(y, simulated)
    found = validate(tmp_path, [batch])
    assert found.largest == 0
    assert [group.operator for group in found.groups if group.integer].count("QLinearConv") == 2
    (fake,) = simulate(model, encodings)(model.params, encodings, batch).values()
    np.testing.assert_allclose(y, fake, atol=2.01 * float(encodings[model.graph.outputs[0].name].scale))


def test_codes_lie_within_six_bits_and_reach_their_ends(tmp_path):
    model, encodings, _ = quantized()
    stored = {name: value for name, value in quantized_model(model, encodings).params.items() if value.dtype == np.int8}
    weights = {name: value for name, value in stored.items() if value.ndim > 1}
    assert len(weights) == 3
    for name, codes in weights.items():
        assert codes.min() >= -32, name
        assert codes.max() <= 31, name
        assert np.abs(codes.astype(int)).max() >= 25, name  # the grid is made for six bits, not for eight


def test_the_encodings_file_says_six_bits(tmp_path):
    model, encodings, _ = quantized()
    export(model, encodings, tmp_path, "model")
    found = json.loads((tmp_path / "model.encodings").read_text())
    assert {entry["bw"] for entry in found["param_encodings"]} == {6}
    assert {entry["bw"] for entry in found["activation_encodings"]} == {8}
    assert all(entry["is_sym"] for entry in found["param_encodings"])
    assert {offset for entry in found["param_encodings"] for offset in entry["offset"]} == {-32}
    (opset,) = onnx.load(tmp_path / "model.onnx").opset_import
    assert opset.version == 17  # no type that needs a later one


def test_an_encoding_tells_its_storage_and_its_bits():
    encoding = choose_encoding(np.linspace(-1, 1, 100, dtype=np.float32), dtype="int6", ranges="min-max")
    assert (encoding.dtype, encoding.num_bits) == ("int8", 6)
    assert float(encoding.scale) == pytest.approx(1 / 31, rel=0.05)


@pytest.mark.parametrize("opset", [10, 17])
def test_activations_of_six_bits_saturate_at_their_ends(tmp_path, opset):
    """QuantizeLinear saturates at the ends of int8; a Clip before it (Max and Min before opset 11) at those of int6."""
    chain = Chain(3, dtype=np.float32, opset=opset)
    model = chain.conv(4, pad=1, bias=True).add("Relu").add("MaxPool", kernel_shape=(2, 2)).build()
    encodings = calibrate(model, [{"x": normal(4, 3, 8, 8)}], QuantizationConfig(activations="int8"))
    narrow = {
        name: make_encoding(encoding.scale * 2, encoding.zero_point // 4, dtype="int6")
        for name, encoding in encodings.items()
        if name not in model.params
    }
    batch = {"x": 3 * normal(4, 3, 8, 8, seed=1)}
    narrow = encodings | narrow
    export(model, narrow, tmp_path, "model")
    (y,) = run(session(tmp_path / "model.onnx"), batch).values()
    for arithmetic in ("float", "integer"):
        (simulated,) = simulate(model, narrow, arithmetic=arithmetic)(model.params, narrow, batch).values()
        np.testing.assert_allclose(y, simulated, atol=1.01 * float(narrow[model.graph.outputs[0].name].scale))
        assert np.mean(y == simulated) > 0.99
    assert np.unique(integers(batch["x"], narrow["x"])).size == 64
    assert validate(tmp_path, [batch]).largest == 0


@pytest.mark.parametrize("dtype", ["int2", "uint3", "int5", "uint7", "int9", "uint12", "int15", "int8"])
@pytest.mark.parametrize("opset", [10, 17])
def test_what_is_rounded_in_a_file_equals_the_grid_to_the_bit(dtype, opset):
    """At the ends, a step beyond, far beyond, at every tie and beside it; of strict grids, too."""
    model = build([node("Identity", ["x"], "y")], {}, input_shape=("n",), outputs=["y"], opset=opset)
    for scale, offset in ((0.1, 0), (1 / 3, 1), (7e-3, -1), (2e-38, 0), (1e33, 0)):
        low = integer_range(dtype)[0]
        zero_point = np.float32(max(offset, low + 1) if dtype[0] == "i" else 2 + offset)
        encoding = make_encoding(np.float32(scale), zero_point, dtype=dtype, symmetric="strict")
        codes = np.arange(float(encoding.qmin) - 3, float(encoding.qmax) + 4, 0.5, dtype=np.float64)
        ends = ((codes - zero_point) * np.float32(scale)).astype(np.float32)
        x = np.concatenate([ends, np.nextafter(ends, np.float32(9e37)), np.nextafter(ends, np.float32(-9e37)), [0]])
        x = np.concatenate([x, [3e38, -3e38]]).astype(np.float32)
        quantized = quantized_model(model, {"x": encoding})
        (y,) = run(session(quantized), {"x": x}).values()
        np.testing.assert_array_equal(y, fake_quantize(x, encoding), err_msg=f"{scale} {offset}")
