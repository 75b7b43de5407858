"""The configuration: defaults of the contract, and errors that list what would be right."""

import dataclasses
import importlib.resources
from pathlib import Path

import pytest

from ptqjax.config import QuantizationConfig, load_target, near_names, target_names
from ptqjax.errors import ConfigError


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
        ("activations", "float8", "or one of float8_e4m3fn, float8_e5m2.*near names: float16"),
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
