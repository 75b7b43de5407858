"""Weights in integers whose activations stay in float, or have grids that are found at run time."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptqjax import (
    adapt,
    apply,
    calibrate,
    export,
    fold_batch_norms,
    prepare,
    quantize,
    read_encodings,
    read_quantized,
    simulate,
    write_encodings,
)
from ptqjax.agreement import accuracy_levels, run, session, validate
from ptqjax.config import QuantizationConfig, Rule
from ptqjax.encoding_files.own_fields import is_identical
from ptqjax.encodings.encoding import dynamic_encoding, fake_quantize
from ptqjax.errors import ConfigError, ModelError
from ptqjax.experiments import Budget, mixed_precision
from ptqjax.exporting import fingerprint, quantized_model
from ptqjax.fit.selection import reading_apart, scale_as_configured, scale_each
from ptqjax.ir import Model
from ptqjax.onnx_io import read
from ptqjax.pipeline import Result
from ptqjax.placement.place import place
from tests.transformers import encoder, samples

RNG = np.random.default_rng(0)
ROWS, WIDTH, HIDDEN = 96, 48, 72
IDS = {"ids": RNG.integers(0, ROWS, (4, 6))}
ROUNDING = 2e-6  # sums of 72 products in float32, in another order
TIE = 1e-2  # rows of a table in 4 bits lie half-way between codes of 8, where fused programs fall to either side


@cache
def network() -> Model:
    """Rows of a table; a layer, and another reader of what it reads; a Gemm; a convolution; the table transposed."""
    arrays = {
        "E": RNG.normal(size=(ROWS, WIDTH)),
        "up": RNG.normal(size=(WIDTH, HIDDEN)) / 7,
        "shift": RNG.normal(size=HIDDEN),
        "down": RNG.normal(size=(WIDTH, HIDDEN)) / 8,
        "b": RNG.normal(size=WIDTH),
        "K": RNG.normal(size=(6, 6, 3)) / 4,
    }
    nodes = [
        ("Gather", ["E", "ids"], ["e"], {}),
        ("MatMul", ["e", "up"], ["p"], {}),
        ("Add", ["p", "shift"], ["s"], {}),
        ("Tanh", ["s"], ["t"], {}),
        ("Reshape", ["t", "flat"], ["f"], {}),
        ("Gemm", ["f", "down", "b"], ["d"], {"transB": 1}),
        ("Reshape", ["d", "whole"], ["w"], {}),
        ("Add", ["w", "e"], ["r"], {}),
        ("Conv", ["r", "K"], ["c"], {"pads": [1, 1]}),
        ("Transpose", ["E"], ["Et"], {"perm": [1, 0]}),
        ("MatMul", ["c", "Et"], ["y"], {}),
    ]
    graph = helper.make_graph(
        [helper.make_node(op, ins, outs, **settings) for op, ins, outs, settings in nodes],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in arrays.items()]
        + [
            numpy_helper.from_array(np.asarray(shape), name)
            for name, shape in (("flat", [-1, HIDDEN]), ("whole", [-1, 6, WIDTH]))
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return read(proto.SerializeToString())


@cache
def quantized(**settings) -> Result:
    return quantize(network(), None, QuantizationConfig(equalize=False, **settings))


def distance(y: np.ndarray, other) -> float:
    return float(np.max(np.abs(y - np.asarray(other))) / np.max(np.abs(y)))


def operators(model: Model) -> set[str]:
    return {node.op_type for node in model.graph.nodes}


BLOCKS = {"granularity": "block:16"}
CASES = [
    pytest.param({"activations": "float", "weights": "int8"}, id="float, 8 bits"),
    pytest.param({"activations": "float", "weights": "int4"}, id="float, 4 bits"),
    pytest.param({"activations": "float", "weights": "uint3", "granularity": "block:32"}, id="float, 3 bits in blocks"),
    pytest.param({"activations": "float", "weights": "int2", "granularity": "block:32"}, id="float, 2 bits in blocks"),
    pytest.param({"activations": "float", "weights": "int4", "weights_symmetric": True, **BLOCKS}, id="symmetric"),
    pytest.param({"activations": "float", "weights": "int8", "granularity": "tensor"}, id="float, one scale"),
    pytest.param({"activations": "dynamic"}, id="dynamic"),
    pytest.param({"activations": "dynamic", "weights": "uint8"}, id="dynamic, zero points"),
    pytest.param({"activations": "dynamic", "weights": "int4"}, id="dynamic, 4 bits"),
    pytest.param({"activations": "dynamic", "weights": "int4", **BLOCKS}, id="level 4"),
    pytest.param({"activations": "dynamic", "weights": "int8", "granularity": "block:32"}, id="level 4, 8 bits"),
]


@pytest.mark.parametrize("settings", CASES)
def test_the_file_equals_the_simulation(settings: dict) -> None:
    result = quantized(**settings)
    written = quantized_model(result.model, result.encodings, weights="matmul-nbits")
    y = run(session(written), IDS)["y"]
    is_in_blocks = settings["activations"] == "dynamic" and "granularity" in settings
    for arithmetic, most in (("float", TIE if is_in_blocks else ROUNDING), ("integer", ROUNDING)):
        simulation = simulate(result.model, result.encodings, arithmetic=arithmetic)
        assert distance(y, simulation(result.model.params, result.encodings, IDS)["y"]) < most
    assert distance(y, apply(written.graph, written.params, IDS)["y"]) < ROUNDING
    assert distance(apply(network().graph, network().params, IDS)["y"], y) > 1e-4  # it is quantized


@pytest.mark.parametrize(
    ("settings", "operator"), [(CASES[1].values[0], "MatMulNBits"), ({"activations": "dynamic"}, "MatMulInteger")]
)
def test_validate_compares_tensor_by_tensor(settings: dict, operator: str) -> None:
    result = quantized(**settings)
    found = validate(quantized_model(result.model, result.encodings, weights="matmul-nbits"), [IDS])
    assert {"GatherBlockQuantized", operator} <= {group.operator for group in found.run_time}
    assert max(group.alone for group in found.run_time) < ROUNDING
    assert found.accuracy_levels == ((1,) if operator == "MatMulNBits" else ())
    assert found.num_samples == 4


@pytest.mark.parametrize("settings", [CASES[1].values[0], {"activations": "dynamic"}], ids=["float", "dynamic"])
def test_a_file_with_a_scale_for_each_channel_of_a_convolution_is_validated(settings: dict, tmp_path: Path) -> None:
    """Its weight is dequantized by Cast and Mul, which reading makes DequantizeLinear again."""
    result = quantized(**settings)
    export(result.model, result.encodings, tmp_path, "m", target="ort-cpu")
    assert any(
        node.op_type == "Cast" and node.input[0] == "K_quantized" for node in onnx.load(tmp_path / "m.onnx").graph.node
    )
    assert max(group.alone for group in validate(tmp_path / "m.onnx", [IDS]).run_time) < ROUNDING


@pytest.mark.parametrize("settings", [CASES[1].values[0], {"activations": "dynamic"}], ids=["float", "dynamic"])
def test_packed_weights_are_not_read_back(settings: dict, tmp_path: Path) -> None:
    result = quantized(**settings)
    export(result.model, result.encodings, tmp_path, "m", target="ort-cpu")
    with pytest.raises(ModelError, match=r"holds its weight packed, which is not read back.*weights='integer'"):
        read_quantized(tmp_path / "m.onnx")


def test_levels_are_told() -> None:
    result = quantized(activations="dynamic", weights="int4", **BLOCKS)
    written = quantized_model(result.model, result.encodings, weights="matmul-nbits")
    assert accuracy_levels(written) == (4,)
    assert validate(written, [IDS]).accuracy_levels == (4,)
    with pytest.raises(ConfigError, match=r"rounded in blocks of 16 at run time.*weights='matmul-nbits'"):
        quantized_model(result.model, result.encodings)


def test_qdq_holds_the_same_weights() -> None:
    """Nothing in the file lets ONNX Runtime round activations: it makes no MatMulNBits of it."""
    result = quantized(activations="float", weights="int4", granularity="block:16")
    written = quantized_model(result.model, result.encodings)
    simulation = simulate(result.model, result.encodings)
    y = run(session(written, exact=False), IDS)["y"]
    assert distance(y, simulation(result.model.params, result.encodings, IDS)["y"]) < ROUNDING
    assert "MatMulNBits" not in operators(written)
    assert accuracy_levels(written) == ()


def test_a_table_and_the_layer_that_it_is_transposed_are_stored_once() -> None:
    result = quantized(activations="float", weights="int4", granularity="block:16")
    written = quantized_model(result.model, result.encodings, weights="matmul-nbits")
    packed = [
        name for name, value in written.params.items() if value.dtype == np.uint8 and value.size >= ROWS * WIDTH // 2
    ]
    assert len(packed) == 1
    assert operators(written) >= {"GatherBlockQuantized", "MatMulNBits", "Reshape"}


def test_what_others_read_stays_in_float() -> None:
    """`e` is read by a layer and by a sum: the layer gets a tensor of its own, which is rounded."""
    result = quantized(activations="dynamic")
    dynamic = {name for name, encoding in result.encodings.items() if encoding.is_dynamic}
    assert dynamic == {"e_read", "f", "c"}
    without = quantized(activations="float")
    assert not any(name in without.encodings for name in ("e", "e_read", "f"))


def test_roundings_are_solved_and_shared_with_the_table() -> None:
    config = QuantizationConfig(equalize=False, activations="float", weights="int3", granularity="block:16")
    batch = {"ids": RNG.integers(0, ROWS, (48, 6))}
    solved = quantize(network(), [batch], config)
    nearest = quantize(network(), [batch], dataclasses.replace(config, rounding="nearest"))
    y = apply(network().graph, network().params, IDS)["y"]
    found = [
        np.linalg.norm(y - simulate(each.model, each.encodings)(each.model.params, each.encodings, IDS)["y"])
        for each in (solved, nearest)
    ]
    assert found[0] < found[1]
    head = next(name for name, value in network().params.items() if value.shape == (WIDTH, ROWS))
    grids = solved.encodings
    rows, columns = (fake_quantize(solved.model.params[name], grids[name]) for name in ("E", head))
    np.testing.assert_array_equal(rows, columns.T)


def test_a_block_of_zeros_and_a_partial_block_have_grids() -> None:
    x = np.asarray([[0, 0, 1, -2, 254]], np.float32)
    np.testing.assert_allclose(fake_quantize(x, dynamic_encoding(2)), [[0, 0, 2 * 64 / 127, -2, 254]], rtol=1e-6)
    whole = fake_quantize(x, dynamic_encoding())
    assert np.max(np.abs(whole - x)) <= 256 / 255 / 2 * 1.001


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activations": "dynamic", "target": "generic-per-channel"}, "has no products that find grids at run time"),
        ({"activations": "float", "target": "qnn-htp"}, "activations='float' is not what target 'qnn-htp' takes"),
        (
            {"activations": "float", "granularity": "block:24"},
            "block:24.*MatMulNBits has blocks of 16, 32, 64, 128, 256",
        ),
        ({"activations": "dynamic", "granularity": "block:8"}, "block:8.*MatMulNBits has blocks of"),
        ({"activations": "dynamic", "power_of_two": True}, "power_of_two=True.*found at run time.*of='weights'"),
        ({"activations": "dynamic", "activations_symmetric": True}, "activations_symmetric=True.*found at run time"),
        ({"activations": "dynamic", "activation_ranges": "mse"}, "activation_ranges='mse'.*found at run time"),
        ({"activations": "float", "activations_symmetric": "strict"}, "activations_symmetric='strict'.*have no grid"),
        ({"activations": "float", "headroom": 1.2}, "headroom=1.2.*have no grid; leave it out"),
        ({"activations": "dynamic", "headroom": 3.0}, "headroom=3.*found at run time"),
    ],
)
def test_what_the_target_has_not_is_an_error(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizationConfig(**settings)


FOUND = "changes no grid, because the grid of 'f' is found at run time"


@pytest.mark.parametrize(
    ("activations", "rule", "message"),
    [
        ("dynamic", Rule(tensors=("f",), dtype="int16"), FOUND),
        ("dynamic", Rule(tensors=("f",), fixed_range=(-1.0, 1.0)), FOUND),
        ("dynamic", Rule(of="activations", power_of_two=True), "changes no grid, because 'y' stays in float"),
        ("dynamic", Rule(tensors=("r",), enabled=True), "changes no grid, because 'r' stays in float: no product"),
        (
            "float",
            Rule(tensors=("f",), enabled=True),
            "changes no grid, because 'f' stays in float: activations='float'",
        ),
    ],
)
def test_a_rule_that_no_grid_obeys_is_an_error(activations: str, rule: Rule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(network(), QuantizationConfig(activations=activations, rules=(rule,)))


def test_rules_that_something_obeys_hold_beside_grids_found_at_run_time() -> None:
    rules = (
        Rule(tensors=("up", "f"), dtype="int4"),
        Rule(tensors=("c",), enabled=False),
        Rule(of="weights", enabled=True),
    )
    placement = place(network(), QuantizationConfig(activations="dynamic", rules=rules))
    assert placement.site("up").dtype == "int4"
    assert placement.site("f").is_dynamic
    assert placement.site("c") is None


def test_a_tied_table_with_other_settings_is_an_error() -> None:
    config = QuantizationConfig(activations="float", weights="int4", rules=(Rule(tensors=("E",), dtype="int8"),))
    with pytest.raises(
        ConfigError, match=r"is the table 'E' transposed, stored once.*int4 and int8.*name both in the rule"
    ):
        quantize(network(), None, config)


def test_files_are_as_small_as_their_integers() -> None:
    result = quantized(activations="float", weights="int4", granularity="block:32")
    written = quantized_model(result.model, result.encodings, weights="matmul-nbits")
    assert "DequantizeLinear" not in operators(written)  # that of the convolution is computed when the file is loaded
    assert onnx.TensorProto.FLOAT not in {  # but scales and biases
        onnx.helper.np_dtype_to_tensor_dtype(value.dtype) for value in written.params.values() if value.size > ROWS * 2
    }


DYNAMIC = [CASES[index].values[0] for index in (6, 9)]  # one grid, and in blocks


@pytest.mark.parametrize("settings", DYNAMIC, ids=["whole", "in blocks"])
@pytest.mark.parametrize("file", ["e.encodings", "e.safetensors"])
def test_files_of_encodings_hold_grids_found_at_run_time(settings: dict, file: str, tmp_path: Path) -> None:
    result = quantized(**settings)
    write_encodings(tmp_path / file, result.model, result.encodings)
    found, _ = read_encodings(tmp_path / file, result.model)
    assert found.keys() == result.encodings.keys()
    assert all(is_identical(found[name], encoding) for name, encoding in result.encodings.items())
    assert sum(encoding.is_dynamic for encoding in found.values()) > 1


def test_a_parameter_whose_grid_is_found_at_run_time_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'up' cannot be written: found a grid found at run time, expected scales"):
        write_encodings(tmp_path / "e.safetensors", network(), {"up": dynamic_encoding()})


@pytest.mark.parametrize("settings", DYNAMIC, ids=["whole", "in blocks"])
def test_export_writes_what_runs_as_simulated(settings: dict, tmp_path: Path) -> None:
    result = quantized(**settings)
    export(result.model, result.encodings, tmp_path, "m", target="ort-cpu")
    y = run(session(tmp_path / "m.onnx"), IDS)["y"]
    simulation = simulate(result.model, result.encodings, arithmetic="integer")
    assert distance(y, simulation(result.model.params, result.encodings, IDS)["y"]) < ROUNDING
    stated = json.loads((tmp_path / "m.encodings").read_text())
    dynamic = {name for name, encoding in result.encodings.items() if encoding.is_dynamic}
    assert dynamic == {entry["name"] for entry in stated["ptqjax_encodings"]}
    assert dynamic.isdisjoint(entry["name"] for entry in stated["activation_encodings"])


def test_how_data_are_cut_into_batches_decides_nothing_about_grids() -> None:
    ids = RNG.integers(0, ROWS, (64, 6))
    config = QuantizationConfig(activations="dynamic", correct="none")
    found = [
        quantize(network(), [{"ids": ids[start : start + size]} for start in range(0, 64, size)], config)
        for size in (32, 24)
    ]
    assert [{name for name, each in one.encodings.items() if each.is_dynamic} for one in found] == [
        {"e_read", "f", "c"}
    ] * 2
    assert found[0].encodings.keys() == found[1].encodings.keys()


@pytest.mark.parametrize("settings", [CASES[0].values[0], *DYNAMIC], ids=["float", "whole", "in blocks"])
def test_public_steps_by_hand_give_the_bits_of_quantize(settings: dict) -> None:
    """What others read as well has tensors of its own for products that round it, scaled or not."""
    batches = [{"ids": RNG.integers(0, ROWS, (16, 6))} for _ in range(2)]
    for more in ({"equalize": False}, {"scaling": "noise", "effort": "fast"}):
        config = QuantizationConfig(**settings, rounding="nearest", **more)
        folded, _ = fold_batch_norms(network())
        prepared = prepare(folded, config.absorb)[0] if config.equalize else folded
        scaled = scale_as_configured(prepared, batches, config).model
        found = adapt(scaled, calibrate(scaled, batches, config), batches, config)
        result = quantize(network(), batches, config)
        assert found.model.graph == result.model.graph
        assert all(np.array_equal(value, result.model.params[name]) for name, value in found.model.params.items())
        assert found.encodings.keys() == result.encodings.keys()
        assert all(is_identical(found.encodings[name], each) for name, each in result.encodings.items())


@pytest.mark.parametrize("activations", ["float", "dynamic"])
def test_widths_of_weights_are_chosen_where_activations_have_none(activations: str) -> None:
    """A table and the layer that it is transposed, both named by the rules that come out, still have one grid."""
    batches = [{"ids": RNG.integers(0, ROWS, (16, 6))}]
    config = QuantizationConfig(activations=activations, equalize=False, rounding="nearest", correct="none")
    mixed = mixed_precision(
        network(), batches, config, budget=Budget(mean_weight_bits=6), widths=(4, 8), activation_widths=(4, 8), points=3
    )
    result = quantize(network(), batches, mixed.config)
    found = {name: result.encodings[name].num_bits for name in mixed.chosen.widths}
    assert found == mixed.chosen.widths
    assert set(found.values()) == {4, 8}
    with pytest.raises(ConfigError, match=f"mean_activation_bits, and activations='{activations}' have no width"):
        mixed_precision(network(), batches, config, budget=Budget(mean_activation_bits=6))


def test_a_model_scaled_for_one_plan_of_activations_is_not_that_of_another() -> None:
    model = encoder(depth=1)
    batches = [samples(model, 8)]
    configs = [QuantizationConfig(scaling="noise", activations=each, effort="fast") for each in ("uint8", "dynamic")]
    alone = [fingerprint(scale_as_configured(model, batches, config).model) for config in configs]
    assert alone[0] != alone[1]
    choices = zip(scale_each(model, batches, configs), configs, strict=True)
    assert [fingerprint(reading_apart(choice, config).model) for choice, config in choices] == alone
