"""AIMET's configuration files: what they mean here, and that nothing of them is passed over in silence."""

import json
from pathlib import Path
from typing import Any

import pytest

from ptqjax.config import QuantizationConfig, Rule, config_from_aimet
from ptqjax.errors import ConfigError
from ptqjax.onnx_io import read
from ptqjax.placement.place import place
from ptqjax.transforms import fold_batch_norms
from tests.test_placement import CONV, MATRIX, SAME, build, floats, plan

AIMET = Path("/work/aimet/venv/lib")
FILES = sorted(AIMET.glob("python3*/site-packages/aimet_onnx/common/quantsim_config/*.json"))

BASE: dict[str, Any] = {
    "defaults": {"ops": {"is_output_quantized": "True"}, "params": {"is_quantized": "True", "is_symmetric": "True"}},
    "params": {"bias": {"is_quantized": "False"}},
    "op_type": {},
    "supergroup_pass_list": ["MatmulAdd"],
    "supergroups": [],
    "model_input": {"is_input_quantized": "True"},
    "model_output": {},
}


@pytest.fixture
def load(tmp_path: Path):
    """Returns a function that reads a file with sections of its own in place of those of `BASE`."""

    def read_with(sections: dict[str, Any], **settings: Any) -> tuple[QuantizationConfig, tuple[str, ...]]:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(BASE | sections))
        return config_from_aimet(path, **settings)

    return read_with


def defaults(**more: Any) -> dict[str, Any]:
    return {"defaults": BASE["defaults"] | more}


def test_the_defaults_of_a_file_are_those_of_the_settings(load) -> None:
    config, notes = load({})
    assert notes == ()
    assert (config.target, config.granularity, config.biases) == ("aimet", "tensor", "float")
    assert (config.weights_symmetric, config.activations_symmetric) == (True, False)
    assert all(rule.optional for rule in config.rules)


@pytest.mark.parametrize(
    ("strict", "unsigned", "expected"),
    [
        ("False", "False", True),
        ("True", "False", "strict"),
        ("False", "True", "unsigned"),
        ("True",) * 2 + ("strict unsigned",),
    ],
)
def test_strict_and_unsigned_say_what_symmetric_means(load, strict: str, unsigned: str, expected) -> None:
    config, _ = load(defaults(strict_symmetric=strict, unsigned_symmetric=unsigned))
    assert config.weights_symmetric == expected
    assert config.activations_symmetric is False


def test_settings_that_are_given_win_and_widths_come_from_them_alone(load) -> None:
    config, _ = load(defaults(per_channel_quantization="True"), weights="int4", granularity="block:32", biases="int32")
    assert (config.weights, config.granularity, config.biases) == ("int4", "block:32", "int32")
    own = Rule(tensors=("w",), dtype="int6")
    assert load({}, rules=(own,))[0].rules[-1] == own


def network():
    return build(
        ("Conv", "x w b", "c", SAME), ("Relu", "c", "r"), ("AveragePool", "r", "a", {"kernel_shape": [2, 2]}),
        ("Softmax", "a", "y"), **CONV,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({}, {}),
        ({"supergroups": [{"op_list": ["Conv", "Relu"]}]}, {"c": "float", "r": "own"}),
        ({"model_input": {}}, {"x": "float"}),
        ({"op_type": {"Softmax": {"is_output_quantized": "False"}}}, {"y": "float"}),
        (
            {"op_type": {"Softmax": {"is_output_quantized": "False"}}, "model_output": {"is_output_quantized": "True"}},
            {},
        ),
        ({"model_output": {"is_output_quantized": "False"}}, {"y": "float"}),
        ({"op_type": {"Conv": {"params": {"weight": {"is_quantized": "False"}}}}}, {"w": "float"}),
        ({"params": {"bias": {"is_quantized": "True"}}}, {"b": "int32"}),
    ],
)
def test_a_file_says_which_tensors_are_rounded(load, sections: dict, changed: dict[str, str]) -> None:
    found = plan(place(network(), load(sections)[0]))
    tied = {"x": "own", "w": "own", "b": "float", "c": "own", "r": "as c", "a": "as c", "y": "own"}
    expected = tied | changed | ({"a": "as r"} if changed.get("c") == "float" else {})
    assert found == expected


def test_sections_by_operator_change_its_tensors(load) -> None:
    operators = {
        "Conv": {"per_channel_quantization": "True", "is_symmetric": "True"},
        "Softmax": {"encoding_constraints": {"min": 0.0, "max": 1.0}},
        "Tanh": {"encoding_constraints": {"min": -1.0, "max": 1.0}},
    }
    config, _ = load({"op_type": operators})
    placement = place(build(("Conv", "x w b", "c"), ("Softmax", "c", "s"), ("Tanh", "s", "y"), **CONV), config)
    sites = {site.tensor: site for site in placement.sites}
    assert (sites["w"].axis, sites["c"].symmetric, sites["x"].symmetric) == (0, True, False)
    assert (sites["s"].fixed_range, sites["s"].symmetric) == ((0.0, 1.0), False)
    assert (sites["y"].fixed_range, sites["y"].symmetric) == ((-1.0, 1.0), True)


@pytest.mark.parametrize(
    ("version", "activations", "expected"),
    [
        ("", "uint8", ("uint8", True)),  # a weight that is computed has the symmetry of weights
        ("V69", "uint16", ("int8", True)),
        ("V73", "uint8", ("uint8", True)),
        ("V73", "uint16", ("uint16", True)),
    ],
)
def test_the_second_input_of_a_dynamic_product_depends_on_the_hardware(load, version, activations, expected) -> None:
    config, _ = load(defaults(**({"hw_version": version} if version else {})), activations=activations)
    nodes = [("Relu", "x", "a"), ("Tanh", "x", "k"), ("Transpose", "k", "t", {"perm": [1, 0]}), ("MatMul", "a t", "y")]
    sites = {site.tensor: site for site in place(build(*nodes, inputs=MATRIX), config).sites}
    assert (sites["k"].dtype, sites["k"].symmetric) == expected  # also where it is moved in between
    assert sites["t"].root == "k"
    assert sites["a"].dtype == activations


@pytest.mark.parametrize(
    ("version", "weights", "expected"),
    [
        ("V75", "int4", ("int8", False)),
        ("V75", "int16", ("int16", True)),
        ("V66", "int16", ("int8", False)),  # its kernels have 8 bits
        ("", "int4", ("int8", False)),
    ],
)
def test_normalizations_have_eight_bits_at_least(load, version: str, weights: str, expected: tuple) -> None:
    model = build(("LayerNormalization", "x g", "y", {"axis": -1}), inputs=MATRIX, g=floats(8))
    site = place(model, load(defaults(**({"hw_version": version} if version else {})), weights=weights)[0]).site("g")
    assert site is not None
    assert (site.dtype, site.symmetric) == expected


@pytest.mark.parametrize(
    ("sections", "note"),
    [
        ({"supergroup_pass_list": ["MatmulAdd", "MaskedSoftmax"]}, "supergroup_pass_list, MaskedSoftmax"),
        ({"supergroup_pass_list": []}, "lacks MatmulAdd"),
        ({"supergroups": [{"op_list": ["Conv", "Relu"]}]}, "depthwise and 3-d convolutions take part"),
        ({"op_type": {"Relu": {"encoding_constraints": {"min": 0.0}}}}, "op_type.Relu.encoding_constraints: one end"),
        ({"op_type": {"PRelu": {"per_channel_quantization": "True"}}}, "op_type.PRelu.per_channel_quantization"),
        ({"op_type": {"Conv": {"is_input_quantized": "True"}}}, "op_type.Conv.is_input_quantized: nothing to do"),
        ({"op_type": {"Conv": {"supported_kernels": []}}}, "op_type.Conv.supported_kernels: not read"),
        ({"op_type": {"GroupNormalization": {"params": {"bias": {"is_quantized": "True"}}}}}, "biases of norm"),
        ({"op_type": {"LSTM": {"params": {"weight_r": {"is_quantized": "True"}}}}}, "op_type.LSTM.params.weight_r"),
        ({"params": {"running_var": {"is_quantized": "True"}}}, "params.running_var: such parameters stay in float"),
        (defaults(supported_kernels=[]), "defaults.supported_kernels: not read"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_noted(load, sections: dict, note: str) -> None:
    notes = load(sections)[1]
    assert [note in each for each in notes] == [True]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"supergroup": []}, "unknown key 'supergroup'; near names: supergroups"),
        (defaults(strict="True"), "unknown key 'defaults.strict'.*none of AIMET's"),
        ({"op_type": {"Conv": {"is_symetric": "True"}}}, "'op_type.Conv.is_symetric'; near names: is_symmetric"),
        ({"op_type": {"Conv": {"params": {"weight": {"bits": 4}}}}}, "'op_type.Conv.params.weight.bits'"),
        ({"model_input": {"is_quantized": "True"}}, "'model_input.is_quantized'; near names: is_input_quantized"),
        (defaults(strict_symmetric="yes"), 'defaults.strict_symmetric is \'yes\'; expected "True" or "False"'),
        ({"supergroups": [{"op_list": ["Conv"]}]}, r"supergroups\[0\].op_list is \['Conv'\]; expected two operators"),
        ({"supergroup_pass_list": ["Matmul"]}, "supergroup_pass_list is 'Matmul'; expected one of MatmulAdd"),
        ({"op_type": {"Tanh": {"encoding_constraints": {"min": "a", "max": 1}}}}, "min is 'a'; expected a number"),
        ({"op_type": []}, "op_type is \\[\\]; expected a table"),
    ],
)
def test_what_is_none_of_aimets_is_an_error_with_its_key(load, sections: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(sections)


def test_a_damaged_file_is_an_error_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n"defaults": {,}}')
    with pytest.raises(ConfigError, match="is not JSON: line 2"):
        config_from_aimet(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        config_from_aimet(tmp_path / "none.json")


@pytest.mark.skipif(not FILES, reason="aimet-onnx is not installed beside")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_aimets_own_files_are_read_as_they_are(path: Path) -> None:
    content = json.loads(path.read_text())
    config, notes = config_from_aimet(path)
    assert len(config.supergroups) == len(content["supergroups"])
    assert len(notes) < 8
    place(network(), config)


# Enabled quantizers of aimet-onnx 2.42's QuantizationSimModel on this network, batch norms folded (measured).
ENABLED = {"default_config_per_channel": 25, "htp_quantsim_config_v66": 29, "htp_quantsim_config_v75": 25}


@pytest.mark.skipif(not FILES, reason="aimet-onnx is not installed beside")
@pytest.mark.parametrize("name", ENABLED)
def test_as_many_tensors_are_rounded_as_in_aimet(shared: Path, name: str) -> None:
    path = next(path for path in FILES if path.stem == name)
    model, _ = fold_batch_norms(read(shared / "models" / "mlperf_resnet8_cifar10.onnx"))
    placement = place(model, config_from_aimet(path)[0])
    moved = [
        site for site in placement.sites if site.reason.startswith("Flatten moves")
    ]  # AIMET has no quantizer there
    assert len(placement.sites) - len(moved) == ENABLED[name]
