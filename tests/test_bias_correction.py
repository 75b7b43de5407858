"""Bias correction: afterwards no layer's output is off on average, and nothing else has changed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import pytest

from ptqjax import onnx_io
from ptqjax.config import QuantizationConfig
from ptqjax.errors import ConfigError, DataError
from ptqjax.fit import bias_correction, correct_biases, correct_each, quantized_pass
from ptqjax.ir import Model, Statistics
from ptqjax.lowering import interpret
from ptqjax.ranges.calibrate import calibrate
from ptqjax.simulation import fake_quantization

PER_TENSOR = QuantizationConfig(granularity="tensor", ranges="min-max", weights="int4")


def read(nodes, tensors, *, shape, outputs=("y",)):
    def info(name, size):
        return oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size)

    initializers = [onh.from_array(value, name) for name, value in tensors.items()]
    outs = [info(name, None) for name in outputs]
    graph = oh.make_graph(nodes, "g", [info("x", ["n", *shape])], outs, initializers)
    return onnx_io.read(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8))


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def convolutions():
    """Conv without bias, Relu, grouped Conv with bias, Relu, pool, Gemm: layers with channels on axis 1."""
    nodes = [
        oh.make_node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
        oh.make_node("Relu", ["a"], ["ra"]),
        oh.make_node("Conv", ["ra", "w2", "b2"], ["b"], group=2, strides=[2, 2]),
        oh.make_node("Relu", ["b"], ["rb"]),
        oh.make_node("GlobalAveragePool", ["rb"], ["p"]),
        oh.make_node("Flatten", ["p"], ["f"]),
        oh.make_node("Gemm", ["f", "w3", "b3"], ["y"], transB=1),
    ]
    tensors = {"w1": normal(6, 3, 3, 3, seed=0), "w2": normal(4, 3, 3, 3, seed=1), "b2": normal(4, seed=2)}
    tensors |= {"w3": normal(5, 4, seed=3), "b3": normal(5, seed=4)}
    return read(nodes, tensors, shape=(3, 8, 8)), ("a", "b", "y")


def matmuls():
    """Two MatMul + Add on rank 3, whose channels are last."""
    nodes = [
        oh.make_node("MatMul", ["x", "w1"], ["m1"]),
        oh.make_node("Add", ["b1", "m1"], ["a"]),
        oh.make_node("Relu", ["a"], ["r"]),
        oh.make_node("MatMul", ["r", "w2"], ["m2"]),
        oh.make_node("Add", ["m2", "b2"], ["y"]),
    ]
    tensors = {"w1": normal(5, 7, seed=0), "b1": normal(7, seed=1), "w2": normal(7, 3, seed=2), "b2": normal(3, seed=3)}
    return read(nodes, tensors, shape=(4, 5)), ("a", "y")


def outputs_of(graph, params, batch, names, encodings):
    """The tensors `names` in ONNX's layout, before they are quantized; biases are not rounded."""
    quantize = fake_quantization(Model(graph=graph, params=params), encodings)

    def intercept(name, value, channel_axis):
        seen = jnp.moveaxis(value, channel_axis, 1) if name in names else None
        return (quantize(name, value, channel_axis)[0] if name in encodings else value), seen

    return interpret(graph, params, batch, intercept=intercept)[1]


@pytest.mark.parametrize("network", [convolutions, matmuls])
def test_no_layer_is_off_on_average_after_correction(network):
    model, layers = network()
    x = np.abs(normal(16, *model.graph.inputs[0].shape[1:], seed=9))
    encodings = calibrate(model, [{"x": x}], PER_TENSOR)
    corrected, report = correct_biases(model, encodings, [{"x": x}])
    channel = -1 if network is matmuls else 1

    def largest_mean_error(candidate):
        exact = outputs_of(model.graph, model.params, {"x": x}, layers, {})
        rounded = outputs_of(candidate.graph, candidate.params, {"x": x}, layers, encodings)
        errors = {name: np.moveaxis(np.asarray(rounded[name] - exact[name]), channel, 0) for name in layers}
        means = {name: np.abs(error.reshape(len(error), -1).mean(axis=1)).max() for name, error in errors.items()}
        return max(mean / np.abs(exact[name]).max() for name, mean in means.items())

    assert largest_mean_error(model) > 1e-2
    assert largest_mean_error(corrected) < 1e-5  # float32 sums; activations that flip to the next code
    assert [record.where[0] for record in report if record.done] == list(layers)


def test_the_shift_is_the_mean_over_samples_however_they_are_batched():
    model, layers = convolutions()
    x = np.abs(normal(12, 3, 8, 8, seed=9))
    encodings = calibrate(model, [{"x": x}], PER_TENSOR)
    whole, _ = correct_biases(model, encodings, [{"x": x}])
    parts, _ = correct_biases(model, encodings, [{"x": x[:8]}, {"x": x[8:]}])
    first = whole.graph.nodes[0].inputs[2]
    # the first layer's error does not depend on other corrections: equal to rounding of float32 means of values near 10
    np.testing.assert_allclose(parts.params[first], whole.params[first], atol=1e-5)
    assert len(layers) == 3


def test_a_missing_bias_is_made_and_the_callers_model_stays_as_it_was():
    model, _ = convolutions()
    before = {name: np.array(value) for name, value in model.params.items()}
    x = np.abs(normal(4, 3, 8, 8, seed=9))
    encodings = calibrate(model, [{"x": x}], PER_TENSOR)
    corrected, _ = correct_biases(model, encodings, [{"x": x}])
    assert len(corrected.graph.nodes[0].inputs) == 3
    assert len(model.graph.nodes[0].inputs) == 2
    assert all(np.array_equal(model.params[name], value) for name, value in before.items())
    assert set(before) == set(model.params)


def test_quantization_that_is_switched_off_corrects_nothing():
    model, _ = convolutions()
    x = np.abs(normal(4, 3, 8, 8, seed=9))
    encodings = calibrate(model, [{"x": x}], PER_TENSOR)
    off = {name: encoding.replace(enabled=np.asarray(False)) for name, encoding in encodings.items()}
    corrected, _ = correct_biases(model, off, [{"x": x}])
    for name in ("b2", "b3"):
        np.testing.assert_allclose(corrected.params[name], model.params[name], atol=1e-6)


def test_a_shared_bias_and_a_matmul_without_bias_are_left_alone_with_a_reason():
    nodes = [
        oh.make_node("Conv", ["x", "w1", "b"], ["a"]),
        oh.make_node("Conv", ["a", "w2", "b"], ["c"]),
        oh.make_node("Flatten", ["c"], ["f"]),
        oh.make_node("MatMul", ["f", "w3"], ["y"]),
    ]
    tensors = {"w1": normal(3, 3, 1, 1, seed=0), "w2": normal(3, 3, 1, 1, seed=1), "b": normal(3, seed=2)}
    model = read(nodes, tensors | {"w3": normal(12, 2, seed=3)}, shape=(3, 2, 2))
    batch = {"x": normal(4, 3, 2, 2, seed=9)}
    encodings = calibrate(model, [batch], PER_TENSOR)
    corrected, report = correct_biases(model, encodings, [batch])
    assert corrected.params.keys() == model.params.keys()
    assert not any(record.done for record in report)
    assert {record.where[0]: record.reason for record in report} == {
        "a": "its bias 'b' is shared with another node",
        "c": "its bias 'b' is shared with another node",
        "y": "a MatMul without an Add of one number per channel behind it has no bias",
    }


def test_one_number_for_all_channels_becomes_one_per_channel():
    nodes = [oh.make_node("Gemm", ["x", "w", "b"], ["y"])]
    model = read(nodes, {"w": normal(5, 3, seed=0), "b": np.ones(1, np.float32)}, shape=(5,))
    batch = {"x": normal(4, 5, seed=9)}
    corrected, _ = correct_biases(model, calibrate(model, [batch], PER_TENSOR), [batch])
    assert corrected.params["b"].shape == (3,)


def test_no_batches_is_an_error():
    model, _ = convolutions()
    encodings = calibrate(model, [{"x": np.abs(normal(4, 3, 8, 8, seed=9))}], PER_TENSOR)
    with pytest.raises(DataError, match="batches is empty; expected at least one"):
        correct_biases(model, encodings, [])
    with pytest.raises(DataError, match="batches is None"):
        correct_biases(model, encodings, None, method="empirical")


def test_without_batch_norms_the_analytic_correction_names_the_layers_and_the_way_out():
    model, _ = convolutions()
    encodings = calibrate(model, [{"x": np.abs(normal(4, 3, 8, 8, seed=9))}], PER_TENSOR)
    with pytest.raises(DataError, match=r"layers that produce 'a', 'b', 'y' is unknown.*empirical"):
        correct_biases(model, encodings, None)


def test_an_unknown_method_is_an_error():
    model, _ = convolutions()
    with pytest.raises(ConfigError, match="method='exact' is unknown; expected one of empirical, analytic"):
        correct_biases(model, {}, None, method="exact")


def linear_kinds():
    """One layer of each kind that reads `x`, of four channels."""
    random = np.random.default_rng(0)

    def weight(*shape):
        return random.normal(size=shape).astype(np.float32)

    return {
        "Conv": ({}, weight(6, 4, 3, 3), True),
        "Conv grouped": ({"group": 2}, weight(6, 2, 3, 3), True),
        "Conv depthwise": ({"group": 4}, weight(4, 1, 3, 3), True),
        "ConvTranspose": ({}, weight(4, 5, 1, 1), True),
        "ConvTranspose grouped": ({"group": 2}, weight(4, 3, 1, 1), True),
        "Gemm": ({"alpha": 0.5}, weight(4, 6), False),
        "Gemm transposed": ({"transB": 1}, weight(6, 4), False),
        "MatMul": ({}, weight(4, 6), False),
    }


@pytest.mark.parametrize("kind", linear_kinds())
def test_the_analytic_correction_takes_out_the_mean_error_of_inputs_that_are_as_stated(kind):
    """Constant inputs with the stated mean: the law holds for them exactly, whatever the layer."""
    attributes, weight, is_image = linear_kinds()[kind]
    operator = kind.partition(" ")[0]
    nodes = [oh.make_node(operator, ["x", "w"], ["m" if operator == "MatMul" else "y"], **attributes)]
    tensors = {"w": weight}
    if operator == "MatMul":
        nodes.append(oh.make_node("Add", ["m", "b"], ["y"]))
        tensors["b"] = normal(6, seed=1)
    model = read(nodes, tensors, shape=(4, 5, 5) if is_image else (4,))
    mean = np.asarray([0.5, -1.0, 2.0, 4.0])
    model = model.replace(statistics={"x": Statistics(mean=mean, std=np.ones(4))})
    x = np.broadcast_to(mean.reshape(1, 4, 1, 1), (2, 4, 5, 5)) if is_image else np.tile(mean, (2, 1))
    batch = {"x": np.ascontiguousarray(x, np.float32)}
    encodings = calibrate(model, [batch], PER_TENSOR)
    corrected, (record,) = correct_biases(model, encodings, None)
    weights_alone = {"w": encodings["w"]}
    exact = outputs_of(model.graph, model.params, batch, ["y"], {})["y"]
    before = outputs_of(model.graph, model.params, batch, ["y"], weights_alone)["y"]
    after = outputs_of(corrected.graph, corrected.params, batch, ["y"], weights_alone)["y"]
    assert np.abs(before - exact).max() > 1e-2
    np.testing.assert_allclose(after, exact, atol=2e-5)  # float32 sums of values near 10
    np.testing.assert_allclose(record.before["mean error, largest channel"], np.abs(before - exact).max(), rtol=1e-3)


def test_the_analytic_correction_agrees_with_the_empirical_one_on_data_that_are_as_stated():
    """Behind a Relu and a residual sum, with batch norms that tell the truth about their outputs."""
    nodes = [
        oh.make_node("Conv", ["x", "w1"], ["a"]),
        oh.make_node("Relu", ["a"], ["r"]),
        oh.make_node("Conv", ["r", "w2"], ["b"]),
        oh.make_node("Add", ["r", "b"], ["s"]),
        oh.make_node("Conv", ["s", "w3"], ["y"]),
    ]
    tensors = {name: normal(8, 8, 1, 1, seed=seed) for seed, name in enumerate(("w1", "w2", "w3"))}
    model = read(nodes, tensors, shape=(8, 6, 6))
    batch = {"x": normal(400, 8, 6, 6, seed=9) + np.float32(0.5)}
    values = outputs_of(model.graph, model.params, batch, ["a", "b"], {})
    told = {name: np.moveaxis(np.asarray(value, np.float64), 1, 0).reshape(8, -1) for name, value in values.items()}
    model = model.replace(
        statistics={name: Statistics(mean=value.mean(1), std=value.std(1)) for name, value in told.items()}
        | {"x": Statistics(mean=np.full(8, 0.5), std=np.ones(8))}
    )
    encodings = calibrate(model, [batch], QuantizationConfig(granularity="tensor", activations="int16"))
    empirical, _ = correct_biases(model, encodings, [batch])
    analytic, _ = correct_biases(model, encodings, [batch], method="analytic")
    for first, second in zip(empirical.graph.nodes, analytic.graph.nodes, strict=True):
        if first.op_type == "Conv":
            shift, expected = analytic.params[second.inputs[2]], empirical.params[first.inputs[2]]
            # Of the largest shift. The first layer's agree to 1 %; behind it, statistics are those of the float model,
            # while its rounded weights have changed the variance of what the Relu cuts: 15 to 21 % (sqnr, min-max).
            limit = 0.02 if first.inputs[0] == "x" else 0.25
            np.testing.assert_allclose(shift, expected, atol=limit * np.abs(expected).max())


def test_layers_of_which_nothing_is_known_are_left_alone_among_others():
    nodes = [
        oh.make_node("Conv", ["x", "w1"], ["a"]),
        oh.make_node("Sigmoid", ["a"], ["s"]),
        oh.make_node("Conv", ["s", "w2"], ["y"]),
    ]
    model = read(nodes, {"w1": normal(3, 3, 1, 1, seed=0), "w2": normal(3, 3, 1, 1, seed=1)}, shape=(3, 2, 2))
    encodings = calibrate(model, [{"x": normal(4, 3, 2, 2, seed=9)}], PER_TENSOR)
    model = model.replace(statistics={"x": Statistics(mean=np.ones(3), std=np.ones(3))})
    _, report = correct_biases(model, encodings, None)
    assert [(record.where[0], record.done) for record in report] == [("a", True), ("y", False)]
    assert "does not follow from batch norms" in report[1].reason


X = np.abs(normal(4, 3, 8, 8, seed=9))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({"x": X}, "batches is a dict; expected an iterable of mappings"),
        ([{}], "batch 0 lacks the input 'x'"),
        ([{"xs": X}], "batch 0 has the input 'xs', which the model has not"),
        ([{"x": X[:, :2]}], "batch 0: input 'x' has the shape 4x2x8x8; expected nx3x8x8"),
        ([{"x": X.astype(np.float64)}], "batch 0: input 'x' has the type float64; expected float32"),
        ([{"x": X[:0]}], "has no elements"),
        ([{"x": X}, {"x": np.where(X.max() == X, np.nan, X)}], "batch 1: input 'x' holds nan at"),
        ([{"x": X}, {"x": X * np.float32(1e38)}], "tensor 'a' is NaN or infinite in batch 1"),
    ],
)
def test_bad_batches_are_an_error_that_names_the_place(batches, message):
    model, _ = convolutions()
    encodings = calibrate(model, [{"x": X}], PER_TENSOR)
    with np.errstate(all="ignore"), pytest.raises(DataError, match=message):
        correct_biases(model, encodings, batches)


def test_an_encoding_of_another_model_is_an_error():
    model, _ = convolutions()
    encodings = calibrate(model, [{"x": X}], PER_TENSOR)
    with pytest.raises(ConfigError, match="there is an encoding for 'w9', but the model has no such tensor"):
        correct_biases(model, encodings | {"w9": encodings["w1"]}, [{"x": X}])


def test_a_bias_along_another_axis_is_left_alone():
    nodes = [oh.make_node("MatMul", ["x", "w"], ["m"]), oh.make_node("Add", ["m", "b"], ["y"])]
    model = read(nodes, {"w": normal(5, 4, seed=0), "b": normal(4, 1, seed=1)}, shape=(4, 5))
    batch = {"x": normal(3, 4, 5, seed=9)}
    corrected, (record,) = correct_biases(model, calibrate(model, [batch], PER_TENSOR), [batch])
    np.testing.assert_array_equal(corrected.params["b"], model.params["b"])
    assert not record.done


def test_a_product_of_two_activations_is_no_layer():
    nodes = [oh.make_node("Relu", ["x"], ["r"]), oh.make_node("Conv", ["x", "r"], ["y"])]
    model = read(nodes, {}, shape=(3, 2, 2))
    batch = {"x": normal(3, 3, 2, 2, seed=9)}
    corrected, report = correct_biases(model, calibrate(model, [batch], PER_TENSOR), [batch])
    assert (corrected.graph, report) == (model.graph, ())


def test_one_program_serves_all_batches_of_a_size(monkeypatch):
    model, _ = convolutions()
    x = np.abs(normal(12, 3, 8, 8, seed=9))
    encodings = calibrate(model, [{"x": x}], PER_TENSOR)
    traced = []

    def counting(*args, **kwargs):
        traced.append(args)
        return interpret(*args, **kwargs)

    for module in (bias_correction, quantized_pass):
        monkeypatch.setattr(module, "interpret", counting)
    correct_biases(model, encodings, [{"x": x[:6]}, {"x": x[6:]}])
    assert len(traced) == 2  # the float and the quantized program, each once


def test_several_variants_are_corrected_as_each_is_alone(monkeypatch):
    model, _ = convolutions()
    batches = [{"x": normal(6, 3, 8, 8, seed=9)}, {"x": normal(6, 3, 8, 8, seed=10)}]
    configs = [PER_TENSOR, replace(PER_TENSOR, weights="int3"), replace(PER_TENSOR, exclude=("w2", "ra"))]
    variants = [calibrate(model, batches, config) for config in configs]
    alone = [correct_biases(model, encodings, batches) for encodings in variants]
    traced = []

    def counting(*args, **kwargs):
        traced.append(args)
        return interpret(*args, **kwargs)

    monkeypatch.setattr(bias_correction, "interpret", counting)
    for (found, report), (expected, expected_report) in zip(correct_each(model, variants, batches), alone, strict=True):
        assert found.graph == expected.graph
        jax.tree.map(np.testing.assert_array_equal, dict(found.params), dict(expected.params))
        assert report == expected_report
    assert not traced  # the float program is that of one, and the quantized ones are those of two structures
