"""The whole flow: stages in order, what is switched off stays off, bad input is refused before any work."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import pytest

import ptqjax
from ptqjax.errors import ConfigError, DataError, ModelError
from ptqjax.fit import Learning, learn_scales
from ptqjax.fit.ways import steps_of

EXAMPLES = Path(__file__).parents[1] / "examples"
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    """Conv, BN, ReLU6, depthwise Conv, BN, ReLU6, 1x1 Conv: channels of very different ranges."""
    spread = np.exp(RNG.normal(size=8) * 2.5)
    norms = {}
    for name in ("bn1", "bn2"):
        norms[f"{name}.g"], norms[f"{name}.b"] = RNG.uniform(0.5, 1.5, 8), RNG.normal(size=8)
        norms[f"{name}.m"], norms[f"{name}.v"] = np.zeros(8), spread**2
    weights = {
        "w1": RNG.normal(size=(8, 3, 3, 3)) * spread.reshape(-1, 1, 1, 1) / 5,  # as bn1 expects
        "w2": RNG.normal(size=(8, 1, 3, 3)),  # folded: spread over four orders
        "w3": RNG.normal(size=(5, 8, 1, 1)),
        "lo": np.array(0),
        "hi": np.array(6),
    }
    nodes = [
        oh.make_node("Conv", ["x", "w1"], ["a"], pads=[1] * 4),
        oh.make_node("BatchNormalization", ["a", "bn1.g", "bn1.b", "bn1.m", "bn1.v"], ["b"]),
        oh.make_node("Clip", ["b", "lo", "hi"], ["c"]),
        oh.make_node("Conv", ["c", "w2"], ["d"], group=8, pads=[1] * 4),
        oh.make_node("BatchNormalization", ["d", "bn2.g", "bn2.b", "bn2.m", "bn2.v"], ["e"]),
        oh.make_node("Clip", ["e", "lo", "hi"], ["f"]),
        oh.make_node("Conv", ["f", "w3"], ["y"]),
    ]
    tensors = [onh.from_array(value.astype(np.float32), name) for name, value in (weights | norms).items()]
    info = oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])
    out = oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 5, 8, 8])
    graph = oh.make_graph(nodes, "g", [info], [out], tensors)
    return ptqjax.read(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8))


def sqnr(model, result):
    exact = ptqjax.apply(model.graph, model.params, {"x": X})["y"]
    rounded = ptqjax.simulate(result.model, result.encodings)(result.model.params, result.encodings, {"x": X})["y"]
    return 10 * np.log10(np.sum(exact**2) / np.sum((exact - rounded) ** 2))


def test_equalization_and_correction_recover_what_per_tensor_rounding_lost(model):
    batches = [{"x": X[:8]}, {"x": X[8:]}]
    plain = ptqjax.QuantizationConfig(granularity="tensor", equalize=False, correct="none")
    whole = ptqjax.QuantizationConfig(granularity="tensor")
    assert sqnr(model, ptqjax.quantize(model, batches, whole)) > sqnr(model, ptqjax.quantize(model, batches, plain)) + 2


def test_stages_and_reports_are_those_that_ran(model):
    batches = [{"x": X}]
    whole = ptqjax.quantize(model, batches)
    assert [stage.name for stage in whole.stages] == ["fold", "equalize", "correct"]
    assert list(whole.reports) == ["fold", "equalize", "calibrate", "correct"]
    assert whole.stages[-1].model is whole.model
    config = ptqjax.QuantizationConfig(equalize=False, correct="none", target="generic-per-channel")
    assert [stage.name for stage in ptqjax.quantize(model, batches, config).stages] == ["fold"]
    fitted = ptqjax.quantize(model, batches, replace(config, target="ort-cpu"))  # weights, for kernels that saturate
    assert [stage.name for stage in fitted.stages] == ["fold", "correct"]


def test_an_iterator_is_as_good_as_a_list(model):
    batches = [{"x": X[:8]}, {"x": X[8:]}]
    once, again = ptqjax.quantize(model, iter(batches)), ptqjax.quantize(model, batches)
    assert all(np.array_equal(once.model.params[name], value) for name, value in again.model.params.items())


def test_the_same_input_gives_the_same_bits(model):
    one, two = (ptqjax.quantize(model, [{"x": X}]) for _ in range(2))
    assert one.encodings.keys() == two.encodings.keys()
    assert all(np.array_equal(one.encodings[name].scale, two.encodings[name].scale) for name in one.encodings)
    assert all(np.array_equal(value, two.model.params[name]) for name, value in one.model.params.items())


def test_a_quantized_model_is_refused_by_name(model, tmp_path):
    result = ptqjax.quantize(model, [{"x": X}])
    ptqjax.export(result.model, result.encodings, tmp_path, "q")
    with pytest.raises(ModelError, match=r"quantized already: it holds (De)?[Qq]uantizeLinear.*producing.*its source"):
        ptqjax.quantize(ptqjax.read(tmp_path / "q.onnx"), [{"x": X}])


def test_an_empty_iterable_is_an_error(model):
    with pytest.raises(DataError, match="batch"):
        ptqjax.quantize(model, [])


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_without_data_batch_norms_tell_ranges_and_corrections(granularity):
    model = ptqjax.read(EXAMPLES / "digits.onnx")
    images = np.load(EXAMPLES / "digits_evaluation.npz")["input"]
    result = ptqjax.quantize(model, None, ptqjax.QuantizationConfig(granularity=granularity))
    exact = np.asarray(ptqjax.apply(model.graph, model.params, {"input": images})["output"])
    simulate = ptqjax.simulate(result.model, result.encodings)
    rounded = np.asarray(simulate(result.model.params, result.encodings, {"input": images})["output"])
    assert np.mean(exact.argmax(1) == rounded.argmax(1)) >= 0.95  # per tensor and as it is, it falls to 0.24
    assert any(record.done for record in result.reports["correct"])


def test_learned_scales_need_data(model):
    with pytest.raises(ConfigError, match="'learned' needs calibration data"):
        ptqjax.quantize(model, None, ptqjax.QuantizationConfig(scaling="learned"))


def test_what_was_tried_is_in_the_report_and_one_of_it_is_chosen(model):
    result = ptqjax.quantize(model, [{"x": X}], ptqjax.QuantizationConfig(effort="thorough"))
    tried = [r for r in result.reports["equalize"] if r.transform == "choose" and r.what.startswith("scaling ")]
    assert sum(record.done for record in tried) == 1
    assert {name for name in ("off", "ranges", "noise") for record in tried if f"scaling {name}," in record.what} == {
        "off",
        "ranges",
        "noise",
    }
    best = next(record for record in tried if record.done)
    figure = "SQNR on samples held back, dB"
    assert best.after[figure] >= max(record.after[figure] for record in tried) - 0.5  # what is simpler may win a tie


@pytest.mark.parametrize("scaling", ["off", "weights", "ranges", "noise", "learned"])
def test_each_scaling_keeps_the_float_function(model, scaling):
    config = ptqjax.QuantizationConfig(granularity="tensor", scaling=scaling, correct="none", rounding="nearest")
    result = ptqjax.quantize(model, [{"x": X}], config)
    exact = np.asarray(ptqjax.apply(model.graph, model.params, {"x": X})["y"])
    after = np.asarray(ptqjax.apply(result.model.graph, result.model.params, {"x": X})["y"])
    np.testing.assert_allclose(after, exact, rtol=0, atol=3e-5 * np.abs(exact).max())  # folding alone: 1e-5


def test_headroom_widens_activations_up_to_what_can_occur(model):
    plain = ptqjax.QuantizationConfig(scaling="off", correct="none", headroom=1.0)
    one, wide = (ptqjax.quantize(model, [{"x": X}], replace(plain, headroom=factor)) for factor in (1.0, 1.5))
    ratio = {name: float(wide.encodings[name].scale / one.encodings[name].scale) for name in ("x", "y", "c")}
    assert [ratio["x"], ratio["y"]] == pytest.approx([1.5, 1.5])
    assert ratio["c"] <= 6 / 255 / float(one.encodings["c"].scale) + 1e-6  # a ReLU6 gives no more
    assert all(
        np.array_equal(one.encodings[name].scale, wide.encodings[name].scale)
        for name in one.encodings
        if name in one.model.params
    )


def small(nodes, weights, *, shape, outputs=("y",), dtype=onnx.TensorProto.FLOAT):
    """A model read from a graph with the input x."""
    tensors = [onh.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()]
    ends = [oh.make_tensor_value_info(name, dtype, None) for name in outputs]
    graph = oh.make_graph(
        nodes, "g", [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)], ends, tensors
    )  # fmt: skip
    return ptqjax.read(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8))


def two_convolutions(shape, *, biases=("b1", "b2")):
    weights = {"w1": RNG.normal(size=(4, 3, 1, 1)), "w2": RNG.normal(size=(5, 4, 1, 1))}
    weights |= {name: RNG.normal(size=size) for name, size in (("b1", 4), ("b2", 5)) if name in biases}
    nodes = [
        oh.make_node("Conv", ["x", "w1", *(["b1"] if "b1" in biases else [])], ["h"]),
        oh.make_node("Conv", ["h", "w2", *(["b2"] if "b2" in biases else [])], ["y"]),
    ]
    return small(nodes, weights, shape=shape)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_fixed_batch_size_is_kept(granularity):
    model = two_convolutions([1, 3, 6, 6])
    batches = [{"x": RNG.normal(size=(1, 3, 6, 6)).astype(np.float32)} for _ in range(5)]
    result = ptqjax.quantize(model, batches, ptqjax.QuantizationConfig(granularity=granularity))
    assert result.encodings.keys() >= {"x", "h", "y", "w1", "w2"}


def test_pictures_of_several_sizes_are_kept_apart():
    model = two_convolutions(["n", 3, "h", "w"])
    batches = [{"x": RNG.normal(size=(2, 3, size, size)).astype(np.float32)} for size in (4, 6, 5)]
    config = ptqjax.QuantizationConfig(granularity="tensor", rounding="nearest")
    result = ptqjax.quantize(model, batches, config)
    (judged,) = [record for record in result.reports["equalize"] if record.what == "stage correct"]
    is_corrected = any(record.transform == "correct_biases" for record in result.reports.get("correct", ()))
    assert judged.done == is_corrected  # of random networks it may not pay


def test_a_model_that_answers_with_integers_is_left_unscaled_with_a_reason():
    nodes = [oh.make_node("Conv", ["x", "w1"], ["h"]), oh.make_node("Conv", ["h", "w2"], ["c"])]
    nodes.append(oh.make_node("ArgMax", ["c"], ["y"], axis=1))
    weights = {"w1": RNG.normal(size=(4, 3, 1, 1)), "w2": RNG.normal(size=(5, 4, 1, 1))}
    model = small(nodes, weights, shape=["n", 3, 6, 6], dtype=onnx.TensorProto.INT64)
    result = ptqjax.quantize(model, [{"x": X[:, :, :6, :6]}])
    assert any("no output holds floating numbers" in record.reason for record in result.reports["equalize"])


@pytest.mark.parametrize("biases", [("b1",), ("b2",), (), ("b1", "b2")])
def test_learned_shifts_keep_the_function_whichever_layer_has_a_bias(biases):
    model = two_convolutions(["n", 3, 6, 6], biases=biases)
    config = ptqjax.QuantizationConfig(granularity="tensor", weights="int4")
    x = {"x": X[:, :, :6, :6] + 3}
    learned, _ = learn_scales(model, [x], config, Learning(num_steps=20, rate=0.05))
    exact = np.asarray(ptqjax.apply(model.graph, model.params, x)["y"])
    after = np.asarray(ptqjax.apply(learned.graph, learned.params, x)["y"])
    np.testing.assert_allclose(after, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_headroom_is_shared_along_with_encodings_and_leaves_known_ranges():
    nodes = [
        oh.make_node("Conv", ["x", "w1"], ["h"]),
        oh.make_node("Transpose", ["h"], ["t"], perm=[0, 2, 3, 1]),
        oh.make_node("Sigmoid", ["t"], ["y"]),
    ]
    model = small(nodes, {"w1": RNG.normal(size=(4, 3, 1, 1))}, shape=["n", 3, 8, 8])
    config = ptqjax.QuantizationConfig(scaling="off", correct="none", headroom=1.5)
    found = ptqjax.quantize(model, [{"x": X}], config).encodings
    plain = ptqjax.quantize(model, [{"x": X}], replace(config, headroom=1.0)).encodings
    assert found["h"].scale == found["t"].scale > plain["h"].scale
    assert found["y"].scale == plain["y"].scale


def test_bounds_that_are_to_be_left_are_left_by_learning_too(model):
    config = ptqjax.QuantizationConfig(granularity="tensor", scaling="learned", bounds="leave", absorb="off")
    kinds = [node.op_type for node in ptqjax.quantize(model, [{"x": X}], config).model.graph.nodes]
    assert kinds.count("Clip") == 2


def test_the_parts_of_the_work_are_entered_in_order_by_their_names(model):
    entered = []

    @contextmanager
    def stage(name):
        entered.append(name)
        yield
        entered.append(f"{name} ends")

    config = ptqjax.QuantizationConfig(scaling="off", correct="none", ranges="min-max")
    ptqjax.quantize(model, [{"x": X}], config, stage=stage)
    names = [name for name in entered if not name.endswith(" ends")]
    assert list(dict.fromkeys(names)) == ["fold", "equalize", "calibrate", "correct"]
    assert entered == [each for name in names for each in (name, f"{name} ends")]  # none in another


@pytest.mark.parametrize("scaling", ["off", "weights", "ranges", "noise"])
@pytest.mark.parametrize(("has_data", "headroom"), [(True, None), (True, 1.1), (False, None)])
def test_public_steps_composed_by_hand_give_the_bits_of_quantize(model, scaling, has_data, headroom):
    """Also where tensors have few values, for which ranges are wider than a headroom that is set."""
    batches = [{"x": X[:8]}, {"x": X[8:]}] if has_data else None
    config = ptqjax.QuantizationConfig(scaling=scaling, granularity="tensor", rounding="nearest", headroom=headroom)
    result = ptqjax.quantize(model, batches, config)
    prepared, _ = ptqjax.prepare(ptqjax.fold_batch_norms(model)[0], config.absorb)
    scaled = ptqjax.scale_as_configured(prepared, batches, config).model
    encodings = ptqjax.calibrate(scaled, batches, config)
    adapted = ptqjax.adapt(scaled, encodings, batches, config)
    assert_same_bits(adapted, result)


def assert_same_bits(adapted, result):
    assert adapted.model.graph == result.model.graph
    assert adapted.encodings.keys() == result.encodings.keys()
    for found, expected in ((adapted.model.params, result.model.params), (adapted.encodings, result.encodings)):
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("scaling", ["off", "weights", "noise"])
def test_equalize_by_itself_scales_as_quantize_without_data(model, scaling):
    config = ptqjax.QuantizationConfig(scaling=scaling, granularity="tensor")
    by_hand, _ = ptqjax.equalize(model, config.absorb, scaling=scaling, steps=steps_of(config))
    scaled = next(stage.model for stage in ptqjax.quantize(model, None, config).stages if stage.name == "equalize")
    assert by_hand.graph == scaled.graph
    for name, value in by_hand.params.items():
        np.testing.assert_array_equal(value, scaled.params[name])
