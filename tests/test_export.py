"""What is written: valid, complete, atomic, and loaded by ONNX Runtime as the groups that were meant."""

import importlib
import json
from collections import Counter
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest

from ptqjax import apply, calibrate, export, onnx_io, read, simulate, validate
from ptqjax.agreement import run, session
from ptqjax.config import QuantizationConfig
from ptqjax.encodings.encoding import make_encoding
from ptqjax.errors import ConfigError, ModelError, OutputError
from ptqjax.exporting import encodings_json, fingerprint, quantized_model
from ptqjax.ir import Node, text
from ptqjax.onnx_io.opset import blocking_node, with_opset
from ptqjax.qdq.insert import insert_qdq
from tests.models import Chain, build, node


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shaped(model, *shape):
    """The model with the shape of its output declared, which ONNX's checker asks for."""
    (output,) = model.graph.outputs
    return model.replace(graph=replace(model.graph, outputs=(replace(output, shape=shape),)))


def network(*, opset=17, size=8):
    chain = Chain(3, dtype=np.float32, opset=opset, size=size)
    chain.conv(6, pad=1, bias=True).clip().depthwise(pad=1, bias=True).add("Relu")
    return shaped(chain.add("GlobalAveragePool").add("Flatten").gemm(5).build(), "N", 5)


def quantized(model, **settings):
    spec = model.graph.inputs[0]
    batch = {spec.name: normal(4, *(size for size in spec.shape[1:]))}
    return calibrate(model, [batch], QuantizationConfig(ranges="min-max", **settings)), batch


def optimized_operators(path, tmp_path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(each.op_type for each in onnx.load(tmp_path / "optimized.onnx").graph.node)


def test_the_qdq_graph_as_text():
    params = {"w": np.full((2, 1, 1, 1), 0.5, np.float32), "b": np.array([1, 2], np.float32)}
    nodes = [node("Conv", ["x", "w", "b"], "c"), node("Relu", ["c"], "y")]
    model = build(nodes, params, input_shape=("n", 1, 2, 2), outputs=["y"])
    encodings, _ = quantized(model)
    lines = text(insert_qdq(model, encodings)).splitlines()
    assert [line.strip() for line in lines if " = " in line] == [
        "x_quantized = QuantizeLinear(x, x_scale, x_zero_point)",
        "x_dequantized = DequantizeLinear(x_quantized, x_scale, x_zero_point)",
        "w = DequantizeLinear(w_quantized, w_scale, w_zero_point) {axis=0}",
        "b = DequantizeLinear(b_quantized, b_scale, b_zero_point) {axis=0}",
        "c = Conv(x_dequantized, w, b)",
        "y_float = Relu(c)",
        "y_quantized = QuantizeLinear(y_float, y_scale, y_zero_point)",
        "y = DequantizeLinear(y_quantized, y_scale, y_zero_point)",
    ]
    assert "  param b_quantized: int32[2]" in lines
    assert "  param w_quantized: int8[2,1,1,1]" in lines


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_onnx_runtime_runs_the_file_in_integers(tmp_path, granularity):
    model = network()
    encodings, batch = quantized(model, granularity=granularity, weights="int7")  # 8 bits saturate on CPUs without VNNI
    export(model, encodings, tmp_path, "small")
    operators = optimized_operators(tmp_path / "small.onnx", tmp_path)
    assert operators["QLinearConv"] == 2
    assert operators["QGemm"] == 1
    assert operators["QLinearGlobalAveragePool"] == 1
    assert not {"Conv", "Gemm", "Relu", "Clip"} & set(operators)
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    y = np.asarray(session.run(None, batch)[0])
    (simulated,) = simulate(model, encodings)(model.params, encodings, batch).values()
    step = float(encodings[model.graph.outputs[0].name].scale)
    np.testing.assert_allclose(y, simulated, atol=2.01 * step)  # roundings of two layers that fall the other way


def test_what_is_written_is_read_back(tmp_path):
    model = network()
    encodings, _ = quantized(model)
    export(model, encodings, tmp_path, "small")
    again, expected = read(tmp_path / "small.onnx"), quantized_model(model, encodings)
    assert [replace(each, attributes=()) for each in again.graph.nodes] == [
        replace(each, attributes=())
        for each in expected.graph.nodes  # reading fills in defaults
    ]
    for name, value in expected.params.items():
        np.testing.assert_array_equal(again.params[name], value)


@pytest.mark.parametrize(
    ("settings", "opset", "domain"),
    [
        ({"weights": "int7"}, 17, ""),  # 8 bits saturate on CPUs without VNNI
        ({"weights": "int4"}, 21, ""),
        ({"activations": "uint16"}, 21, ""),
        ({"granularity": "block:2"}, 21, ""),
        ({"weights": "int16"}, 21, ""),
        ({"weights": "uint8", "activations": "int8"}, 17, ""),
    ],
)
def test_the_lowest_opset_that_has_the_types(tmp_path, settings, opset, domain):
    model = network()
    encodings, batch = quantized(model, **settings)
    export(model, encodings, tmp_path, "small")
    proto = onnx.load(tmp_path / "small.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain: entry.version for entry in proto.opset_import} == {domain: opset}
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    y = np.asarray(session.run(None, batch)[0])
    (simulated,) = simulate(model, encodings)(model.params, encodings, batch).values()
    step = float(encodings[model.graph.outputs[0].name].scale)
    # Sums in another order; a rounding that falls the other way in 16 bits before them moves the result by a few steps.
    np.testing.assert_allclose(y, simulated, atol=max(8 * step, 1e-3))


def test_a_higher_opset_stays():
    model = network(opset=21)
    assert quantized_model(model, quantized(model)[0]).graph.opset() == 21


def blocked_from_13():
    """Softmax over several axes at once: from opset 13 on it has but one."""
    nodes = [node("Softmax", ["x"], "p", axis=2), node("MatMul", ["p", "w"], "y")]
    return build(nodes, {"w": normal(8, 6)}, input_shape=("n", 3, 8, 8), outputs=["y"], opset=12)


def test_where_an_operator_would_change_the_opset_stays_and_the_runtimes_own_operators_serve(tmp_path):
    model = blocked_from_13()
    encodings, batch = quantized(model, activations="uint16")
    export(model, encodings, tmp_path, "small")
    assert dict(read(tmp_path / "small.onnx").graph.opsets) == {"": 12, "com.microsoft": 1}
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    y = np.asarray(session.run(None, batch)[0])
    for arithmetic in ("float", "integer"):
        (simulated,) = simulate(model, encodings, arithmetic=arithmetic)(model.params, encodings, batch).values()
        np.testing.assert_allclose(y, simulated, atol=2.01 * float(encodings["y"].scale))


def test_blocks_behind_an_operator_that_bars_the_way_are_an_error_before_anything_is_written(tmp_path):
    """ONNX Runtime's own DequantizeLinear has no blocks."""
    model = blocked_from_13()
    encodings, _ = quantized(model, granularity="block:4")
    with pytest.raises(ConfigError, match=r"needs opset 21.*Softmax \(producing 'p'\).*version_converter"):
        export(model, encodings, tmp_path / "out", "small")
    assert not (tmp_path / "out").exists()


REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum")


@pytest.mark.parametrize("op_type", REDUCTIONS)
def test_axes_become_an_input_on_the_way_to_blocks(tmp_path, op_type):
    opset = 12 if op_type == "ReduceSum" else 17
    nodes = [node(op_type, ["x"], "m", axes=(2, 3), keepdims=0), node("MatMul", ["m", "w"], "y")]
    model = build(nodes, {"w": normal(4, 5)}, input_shape=("n", 4, 8, 8), outputs=["y"], opset=opset)
    encodings, batch = quantized(model, granularity="block:2")
    export(model, encodings, tmp_path, "small")
    assert dict(read(tmp_path / "small.onnx").graph.opsets) == {"": 21}
    (y,) = run(session(tmp_path / "small.onnx"), batch).values()
    (simulated,) = simulate(model, encodings)(model.params, encodings, batch).values()
    np.testing.assert_allclose(y, simulated, atol=2.01 * float(encodings["y"].scale))


def test_blocks_in_a_transformer_that_reduces(shared, tmp_path):
    """Blocks of 8 bits whose product stays in float ONNX Runtime would mistake, but for a Clip that changes nothing."""
    model = read(shared / "models" / "tiny_vit_cifar10.onnx")
    batch = {model.graph.inputs[0].name: np.load(shared / "data" / "cifar10" / "calibration.npz")["input"][:2]}
    config = QuantizationConfig(ranges="min-max", granularity="block:32", weights="int4")
    encodings = calibrate(model, [batch], config)
    export(model, encodings, tmp_path, "vit")
    assert dict(read(tmp_path / "vit.onnx").graph.opsets) == {"": 21}
    assert run(session(tmp_path / "vit.onnx"), batch)["output"].shape == (2, 10)
    wide = calibrate(model, [batch], replace(config, weights="int8"))
    export(model, wide, tmp_path, "wide")
    (y,) = run(session(tmp_path / "wide.onnx"), batch).values()
    (simulated,) = simulate(model, wide, arithmetic="integer")(model.params, wide, batch).values()
    # One rounding that falls the other way in one of 4 blocks moves logits by some steps.
    np.testing.assert_allclose(y, simulated, atol=0.05 * np.abs(y).max())


OPSETS = [7, 9, 13, 17, 21, *(pytest.param(opset, marks=pytest.mark.slow) for opset in (8, 10, 11, 12, 15))]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("opset", OPSETS)
def test_models_of_every_opset_run_in_integers(tmp_path, opset, granularity):
    """Below opset 10 ONNX Runtime refuses the integer operators that it makes itself."""
    nodes = [
        node("Conv", ["x", "w", "b"], "c", pads=(1, 1, 1, 1)),
        node("Relu", ["c"], "r"),
        node("MaxPool", ["r"], "m", kernel_shape=(2, 2), strides=(2, 2)),
        node("Conv", ["m", "v"], "d"),
        node("Clip", ["d"], "e", min=0.0, max=2.0) if opset < 11 else node("Clip", ["d", "low", "high"], "e"),
        node("GlobalAveragePool", ["e"], "g"),
        node("Flatten", ["g"], "f"),
        node("Gemm", ["f", "u", "t"], "y", transB=1),
    ]
    params = {"w": normal(6, 3, 3, 3), "b": normal(6), "v": normal(8, 6, 3, 3), "u": normal(5, 8), "t": normal(5)}
    bounds = {"low": np.zeros((), np.float32), "high": np.full((), 2, np.float32)}
    params |= bounds if opset >= 11 else {}
    written = build(nodes, params, input_shape=("n", 3, 8, 8), outputs=["y"], opset=opset)
    model = read(onnx_io.to_proto(written))
    encodings, batch = quantized(model, granularity=granularity)
    export(model, encodings, tmp_path, "model")
    if opset < 10:
        assert read(tmp_path / "model.onnx").graph.opset() == 13
    found = validate(tmp_path, [batch])
    assert [group.operator for group in found.groups if group.operator in ("QLinearConv", "QGemm")] == [
        "QLinearConv",
        "QLinearConv",
        "QGemm",
    ]
    assert found.largest <= 1
    assert not [warning for warning in found.warnings if "VNNI" not in warning]
    (y,) = run(session(tmp_path), batch).values()
    (expected,) = apply(model.graph, model.params, batch).values()
    # The mend keeps the meaning: 8 bits through three layers.
    np.testing.assert_allclose(y, expected, atol=0.05 * np.abs(expected).max())


def test_an_operator_that_bars_the_way_to_integers_is_named(tmp_path):
    nodes = [node("Conv", ["x", "w"], "c"), node("Upsample", ["c", "sizes"], "y", mode="nearest")]
    params = {"w": normal(3, 3, 1, 1), "sizes": np.array([1, 1, 0.5, 0.5], np.float32)}
    model = read(onnx_io.to_proto(build(nodes, params, input_shape=(1, 3, 4, 4), outputs=["y"], opset=9)))
    encoding = make_encoding(np.float32(0.1), np.float32(0), dtype="int8")
    with pytest.raises(ModelError, match=r"opset 9.*Upsample \(producing 'y'\).*export the model anew"):
        export(model, {"w": encoding}, tmp_path, "model")


@pytest.mark.parametrize(
    ("layer", "inputs", "shapes"),
    [
        ("Squeeze", {"axes": (2, 3)}, (2, 3, 1, 1)),
        ("Unsqueeze", {"axes": (1,)}, (2, 3)),
        ("TopK", {"k": 2}, (2, 5)),
        ("Pad", {"pads": (0, 1, 0, 2), "value": 1.5, "mode": "constant"}, (2, 3)),
        ("Slice", {"starts": (0, 1), "ends": (9, 2)}, (2, 3)),
        ("Clip", {"min": -0.5}, (2, 3)),
        ("Softmax", {"axis": 1}, (2, 3)),
        ("Dropout", {"ratio": 0.3}, (2, 3)),
        ("ReduceL2", {"axes": (1,)}, (2, 3)),
    ],
)
def test_raising_the_opset_keeps_the_function(layer, inputs, shapes):
    """ONNX Runtime on both versions: an oracle that knows each opset."""
    outputs = ["y", "indices"] if layer == "TopK" else ["y"]
    each = Node(op_type=layer, inputs=("x",), outputs=tuple(outputs), attributes=tuple(sorted(inputs.items())))
    model = build([each], {}, input_shape=shapes, outputs=["y"], opset=9)
    batch = {"x": normal(*shapes)}
    assert blocking_node(model, 21) is None
    (before,), (after,) = (run(session(m), batch).values() for m in (model, with_opset(model, 21)))
    np.testing.assert_array_equal(after, before)


def test_outputs_without_a_declared_shape_are_written(tmp_path):
    """ONNX Runtime takes files whose outputs declare none; the checker does not."""
    chain = Chain(3, dtype=np.float32)
    model = chain.conv(4).add("GlobalAveragePool").add("Flatten").gemm(5).build()
    assert model.graph.outputs[0].shape is None
    encodings, batch = quantized(model)
    export(model, encodings, tmp_path, "m")
    assert read(tmp_path / "m.onnx").graph.outputs[0].shape == ("N", 5)
    assert run(session(tmp_path / "m.onnx"), batch)
    sixteen, batch = quantized(model, activations="uint16")
    onnx_io.write(insert_qdq(model, sixteen), tmp_path / "own.onnx")  # through operators that ONNX does not know
    assert read(tmp_path / "own.onnx").graph.outputs[0].shape == ("N", 5)


def test_block_encodings_state_their_size():
    model = network()
    found = encodings_json(model, quantized(model, granularity="block:2")[0])
    blocks = [entry for entry in found["param_encodings"] if entry["enc_type"] == "PER_BLOCK"]
    assert blocks
    assert all(entry["block_size"] == 2 and len(entry["scale"]) == len(entry["offset"]) for entry in blocks)


def test_bounds_per_channel_are_exact_and_let_the_convolution_fuse(tmp_path):
    """Conv, Relu, then Min with a bound for each channel: rounding before and after Min on one grid changes nothing."""
    params = {"w": normal(4, 3, 3, 3), "bound": np.array([0.5, 1, 2, 4], np.float32).reshape(4, 1, 1)}
    nodes = [node("Conv", ["x", "w"], "c"), node("Relu", ["c"], "r"), node("Min", ["r", "bound"], "y")]
    model = shaped(build(nodes, params, input_shape=("n", 3, 8, 8), outputs=["y"]), "n", 4, 6, 6)
    encodings, batch = quantized(model)
    np.testing.assert_array_equal(encodings["r"].scale, encodings["y"].scale)
    export(model, encodings, tmp_path, "small")
    operators = optimized_operators(tmp_path / "small.onnx", tmp_path)
    assert operators["QLinearConv"] == 1
    assert "Relu" not in operators
    once = {name: encoding for name, encoding in encodings.items() if name != "r"}
    twice = simulate(model, encodings)(model.params, encodings, batch)["y"]
    np.testing.assert_array_equal(twice, simulate(model, once)(model.params, once, batch)["y"])


def test_encodings_follow_the_schema():
    """Key sets, lengths and offsets as in AIMET's schema 1.0.0: offsets are negated unsigned zero points."""
    model = network()
    encodings, _ = quantized(model)
    found = encodings_json(model, encodings)
    assert set(found) == {"version", "producer", "activation_encodings", "param_encodings"}
    assert found["version"] == "1.0.0"
    entries = {entry["name"]: entry for entry in found["param_encodings"] + found["activation_encodings"]}
    assert set(entries) == set(encodings)
    assert {entry["name"] for entry in found["param_encodings"]} == set(encodings) & set(model.params)
    for name, entry in entries.items():
        assert set(entry) == {"name", "enc_type", "dtype", "bw", "is_sym", "scale", "offset"}
        weight = name in model.params
        assert entry["bw"] == 8
        assert entry["is_sym"] == weight
        assert len(entry["scale"]) == len(entry["offset"]) == np.size(encodings[name].scale)
        expected = -128 if weight else -np.asarray(encodings[name].zero_point)
        assert all(offset == expected for offset in entry["offset"])


def test_disabled_encodings_are_left_out():
    model = network()
    encodings, _ = quantized(model)
    off = {name: encoding.replace(enabled=np.asarray(False)) for name, encoding in encodings.items()}
    assert text(quantized_model(model, off)) == text(model)
    assert not encodings_json(model, off)["param_encodings"]


def test_the_file_states_where_it_comes_from(tmp_path):
    model = network()
    encodings, _ = quantized(model)
    export(model, encodings, tmp_path, "small", settings={"seed": 3})
    stated = dict(read(tmp_path / "small.onnx").graph.metadata)
    assert json.loads(stated["ptqjax.settings"]) == {"seed": 3}
    assert stated["ptqjax.model_sha256"] == fingerprint(model)
    assert {"python", "jax", "jaxlib", "numpy", "onnx"} <= json.loads(stated["ptqjax.versions"]).keys()
    other = model.replace(params={name: value + 1 for name, value in model.params.items()})
    assert fingerprint(other) != fingerprint(model)
    again = onnx_io.read(onnx_io.to_proto(model))
    assert fingerprint(onnx_io.read(onnx_io.to_proto(again))) == fingerprint(again)


def test_the_same_input_gives_the_same_bytes(tmp_path):
    model = network()
    encodings, _ = quantized(model)
    for name in ("first", "second"):
        export(model, encodings, tmp_path / name, "m")
    for file in ("m.onnx", "m.encodings"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    model = network()
    encodings, _ = quantized(model)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        export(model, encodings, tmp_path / "file", "m")
    with pytest.raises(ConfigError, match="not the name of a file"):
        export(model, encodings, tmp_path, "a/b")


def test_an_interrupted_export_leaves_nothing_half_written(tmp_path, monkeypatch):
    model = network()
    encodings, _ = quantized(model)
    export(model, encodings, tmp_path, "m")
    before = (tmp_path / "m.onnx").read_bytes()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    changed = model.replace(params={name: value * 2 for name, value in model.params.items()})
    for module, name in (("onnx_io.write", "write_apart"), ("exporting", "write_text")):  # the model, the encodings
        with monkeypatch.context() as patched:
            patched.setattr(importlib.import_module(f"ptqjax.{module}"), name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                export(changed, encodings, tmp_path, "m")
    assert (tmp_path / "m.onnx").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.encodings"}


def test_four_bits_are_stored_in_four_bits():
    model = network()
    encodings, _ = quantized(model, weights="int4")
    stored = [value for value in quantized_model(model, encodings).params.values() if value.dtype == ml_dtypes.int4]
    assert len(stored) == 2 * sum(name in model.params for name in encodings)  # weights and their zero points
