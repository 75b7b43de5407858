"""QDQ models read back: export's inverse to the bit, and files of other tools with their own outputs."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

import ptqjax
from ptqjax import onnx_io
from ptqjax.config import QuantizationConfig, Rule
from ptqjax.encoding_files.own_fields import is_identical
from ptqjax.encodings.encoding import make_encoding
from ptqjax.errors import ModelError
from ptqjax.exporting import quantized_model
from ptqjax.ir import Constant, Graph, Model, Node, TensorSpec, text, verify
from ptqjax.qdq.unquantize import unquantize
from tests.models import Chain, build, node


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network(*, opset=17, clip=True):
    """Layers of every kind with biases, an activation that grids imply, and one of two outputs read further."""
    chain = Chain(3, dtype=np.float32, opset=opset)
    chain.conv(6, pad=1, bias=True)
    chain = chain.clip() if clip else chain.add("Relu")
    chain.depthwise(pad=1, bias=True).add("Relu").conv_transpose(4, bias=True)
    chain.add("GlobalAveragePool").add("Flatten").gemm(8).matmul(5, bias=True).add("Sigmoid")
    model = chain.build()
    (spec,) = model.graph.outputs
    outputs = (replace(spec, shape=(2, 5)), TensorSpec(name="t4", dtype=spec.dtype, shape=(2, 4, 10, 10)))
    return verify(model.replace(graph=replace(model.graph, outputs=outputs)))


def calibrated(model, **settings):
    spec = model.graph.inputs[0]
    shape = [2 if isinstance(size, str) else size for size in spec.shape]
    batch = {spec.name: normal(*shape, seed=5)}
    return ptqjax.calibrate(model, [batch], QuantizationConfig(ranges="min-max", **settings)), batch


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, encoding in expected.items():
        assert is_identical(found[name], encoding), f"{name}: {found[name]} is not {encoding}"


def named_alike(model):
    """The model in which what is quantized has the name of its codes: that of a Relu that is gone is another one."""
    names = {each.inputs[0]: f"{each.output} before" for each in model.graph.nodes if each.op_type == "QuantizeLinear"}
    fixed = {spec.name for spec in (*model.graph.inputs, *model.graph.outputs)} | set(model.params)
    names = {old: new for old, new in names.items() if old not in fixed}
    alike = lambda several: tuple(names.get(name, name) for name in several)  # noqa: E731
    nodes = [replace(each, inputs=alike(each.inputs), outputs=alike(each.outputs)) for each in model.graph.nodes]
    return model.replace(graph=replace(model.graph, nodes=tuple(nodes)))


def assert_same_model(found, expected):
    """Same nodes, names and attributes, and the same arrays to the bit."""
    assert text(named_alike(found)) == text(named_alike(expected))
    for name, value in expected.params.items():
        assert np.asarray(value).tobytes() == np.asarray(found.params[name]).tobytes(), name


def run(path, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def assert_inverse_of_export(tmp_path, model, encodings, batch, **settings):
    """Encodings come back to the bit; exported again it is the same file, with the same outputs."""
    ptqjax.export(model, encodings, tmp_path, "first", **settings)
    again, found, report = ptqjax.read_quantized(tmp_path / "first.onnx")
    assert_identical(found, encodings)
    assert again.graph.metadata == model.graph.metadata
    assert all(record.done for record in report)
    ptqjax.export(again, found, tmp_path, "second", **settings)
    first, second = (onnx_io.read(tmp_path / f"{name}.onnx") for name in ("first", "second"))
    assert_same_model(second, first)
    for one, other in zip(*(run(tmp_path / f"{name}.onnx", batch) for name in ("first", "second")), strict=True):
        np.testing.assert_array_equal(one, other)
    return again, report


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"granularity": "tensor"},
        {"weights": "uint8"},
        {"weights": "int4"},
        {"weights": "int6"},
        {"activations": "int8"},
        {"activations": "uint16", "weights": "int16"},
        {"weights": "int4", "granularity": "block:4"},
        {"exclude": ("w0", "t4")},
    ],
    ids=str,
)
def test_export_and_back_is_the_same_to_the_bit(tmp_path, settings):
    model = network()
    encodings, batch = calibrated(model, **settings)
    assert_inverse_of_export(tmp_path, model, encodings, batch)


@pytest.mark.parametrize("opset", [9, 10, 12, 13, 21])
def test_operator_sets(tmp_path, opset):
    model = Chain(3, dtype=np.float32, opset=opset).conv(4, bias=True).add("Relu").conv(5).build()
    (spec,) = model.graph.outputs
    model = model.replace(graph=replace(model.graph, outputs=(replace(spec, shape=(2, 5, 4, 4)),)))
    encodings, batch = calibrated(model)
    assert_inverse_of_export(tmp_path, model, encodings, batch)


def changed(encodings, **kinds):
    """The encodings with other grids for some tensors, of the same ranges."""
    found = dict(encodings)
    for name, (dtype, settings) in kinds.items():
        old = encodings[name]
        if dtype in ("float16", "bfloat16"):
            found[name] = make_encoding(np.float32(1), 0, dtype=dtype)
        else:
            found[name] = make_encoding(old.scale, 0, dtype=dtype, axis=old.axis, **settings)
    return found


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "int4", "uint4"])
def test_other_types_of_weights_and_activations(tmp_path, dtype):
    model = network(opset=21)
    encodings, batch = calibrated(model)
    assert_inverse_of_export(tmp_path, model, changed(encodings, w0=(dtype, {}), t3=(dtype, {})), batch)


def test_grids_that_end_before_their_type(tmp_path):
    """Strictly symmetric weights and activations, 6 bits: their ends stand in a Clip, or in the metadata."""
    model = network()
    encodings, batch = calibrated(model, weights="int6")
    strict = {"symmetric": "strict"}
    encodings = changed(encodings, w0=("int8", strict), t3=("int8", strict), x=("int6", {}))
    assert_inverse_of_export(tmp_path, model, encodings, batch)


def test_low_power_blocks_keep_their_bits(tmp_path):
    model = build([node("MatMul", ["x", "w"], "y")], {"w": normal(8, 3)}, input_shape=("N", 8), outputs=["y"], opset=21)
    model = model.replace(graph=replace(model.graph, outputs=(replace(model.graph.outputs[0], shape=("N", 3)),)))
    scale = np.array([[16, 3, 16], [1, 16, 9]], np.float32) * np.array([0.01, 0.02, 0.015], np.float32)
    encodings = {"w": make_encoding(scale, 0, dtype="int4", symmetric=True, axis=-2, block_size=4, scale_bits=4)}
    assert_inverse_of_export(tmp_path, model, encodings, {"x": normal(2, 8)})


def test_weights_as_rounded_floats(tmp_path):
    model = network()
    encodings, batch = calibrated(model)
    assert_inverse_of_export(tmp_path, model, encodings, batch, weights="float")


def test_what_is_off_is_not_in_the_file(tmp_path):
    model = network()
    encodings, _ = calibrated(model)
    off = {name: value.replace(enabled=np.asarray(name not in ("w0", "t3"))) for name, value in encodings.items()}
    ptqjax.export(model, off, tmp_path, "m")
    _, found, _ = ptqjax.read_quantized(tmp_path / "m.onnx")
    assert_identical(found, {name: value for name, value in off.items() if value.enabled})


def test_bounds_on_integers_become_bounds_of_numbers(tmp_path):
    params = {"w": normal(4, 3, 3, 3), "bound": np.array([0.5, 1, 2, 4], np.float32).reshape(4, 1, 1)}
    nodes = [node("Conv", ["x", "w"], "c"), node("Relu", ["c"], "r"), node("Min", ["r", "bound"], "m")]
    params["v"] = normal(2, 4, 3, 3)
    model = build([*nodes, node("Conv", ["m", "v"], "y")], params, input_shape=(2, 3, 8, 8), outputs=["y"])
    model = model.replace(graph=replace(model.graph, outputs=(replace(model.graph.outputs[0], shape=(2, 2, 4, 4)),)))
    encodings, batch = calibrated(model)
    again, _ = assert_inverse_of_export(tmp_path, model, encodings, batch)
    assert [each.op_type for each in again.graph.nodes] == ["Conv", "Min", "Conv"]
    step = float(encodings["r"].scale)
    np.testing.assert_allclose(again.params["bound"], params["bound"], atol=0.5001 * step)  # rounded to the grid


def test_a_shared_weight_and_bias_have_their_own_copies(tmp_path):
    params = {"w": normal(4, 4, 1, 1), "b": normal(4)}
    nodes = [node("Conv", ["x", "w", "b"], "c"), node("Conv", ["c", "w", "b"], "y")]
    model = build(nodes, params, input_shape=(2, 4, 3, 3), outputs=["y"])
    model = model.replace(graph=replace(model.graph, outputs=(replace(model.graph.outputs[0], shape=(2, 4, 3, 3)),)))
    encodings, _ = calibrated(model)
    ptqjax.export(model, encodings, tmp_path, "first")
    again, found, _ = ptqjax.read_quantized(tmp_path / "first.onnx")
    assert_identical({name: found[name] for name in encodings}, encodings)
    ptqjax.export(again, found, tmp_path, "second")
    assert_same_model(onnx_io.read(tmp_path / "second.onnx"), onnx_io.read(tmp_path / "first.onnx"))


@pytest.mark.parametrize("kind", ["6 bits", "strict", "low-power blocks", "bfloat16"])
def test_copies_of_a_shared_weight_have_its_grid(tmp_path, kind):
    """What only the metadata tell, of the layer that keeps the name and of the one that reads a copy."""
    scale = np.array([[16, 3, 16, 9], [1, 16, 9, 16]], np.float32) / 128
    encoding = {
        "6 bits": make_encoding(np.float32(0.1), 0, dtype="int6"),
        "strict": make_encoding(np.float32(0.1), 0, dtype="int8", symmetric="strict"),
        "low-power blocks": make_encoding(scale, 0, dtype="int4", axis=-2, block_size=2, scale_bits=4),
        "bfloat16": make_encoding(np.float32(1), 0, dtype="bfloat16"),
    }[kind]
    nodes = [node("MatMul", ["x", "w"], "h"), node("MatMul", ["h", "w"], "y")]
    model = build(nodes, {"w": normal(4, 4)}, input_shape=(2, 4), outputs=["y"], opset=21)
    model = model.replace(graph=replace(model.graph, outputs=(replace(model.graph.outputs[0], shape=(2, 4)),)))
    ptqjax.export(model, {"w": encoding}, tmp_path, "first")
    again, found, _ = ptqjax.read_quantized(tmp_path / "first.onnx")
    assert_identical(found, {"w": encoding, "w_y": encoding})
    ptqjax.export(again, found, tmp_path, "second")
    assert_identical(ptqjax.read_quantized(tmp_path / "second.onnx")[1], found)


def test_rounded_it_is_the_function_that_was_exported(tmp_path):
    """The simulation of what was read equals that of what was exported, although Relu and Clip are gone."""
    model = network()
    outputs = Rule(operators=("ConvTranspose", "Sigmoid"), of="activations", enabled=True)
    encodings, batch = calibrated(model, rules=(outputs,))
    again, found, _ = unquantize(quantized_model(model, encodings))
    assert "Relu" not in {each.op_type for each in again.graph.nodes}
    for arithmetic in ("float", "integer"):
        before = ptqjax.simulate(model, encodings, arithmetic=arithmetic)(model.params, encodings, batch)
        after = ptqjax.simulate(again, found, arithmetic=arithmetic)(again.params, found, batch)
        for name, value in before.items():
            steps = np.abs(np.asarray(after[name]) - np.asarray(value)) / float(encodings[name].scale)
            # Weights that lie on their grid need not be rounded; sums of other floats fall to the other side at times.
            assert steps.max() < 1.01 if arithmetic == "float" else steps.max() == 0


def reader(model, count=2):
    class Reader(CalibrationDataReader):
        def __init__(self):
            shape = [2 if isinstance(size, str) else size for size in model.graph.inputs[0].shape]
            name = model.graph.inputs[0].name
            self.batches = iter([{name: normal(*shape, seed=i)} for i in range(count)])

        def get_next(self):
            return next(self.batches, None)

    return Reader()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_channel": True, "weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8},
        {"extra_options": {"DedicatedQDQPair": True}},
        {"extra_options": {"AddQDQPairToWeight": True}},
        {"extra_options": {"WeightSymmetric": False, "ActivationSymmetric": True}},
        {"activation_type": QuantType.QUInt16, "weight_type": QuantType.QInt8},
        {"op_types_to_quantize": ["Conv", "MatMul"]},
    ],
    ids=str,
)
def test_files_of_onnx_runtimes_tool(tmp_path, settings):
    """Names of tensors come back, and what is exported again gives the same outputs without the runtime's fusions."""
    model = network(opset=21)
    onnx_io.write(model, tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "theirs.onnx", reader(model), quant_format=QuantFormat.QDQ, **settings
    )
    again, encodings, report = ptqjax.read_quantized(tmp_path / "theirs.onnx")
    known = set(model.params) | {"x"} | set(model.graph.producers)
    assert encodings
    assert set(encodings) <= known
    assert set(again.params) <= set(model.params)
    assert all(record.done for record in report)
    ptqjax.export(again, encodings, tmp_path, "ours")
    _, found, _ = ptqjax.read_quantized(tmp_path / "ours.onnx")
    assert_identical(found, encodings)
    batch = {"x": normal(2, 3, 8, 8, seed=9)}
    for one, other in zip(
        plain_run(tmp_path / "theirs.onnx", batch), plain_run(tmp_path / "ours.onnx", batch), strict=True
    ):
        # Biases of layers that are left in float are int32 in one of the files: half a step of 2^-31 of their range.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(one).max())


def plain_run(path, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, inputs)


def test_files_of_integer_operators_are_refused(tmp_path):
    model = network()
    onnx_io.write(model, tmp_path / "float.onnx")
    quantize_static(tmp_path / "float.onnx", tmp_path / "q.onnx", reader(model), quant_format=QuantFormat.QOperator)
    with pytest.raises(ModelError, match=r"QLinear.*works on integers; expected QuantizeLinear and DequantizeLinear"):
        ptqjax.read_quantized(tmp_path / "q.onnx")


def test_what_is_quantized_at_run_time_is_left_with_a_reason(tmp_path):
    model = network()
    onnx_io.write(model, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx")
    again, encodings, report = ptqjax.read_quantized(tmp_path / "dynamic.onnx")
    assert encodings == {}
    assert_same_model(again, onnx_io.read(tmp_path / "dynamic.onnx"))
    assert {record.where[0] for record in report if not record.done} >= {
        each.output for each in again.graph.nodes if each.op_type in ("DynamicQuantizeLinear", "MatMulInteger")
    }


SCALES = {"s": np.float32(0.5).reshape(()), "z": np.uint8(7).reshape(()), "s2": np.float32(0.25).reshape(())}


def handmade(nodes, *, outputs=("y",), params=None, x=np.float32, opset=21, microsoft=False):
    params = {name: np.asarray(value) for name, value in {**SCALES, **(params or {})}.items()}
    read = {name for each in nodes for name in each.inputs}
    params = {name: value for name, value in params.items() if name in read}
    graph = Graph(
        name="test",
        inputs=(TensorSpec(name="x", dtype=np.dtype(x), shape=(2, 6)),),
        outputs=tuple(TensorSpec(name=name, dtype=np.dtype(np.float32), shape=None) for name in outputs),
        nodes=tuple(nodes),
        parameters=tuple(sorted(params)),
        opsets=(("", opset), ("com.microsoft", 1)) if microsoft else (("", opset),),
    )
    return verify(Model(graph=graph, params=params))


def q(source, target, *, scale="s", **more):
    return Node(op_type="QuantizeLinear", inputs=(source, scale, "z"), outputs=(target,), **more)


def dq(source, target, *, scale="s", **more):
    return Node(op_type="DequantizeLinear", inputs=(source, scale, "z"), outputs=(target,), **more)


def lines(model):
    return [line.strip() for line in text(model).splitlines() if " = " in line]


STEP = make_encoding(np.float32(0.5), 7, dtype="uint8")
HALF_STEP = make_encoding(np.float32(0.25), 7, dtype="uint8")


def test_pairs_that_share_a_grid_are_one_and_names_of_aimet_are_known():
    """Several pairs on one tensor, several dequantizers of one quantizer, and a weight with both behind it."""
    nodes = [q("x", "x_q"), dq("x_q", "x_updated"), dq("x_q", "x_two"), q("x", "x_q3"), dq("x_q3", "x_three")]
    nodes += [q("w", "w_q"), dq("w_q", "w_qdq"), node("MatMul", ["x_updated", "w_qdq"], "m")]
    nodes += [node("Sum", ["m", "x_two", "x_three"], "y_updated"), q("y_updated", "y_q"), dq("y_q", "y")]
    found, encodings, _ = unquantize(handmade(nodes, params={"w": normal(6, 6)}))
    assert lines(found) == ["m = MatMul(x, w)", "y = Sum(m, x, x)"]
    assert_identical(encodings, {"x": STEP, "w": STEP, "y": STEP})


def test_files_of_aimets_to_onnx_qdq(tmp_path):
    """As aimet-onnx 2.42 writes a Conv, Flatten and Gemm: float weights behind pairs, float biases, X_updated."""
    params = {"w": normal(4, 3, 3, 3), "b": normal(4), "g": normal(5, 36), "gb": normal(5)}
    graph = onnx.helper.make_graph(
        [
            *aimet_pair("w", "w_qdq", axis=0),
            *aimet_pair("x", "x_updated"),
            onnx.helper.make_node("Conv", ["x_updated", "w_qdq", "b"], ["c"], "conv"),
            onnx.helper.make_node("Relu", ["c"], ["r"], "relu"),
            *aimet_pair("r", "r_updated"),
            onnx.helper.make_node("Flatten", ["r_updated"], ["f"], "flatten"),
            *aimet_pair("g", "g_qdq", axis=0),
            *aimet_pair("f", "f_qdq"),
            onnx.helper.make_node("Gemm", ["f_qdq", "g_qdq", "gb"], ["y_updated"], "gemm", transB=1),
            *aimet_pair("y_updated", "y", base="y"),
        ],
        "aimet",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3, 5, 5])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 5])],
    )
    grids = {name: (np.float32(0.05), np.uint8(120)) for name in ("x", "y")}
    grids |= {name: (np.float32(0.03), np.uint8(0)) for name in ("r", "f")}
    grids |= {"w": (np.float32([0.01, 0.02, 0.03, 0.015]), np.zeros(4, np.int8))}
    grids |= {"g": (np.float32([0.02, 0.01, 0.025, 0.03, 0.015]), np.zeros(5, np.int8))}
    ends = {f"{name}_{end}": value for name, pair in grids.items() for end, value in zip(ENDS, pair, strict=True)}
    arrays = {**params, **ends}.items()
    graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in arrays)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, tmp_path / "aimet.onnx")
    found, encodings, report = ptqjax.read_quantized(tmp_path / "aimet.onnx")
    assert [each.op_type for each in found.graph.nodes] == ["Conv", "Relu", "Flatten", "Gemm"]
    assert found.params.keys() == params.keys()
    assert all(record.done for record in report)
    axes = {"w": 0, "g": 0}
    types = {name: ("int8" if name in axes else "uint8") for name in grids}
    expected = {
        name: make_encoding(scale, zero_point.astype(np.float32), dtype=types[name], axis=axes.get(name))
        for name, (scale, zero_point) in grids.items()
    }
    assert_identical(encodings, expected)
    for name, value in params.items():
        np.testing.assert_array_equal(found.params[name], value)
    batch = {"x": normal(2, 3, 5, 5, seed=9)}
    ptqjax.export(found, encodings, tmp_path, "ours")
    (one,), (other,) = (plain_run(tmp_path / f"{name}.onnx", batch) for name in ("aimet", "ours"))
    assert np.abs(one - other).max() <= 0.05 * 1.001  # biases become int32: a sum at a tie may fall to the other side


ENDS = ("scale", "zero_point")


def aimet_pair(source, target, *, base=None, **attributes):
    base = base or source
    ends, name = [f"{base}_{end}" for end in ENDS], f"QcQuantizeOp_{base}"
    return (
        onnx.helper.make_node("QuantizeLinear", [source, *ends], [f"{base}_q"], f"{name}_q", **attributes),
        onnx.helper.make_node("DequantizeLinear", [f"{base}_q", *ends], [target], f"{name}_dq", **attributes),
    )


def test_the_runtimes_own_operators_are_read_like_onnxs():
    ms = {"domain": "com.microsoft"}
    nodes = [q("x", "x_q", **ms), dq("x_q", "x_dq", **ms), node("Relu", ["x_dq"], "y")]
    found, encodings, _ = unquantize(handmade(nodes, opset=11, microsoft=True))
    assert lines(found) == ["y = Relu(x)"]
    assert found.graph.opsets == (("", 11),)
    assert_identical(encodings, {"x": STEP})


def test_a_tensor_that_is_also_read_unrounded_is_kept_apart():
    nodes = [node("Relu", ["x"], "r"), q("r", "r_q"), dq("r_q", "r_dq"), node("Add", ["r", "r_dq"], "y")]
    found, encodings, report = unquantize(handmade(nodes))
    assert lines(found) == ["r = Relu(x)", "r_dq = Identity(r)", "y = Add(r, r_dq)"]
    assert_identical(encodings, {"r_dq": STEP})
    assert "also read unrounded" in report[0].reason


@pytest.mark.parametrize("outputs", [("r", "y"), ("r_dq", "y")])
def test_outputs_are_what_they_were(outputs):
    nodes = [node("Relu", ["x"], "r"), q("r", "r_q"), dq("r_q", "r_dq"), node("Neg", ["r_dq"], "y")]
    found, encodings, _ = unquantize(handmade(nodes, outputs=outputs))
    if outputs[0] == "r":
        assert lines(found) == ["r = Relu(x)", "r_dq = Identity(r)", "y = Neg(r_dq)"]
    else:
        assert lines(found) == ["r_dq = Relu(x)", "y = Neg(r_dq)"]
    assert_identical(encodings, {"r_dq": STEP})


def test_two_grids_on_one_tensor_are_kept_apart():
    nodes = [q("x", "a_q"), dq("a_q", "a"), q("x", "b_q", scale="s2"), dq("b_q", "b", scale="s2")]
    found, encodings, _ = unquantize(handmade([*nodes, node("Add", ["a", "b"], "y")]))
    assert lines(found) == ["a = Identity(x)", "b = Identity(x)", "y = Add(a, b)"]
    assert_identical(encodings, {"a": STEP, "b": HALF_STEP})


def test_one_pair_behind_another_rounds_twice():
    nodes = [q("x", "a_q"), dq("a_q", "a"), q("a", "b_q", scale="s2"), dq("b_q", "b", scale="s2")]
    found, encodings, _ = unquantize(handmade([*nodes, node("Relu", ["b"], "y")]))
    assert lines(found) == ["b = Identity(x)", "y = Relu(b)"]
    assert_identical(encodings, {"x": STEP, "b": HALF_STEP})


def test_an_input_that_is_rounded_to_an_output():
    found, encodings, _ = unquantize(handmade([q("x", "x_q"), dq("x_q", "y")]))
    assert lines(found) == ["y = Identity(x)"]
    assert_identical(encodings, {"y": STEP})


def test_what_moves_integers_moves_numbers():
    nodes = [q("x", "x_q"), node("Transpose", ["x_q"], "t_quantized", perm=(1, 0)), dq("t_quantized", "t_dq")]
    found, encodings, _ = unquantize(handmade([*nodes, node("Relu", ["t_dq"], "y")]))
    assert lines(found) == ["t = Transpose(x) {perm=[1, 0]}", "y = Relu(t)"]
    assert_identical(encodings, {"x": STEP, "t": STEP})


def test_a_type_without_a_zero_point_is_that_of_onnx():
    bare = [Node(op_type="QuantizeLinear", inputs=("x", "s"), outputs=("x_q",))]
    bare += [Node(op_type="DequantizeLinear", inputs=("x_q", "s"), outputs=("x_dq",)), node("Relu", ["x_dq"], "y")]
    weight = [Node(op_type="DequantizeLinear", inputs=("w_q", "s"), outputs=("w",)), node("MatMul", ["x", "w"], "y")]
    _, encodings, _ = unquantize(handmade(weight, params={"w_q": np.arange(36, dtype=np.int8).reshape(6, 6)}))
    assert_identical(encodings, {"w": make_encoding(np.float32(0.5), 0, dtype="int8")})


def test_a_single_scale_is_one_per_channel_only_on_an_axis_of_one_place():
    params = {"s": np.array([0.5], np.float32), "z": np.array([0], np.int8)}
    for shape, axis, expected in (((6, 1), 1, 1), ((6, 6), 1, None)):
        codes = np.ones(shape, np.int8)
        nodes = [dq("w_quantized", "w", attributes=(("axis", 1),)), node("Gemm", ["x", "w"], "y")]
        _, encodings, _ = unquantize(handmade(nodes, params=params | {"w_quantized": codes}))
        assert encodings["w"].axis == expected, (shape, axis)
        assert encodings["w"].scale.shape == (() if expected is None else (1,))


def test_scales_that_are_computed_and_codes_at_the_ends_are_left_with_a_reason():
    nodes = [node("ReduceMax", ["x"], "m", keepdims=0), q("x", "x_q", scale="m"), dq("x_q", "y", scale="m")]
    found, encodings, report = unquantize(handmade(nodes))
    assert lines(found)[1:] == ["x_q = QuantizeLinear(x, m, z)", "y = DequantizeLinear(x_q, m, z)"]
    assert encodings == {}
    assert [record.where[0] for record in report if not record.done] == ["x_q", "y"]
    found, encodings, report = unquantize(handmade([dq("x", "a"), node("Relu", ["a"], "y")], x=np.uint8))
    assert (encodings, report[0].done, lines(found)[0]) == ({}, False, "a = DequantizeLinear(x, s, z)")
    found, encodings, report = unquantize(handmade([node("Relu", ["x"], "r"), q("r", "y")]))
    assert (encodings, report[0].done, lines(found)[1]) == ({}, False, "y = QuantizeLinear(r, s, z)")


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([q("x", "x_q"), dq("x_q", "y", scale="s2")], "'y'.*dequantizes 'x' on another grid"),
        ([q("x", "x_q"), node("Cast", ["x_q"], "y", to=1)], "Cast.*reads 'x_q', which are integers"),
        ([q("x", "x_q"), node("Add", ["x_q", "x_q"], "a"), dq("a", "y")], "Add.*reads 'x_q', which are integers"),
    ],
)
def test_operators_on_integers_are_refused(nodes, message):
    with pytest.raises(ModelError, match=message):
        unquantize(handmade(nodes))


def test_a_bias_on_another_grid_than_its_layers_is_told():
    params = {"w_q": np.ones((6, 6), np.uint8), "b_q": np.arange(6, dtype=np.int32), "zb": np.int32(0)}
    nodes = [q("x", "x_q"), dq("x_q", "xd"), dq("w_q", "wd")]
    for scale, reason in (("sb", ""), ("s2", "another one")):
        bias = Node(op_type="DequantizeLinear", inputs=("b_q", scale, "zb"), outputs=("b",))
        extra = params | {"sb": np.float32(0.25)} | ({"s2": np.float32(0.3)})
        found, encodings, report = unquantize(
            handmade([*nodes, bias, node("Gemm", ["xd", "wd", "b"], "y")], params=extra)
        )
        assert "b" not in encodings
        assert found.params["b"].dtype == np.float32
        (record,) = [record for record in report if record.where == ("b",)]
        assert record.done
        assert reason in record.reason
        assert bool(record.reason) == bool(reason)


def test_float_models_come_back_as_they_are():
    model = network()
    found, encodings, report = unquantize(model)
    assert_same_model(found, model)
    assert (encodings, report) == ({}, ())


@pytest.mark.parametrize(
    "metadata",
    ["{", "[]", '{"w": 3}', '{"w": {"limits": "no"}}', '{"w": {"limits": [1]}}', '{"w": {"scale_bits": "x"}}'],
)
def test_damaged_metadata_are_an_error(metadata):
    model = build([node("MatMul", ["x", "w"], "y")], {"w": normal(6, 6)}, input_shape=("N", 6), outputs=["y"])
    quantized = quantized_model(model, {"w": make_encoding(np.float32(0.1), 0, dtype="int8")})
    graph = replace(quantized.graph, metadata=(("ptqjax.grids", metadata),))
    with pytest.raises(ModelError, match=r"ptqjax\.grids"):
        unquantize(quantized.replace(graph=graph))


def test_readers_in_subgraphs_see_the_tensor_unrounded(tmp_path):
    """As export writes it: a subgraph that captures an activation reads it in float."""
    inner = Graph(
        name="then",
        inputs=(),
        outputs=(TensorSpec(name="i", dtype=np.dtype(np.float32), shape=None),),
        nodes=(node("Neg", ["r"], "i"),),
    )
    branch = Node(
        op_type="If",
        inputs=("condition",),
        outputs=("b",),
        attributes=(("else_branch", inner), ("then_branch", inner)),
    )
    nodes = [node("Relu", ["x"], "r"), branch, node("Add", ["r", "b"], "y")]
    plain = build([nodes[0]], {}, input_shape=(2, 6), outputs=["r"])
    constants = (("condition", Constant(np.asarray(True))),)
    graph = replace(
        plain.graph, nodes=tuple(nodes), constants=constants, outputs=(replace(plain.graph.outputs[0], name="y"),)
    )
    model = verify(plain.replace(graph=graph))
    encodings = {"r": STEP, "y": STEP}
    again, found, _ = unquantize(quantized_model(model, encodings))
    assert_identical(found, encodings)
    assert_same_model(quantized_model(again, found), quantized_model(model, encodings))


REAL = ["mlperf_resnet8_cifar10", "mlperf_vww_mobilenet_v1_0.25_96", "mlperf_ad01_autoencoder", "tiny_vit_cifar10"]


@pytest.mark.parametrize("name", REAL)
def test_real_networks_come_back(tmp_path, shared, name):
    path = shared / "models" / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    model, _ = ptqjax.fold_batch_norms(ptqjax.read(path))
    encodings, batch = calibrated(model)
    assert_inverse_of_export(tmp_path, model, encodings, batch)
    stated = json.loads((tmp_path / "first.encodings").read_text())
    assert stated == json.loads((tmp_path / "second.encodings").read_text())
