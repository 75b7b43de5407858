"""Recommendations follow from the figures: each reason speaks where its facts hold, and is silent where they do not."""

import copy
import math
import re
import shlex
import tomllib

import pytest

from ptqjax.config.files import config_from_toml
from ptqjax.placement.names import matches_name
from ptqjax.report import recommendations as all_of
from ptqjax.report.recommendations import (
    REASONS,
    as_facts,
    changed_function,
    clipping,
    dominant_groups,
    losing_stages,
    never_values,
    noisy_kind,
    one_grid_for_all_channels,
    other_arithmetic,
    shares,
    stage_gains,
    unlike_parts,
    weak_output,
    without_samples,
)


def encoding(bits: int, *, axis: int | None = 0) -> dict:
    return {"axis": axis, "num_bits": bits, "dtype": f"int{bits}"}


def tensor(name: str, **figures: float | str) -> dict:
    usual = {"kind": "activation", "operator": "Conv", "sqnr_db": 20.0, "own_sqnr_db": 40.0}
    return usual | {"name": name, "clipped": 0.0, "clip_share": 0.0} | figures


def group(name: str, kind: str, noise: float) -> dict:
    return {"name": name, "kind": kind, "tensors": [name], "noise": noise, "sqnr_db": 0.0}


@pytest.fixture
def facts() -> dict:
    """A run in which nothing is wrong but the noise: 20 dB, evenly from six tensors."""
    stages = [
        {"stage": "float", "metrics": {"float_sqnr_db": float("inf"), "sqnr_db": float("inf"), "agreement": 1.0}},
        {"stage": "fold", "metrics": {"float_sqnr_db": 120.0, "sqnr_db": 12.0, "agreement": 0.7}},
        {"stage": "equalize", "metrics": {"float_sqnr_db": 110.0, "sqnr_db": 18.0, "agreement": 0.85}},
        {"stage": "correct", "metrics": {"sqnr_db": 20.0, "agreement": 0.9}},
    ]
    names = {"w1": "weight", "w2": "weight", "w3": "weight", "x1": "activation", "x2": "activation", "x3": "activation"}
    even = [group(name, kind, 0.001) for name, kind in names.items()]
    return {
        "source": {"num_samples": 100},
        "settings": {"weights": "int16", "activations": "int16", "ranges": "sqnr", "bounds": "exact"},
        "model": {"outputs": [{"name": "y", "shape": ["N", 10]}]},
        "stages": stages,
        "encodings": {name: encoding(8) for name in names},
        "weight_ranges": {},
        "sensitivity": {"samples": 32, "groups": even},
        "tensors": [tensor(name, kind=kind) for name, kind in names.items()],
        "runtime": {"compared": True, "integer": {"agreement": 1.0}, "groups": [], "unverified": []},
    }


def good(facts: dict) -> dict:
    """The same run, had it come to 40 dB."""
    found = copy.deepcopy(facts)
    found["stages"][-1]["metrics"] = {"sqnr_db": 40.0, "agreement": 1.0}
    return found


def test_an_even_run_has_nothing_to_recommend(facts):
    facts["sensitivity"]["groups"] = [group(f"w{i}", "weight", 0.001) for i in range(20)]
    assert all_of(facts) == ()
    assert all_of(good(facts)) == ()


def test_facts_without_the_parts_of_explain_are_enough(facts):
    for name in ("sensitivity", "tensors", "runtime"):
        del facts[name]
    assert all_of(facts) == ()


@pytest.mark.parametrize(("count", "reason"), [(0, "no samples"), (31, "few samples"), (32, None)])
def test_few_samples_are_pointed_out(facts, count, reason):
    facts["source"]["num_samples"] = count
    assert [each.reason for each in without_samples(facts)] == ([reason] if reason else [])


def test_without_samples_nothing_is_said_of_noise(facts):
    facts |= {"stages": [], "source": {"num_samples": 0}}
    facts["sensitivity"]["groups"][0]["noise"] = 1.0
    assert [each.reason for each in all_of(facts)] == ["no samples"]


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"bounds": "relu"}, "--bounds exact"),
        ({"absorb": "statistics"}, "--absorb exact"),
        ({}, "--no-equalize"),
    ],
)
def test_a_transform_that_changed_the_function_is_named_with_the_setting_that_allowed_it(facts, settings, option):
    assert changed_function(facts) == []
    facts["settings"] |= settings
    facts["stages"][2]["metrics"]["float_sqnr_db"] = 31.4
    (found,) = changed_function(facts)
    assert "equalize" in found.what
    assert "31.4 dB" in found.why
    assert found.option == option


@pytest.mark.parametrize(("stage", "option"), [(2, "--no-equalize"), (3, "--correct none")])
def test_a_stage_after_which_less_is_left_is_to_be_left_out(facts, stage, option):
    assert losing_stages(facts) == []
    facts["stages"][stage]["metrics"]["sqnr_db"] = 11.0 if stage == 2 else 17.0
    found = losing_stages(facts)
    assert [each.option for each in found] == [option]
    assert found[0].gain_db == pytest.approx(1.0)


@pytest.mark.parametrize("is_kept", [True, False])
def test_nothing_is_said_against_a_stage_that_samples_held_back_spoke_for(facts, is_kept):
    facts["stages"][3]["metrics"]["sqnr_db"] = 17.0
    facts["records"] = [{"transform": "choose", "what": "stage correct", "done": is_kept}]
    assert len(losing_stages(facts)) == (0 if is_kept else 1)


def test_stage_gains_are_differences_to_the_stage_before(facts):
    equalize, correct = stage_gains(facts["stages"])
    assert (equalize["stage"], equalize["over"]) == ("equalize", "fold")
    assert (equalize["sqnr_db"], equalize["agreement"]) == pytest.approx((6.0, 0.15))
    assert (correct["sqnr_db"], correct["agreement"]) == pytest.approx((2.0, 0.05))
    assert "top1" not in correct


def test_weights_with_one_grid_for_unlike_channels_are_named_widest_first(facts):
    facts["weight_ranges"] = {
        "w1": {"before": [1.0, 1.0], "after": [1.0, 20.0]},
        "w2": {"before": [1.0, 1.0], "after": [1.0, 64.0]},
        "w3": {"before": [1.0, 99.0], "after": [1.0, 15.0]},  # what it was before does not count
    }
    assert one_grid_for_all_channels(facts) == []  # they have a grid per channel
    facts["encodings"] |= {name: encoding(8, axis=None) for name in ("w1", "w2", "w3")}
    (found,) = one_grid_for_all_channels(facts)
    assert found.where == ("w2", "w1")
    assert "by 64" in found.why
    assert "2.0" in found.why  # 8 bits less log2(64)
    assert one_grid_for_all_channels(good(facts)) == []


def test_the_tensors_that_cause_most_of_the_noise_are_widened_or_excluded(facts):
    assert dominant_groups(facts) == []  # a sixth of the noise each is 0.8 dB, and no more than its part
    facts["encodings"]["w1"] = encoding(4)
    facts["sensitivity"]["groups"] = [
        group("w1", "weight", 0.006),
        group("x1", "activation", 0.003),
        *(group(f"v{i}", "weight", 0.0002) for i in range(5)),
    ]
    widen, exclude = dominant_groups(facts)
    assert widen.where == ("w1",)
    assert widen.gain_db == pytest.approx(-10 * math.log10(1 - 0.6 * (1 - 4.0**-4)))
    assert tomllib.loads(widen.option) == {"rules": [{"tensors": ["w1"], "dtype": "int8"}]}
    assert exclude.option == "--exclude 'x1'"
    assert exclude.gain_db == pytest.approx(1.549, abs=1e-3)  # -10 log10(1 - 0.3)
    assert "x1 30 %" in exclude.why
    assert dominant_groups(good(facts)) == []


def test_tensors_that_are_widened_alike_are_one_recommendation_with_the_gain_of_all(facts):
    facts["encodings"] |= {"w1": encoding(4), "w2": encoding(6)}
    facts["sensitivity"]["groups"] = [
        group("w2", "weight", 0.003),
        group("w1", "weight", 0.006),
        *(group(f"v{i}", "weight", 0.0001) for i in range(10)),
    ]
    (found,) = dominant_groups(facts)
    assert found.what == "Widen w1 and 1 other to int8."
    assert found.where == ("w1", "w2")
    assert found.gain_db == pytest.approx(-10 * math.log10(1 - 0.6 * (1 - 4.0**-4) - 0.3 * (1 - 4.0**-2)))


def test_shares_add_up_and_the_largest_comes_first(facts):
    facts["sensitivity"]["groups"][3]["noise"] = 0.005
    found = shares(facts)
    assert sum(found.values()) == pytest.approx(1.0)
    assert next(iter(found.items())) == ("x1", pytest.approx(0.5))


def test_the_noisier_kind_is_widened_to_the_next_type(facts):
    assert noisy_kind(facts) == []  # 16 bits have none
    facts["settings"] |= {"weights": "int4", "activations": "uint8"}
    facts["sensitivity"]["groups"][0]["noise"] = 0.005  # weights: 7 of 10
    (found,) = noisy_kind(facts)
    assert found.option == "--weights int8"
    assert "70 %" in found.why
    assert found.gain_db == pytest.approx(5.19, abs=0.01)  # -10 log10(1 - 0.7 (1 - 4^-4))
    facts["sensitivity"]["groups"][4]["noise"] = 0.05
    (found,) = noisy_kind(facts)
    assert found.option == "--activations uint16"
    assert noisy_kind(good(facts)) == []


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "int16"])
def test_types_without_a_wider_one_of_their_kind_are_left(facts, dtype):
    facts["settings"] |= {"weights": dtype}
    facts["sensitivity"]["groups"][0]["noise"] = 1.0
    assert noisy_kind(facts) == []


def test_a_range_that_loses_most_by_clipping_is_to_reach_farther(facts):
    assert clipping(facts) == []
    far = tensor("x2", clipped=0.02, clip_share=0.9, own_sqnr_db=15.0)
    quiet = tensor("x3", clipped=0.02, clip_share=0.9, own_sqnr_db=45.0)  # adds nothing to 20 dB
    facts["tensors"] = [tensor("x1", clip_share=0.4, own_sqnr_db=15.0), far, quiet]
    (found,) = clipping(facts)
    assert found.where == ("x2",)
    assert "2 %" in found.why
    assert "90 %" in found.why
    assert tomllib.loads(found.option) == {"rules": [{"tensors": ["x2"], "ranges": "min-max"}]}
    assert clipping(good(facts)) == []
    facts["settings"]["ranges"] = "min-max"
    assert clipping(facts) == []


def test_masks_that_are_measured_as_data_are_to_stay_in_float(facts):
    assert never_values(facts) == []
    mask = {"tensor": "a mask", "reason": "carries values that mean never ('m')", "counts": True}
    scores = {"tensor": "x2", "reason": "values that mean never ('m') do not count", "counts": False}
    facts["never"] = [scores, mask]
    (found,) = never_values(facts)
    assert found.where == ("a mask",)
    assert "mean never ('m')" in found.why
    assert shlex.split(found.option) == ["--exclude", "a mask"]
    facts["tensors"] = [tensor("x2", clipped=0.4, clip_share=0.9, own_sqnr_db=1.0)]
    assert clipping(facts) == []  # what lies outside is meant to


def test_where_the_runtime_computes_something_else_the_file_is_to_be_judged_there(facts):
    assert other_arithmetic(facts) == []
    facts["runtime"] |= {"integer": {"agreement": 0.9}, "groups": [{"tensor": "t"}]}
    (found,) = other_arithmetic(facts)
    assert found.where == ("t",)
    assert "90.0 %" in found.why
    facts["model"]["outputs"][0]["shape"] = ["N", 1]  # one output has no classes to agree on
    assert other_arithmetic(facts) == []
    facts["runtime"]["unverified"] = ["u"]
    assert other_arithmetic(facts)[0].where == ("u",)
    facts["runtime"] = {"compared": False, "reason": "there is none"}
    assert other_arithmetic(facts) == []


def test_agreement_of_a_single_output_is_no_sign_of_quality(facts):
    facts["stages"][-1]["metrics"]["agreement"] = 1.0
    facts["sensitivity"]["groups"][0]["noise"] = 1.0
    assert dominant_groups(facts) == []
    facts["model"]["outputs"][0]["shape"] = ["N", 1]
    assert dominant_groups(facts) != []


@pytest.mark.parametrize("name", ["plain", "a/b:0", "odd[0]*?", 'it\'s "quoted"', "back\\slash", "re:x"])
def test_options_name_their_tensors_and_no_others_whatever_they_are_called(facts, name):
    facts["encodings"][name] = encoding(4)
    facts["sensitivity"]["groups"] = [group(name, "weight", 0.01)]
    (widen,) = dominant_groups(facts)
    (rule,) = config_from_toml(widen.option).rules
    assert rule.dtype == "int8"
    assert matches_name(rule.tensors[0], name)
    assert not matches_name(rule.tensors[0], name + "x")
    facts["sensitivity"]["groups"] = [group(name, "activation", 0.01)]
    (exclude,) = dominant_groups(facts)
    flag, pattern = shlex.split(exclude.option)
    assert flag == "--exclude"
    assert matches_name(pattern, name)


def test_each_reason_has_a_name_of_its_own_and_tells_figures(facts):
    facts["source"]["num_samples"] = 3
    facts["settings"] |= {"weights": "int4"}
    facts["sensitivity"]["groups"][0]["noise"] = 0.01
    facts["tensors"].append(tensor("x9", clipped=0.02, clip_share=0.9, own_sqnr_db=15.0))
    facts["stages"][3]["metrics"]["sqnr_db"] = 10.0
    found = all_of(facts)
    assert {"few samples", "losing stage", "dominant groups", "noisy kind", "clipping"} == {f.reason for f in found}
    assert all(re.search(r"\d", each.why) for each in found)
    assert all(each["option"] and isinstance(each["where"], list) for each in as_facts(found))
    assert len(REASONS) == 12


def with_outputs(facts: dict, **figures: float) -> dict:
    facts["stages"][-1]["outputs"] = {name.replace("_", ": "): value for name, value in figures.items()}
    facts["stages"][-1]["metrics"] |= {"worst_sqnr_db": min(figures.values())}
    return facts


def test_an_output_that_is_worth_much_less_than_the_best_is_named(facts):
    (found,) = weak_output(with_outputs(facts, boxes=45.0, y_scores=3.0))
    assert found.where == ("y: scores",)
    assert "3.0 dB" in found.why
    assert found.option == "--exclude 'scores'"
    assert weak_output(with_outputs(facts, boxes=45.0, y_scores=38.0)) == []
    assert weak_output(with_outputs(facts, boxes=12.0, y_scores=8.0)) == []


def test_what_is_good_on_average_is_not_good_where_an_output_is_bad(facts):
    """Nor are stages judged by an average over unlike outputs."""
    found = with_outputs(good(facts), boxes=40.0, scores=2.0)
    found["sensitivity"]["groups"][0]["noise"] = 1.0
    assert dominant_groups(found) != []
    found["stages"][2]["metrics"] |= {"sqnr_db": 50.0, "worst_sqnr_db": 1.0}
    assert stage_gains(found["stages"])[-1]["sqnr_db"] == pytest.approx(1.0)


@pytest.mark.parametrize(("done", "option"), [(True, "--exclude 'cat'"), (False, '[[rules]]\ntensors = ["cat"]')])
def test_tensors_of_unlike_parts_are_told(facts, done, option):
    record = {"transform": "give_up_grids", "done": done, "where": ["cat", "scores"], "reason": "0.4 of 255 steps"}
    facts["records"] = [record | {"what": "left"}]
    (found,) = unlike_parts(facts)
    assert found.where == ("cat", "scores")
    assert found.option.startswith(option)
