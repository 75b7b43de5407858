"""Weights of six bits: stored in eight, simulated as they are stored, and told apart in the encodings file."""

import json

import numpy as np
import onnx
import pytest

from ptqjax import QuantizationConfig, calibrate, choose_encoding, export, simulate, validate
from ptqjax.errors import ConfigError
from ptqjax.export import quantized_model
from ptqjax.quantize import make_encoding
from ptqjax.validate import run, session
from tests.models import Chain


def network():
    chain = Chain(3, dtype=np.float32)
    chain.conv(6, pad=1, bias=True).clip().depthwise(pad=1, bias=True).add("Relu")
    return chain.add("GlobalAveragePool").add("Flatten").gemm(5).build()


def quantized(granularity="channel"):
    model = network()
    batch = {"x": np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)}
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


def test_an_activation_of_six_bits_cannot_be_exported(tmp_path):
    """QuantizeLinear saturates at the ends of int8."""
    model, encodings, _ = quantized()
    six = make_encoding(np.float32(0.1), np.float32(0), dtype="int6")
    with pytest.raises(ConfigError, match=r"'x' has the integers -32\.\.31"):
        export(model, encodings | {"x": six}, tmp_path, "model")
