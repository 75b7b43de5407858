"""Moments of normal variables behind activations: against numeric integration in float64, and their laws."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy import integrate

from ptqjax import onnx_io
from ptqjax.ir import Statistics
from ptqjax.kernels.grouped import respond_to_constant
from ptqjax.kernels.moments import clipped_normal, cumulative_normal, leaky_normal, passing_probability
from ptqjax.lowering import apply
from ptqjax.transforms import equalize, fold_batch_norms
from ptqjax.transforms.input_moments import input_moments
from ptqjax.transforms.linear import linear_layers, weight_view
from ptqjax.transforms.moments import channel_moments, channel_ranges, layer_inputs
from tests.models import Chain, build, mobile_block, node

INF = np.inf


def quadrature(function, mean, std, kinks):
    """Mean and variance of function(x), x normal, by adaptive integration between the kinks."""

    def density(x):
        return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))

    edges = sorted({mean - 12 * std, mean, mean + 12 * std, *(k for k in kinks if abs(k - mean) < 12 * std)})
    pieces = list(pairwise(edges))

    def expectation(g):
        return sum(integrate.quad(lambda x: g(x) * density(x), *piece, epsabs=0, epsrel=1e-12)[0] for piece in pieces)

    first = expectation(function)
    return first, expectation(lambda x: (function(x) - first) ** 2)


LIMITS = [(-INF, INF), (0.0, INF), (0.0, 6.0), (-1.0, 1.0), (-INF, 2.0), (0.5, 0.75), (2.0, 2.0)]
NORMALS = [(0.0, 1.0), (-1.0, 0.7), (3.0, 2.5), (1.0, 0.05), (-4.0, 1.0), (9.0, 0.8)]


@pytest.mark.parametrize(("low", "high"), LIMITS)
@pytest.mark.parametrize(("mean", "std"), NORMALS)
def test_clipped_moments_are_those_of_numeric_integration(mean, std, low, high):
    expected = quadrature(lambda x: np.clip(x, low, high), mean, std, (low, high))
    # float64 sums of a handful of terms of order std
    np.testing.assert_allclose(clipped_normal(mean, std, low, high), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.25, 1.0, 1.7])
@pytest.mark.parametrize(("low", "high"), [(-INF, INF), (-0.2, 1.5), (0.3, 6.0), (-2.0, -0.1)])
@pytest.mark.parametrize(("mean", "std"), NORMALS)
def test_leaky_moments_are_those_of_numeric_integration(mean, std, low, high, slope):
    kinks = [0.0, low, high, *(limit / slope for limit in (low, high) if slope)]
    expected = quadrature(lambda x: np.clip(x if x > 0 else slope * x, low, high), mean, std, kinks)
    np.testing.assert_allclose(leaky_normal(mean, std, slope, low, high), expected, rtol=1e-9, atol=1e-13)


def test_a_negative_slope_is_right_without_limits():
    expected = quadrature(lambda x: x if x > 0 else -0.5 * x, 0.3, 1.2, (0.0,))
    np.testing.assert_allclose(leaky_normal(0.3, 1.2, -0.5), expected, rtol=1e-9)


def test_without_limits_nothing_changes():
    mean, variance = clipped_normal(np.asarray([3.0, -1.0]), np.asarray([2.0, 1e-3]), -INF, INF)
    np.testing.assert_array_equal(mean, [3.0, -1.0])
    np.testing.assert_allclose(variance, [4.0, 1e-6], rtol=1e-14)


def test_the_sign_of_the_standard_deviation_does_not_matter():
    # DFQ's formula taken with gamma = -1 gives -0.083 for this Relu, the mean is 1.083
    signed = clipped_normal(1.0, -1.0, 0.0, INF)
    assert signed == clipped_normal(1.0, 1.0, 0.0, INF)
    np.testing.assert_allclose(signed[0], 1.0833154705876864, rtol=1e-12)


@pytest.mark.parametrize(("low", "high"), LIMITS)
def test_a_constant_is_clipped_exactly(low, high):
    means = np.asarray([-7.3, 0.0, 0.1, 2.0, 8.1])
    mean, variance = clipped_normal(means, np.zeros(5), low, high)
    np.testing.assert_array_equal(mean, np.clip(means, low, high))
    np.testing.assert_array_equal(variance, np.zeros(5))


def test_small_deviations_keep_their_digits_far_from_zero():
    mean, variance = clipped_normal(1e4, 1e-4, 0.0, INF)
    np.testing.assert_allclose((mean, variance), (1e4, 1e-8), rtol=1e-12)


def test_limits_may_differ_by_channel():
    high = np.asarray([1.0, 6.0, INF])
    mean, variance = clipped_normal(np.full(3, 0.5), np.ones(3), 0.0, high)
    for channel in range(3):
        expected = clipped_normal(0.5, 1.0, 0.0, high[channel])
        np.testing.assert_array_equal((mean[channel], variance[channel]), expected)


@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize(("low", "high"), LIMITS)
@pytest.mark.parametrize("mean", [-50.0, 0.0, 1.0, 50.0])
def test_gradients_are_finite(mean, std, low, high):
    for function in (clipped_normal, lambda m, s, a, b: leaky_normal(m, s, 0.1, a, b)):
        for part in (0, 1):
            found = jax.grad(lambda m, s, function=function, part=part: function(m, s, low, high)[part], (0, 1))
            assert np.isfinite(found(jnp.float32(mean), jnp.float32(std))).all()


def test_gradients_are_those_of_finite_differences():
    step = 1e-5

    def numeric(function, x):
        return (function(x + step) - function(x - step)) / (2 * step)

    for part in (0, 1):
        by_mean = jax.grad(lambda m, part=part: clipped_normal(m, 0.7, 0.0, 1.0)[part])(jnp.float32(0.4))
        by_std = jax.grad(lambda s, part=part: clipped_normal(0.4, s, 0.0, 1.0)[part])(jnp.float32(0.7))
        expected = numeric(lambda m, part=part: clipped_normal(m, 0.7, 0.0, 1.0)[part], 0.4)
        np.testing.assert_allclose(by_mean, expected, rtol=1e-4)  # float32
        expected = numeric(lambda s, part=part: clipped_normal(0.4, s, 0.0, 1.0)[part], 0.7)
        np.testing.assert_allclose(by_std, expected, rtol=1e-4)


def test_vmap_and_jit_give_what_numpy_gives():
    means, stds = np.linspace(-3, 8, 12), np.linspace(0, 2, 12)
    expected = clipped_normal(means, stds, 0.0, 6.0)
    traced = jax.jit(jax.vmap(lambda m, s: clipped_normal(m, s, 0.0, 6.0)))(jnp.asarray(means), jnp.asarray(stds))
    np.testing.assert_allclose(traced[0], expected[0], atol=2e-6)  # float32
    np.testing.assert_allclose(traced[1], expected[1], atol=4e-6)


@pytest.mark.parametrize(("low", "high"), LIMITS)
@pytest.mark.parametrize(("mean", "std"), NORMALS)
def test_what_passes_is_the_derivative_of_the_mean(mean, std, low, high):
    step = 1e-5 * std
    slope = (clipped_normal(mean + step, std, low, high)[0] - clipped_normal(mean - step, std, low, high)[0]) / step / 2
    np.testing.assert_allclose(passing_probability(mean, std, low, high), slope, atol=1e-7)  # digits lost to the step


def test_the_cumulative_probability_is_monotone_and_steps_at_a_constant():
    values = np.asarray([-INF, -1.0, 0.0, 1.0, INF])
    np.testing.assert_allclose(cumulative_normal(values, 0.0, 1.0), [0, 0.15865525, 0.5, 0.84134475, 1], atol=1e-8)
    np.testing.assert_array_equal(cumulative_normal(values, 0.0, 0.0), [0, 0, 1, 1, 1])


def with_input(chain, seed=0):
    """The chain's model, whose input is normal; statistics are the only thing that it is told."""
    model = chain.build()
    random = np.random.default_rng(seed)
    channels = model.graph.inputs[0].shape[1]
    known = Statistics(mean=random.normal(size=channels), std=random.uniform(0.2, 1.5, size=channels))
    return model.replace(statistics={"x": known})


def sampled(model, num_samples=4000, seed=1):
    """Mean and standard deviation of the last tensor, and their standard errors, on samples of the stated input."""
    known, shape = model.statistics["x"], model.graph.inputs[0].shape
    shape = (num_samples, *shape[1:])
    axes = (1, -1, *(1,) * (len(shape) - 2))
    x = np.random.default_rng(seed).normal(size=shape) * known.std.reshape(axes) + known.mean.reshape(axes)
    (output,) = apply(model.graph, model.params, {"x": x}).values()
    values = np.moveaxis(np.asarray(output), 1, 0).reshape(output.shape[1], -1)
    return values.mean(1), values.std(1), values.std(1) / np.sqrt(num_samples)


def chain(**settings):
    return Chain(4, size=3, **settings)


EXACT = {
    "relu": chain().add("Relu"),
    "relu6": chain().clip(),
    "two clips": chain().add("Relu").clip(0.2, 0.9),
    "leaky": chain().add("LeakyRelu", alpha=0.2),
    "leaky and bounded": chain().add("LeakyRelu", alpha=0.2).clip(-0.1, 1.0),
    "prelu of either sign": chain().prelu(),
    "clip, then leaky": chain().clip(-0.5, 0.7).add("LeakyRelu", alpha=0.2),
    "neg": chain().clip().add("Neg"),
    "leaky, then neg": chain().add("LeakyRelu", alpha=0.2).add("Neg"),
    "convolution": chain().conv(5, bias=True),
    "grouped": chain().conv(6, group=2, bias=True),
    "depthwise": chain().depthwise(bias=True),
    "relu, convolution": chain().add("Relu").conv(5, kernel=1, bias=True),
    "matrix": Chain(4, rank=0).gemm(5, alpha=0.5, beta=2.0),
    "matrix, transposed": Chain(4, rank=0).gemm(5, trans_b=0),
    "product and sum": Chain(4, rank=0).matmul(3, bias=True),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_follows_is_what_samples_give(name):
    model = with_input(EXACT[name])
    mean, std, error = sampled(model)
    found = channel_moments(model)[model.graph.outputs[0].name]
    np.testing.assert_array_less(np.abs(found.mean - mean), 5 * error + 1e-12)
    np.testing.assert_allclose(found.std, std, rtol=0.06)  # 4000 samples and more: 1.1 % standard error


def network(nodes, params, outputs, *, shape=("N", 4, 6, 6)):
    model = build(nodes, params, input_shape=shape, outputs=outputs, dtype=np.float64)
    mean, std = np.asarray([0.5, -1.0, 2.0, 0.0]), np.asarray([1.0, 0.5, 2.0, 0.0])
    return model.replace(statistics={"x": Statistics(mean=mean, std=std)})


def test_a_flatten_repeats_each_channel_for_its_reader():
    weight = np.random.default_rng(0).normal(size=(3, 4 * 36))
    nodes = [node("Relu", ["x"], "r"), node("Flatten", ["r"], "f", axis=1), node("Gemm", ["f", "w"], "y", transB=1)]
    found = channel_moments(network(nodes, {"w": weight}, ["y"]))
    expected = weight.reshape(3, 4, 36).sum(2) @ found["r"].mean
    np.testing.assert_allclose(found["y"].mean, expected, rtol=1e-12)
    np.testing.assert_allclose(found["y"].std ** 2, (weight**2).reshape(3, 4, 36).sum(2) @ found["r"].std ** 2)


def test_means_and_variances_add_and_a_tensor_does_not_vary_on_its_own_from_itself():
    nodes = [
        node("Relu", ["x"], "r"),
        node("Add", ["x", "r"], "sum"),
        node("Sub", ["x", "r"], "difference"),
        node("Add", ["x", "x"], "double"),
    ]
    found = channel_moments(network(nodes, {}, ["sum", "difference", "double"]))
    x, r = found["x"], found["r"]
    np.testing.assert_allclose(found["sum"].mean, x.mean + r.mean)
    np.testing.assert_allclose(found["difference"].mean, x.mean - r.mean)
    np.testing.assert_allclose(found["sum"].std ** 2, x.std**2 + r.std**2)
    np.testing.assert_allclose(found["double"].std, 2 * x.std)


def test_channels_are_cut_and_joined_as_their_tensors_are():
    model = read_shortcut()
    found = channel_moments(model)
    x = found["x"]
    np.testing.assert_array_equal(found["first"].mean, x.mean[:1])
    np.testing.assert_array_equal(found["rest"].std, x.std[1:])
    np.testing.assert_array_equal(found["joined"].mean, np.concatenate([x.mean[1:], x.mean[:1]]))
    np.testing.assert_array_equal(found["sliced"].mean, x.mean[1:3])
    np.testing.assert_array_equal(found["padded"].mean, [0, 0, *x.mean, 0])
    np.testing.assert_array_equal(found["padded"].std, [0, 0, *x.std, 0])
    np.testing.assert_allclose(found["scaled"].mean, x.mean * [1, -2, 3, 0])
    np.testing.assert_allclose(found["scaled"].std, x.std * [1, 2, 3, 0])


def read_shortcut():
    """Split, Concat, Slice, Pad and a product, through a file, where their settings are constants."""
    nodes = [
        helper.make_node("Split", ["x", "sizes"], ["first", "rest"], axis=1),
        helper.make_node("Concat", ["rest", "first"], ["joined"], axis=1),
        helper.make_node("Slice", ["x", "starts", "ends", "axes"], ["sliced"]),
        helper.make_node("Pad", ["x", "pads"], ["padded"]),
        helper.make_node("Mul", ["x", "factors"], ["scaled"]),
    ]
    integers = {"sizes": [1, 3], "starts": [1], "ends": [3], "axes": [1], "pads": [0, 2, 0, 0, 0, 1, 0, 0]}
    tensors = [numpy_helper.from_array(np.asarray(value, np.int64), name) for name, value in integers.items()]
    tensors += [numpy_helper.from_array(np.asarray([1, -2, 3, 0], np.float32).reshape(4, 1, 1), "factors")]
    names = ["first", "rest", "joined", "sliced", "padded", "scaled"]
    info = helper.make_tensor_value_info
    outputs = [info(name, TensorProto.FLOAT, None) for name in names]
    graph = helper.make_graph(nodes, "g", [info("x", TensorProto.FLOAT, ["N", 4, 6, 6])], outputs, tensors)
    model = onnx_io.read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    mean, std = np.asarray([0.5, -1.0, 2.0, 0.0]), np.asarray([1.0, 0.5, 2.0, 0.0])
    return model.replace(statistics={"x": Statistics(mean=mean, std=std)})


def test_a_batch_norm_speaks_for_its_output_folded_or_not():
    model = Chain(3).conv(6).norm().clip().depthwise().norm().build()
    folded, _ = fold_batch_norms(model)
    found = channel_moments(folded)
    for name, known in folded.statistics.items():
        np.testing.assert_array_equal(found[name].mean, known.mean)
        np.testing.assert_array_equal(found[name].std, known.std)


def test_nothing_is_known_without_statistics_or_behind_what_is_not_followed():
    assert channel_moments(Chain(3).conv(6).clip().build()) == {}
    model = network([node("Sigmoid", ["x"], "s"), node("Relu", ["s"], "y")], {}, ["y"])
    assert channel_moments(model).keys() == {"x"}


def test_scaled_channels_have_scaled_moments():
    """An equalized network is as well known as it was: what its layers read differs by the scales alone."""
    folded, _ = fold_batch_norms(mobile_block())
    scaled, _ = equalize(folded, absorb="off", limit=None)
    before, after = layer_inputs(folded), layer_inputs(scaled)
    assert before.keys() == after.keys()
    for name, known in before.items():
        responses = [
            respond_to_constant(weight_view(model, linear_layers(model)[name]), found.moments.mean)
            for model, found in ((folded, known), (scaled, after[name]))
        ]
        ratio = responses[1] / responses[0]
        np.testing.assert_allclose(ratio, np.abs(ratio))
    last = list(before)[-1]
    np.testing.assert_allclose(responses[1], responses[0], rtol=1e-9, err_msg=last)


@pytest.mark.parametrize("shared", [True, False], ids=["grey", "colours"])
@pytest.mark.parametrize("flat", [True, False], ids=["constant", "white"])
def test_the_inputs_moments_are_found_from_what_a_layer_made_of_it(shared, flat):
    random = np.random.default_rng(3)
    weight, bias = random.normal(size=(24, 3, 3, 3)), random.normal(size=24)
    mean, std = np.asarray([0.4, -0.2, 0.1]), 0.7
    taps = weight.reshape(24, 3, 9)
    taps = taps.sum(2, keepdims=True) if flat else taps
    taps = taps.sum(1, keepdims=True) if shared else taps
    made = Statistics(mean=weight.sum((2, 3)) @ mean + bias, std=std * np.sqrt((taps**2).reshape(24, -1).sum(1)))
    model = build(
        [node("Conv", ["x", "w", "b"], "y")],
        {"w": weight, "b": bias},
        input_shape=("N", 3, 8, 8),
        outputs=["y"],
        dtype=np.float64,
    ).replace(statistics={"y": made})
    found = input_moments(model)["x"]
    np.testing.assert_allclose(found.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(found.std, std, rtol=1e-6)


def test_ranges_hold_what_they_should_and_stay_within_what_is_provable():
    model = with_input(chain().clip())
    known, (low, high) = model.statistics["x"], channel_ranges(model, num_std=4.0)["t0"]
    np.testing.assert_allclose(low, np.clip(known.mean - 4 * known.std, 0, 6))
    np.testing.assert_allclose(high, np.clip(known.mean + 4 * known.std, 0, 6))
    averaged = with_input(chain().conv(5).add("Relu").add("GlobalAveragePool"))
    assert (channel_ranges(averaged)["t2"][0] >= 0).all()  # the mean of what is never negative


@pytest.mark.parametrize("damage", ["a weight is nan", "nothing varies"])
def test_an_input_that_cannot_be_explained_stays_unknown(damage):
    model, _ = fold_batch_norms(Chain(3).conv(6).norm().build())
    name, known = next(iter(model.statistics.items()))
    weight = next(name for name in model.params if name.startswith("w"))
    if damage == "nothing varies":
        model = model.replace(statistics={name: Statistics(mean=known.mean, std=0 * known.std)})
    else:
        model = model.replace(params=model.params | {weight: np.full_like(model.params[weight], np.nan)})
    assert input_moments(model) == {}


def test_moments_follow_under_jit_where_the_input_is_stated():
    model = with_input(chain(dtype=np.float32).clip().conv(5, bias=True))
    expected = channel_moments(model)["t1"]
    found = jax.jit(lambda params: channel_moments(model.replace(params=params))["t1"])(model.params)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-4)  # float32
    np.testing.assert_allclose(found.std, expected.std, rtol=1e-4)
