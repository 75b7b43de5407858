"""The configuration: defaults of the contract, and errors that list what would be right."""

import dataclasses
import importlib.resources
import subprocess
import sys
from pathlib import Path

import pytest

from ptqjax.config import (
    FLOAT_DTYPES,
    SYMMETRIES,
    QuantizationConfig,
    Rule,
    config_from_toml,
    config_to_toml,
    load_target,
    near_names,
    read_config,
    target_names,
    write_config,
)
from ptqjax.config.checks import DTYPES
from ptqjax.errors import ConfigError, OutputError
from ptqjax.kernels import grid, ranges


def test_defaults_are_those_of_the_contract() -> None:
    written_out = QuantizationConfig(
        weights="int8", activations="uint8", granularity="channel", ranges="sqnr",
        equalize=True, absorb="exact", correct="empirical", target="ort-cpu",
    )  # fmt: skip
    assert QuantizationConfig() == written_out


def test_is_frozen_and_hashable() -> None:
    config = QuantizationConfig()
    assert hash(config) == hash(QuantizationConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.weights = "int4"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weights", "int1", "expected int or uint with 2 to 16 bits.*near names: int"),
        ("activations", "int17", "2 to 16 bits, as in 'int8', or one of float8_e4m3fn, .*; near names: .*int1"),
        ("activations", "float8", "or one of float8_e4m3fn, float8_e5m2.*near names: .*float16"),
        ("granularity", "chanel", "expected tensor, channel, block:N or lpbq:N"),
        ("granularity", "block:0", "N = 1 or more"),
        ("granularity", "block:x", "N = 1 or more"),
        ("ranges", "minmax", "unknown; expected one of min-max, .*; near names: min-max"),
        ("ranges", "percentile", "expected percentile:P with 50 < P <= 100"),
        ("weight_ranges", "percentile:101", "expected percentile:P"),
        ("activation_ranges", "kl", "expected one of min-max, moving-average, sqnr, percentile:P, mse, entropy"),
        (
            "weights_symmetric",
            "unsigned strict",
            "one of False, True, 'strict', 'unsigned', 'strict unsigned'",
        ),
        ("biases", "int16", "expected one of int32, float"),
        ("compatibility", "tensorrt", "expected one of aimet"),
        ("supergroups", (("Conv",),), "two operators or more"),
        ("absorb", "statistic", "unknown; expected one of exact, statistics, off; near names: statistics"),
        ("correct", "analytical", "unknown; expected one of none, analytic, empirical; near names: analytic"),
        ("scaling", "noisy", "expected one of auto, off, weights, ranges, noise, learned; near names: noise"),
        ("bounds", "relu6", "expected one of exact, relu, leave, auto; near names: relu"),
        ("effort", "through", "unknown; expected one of fast, balanced, thorough; near names: thorough"),
        ("target", "ort-cpus", "expected one of .*ort-cpu.*near names: ort-cpu"),
        ("target", "/nowhere/x.toml", "the path of a .toml file"),
        ("seed", -1, "an integer, 0 or more"),
    ],
)
def test_a_bad_value_is_an_error_that_says_what_is_allowed(field: str, value, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        QuantizationConfig(**{field: value})
    assert field in str(caught.value)


def test_block_size_is_read_from_the_granularity() -> None:
    assert QuantizationConfig(granularity="block:32").block_size == 32
    assert QuantizationConfig().block_size is None


def test_near_names_lists_what_may_have_been_meant() -> None:
    assert near_names("conv1.wieght", ["conv1.weight", "fc.bias"]) == "; near names: conv1.weight"
    assert near_names("zzz", ["conv1.weight"]) == ""


@pytest.mark.parametrize("name", target_names())
def test_every_target_loads_and_describes_itself(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.description
    assert not target.heads & target.clamps


def test_a_target_may_be_a_file(tmp_path: Path) -> None:
    text = (importlib.resources.files("ptqjax.targets") / "ort-cpu.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert load_target(QuantizationConfig(target=str(path)).target).heads == load_target("ort-cpu").heads


@pytest.mark.parametrize(
    ("text", "message"),
    [("headz = []", "unknown key 'headz'; near names: heads"), ("heads = ", "is not TOML"), ("", "lacks the key")],
)
def test_a_bad_target_file_is_an_error_that_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_target(str(path))


def test_types_and_symmetries_are_those_that_grids_have() -> None:
    assert FLOAT_DTYPES == grid.FLOAT_FORMATS
    assert SYMMETRIES == ranges.SYMMETRIES
    for dtype in set(DTYPES) - set(FLOAT_DTYPES):
        assert grid.integer_range(dtype)[1] > 0


# A target's own settings


@pytest.mark.parametrize("name", target_names())
def test_settings_for_a_target_are_its_defaults_and_what_is_given_wins(name: str) -> None:
    config = QuantizationConfig.for_target(name, seed=3)
    assert (config.target, config.seed) == (name, 3)
    assert {key: getattr(config, key) for key, _ in load_target(name).defaults} == dict(load_target(name).defaults)


def test_the_default_target_has_the_defaults_of_the_contract() -> None:
    assert QuantizationConfig.for_target("ort-cpu") == QuantizationConfig()


# Files

RULES = (
    Rule(tensors=("conv1*", "re:.*/Add_\\d+"), of="activations", dtype="int16", symmetric="strict unsigned"),
    Rule(operators=("MatMul",), operands=(1,), dtypes=("uint16",), enabled=False, optional=True),
    Rule(of="weights", granularity="lpbq:32", ranges="percentile:99.99", power_of_two=True, least_bits=8),
    Rule(tensors=('a "name" \\ with\ttabs, \x7f and ü',), fixed_range=(-1.0, 0.1), symmetric=False),
)


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(),
        *(QuantizationConfig.for_target(name) for name in target_names()),
        QuantizationConfig(
            weights="float8_e4m3fn", activations="uint13", granularity="block:7", ranges="entropy", weight_ranges="mse",
            activation_ranges="percentile:99.9", activations_symmetric=False, power_of_two=True, biases="float",
            compatibility="aimet", equalize=False, headroom=1.2, effort="thorough", rounding="solved", seed=7,
            exclude=("a*", "re:b"), supergroups=(("Conv", "Sigmoid"), ("Add", "Relu", "Tanh")), rules=RULES,
        ),
        QuantizationConfig(target="generic-per-channel", weights_symmetric=None, rules=RULES[:1]),  # not its default
        QuantizationConfig(headroom=1 / 3 + 1),
    ],
    ids=lambda config: config.target,
)  # fmt: skip
def test_a_file_is_read_as_it_was_written_to_the_last_bit(config: QuantizationConfig, tmp_path: Path) -> None:
    write_config(config, tmp_path / "settings.toml")
    assert read_config(tmp_path / "settings.toml") == config
    assert config_from_toml(config_to_toml(config)) == config


def test_what_a_file_leaves_out_is_the_targets_default_and_what_is_given_wins() -> None:
    config = config_from_toml('target = "tensorrt"\nseed = 4', granularity="tensor")
    assert config == QuantizationConfig.for_target("tensorrt", seed=4, granularity="tensor")
    assert config_from_toml("", target="qnn-htp") == QuantizationConfig.for_target("qnn-htp")


ONE_RULE = '[[rules]]\ntensors = ["a"]\ndtype = "int4"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('\n\nweigths = "int8"', "config, line 3: unknown key 'weigths'; near names: weights"),
        ('seed = 1\nweights = "int1"', "line 2: weights='int1' is unknown"),
        ('target = "tensorrt"\n\nactivations = "uint8"', "line 3: activations='uint8' is not what"),
        ('target = "ort"', "line 1: target='ort' is unknown"),
        ("seed = \nx = 1", "is not TOML: .*line 1"),
        (f'{ONE_RULE}\n\n[[rules]]\ntensors = ["b"]\ndtyp = "int4"', "line 7: .*'dtyp'; near names"),
        (f'{ONE_RULE}\n[[rules]]\nof = "weigths"\nenabled = true', "line 5: of='weigths'"),
        ('rules = [{tensors = ["a"]}]', "line 1: rule for 'a' sets nothing"),
        ('rules = "all"', "line 1: rules is 'all'; expected tables"),
        ('target = "generic-per-tensor"\n[[rules]]\ngranularity = "channel"', "line 2: .*not take channel"),
    ],
)  # fmt: skip
def test_a_bad_file_is_an_error_with_line_and_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_toml(text)


def test_a_file_that_cannot_be_read_or_written_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml' cannot be read"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'weights = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin.toml' cannot be read"):
        read_config(tmp_path / "latin.toml")
    with pytest.raises(OutputError, match="cannot be written"):
        write_config(QuantizationConfig(), tmp_path)


WRONG_TYPES = {
    "weights = 8": "weights=8 is unknown",
    "equalize = 1": "equalize=1: expected True or False",
    "power_of_two = 0": "power_of_two=0: expected True or False",
    'exclude = "conv"': "exclude='conv': expected a tuple of patterns",
    'supergroups = ["Conv", "Relu"]': "supergroups='Conv': expected a tuple of operators",
    "activations_symmetric = 1": "activations_symmetric=1 is unknown",
    "headroom = true": "headroom=True: expected a number",
    "target = 3": "target=3 is unknown",
    "granularity = 4": "granularity=4 is unknown",
    '[[rules]]\ntensors = "conv"\nenabled = true': "tensors='conv': expected a tuple of patterns",
    '[[rules]]\ndtypes = [["int8"]]\nenabled = true': "expected a tuple of types",
    "[[rules]]\nfixed_range = [1]": "expected two finite numbers",
    "[[rules]]\nleast_bits = true": "a number from 2 to 16",
}


def test_values_of_a_wrong_type_are_errors_as_others_are() -> None:
    """In a process without the checks of types that tests add, which would come first."""
    code = f"""
from ptqjax.config import config_from_toml
from ptqjax.errors import ConfigError
for text, message in {WRONG_TYPES!r}.items():
    try:
        config_from_toml(text)
    except ConfigError as error:
        assert message in str(error), (text, str(error))
        assert "line" in str(error), (text, str(error))
    else:
        raise AssertionError(text)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_rule_that_its_target_does_not_take_is_found_among_others() -> None:
    text = 'target = "tensorrt"\n\n[[rules]]\noperators = ["Conv"]\nranges = "mse"\n\n[[rules]]\ndtype = "uint16"\n'
    with pytest.raises(ConfigError, match=r"line 7: .*uint16 \(weights\).*of='activations'"):
        config_from_toml(text)


def test_marks_of_editors_are_left_out_and_other_encodings_told_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes('\ufeffweights = "int4"\r\nexclude = ["\u00e9"]\r\n'.encode())
    assert read_config(path) == QuantizationConfig(weights="int4", exclude=("\u00e9",))
    path.write_bytes('weights = "int4"\nexclude = ["\u00e9"]\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"line 2 holds the byte 0xe9"):
        read_config(path)
