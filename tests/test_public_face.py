"""What users call beside the pipeline: export for a target, the quantized model applied, values on the way, clamps."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import pytest

import ptqjax
from ptqjax.experiments.metrics import METRICS

RNG = np.random.default_rng(3)
X = RNG.normal(size=(4, 3, 6, 6)).astype(np.float32)
BATCHES = [{"x": X}]


@pytest.fixture(scope="module")
def model():
    """Conv, Relu, Conv, mean over pixels."""
    weights = {"w1": RNG.normal(size=(8, 3, 3, 3)), "b1": RNG.normal(size=8), "w2": RNG.normal(size=(5, 8, 1, 1))}
    nodes = [
        oh.make_node("Conv", ["x", "w1", "b1"], ["a"], pads=[1] * 4),
        oh.make_node("Relu", ["a"], ["r"]),
        oh.make_node("Conv", ["r", "w2"], ["c"]),
        oh.make_node("GlobalAveragePool", ["c"], ["y"]),
    ]
    info = oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 6, 6])
    out = oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 5, 1, 1])
    tensors = [onh.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    graph = oh.make_graph(nodes, "g", [info], [out], tensors)
    return ptqjax.read(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8))


@pytest.fixture(scope="module")
def encodings(model):
    return ptqjax.calibrate(model, BATCHES, ptqjax.QuantizationConfig(ranges="min-max"))


def test_export_obeys_the_target(model, tmp_path):
    target = tmp_path / "floats.toml"
    text = (Path(ptqjax.__file__).parent / "targets" / "tensorrt.toml").read_text()
    target.write_text(text.replace("biases = ", 'exported_weights = "float"\nbiases = ', 1))
    config = ptqjax.QuantizationConfig.for_target(str(target))
    result = ptqjax.quantize(model, BATCHES, dataclasses.replace(config, scaling="off", correct="none"))
    for given, kind in ((str(target), onnx.TensorProto.FLOAT), (None, onnx.TensorProto.INT8)):
        ptqjax.export(result.model, result.encodings, tmp_path, "m", target=given)
        stored = [each for each in onnx.load(tmp_path / "m.onnx").graph.initializer if len(each.dims) == 4]
        assert {each.data_type for each in stored} == {kind}  # floats on their grids, or integers


def test_export_refuses_grids_that_the_target_does_not_take(model, encodings, tmp_path):
    with pytest.raises(ptqjax.ConfigError, match=r"'\w+' has a grid of uint8; target 'tensorrt' takes int8"):
        ptqjax.export(model, encodings, tmp_path / "out", "m", target="tensorrt")
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_zero_point_where_the_target_has_none(model, tmp_path):
    config = ptqjax.QuantizationConfig(activations="int8", activations_symmetric=False, ranges="min-max")
    with pytest.raises(ptqjax.ConfigError, match=r"zero point .*; target 'tensorrt' takes 0"):
        ptqjax.export(model, ptqjax.calibrate(model, BATCHES, config), tmp_path / "out", "m", target="tensorrt")


@pytest.mark.parametrize(
    ("granularity", "target", "taken"),
    [
        ("channel", "generic-per-tensor", "tensor"),
        ("block:3", "generic-per-channel", "channel, tensor"),
        ("lpbq:3", "tensorrt", "channel, tensor, block"),
    ],
)
def test_a_target_takes_weights_of_its_granularity_alone(model, tmp_path, granularity, target, taken):
    config = ptqjax.QuantizationConfig.for_target("tensorrt", granularity="channel", ranges="min-max")
    config = dataclasses.replace(config, target="ort-cpu", granularity=granularity, weights="int4")
    found = ptqjax.calibrate(model, BATCHES, config)
    message = f"granularity {granularity.partition(':')[0]!r}; target {target!r} takes {taken} for weights"
    with pytest.raises(ptqjax.ConfigError, match=message):
        ptqjax.export(model, found, tmp_path / "out", "m", target=target)
    assert not (tmp_path / "out").exists()


class Unread:
    """Batches that must not be gone through."""

    def __iter__(self):
        raise AssertionError


@pytest.mark.parametrize("work", [ptqjax.quantize, ptqjax.calibrate])
def test_a_frozen_grid_that_the_target_does_not_take_is_refused_before_data_are_read(model, encodings, work):
    config = ptqjax.QuantizationConfig.for_target("generic-per-tensor", equalize=False)
    assert encodings["w1"].granularity == "channel"
    with pytest.raises(ptqjax.ConfigError, match="'w1' has a grid of granularity 'channel'; target 'generic-per-ten"):
        work(model, Unread(), config, frozen={"w1": encodings["w1"]})


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_apply_quantized_is_simulate(model, encodings, arithmetic):
    found = ptqjax.apply_quantized(model.graph, model.params, encodings, {"x": X}, arithmetic=arithmetic)
    expected = ptqjax.simulate(model, encodings, arithmetic=arithmetic)(model.params, encodings, {"x": X})
    np.testing.assert_array_equal(found["y"], expected["y"])


def test_apply_quantized_goes_through_jit_and_grad(model, encodings):
    def loss(params):
        return ptqjax.apply_quantized(model.graph, params, encodings, {"x": X})["y"].sum()

    gradient = jax.jit(jax.grad(loss))(dict(model.params))
    assert np.any(np.asarray(gradient["w2"]) != 0)


def test_tensor_values_are_those_of_both_models_in_the_layout_of_onnx(model, encodings, tmp_path):
    values = ptqjax.tensor_values(model, encodings, {"x": X})
    assert values.exact.keys() == values.quantized.keys() == {"x", "a", "r", "c", "y"}
    assert values.exact["r"].shape == (4, 8, 6, 6)
    np.testing.assert_allclose(values.exact["y"], ptqjax.apply(model.graph, model.params, {"x": X})["y"], rtol=1e-5)
    steps = values.quantized["r"] / encodings["r"].scale
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    ptqjax.write_tensor_values(tmp_path / "values.npz", values)
    with np.load(tmp_path / "values.npz") as file:
        np.testing.assert_array_equal(file["quantized/c"], values.quantized["c"])
        np.testing.assert_array_equal(file["float/c"], values.exact["c"])
    with pytest.raises(ptqjax.ConfigError, match=r"npz"):
        ptqjax.write_tensor_values(tmp_path / "values.txt", values)


@pytest.mark.parametrize("ends", [(-0.5, 0.75), (-100.0, 100.0), (0.0, 0.5)])
@pytest.mark.parametrize("name", ["x", "w1"])
def test_a_clamped_grid_reaches_no_further(encodings, name, ends):
    found = ptqjax.clamp_ranges(encodings, {name: ends})[name]
    before = encodings[name]
    low, high = ((np.float64(end) - found.zero_point) * found.scale for end in (found.qmin, found.qmax))
    slack = found.scale  # the zero point is an integer
    is_symmetric = name == "w1"
    reach = max(abs(end) for end in ends)
    assert np.all(low >= (-reach if is_symmetric else ends[0]) - slack)
    assert np.all(high <= (reach if is_symmetric else ends[1]) + slack)
    assert np.all(found.scale <= before.scale)
    if abs(ends[0]) == 100.0:
        np.testing.assert_array_equal(found.scale, before.scale)


@pytest.mark.parametrize(
    ("ranges", "words"), [({"z": (0.0, 1.0)}, "'z' has no encoding"), ({"x": (1.0, 2.0)}, "finite ends")]
)
def test_a_clamp_that_cannot_be_is_refused(encodings, ranges, words):
    with pytest.raises(ptqjax.ConfigError, match=words):
        ptqjax.clamp_ranges(encodings, ranges)


def test_sensitivity_tells_the_change_of_a_metric_of_ones_own(model, encodings):
    metric = METRICS["sqnr_db"]()
    worst = ptqjax.Metric(
        name="worst",
        init=lambda: 0.0,
        update=lambda state, seen: max(state, float(np.max(abs(seen.found["y"] - seen.wanted["y"])))),
        finish=lambda state: state,
        higher_is_better=False,
    )
    found = ptqjax.sensitivity(model, BATCHES, encodings, method="on-only", metric=worst)
    exact = ptqjax.apply(model.graph, model.params, {"x": X})["y"]
    for each in found:
        alone = {name: encodings[name].replace(enabled=np.asarray(name in each.tensors)) for name in encodings}
        rounded = ptqjax.apply_quantized(model.graph, model.params, alone, {"x": X})["y"]
        assert each.change == pytest.approx(float(np.max(abs(np.asarray(exact) - rounded))), rel=1e-3, abs=1e-6)
    with pytest.raises(ptqjax.ConfigError, match="on-only"):
        ptqjax.sensitivity(model, BATCHES, encodings, metric=metric)
