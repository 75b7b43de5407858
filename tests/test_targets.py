"""Targets: each that comes with the package places real networks within its own limits, and what it exports runs."""

import importlib.resources
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from ptqjax.config import QuantizationConfig, Rule, load_target, target_names
from ptqjax.errors import ConfigError
from ptqjax.exporting import export
from ptqjax.ir import Model
from ptqjax.onnx_io import read
from ptqjax.placement.place import place
from ptqjax.ranges.calibrate import calibrate
from ptqjax.ranges.search import choose_encoding
from ptqjax.simulation import simulate
from ptqjax.transforms import fold_batch_norms
from tests.test_placement import CONV, MATRIX, SAME, build, floats, plan

NETWORKS = ("mlperf_resnet8_cifar10", "mlperf_vww_mobilenet_v1_0.25_96", "tiny_vit_cifar10")


def text_of(name: str) -> str:
    return (importlib.resources.files("ptqjax.targets") / f"{name}.toml").read_text()


@pytest.mark.parametrize("name", target_names())
def test_a_target_cites_its_source_and_has_settings_that_it_takes(name: str) -> None:
    assert re.search(r"Sources?: ", text_of(name))
    assert QuantizationConfig.for_target(name).target == name


@pytest.mark.parametrize("name", target_names())
@pytest.mark.parametrize("network", NETWORKS)
def test_real_networks_are_placed_within_the_limits_of_the_target(shared: Path, name: str, network: str) -> None:
    model, _ = fold_batch_norms(read(shared / "models" / f"{network}.onnx"))
    target, config = load_target(name), QuantizationConfig.for_target(name)
    placement = place(model, config)
    allowed = dict(target.allowed)
    for site in placement.sites:
        kind = "weights" if site.kind == "weight" else "activations"
        assert site.dtype in allowed.get(kind, (site.dtype,)), site
        assert site.symmetric in allowed.get(f"{kind}_symmetric", (site.symmetric,)), site
        assert site.axis is None or "channel" in allowed.get("granularity", ("channel",)), site
    assert bool(placement.biases) is (target.biases == "int32")
    assert bool(placement.float_biases) is (target.biases == "float")


# What is exported


def network() -> Model:
    """A residual block with a depthwise convolution, a pool, a product and a Softmax."""
    return build(
        ("Conv", "x w1 b1", "c1", SAME), ("Relu", "c1", "r1"), ("Conv", "r1 w2 b2", "c2", {"group": 4, **SAME}),
        ("Add", "c2 r1", "a"), ("Relu", "a", "r2"), ("MaxPool", "r2", "m", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("GlobalAveragePool", "m", "g"), ("Flatten", "g", "f"), ("Gemm", "f w3 b3", "z"), ("Softmax", "z", "y"),
        w1=CONV["w"], b1=CONV["b"], w2=floats(4, 1, 3, 3), b2=floats(4), w3=floats(4, 5), b3=floats(5),
    )  # fmt: skip


def exported(model: Model, config: QuantizationConfig, folder: Path) -> tuple[onnx.ModelProto, dict, dict]:
    """Returns the file, and what ONNX Runtime and the simulation make of a random input."""
    random = np.random.default_rng(0)
    batches = [{"x": random.normal(size=(1, 4, 6, 6)).astype(np.float32)} for _ in range(4)]
    encodings = calibrate(model, batches, config)
    export(model, encodings, folder, "model", weights=load_target(config.target).exported_weights)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, batches[0])
    simulated = simulate(model, encodings)(model.params, encodings, batches[0])
    return onnx.load(folder / "model.onnx"), encodings, {"runtime": found, "simulation": simulated["y"]}


@pytest.mark.parametrize("name", target_names())
def test_what_is_exported_for_a_target_runs_and_is_what_was_simulated(name: str, tmp_path: Path) -> None:
    config = QuantizationConfig.for_target(name, ranges="min-max")
    _, encodings, outputs = exported(network(), config, tmp_path)
    # A rounding that flips on the way moves a class by a few steps of 1 / 255; Softmax outputs lie in [0, 1].
    steps = 1 / 255 if "y" not in encodings else float(encodings["y"].scale)
    assert np.abs(outputs["runtime"] - outputs["simulation"]).max() <= 4 * max(steps, 1 / 255)


def test_tensorrt_gets_symmetric_grids_in_front_of_layers_alone_and_biases_in_float(tmp_path: Path) -> None:
    model = network()
    config = QuantizationConfig.for_target("tensorrt", ranges="min-max")
    found = plan(place(model, config))
    rounded = {tensor for tensor, what in found.items() if what != "float"}
    assert rounded == {"x", "r1", "m", "r2", "g", "f", "w1", "w2", "w3"}  # r1 as the residual input, too
    proto, encodings, _ = exported(model, config, tmp_path)
    assert {float(np.max(np.abs(encodings[tensor].zero_point))) for tensor in rounded} == {0.0}
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    assert stored["b1"].data_type == onnx.TensorProto.FLOAT
    quantized = {node.input[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    assert "c1" not in quantized
    assert "c2" not in quantized


def test_without_vnni_no_pair_of_products_saturates() -> None:
    model = network()
    config = QuantizationConfig.for_target("ort-cpu-avx2", ranges="min-max")
    batches = [{"x": np.random.default_rng(0).normal(size=(1, 4, 6, 6)).astype(np.float32)}]
    encodings = calibrate(model, batches, config)
    for name in ("w1", "w2", "w3"):
        largest = max(abs(float(encodings[name].qmin)), float(encodings[name].qmax))
        assert 2 * 255 * largest < 2**15
    with pytest.raises(
        ConfigError, match=r"weights='int8' is not what target 'ort-cpu-avx2' takes: int7, .*set weights='int7'"
    ):
        QuantizationConfig(target="ort-cpu-avx2")
    assert QuantizationConfig(target="ort-cpu-avx2", weights="uint8").weights == "uint8"  # widened before it is added


@pytest.mark.parametrize(
    ("operator", "activations", "scale", "zero_point"),
    [
        ("Sigmoid", "uint16", 2.0**-16, 0),
        ("Sigmoid", "int16", 2.0**-15, 0),
        ("Tanh", "uint16", 2.0**-15, 2**15),
        ("Tanh", "int16", 2.0**-15, 0),
    ],
)
def test_sixteen_bit_sigmoids_have_the_grids_that_qnn_asks_for(operator, activations, scale, zero_point) -> None:
    model = build((operator, "x", "y"))
    batches = [{"x": floats(1, 4, 6, 6)}]
    found = calibrate(model, batches, QuantizationConfig.for_target("qnn-htp", activations=activations))["y"]
    assert (float(found.scale), float(found.zero_point)) == (scale, zero_point)


def test_qnn_has_no_product_per_channel_and_wide_second_operands_without_zero_point() -> None:
    config = QuantizationConfig.for_target("qnn-htp", activations="uint16")
    model = build(
        ("MatMul", "x w", "k"),
        ("Transpose", "k", "t", {"perm": [1, 0]}),
        ("MatMul", "k t", "y"),
        inputs=MATRIX,
        w=floats(8, 3),
    )
    sites = {site.tensor: site for site in place(model, config).sites}
    assert sites["w"].axis is None
    assert sites["k"].symmetric is True  # both an operand and, moved, the second one
    assert sites["y"].symmetric is False


def test_qnn_rounds_the_parameters_of_normalizations_to_eight_bits_at_least() -> None:
    model = build(("LayerNormalization", "x g", "y", {"axis": -1}), inputs=MATRIX, g=floats(8))
    for weights, expected in (("int4", ("int8", False)), ("int16", ("int16", True))):
        site = place(model, QuantizationConfig.for_target("qnn-htp", weights=weights)).site("g")
        assert site is not None
        assert (site.dtype, site.symmetric) == expected


def test_channels_of_the_generic_target_leave_the_smallest_integer_out() -> None:
    encoding = calibrate(network(), [{"x": floats(1, 4, 6, 6)}], QuantizationConfig.for_target("generic-per-channel"))[
        "w1"
    ]
    assert (float(encoding.qmin), float(encoding.qmax)) == (-127, 127)
    assert choose_encoding(floats(8), symmetric="strict").qmin == encoding.qmin


# What a target refuses


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        ("tensorrt", {"activations": "uint8"}, "'tensorrt' takes: int8, float8_e4m3fn; set activations='int8'"),
        ("tensorrt", {"activations_symmetric": None}, "=None, which is False, .* True, strict; set activations_symm"),
        ("tensorrt", {"granularity": "lpbq:16"}, "granularity='lpbq:16', which is lpbq:N, .* channel, tensor, block:N"),
        ("generic-per-tensor", {"granularity": "channel"}, "takes: tensor; set granularity='tensor'"),
        ("wide-accumulate", {"activations": "uint8"}, "takes: int16"),
        ("qnn-htp", {"weights": "uint8"}, "takes: int8, int4, int16"),
        ("qnn-htp", {"rules": (Rule(of="weights", dtype="int3"),)}, r"rule for weights: .* int3 .*it takes int8, "),
        ("tensorrt", {"rules": (Rule(operators=("Conv",), symmetric=False),)}, "rule for Conv: .* does not take False"),
    ],
)  # fmt: skip
def test_what_a_target_does_not_take_is_an_error_with_the_remedy(target: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizationConfig.for_target(target, **settings)
    with pytest.raises(ConfigError, match=r"or begin with QuantizationConfig.for_target\('tensorrt'\)"):
        QuantizationConfig(target="tensorrt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('supergroups = ["Conv"]', "supergroups is \\['Conv'\\]; expected a list of lists of operators"),
        ('biases = "int16"', 'biases is \'int16\'; expected "int32" or "float"'),
        ("bounds_per_channel = 1", "bounds_per_channel is 1; expected true or false"),
        ("fixed_point = 1", "fixed_point is 1; expected true or false"),
        ("[fixed_ranges]\nTanh = [1]", "expected a table: operator = \\[low, high\\]"),
        ("[allowed]\nweight = []", "allowed: unknown key 'weight'"),
        ('[[exceptions]]\ndtyp = "int8"', "exceptions: a rule has the unknown key 'dtyp'; near names: dtype"),
        ('[[exceptions]]\nmatch = "x"', "a rule has the unknown key 'match'; expected one of tensors, "),
        ('[rounded_parameters]\nLSTM = ["w"]', "expected a table: operator = \\[positions\\]"),
    ],
)
def test_a_bad_value_in_a_target_is_an_error_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    lists = "".join(f"{key} = []\n" for key in ("heads", "clamps", "activations", "data_movement", "adopt_output"))
    ends = "" if "fixed_ranges" in text else "[fixed_ranges]\n"
    path.write_text(
        f'description = "bad"\nconstant_operands = []\n{lists}'
        + (f"{text}\n{ends}" if "[" not in text.split("=", maxsplit=1)[0] else f"{ends}{text}\n")
    )
    with pytest.raises(ConfigError, match=message):
        load_target(str(path))
