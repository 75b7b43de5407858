"""Gains and behaviour that statistics imply, against what is measured on data."""

import time

import numpy as np
import pytest

from ptqjax.fit.behaviour import observe_behaviour
from ptqjax.ir import Statistics
from ptqjax.transforms.behaviour import implied_behaviour
from ptqjax.transforms.gains import channel_gains
from ptqjax.transforms.moments import channel_ranges, distributions, normal
from ptqjax.transforms.places import places_of
from tests.models import build, node

RANDOM = np.random.default_rng(3)
SAMPLES = RANDOM.normal(size=(64, 4, 10, 10)).astype(np.float32)


def weight(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def linear_network(pads, stride, group):
    """A convolution, a residual sum, pools over what is left, and a matrix; one output, so that its sign drops out.

    The pools' windows cover their input evenly: the derivatives of a channel are the same at all places of `a`.
    """
    nodes = [
        node("Conv", ["x", "w1"], "a", kernel_shape=(3, 3), pads=(pads,) * 4, strides=(stride, 1), group=group),
        node("Conv", ["a", "w2"], "b", kernel_shape=(1, 1)),
        node("Sub", ["b", "a"], "sum"),
        node("AveragePool", ["sum"], "pooled", kernel_shape=(2, 2), strides=(2, 2)),
        node("GlobalAveragePool", ["pooled"], "g"),
        node("Flatten", ["g"], "f", axis=1),
        node("Gemm", ["f", "w3"], "y", alpha=0.5, beta=1.0, transA=0, transB=1),
    ]
    params = {"w1": weight(4, 4 // group, 3, 3), "w2": weight(4, 4, 1, 1), "w3": weight(1, 4)}
    return build(nodes, params, input_shape=("N", 4, 10, 10), outputs=["y"])


def with_observed(model, observed):
    known = {
        name: normal(found.mean, np.sqrt(np.maximum(found.power - found.mean**2, 0)))
        for name, found in observed.items()
        if name != "f"
    }
    return known | {"f": known["g"]}  # a Flatten of single places


@pytest.mark.parametrize(("pads", "stride", "group"), [(0, 1, 1), (0, 2, 4), (1, 1, 2), (1, 3, 1)])
def test_gains_of_a_linear_network_are_those_measured(pads, stride, group):
    model = linear_network(pads, stride, group)
    observed = observe_behaviour(model, [{"x": SAMPLES}])
    gains = channel_gains(model, with_observed(model, observed))
    assert gains.keys() == observed.keys()
    for name, gain in gains.items():  # the derivatives are sums of float32 products
        np.testing.assert_allclose(gain, observed[name].gain, rtol=1e-4, err_msg=name)


def activated(op_type, **attributes):
    nodes = [
        node("Conv", ["x", "w1", "b1"], "a", kernel_shape=(3, 3)),
        node(op_type, ["a", *([] if op_type != "PRelu" else ["slope"])], "r", **attributes),
        node("Conv", ["r", "w2"], "b", kernel_shape=(3, 3)),
        node("GlobalAveragePool", ["b"], "g"),
        node("Flatten", ["g"], "y", axis=1),
    ]
    params = {"w1": weight(16, 4, 3, 3) / 6, "b1": weight(16), "w2": weight(3, 16, 3, 3)}
    params |= {"slope": np.full((16, 1, 1), 0.5, np.float32)} if op_type == "PRelu" else {}
    return build(nodes, params, input_shape=("N", 4, 10, 10), outputs=["y"])


@pytest.mark.parametrize(("op_type", "attributes"), [("Relu", {}), ("LeakyRelu", {"alpha": 0.3}), ("PRelu", {})])
def test_gains_in_front_of_an_activation_are_about_those_measured(op_type, attributes):
    model = activated(op_type, **attributes)
    observed = observe_behaviour(model, [{"x": SAMPLES[i : i + 1]} for i in range(64)])
    a = Statistics(mean=observed["a"].mean, std=np.sqrt(observed["a"].power - observed["a"].mean ** 2))
    gains = channel_gains(model, distributions(model.replace(statistics={"a": a})))
    ratio = np.concatenate([gains[name] / observed[name].gain for name in ("a", "r")])
    ratio = ratio / np.median(gains["r"] / observed["r"].gain)  # an output's size without statistics of it is a guess
    assert np.abs(10 * np.log10(ratio)).max() < 3  # signs of three outputs, and 64 samples' masks


def chain(scale=1.0):
    nodes = [
        node("Conv", ["x", "w1"], "a", kernel_shape=(3, 3), pads=(1, 1, 1, 1)),
        node("Relu", ["a"], "r"),
        node("Conv", ["r", "w2"], "y", kernel_shape=(3, 3)),
    ]
    params = {"w1": weight(8, 4, 3, 3), "w2": scale * weight(5, 8, 3, 3)}
    model = build(nodes, params, input_shape=("N", 4, 10, 10), outputs=["y"])
    ones = Statistics(mean=np.linspace(-1, 1, 8), std=np.ones(8))
    return model.replace(statistics={"x": Statistics(mean=np.zeros(4), std=np.ones(4)), "a": ones})


def test_scaling_a_layer_scales_the_gains_before_it_by_the_square():
    known = distributions(chain())  # the outputs' size stays
    once, twice = channel_gains(chain(), known), channel_gains(chain(3.0), known)
    for name in ("x", "a", "r"):
        np.testing.assert_allclose(twice[name], 9 * once[name], rtol=1e-5, err_msg=name)  # float32 sums
    np.testing.assert_array_equal(twice["y"], once["y"])


def test_gains_do_not_depend_on_the_units_of_the_output():
    once, thrice = (channel_gains(model, distributions(model)) for model in (chain(), chain(3.0)))
    np.testing.assert_allclose(thrice["x"], once["x"], rtol=1e-5)
    np.testing.assert_allclose(9 * thrice["y"], once["y"], rtol=1e-5)


def test_gains_of_several_readers_add():
    def gains(names):
        nodes = [node("Conv", ["x", f"w{n}"], f"y{n}", kernel_shape=(3, 3)) for n in names]
        params = {f"w{n}": weight(5 + n, 4, 3, 3) for n in names}
        model = build(nodes, params, input_shape=("N", 4, 10, 10), outputs=[f"y{n}" for n in names])
        model = model.replace(statistics={"x": Statistics(mean=np.zeros(4), std=np.ones(4))})
        return channel_gains(model, distributions(model))["x"]

    np.testing.assert_allclose(gains([1, 2]), gains([1]) + gains([2]), rtol=1e-6)


def test_what_moves_channels_moves_their_gains():
    nodes = [
        node("Concat", ["x", "x"], "c", axis=1),
        node("Slice", ["c", "starts", "ends", "axes"], "s"),
        node("Conv", ["s", "w"], "y", kernel_shape=(1, 1)),
    ]
    params = {"w": weight(5, 2, 1, 1), "starts": np.array([3]), "ends": np.array([5]), "axes": np.array([1])}
    model = build(nodes, params, input_shape=("N", 4, 10, 10), outputs=["y"])
    model = model.replace(statistics={"x": Statistics(mean=np.zeros(4), std=np.ones(4))})
    gains = channel_gains(model, distributions(model))
    last, first = gains["s"]
    np.testing.assert_allclose(gains["c"], [0, 0, 0, last, first, 0, 0, 0])
    assert gains["x"].shape == (4,)


def test_what_lies_before_an_operator_that_is_not_followed_is_not_free():
    nodes = [node("Conv", ["x", "w"], "a", kernel_shape=(1, 1)), node("Sigmoid", ["a"], "s")]
    nodes += [node("Conv", ["s", "v"], "y", kernel_shape=(1, 1))]
    params = {"w": weight(6, 4, 1, 1), "v": weight(5, 6, 1, 1)}
    model = build(nodes, params, input_shape=("N", 4, 10, 10), outputs=["y"])
    model = model.replace(statistics={"a": Statistics(mean=np.zeros(6), std=np.ones(6))})
    gains = channel_gains(model, distributions(model))
    np.testing.assert_allclose(gains["a"], gains["s"].mean() * np.ones(6))


def test_sizes_that_are_not_declared_end_in_seven_by_seven():
    nodes = [node("Conv", ["x", "w"], "a", kernel_shape=(2, 2), strides=(32, 32)), node("Relu", ["a"], "y")]
    model = build(nodes, {"w": weight(5, 4, 2, 2)}, input_shape=("N", 4, "H", "W"), outputs=["y"])
    assert places_of(model)["y"] == (7, 7)


def test_behaviour_is_that_of_ranges_and_moments():
    model = chain()
    behaviour = implied_behaviour(model)
    low, high = channel_ranges(model, num_std=6.0)["r"]
    np.testing.assert_allclose(behaviour["r"].low, low)
    np.testing.assert_allclose(behaviour["r"].high, high)
    np.testing.assert_allclose(behaviour["x"].high, 3.0)
    moments = distributions(model)["r"].moments
    np.testing.assert_allclose(behaviour["r"].mean, moments.mean)
    np.testing.assert_allclose(behaviour["r"].power, moments.mean**2 + moments.std**2)
    assert set(behaviour) == {"x", "a", "r", "y"}


def test_a_deep_network_takes_little_time():
    widths = [64] * 30
    nodes, params, last = [], {}, "x"
    for i, width in enumerate(widths):
        params[f"w{i}"] = weight(width, 4 if i == 0 else 64, 1, 1)
        nodes.append(node("Conv", [last, f"w{i}"], f"t{i}", kernel_shape=(1, 1)))
        last = f"t{i}"
    model = build(nodes, params, input_shape=("N", 4, 10, 10), outputs=[last])
    model = model.replace(statistics={"x": Statistics(mean=np.zeros(4), std=np.ones(4))})
    start = time.perf_counter()
    implied_behaviour(model)
    assert time.perf_counter() - start < 2  # it takes 20 ms; the machine may be busy
