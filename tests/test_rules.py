"""Rules for single tensors: what they match, which wins, and that none is without effect in silence."""

from pathlib import Path

import numpy as np
import pytest

from ptqjax.config import QuantizationConfig, Rule, load_target
from ptqjax.errors import ConfigError
from ptqjax.placement.place import Site, place
from ptqjax.ranges.calibrate import calibrate
from tests.test_placement import CONV, MATRIX, SAME, build, floats, plan


def net():
    """Two convolutions, an activation after the first, a pool and a product at the end, whose gate is an output too."""
    return build(
        ("Conv", "x w1 b1", "c1", SAME), ("Relu", "c1", "r"), ("Conv", "r w2 b2", "c2", SAME),
        ("MaxPool", "c2", "p", {"kernel_shape": [2, 2]}), ("Sigmoid", "p", "s"), ("Mul", "s p", "y"),
        w1=CONV["w"], b1=CONV["b"], w2=CONV["w"], b2=CONV["b"], outputs=("y", "s"),
    )  # fmt: skip


def sites(*rules: Rule, **settings) -> dict[str, Site]:
    placement = place(net(), QuantizationConfig(rules=rules, **settings))
    return {site.tensor: site for site in placement.sites}


def dtypes(*rules: Rule, **settings) -> dict[str, str]:
    return {tensor: site.dtype for tensor, site in sites(*rules, **settings).items()}


ALL_8 = {
    "w1": "int8",
    "w2": "int8",
    "x": "uint8",
    "r": "uint8",
    "c2": "uint8",
    "p": "uint8",
    "s": "uint8",
    "y": "uint8",
}


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        (Rule(tensors=("w1",), dtype="int4"), {"w1"}),
        (Rule(tensors=("w*",), dtype="int4"), {"w1", "w2"}),
        (Rule(tensors=("re:[wr]1?",), dtype="int4"), {"w1", "r"}),
        (Rule(operators=("Conv",), of="weights", dtype="int4"), {"w1", "w2"}),
        (Rule(operators=("Conv",), of="activations", dtype="int4"), {"c2", "p"}),
        (Rule(operators=("Conv",), dtype="int4"), {"w1", "w2", "c2", "p"}),
        (Rule(of="inputs", dtype="int4"), {"x"}),
        (Rule(of="outputs", dtype="int4"), {"y", "s"}),
        (Rule(of="weights", dtype="int4"), {"w1", "w2"}),
        (Rule(operators=("Sigmoid",), operands=(0,), dtype="int4"), {"c2", "p"}),
        (Rule(operators=("Mul",), operands=(0,), dtype="int4"), {"s"}),
        (Rule(dtypes=("int8",), dtype="int4"), {"w1", "w2"}),
        (Rule(of="activations", dtypes=("uint8",), tensors=("s", "w1"), dtype="int4"), {"s"}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value.tensors or value.operators or value.of),
)
def test_a_rule_changes_what_it_matches_and_nothing_else(rule: Rule, changed: set[str]) -> None:
    assert dtypes(rule) == ALL_8 | dict.fromkeys(changed, "int4")


def test_the_later_rule_wins_field_by_field() -> None:
    first = Rule(tensors=("w*",), dtype="int4", power_of_two=True)
    found = sites(first, Rule(tensors=("w2",), dtype="int6"))
    assert {name: (found[name].dtype, found[name].power_of_two) for name in ("w1", "w2")} == {
        "w1": ("int4", True),
        "w2": ("int6", True),
    }
    assert "dtype=int6 by the rule for 'w2'" in found["w2"].reason


def test_all_settings_reach_the_site() -> None:
    weights = Rule(tensors=("w1",), symmetric="strict", granularity="tensor", ranges="mse", power_of_two=True)
    site = sites(weights)["w1"]
    assert (site.symmetric, site.axis, site.ranges, site.power_of_two) == ("strict", None, "mse", True)
    site = sites(Rule(tensors=("s",), fixed_range=(0.0, 2.0), symmetric="unsigned"))["s"]
    assert (site.fixed_range, site.symmetric) == ((0.0, 2.0), "unsigned")


def test_a_constant_operand_may_have_a_known_range() -> None:
    model = build(("Add", "x k", "y"), k=floats(4, 6, 6))
    config = QuantizationConfig(rules=(Rule(tensors=("k",), fixed_range=(-4.0, 4.0), symmetric=True, dtype="int8"),))
    found = calibrate(model, [{"x": floats(1, 4, 6, 6)}], config)["k"]
    assert float(found.scale) == np.float32(4 / 127)


def test_schemes_are_apart_for_weights_and_activations() -> None:
    found = sites(weight_ranges="mse", activation_ranges="percentile:99.9")
    assert (found["w1"].ranges, found["x"].ranges) == ("mse", "percentile:99.9")
    assert sites()["w1"].ranges == ""  # that of the configuration


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (True, False)),
        ({"weights": "uint8", "activations": "int8"}, (False, False)),
        ({"weights": "uint8", "weights_symmetric": "unsigned", "activations_symmetric": True}, ("unsigned", True)),
        ({"weights": "float8_e4m3fn", "activations": "float16"}, (True, True)),  # codes without a zero point
    ],
)
def test_how_zero_lies_on_grids(settings: dict, expected: tuple) -> None:
    found = sites(**settings)
    assert (found["w1"].symmetric, found["x"].symmetric) == expected


def test_the_symmetry_of_a_changed_type_is_that_types_own() -> None:
    assert sites(Rule(tensors=("w1",), dtype="uint4"))["w1"].symmetric is False


@pytest.mark.parametrize(
    ("before", "after"), [("int4", "int8"), ("uint3", "uint8"), ("int16", "int16"), ("bfloat16",) * 2]
)
def test_least_bits_widen_and_never_narrow(before: str, after: str) -> None:
    assert sites(Rule(of="weights", least_bits=8), weights=before)["w1"].dtype == after


def test_low_power_blocks_have_scales_of_as_many_bits_as_the_weight() -> None:
    model = build(("MatMul", "x w", "y"), inputs=MATRIX, w=floats(8, 3))
    site = place(model, QuantizationConfig(weights="int4", granularity="lpbq:4")).site("w")
    assert site is not None
    assert (site.axis, site.block_size, site.scale_bits) == (-2, 4, 4)
    with pytest.raises(ConfigError, match="'w': granularity 'lpbq:4' is for integers; float8_e5m2 has block:N"):
        place(model, QuantizationConfig(weights="float8_e5m2", granularity="lpbq:4"))


# On and off


def test_switched_off_tensors_stay_in_float_and_so_do_moved_ones() -> None:
    placement = place(net(), QuantizationConfig(rules=(Rule(operators=("Conv",), of="activations", enabled=False),)))
    found = plan(placement)
    assert (found["c2"], found["p"], found["s"]) == ("float", "float", "own")
    reasons = {entry.tensor: entry.reason for entry in placement.skipped}
    assert reasons["c2"] == "switched off by the rule for Conv, activations"


def test_a_later_rule_switches_on_again() -> None:
    rules = (Rule(of="activations", enabled=False), Rule(tensors=("s",), enabled=True))
    found = plan(place(net(), QuantizationConfig(rules=rules)))
    assert {tensor for tensor, what in found.items() if what != "float"} == {"w1", "w2", "s"}
    found = plan(place(net(), QuantizationConfig(exclude=("w1",), rules=(Rule(tensors=("w1",), enabled=True),))))
    assert found["w1"] == "own"


def test_a_rule_may_round_inside_a_group() -> None:
    found = plan(place(net(), QuantizationConfig(rules=(Rule(tensors=("c1",), enabled=True),))))
    assert (found["c1"], found["r"]) == ("own", "own")


def test_a_bias_alone_cannot_be_switched_off_but_all_can() -> None:
    with pytest.raises(ConfigError, match=r"switched off by the rule for 'b1' matches only biases.*biases='float'"):
        sites(Rule(tensors=("b1",), enabled=False))
    placement = place(net(), QuantizationConfig(biases="float"))
    assert (placement.biases, placement.float_biases) == ((), ("b1", "b2"))
    assert {entry.reason for entry in placement.skipped if entry.tensor == "b1"} == {
        "bias, added in float by biases='float'"
    }


# Ties


def test_a_moved_tensor_follows_its_source_unless_it_is_named() -> None:
    found = sites(Rule(tensors=("*",), of="activations", dtype="int16"))
    assert (found["p"].root, found["p"].dtype) == ("c2", "int16")
    found = sites(Rule(tensors=("p",), dtype="int16"))
    assert (found["c2"].dtype, found["p"].dtype, found["p"].root) == ("uint8", "int16", "p")
    assert "apart from 'c2'" in found["p"].reason


# Errors


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(tensors=("w7",), dtype="int4"), "the pattern 'w7' matches none of 11 tensors; near names: w[12]"),
        (Rule(tensors=("w1", "re:q.*"), dtype="int4"), "the pattern 're:q.\\*' matches none"),
        (Rule(operators=("Cnov",), dtype="int4"), "no operator 'Cnov' .*; near names: Conv"),
        (
            Rule(operators=("Mul",), of="weights", dtype="int4"),
            "no tensor meets all conditions of the rule for Mul, weights",
        ),
        (Rule(tensors=("c1",), dtype="int4"), "changes no grid, because 'c1' stays in float: inside Conv\\+Relu"),
        (Rule(tensors=("b1",), dtype="int4"), "'b1' stays in float: it is a bias, which follows its layer"),
        (Rule(operators=("MaxPool",), dtype="int4"), "'p' has the encoding of 'c2'; set it where the grid is"),
        (Rule(tensors=("w1",), fixed_range=(-1.0, 1.0)), r"'w1' \(weight\) has no known range; its values are in hand"),
        (Rule(tensors=("s",), granularity="tensor"), r"'s' \(activation\) has no granularity; it has one scale"),
    ],
    ids=lambda value: "" if isinstance(value, Rule) else value[:30],
)
def test_a_rule_without_effect_is_an_error_that_says_why(rule: Rule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sites(rule)


def test_an_optional_rule_may_match_nothing() -> None:
    rules = [
        Rule(tensors=("w7",), dtype="int4", optional=True),
        Rule(operators=("Gelu",), enabled=False, optional=True),
    ]
    assert dtypes(*rules) == ALL_8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensors": ("w",)}, "rule for 'w' sets nothing; expected one of enabled, dtype"),
        ({"tensors": ("re:(",), "dtype": "int4"}, r"'re:\(' is no regular expression"),
        ({"operands": (1,), "dtype": "int4"}, "name the operators as well"),
        ({"operators": ("Conv",), "operands": (-1,), "dtype": "int4"}, "positions, 0 the first"),
        ({"of": "weight", "dtype": "int4"}, "of='weight' is unknown.*near names: weights"),
        ({"dtype": "int1"}, "2 to 16 bits"),
        ({"dtypes": ("int",), "dtype": "int4"}, "dtypes='int' is unknown"),
        ({"least_bits": 1}, "a number from 2 to 16"),
        ({"fixed_range": (1.0, 2.0)}, "a range with 0 in it"),
        ({"fixed_range": (0.0, float("inf"))}, "two finite numbers"),
        ({"of": "inputs", "granularity": "tensor"}, "granularity is for weights only"),
    ],
)
def test_a_bad_rule_is_an_error(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rule(**settings)


# Supergroups


def groups(runs: tuple[tuple[str, ...], ...], *nodes, **initializers) -> set[str]:
    """Returns the tensors that are inside a group."""
    model = build(*nodes, **CONV, **initializers)
    placement = place(model, QuantizationConfig(target="aimet", supergroups=runs))
    return {entry.tensor for entry in placement.skipped if entry.reason.startswith("inside")}


CHAIN = (("Conv", "x w b", "c", SAME), ("Sigmoid", "c", "s"), ("Relu", "s", "r"), ("Tanh", "r", "y"))


@pytest.mark.parametrize(
    ("runs", "inside"),
    [
        ((), set()),
        ((("Conv", "Sigmoid"),), {"c"}),
        ((("Conv", "Sigmoid"), ("Conv", "Sigmoid", "Relu")), {"c", "s"}),  # the longest first
        ((("Sigmoid", "Relu"), ("Relu", "Tanh")), {"r"}),  # disjoint: of two as long, the first by name
        ((("Conv", "Relu"),), set()),
        ((("Conv", "Sigmoid"), ("Relu", "Tanh")), {"c", "r"}),
    ],
)
def test_runs_are_matched_the_longest_first_and_disjoint(runs: tuple, inside: set[str]) -> None:
    assert groups(runs, *CHAIN) == inside


def test_a_run_ends_where_others_read_as_well() -> None:
    assert groups((("Conv", "Sigmoid"),), CHAIN[0], CHAIN[1], ("Mul", "c s", "y")) == set()


def test_depthwise_convolutions_are_in_runs_as_others_are() -> None:
    nodes = (("Conv", "x d", "c", {"group": 4, **SAME}), ("Relu", "c", "h"), ("Conv", "h w b", "y"))
    assert groups((("Conv", "Relu"),), *nodes, d=floats(4, 1, 3, 3)) == {"c"}


def test_runs_of_the_configuration_come_beside_those_of_the_target() -> None:
    model = build(("Conv", "x w b", "c", SAME), ("Relu", "c", "r"), ("Tanh", "r", "y"), **CONV)
    found = plan(place(model, QuantizationConfig(supergroups=(("Relu", "Tanh"),))))
    assert (found["c"], found["r"]) == ("own", "float")  # no operator is in two
    assert plan(place(model))["c"] == "float"


# Ties and lists of a target


def target(tmp_path: Path, **lists: str) -> str:
    text = "\n".join(f"{key} = []" for key in sorted(REQUIRED - set(lists)))
    path = tmp_path / "mine.toml"
    path.write_text(
        f'description = "mine"\n{text}\n'
        + "\n".join(f"{k} = {v}" for k, v in lists.items())
        + "\n[fixed_ranges]\nSoftmax = [0, 1]\n"
    )
    return str(path)


REQUIRED = {"heads", "clamps", "activations", "data_movement", "adopt_output", "constant_operands"}


def test_a_forward_tie_gives_the_result_the_encoding_of_the_input(tmp_path: Path) -> None:
    config = QuantizationConfig(target=target(tmp_path, forward_ties='["AveragePool", "Softmax"]'))
    nodes = [("AveragePool", "x", "p", {"kernel_shape": [2, 2]}), ("Softmax", "p", "y")]
    assert plan(place(build(*nodes), config)) == {"x": "own", "p": "as x", "y": "own"}  # a known range is kept


def test_the_last_state_shares_the_encoding_of_the_sequence(tmp_path: Path) -> None:
    config = QuantizationConfig(
        target=target(tmp_path, shared_results="{LSTM = [1]}", rounded_parameters="{LSTM = [1, 2]}")
    )
    model = build(
        ("LSTM", "x w r", "a h k", {"hidden_size": 3}), inputs=(("x", (5, 1, 4)),), outputs=("a", "h", "k"),
        w=floats(1, 12, 4), r=floats(1, 12, 3),
    )  # fmt: skip
    placement = place(model, config)
    assert plan(placement) == {"x": "own", "a": "own", "h": "as a", "k": "own", "w": "own", "r": "own"}
    site = placement.site("w")
    assert site is not None
    assert (site.dtype, site.symmetric, site.axis) == ("int8", True, None)


def test_a_target_that_rounds_in_front_of_layers_rounds_nowhere_else(tmp_path: Path) -> None:
    lists = {"rounded_for": '["Conv"]', "data_movement": '["MaxPool"]'}
    config = QuantizationConfig(target=target(tmp_path, **lists))
    found = plan(place(net(), config))
    assert {tensor for tensor, what in found.items() if what != "float"} == {"x", "r", "w1", "w2", "b1", "b2"}
    pooled = build(("MaxPool", "x", "p", {"kernel_shape": [1, 1]}), ("Conv", "p w b", "y"), **CONV)
    assert plan(place(pooled, config)) == {"x": "own", "p": "as x", "w": "own", "b": "int32", "y": "float"}


def test_exceptions_of_a_target_come_before_rules(tmp_path: Path) -> None:
    name = target(tmp_path, exceptions='[{operators = ["Conv"], of = "weights", dtype = "int5"}]')
    assert len(load_target(name).exceptions) == 1
    assert dtypes(target=name)["w1"] == "int5"
    assert dtypes(Rule(tensors=("w1",), dtype="int3"), target=name)["w1"] == "int3"
    assert dtypes(Rule(tensors=("w1",), dtype="int3"), target=name)["w2"] == "int5"


# Axes of channels


@pytest.mark.parametrize(
    ("node", "shape", "axis"),
    [
        (("Conv", "x w", "y", {"group": 2}), (4, 2, 3, 3), 0),
        (("Conv", "x w", "y", {"group": 4}), (4, 1, 3, 3), 0),
        (("ConvTranspose", "x w", "y"), (4, 3, 3, 3), 1),
        (("ConvTranspose", "x w", "y", {"group": 2}), (4, 3, 3, 3), 1),
    ],
)
def test_scales_run_along_output_channels_with_and_without_groups(node, shape, axis: int) -> None:
    rounds = QuantizationConfig(rules=(Rule(tensors=("w",), enabled=True),))  # what has no kernel, too
    site = place(build(node, w=floats(*shape)), rounds).site("w")
    assert site is not None
    assert (site.axis, site.block_size) == (axis, None)


def test_a_weight_behind_a_transpose_has_its_scales_along_the_columns_that_are_multiplied() -> None:
    model = build(("Transpose", "w", "t", {"perm": [1, 0]}), ("MatMul", "x t", "y"), inputs=MATRIX, w=floats(3, 8))
    (weight,) = [site for site in place(model).sites if site.kind == "weight"]
    assert weight.axis is not None
    assert np.shape(model.params[weight.tensor])[weight.axis] == 3  # reading has made it one constant, [8, 3]


@pytest.mark.parametrize(("operator", "remedy"), [("Clip", "equalize=False"), ("BatchNormalization", "folded")])
def test_a_rule_for_what_transforms_have_taken_away_says_so(operator: str, remedy: str) -> None:
    config = QuantizationConfig(rules=(Rule(operators=(operator,), dtype="int16"),))
    with pytest.raises(ConfigError, match=f"no operator '{operator}'.*{remedy}"):
        place(net(), config)
