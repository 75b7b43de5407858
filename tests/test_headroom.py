"""Laws of headroom: how far ranges from few values reach beyond them, and what they never go beyond."""

import math
from dataclasses import replace

import numpy as np
import onnx.helper as oh
import pytest
from onnx import TensorProto, numpy_helper

import ptqjax
from ptqjax.ranges.headroom import headroom_of_few
from ptqjax.ranges.observing import MANY

RNG = np.random.default_rng(4)
PLAIN = ptqjax.QuantizationConfig(equalize=False, correct="none", ranges="min-max")
SIZE = 8


def model_of(nodes, *, outputs=("y",)):
    weights = {f"w{i}": RNG.normal(size=(SIZE, SIZE)).astype(np.float32) for i in range(3)}
    bounds = {"zero": np.float32(0), "six": np.float32(6)}
    used = {name for node in nodes for name in node.input}
    tensors = [
        numpy_helper.from_array(value, name) for name, value in {**weights, **bounds}.items() if name in used
    ]  # fmt: skip
    ends = [oh.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    source = [oh.make_tensor_value_info("x", TensorProto.FLOAT, ["n", SIZE])]
    graph = oh.make_graph(nodes, "g", source, ends, tensors)
    return ptqjax.read(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8))


@pytest.fixture(scope="module")
def dense():
    names = ["x", "h", "i", "y"]
    return model_of([oh.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(3)])


def samples(num, seed=0):
    return np.random.default_rng(seed).normal(size=(num, SIZE)).astype(np.float32)


def scales(model, batches, config=PLAIN):
    found = ptqjax.quantize(model, batches, config)
    return {name: float(each.scale) for name, each in found.encodings.items() if name not in found.model.params}


def test_fewer_values_ask_for_more_and_many_for_nothing():
    factors = [headroom_of_few(num) for num in (1, 64, 65, 500, 2000, MANY - 1, MANY, 10 * MANY)]
    assert factors == sorted(factors, reverse=True)
    assert factors[:2] == [2.0, 2.0]
    assert factors[-3] == pytest.approx(1, abs=1e-4)
    assert factors[-2:] == [1.0, 1.0]


def decibels_on(model, batches, x, config):
    result = ptqjax.quantize(model, batches, config)
    exact = np.asarray(ptqjax.apply(model.graph, model.params, {"x": x})["y"])
    rounded = ptqjax.simulate(result.model, result.encodings)(result.model.params, result.encodings, {"x": x})["y"]
    return 10 * math.log10(np.sum(exact**2) / np.sum((exact - np.asarray(rounded)) ** 2))


def test_ranges_of_few_values_reach_what_other_samples_have(dense):
    few, new = [{"x": samples(4)}], samples(200, seed=1)
    assert decibels_on(dense, few, new, PLAIN) > 6 + decibels_on(dense, few, new, replace(PLAIN, headroom=1.0))


@pytest.mark.parametrize("ranges", ["min-max", "moving-average", "sqnr", "percentile:100", "mse", "entropy"])
def test_a_set_headroom_is_the_least_and_1_leaves_ranges_alone(dense, ranges):
    config = replace(PLAIN, ranges=ranges)
    batches = [{"x": samples(4)}]
    plain, own = scales(dense, batches, replace(config, headroom=1.0)), scales(dense, batches, config)
    assert {name: own[name] / plain[name] for name in plain} == pytest.approx(dict.fromkeys(plain, 2.0))
    for least, found in ((1.25, 2.0), (3.0, 3.0)):
        wide = scales(dense, batches, replace(config, headroom=least))
        assert {name: wide[name] / plain[name] for name in plain} == pytest.approx(dict.fromkeys(plain, found))


def test_many_values_are_taken_at_their_word_to_the_bit(dense):
    batches = [{"x": samples(MANY // SIZE // 4, seed)} for seed in range(4)]
    assert scales(dense, batches) == scales(dense, batches, replace(PLAIN, headroom=1.0))


def test_values_are_counted_over_batches_however_they_are_cut(dense):
    x = samples(12)
    whole, cut = scales(dense, [{"x": x}]), scales(dense, [{"x": x[:5]}, {"x": x[5:6]}, {"x": x[6:]}])
    plain = scales(dense, [{"x": x}], replace(PLAIN, headroom=1.0))
    assert whole == cut
    assert whole["x"] / plain["x"] == pytest.approx(math.log(MANY) / math.log(x.size))


def test_what_is_bounded_or_known_beforehand_is_not_widened():
    nodes = [
        oh.make_node("MatMul", ["x", "w0"], ["h"]),
        oh.make_node("Clip", ["h", "zero", "six"], ["c"]),
        oh.make_node("MatMul", ["c", "w1"], ["i"]),
        oh.make_node("Sigmoid", ["i"], ["s"]),
        oh.make_node("MatMul", ["s", "w2"], ["y"]),
    ]
    model, batches = model_of(nodes), [{"x": 5 * samples(4)}]
    plain, own = scales(model, batches, replace(PLAIN, headroom=1.0)), scales(model, batches)
    assert own["c"] == plain["c"]
    assert own["c"] == pytest.approx(6 / 255)
    assert own["y"] > plain["y"]


def test_aimets_formulas_and_encodings_of_the_user_stay(dense):
    batches = [{"x": samples(4)}]
    as_aimet = replace(PLAIN, compatibility="aimet")
    assert scales(dense, batches, as_aimet) == scales(dense, batches, replace(as_aimet, headroom=1.0))
    kept = ptqjax.quantize(dense, batches, replace(PLAIN, headroom=1.0)).encodings["x"]
    again = ptqjax.quantize(dense, batches, PLAIN, frozen={"x": kept}).encodings["x"]
    assert again.scale == kept.scale


@pytest.mark.parametrize("headroom", [None, 1.2, 3.0])
def test_powers_of_two_stay_powers_of_two(dense, headroom):
    config = replace(PLAIN, power_of_two=True, headroom=headroom)
    found = scales(dense, [{"x": samples(4)}], config)
    assert all(math.frexp(scale)[0] == 0.5 for scale in found.values())


@pytest.mark.parametrize("headroom", [None, 1.5])
def test_a_cast_to_16_bits_has_no_range_to_widen(dense, headroom):
    config = replace(PLAIN, activations="float16", weights="int8", biases="float", headroom=headroom)
    assert set(scales(dense, [{"x": samples(4)}], config).values()) == {1.0}
