"""Calibration without data: ranges that batch norms imply, errors that name what is unknown."""

import numpy as np
import pytest

from ptqjax.config import QuantizationConfig, Rule
from ptqjax.errors import DataError
from ptqjax.ir import Statistics
from ptqjax.placement.place import place
from ptqjax.ranges.calibrate import calibrate, calibrate_and_report
from ptqjax.ranges.data_free import NUM_STD, NUM_STD_OF_INPUTS
from ptqjax.transforms import fold_batch_norms
from ptqjax.transforms.input_moments import input_moments
from tests.models import Chain, build, node


def range_of(encoding):
    low, high = ((limit - encoding.zero_point) * encoding.scale for limit in (encoding.qmin, encoding.qmax))
    return float(low), float(high)


def folded(chain):
    return fold_batch_norms(chain.build())[0]


def network():
    """A convolution, ReLU6, a depthwise one, Relu, a pool and a layer without batch norm."""
    chain = Chain(3, dtype=np.float32).conv(8).norm().clip().depthwise().norm().add("Relu").add("GlobalAveragePool")
    return folded(chain.add("Flatten", axis=1).gemm(5))


@pytest.mark.parametrize("ranges", ["min-max", "sqnr"])
def test_the_same_tensors_have_grids_of_the_same_kind_as_with_data(ranges):
    model, config = network(), QuantizationConfig(ranges=ranges)
    data = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    with_data, without = calibrate(model, [{"x": data}], config), calibrate(model, None, config)
    assert with_data.keys() == without.keys()
    assert all(without[name].dtype == encoding.dtype for name, encoding in with_data.items())
    for site in place(model, config).sites:
        assert without[site.tensor].scale is not None
        np.testing.assert_array_equal(without[site.tensor].scale, without[site.root].scale)
        if site.kind == "weight":
            np.testing.assert_array_equal(without[site.tensor].scale, with_data[site.tensor].scale)


def test_a_range_holds_every_channel_so_many_deviations_around_its_mean_clipped():
    model = network()
    encodings = calibrate(model, None)
    known = model.statistics[next(name for name in model.statistics if "t1" in name)]
    low = np.clip(known.mean - NUM_STD * known.std, 0, 6).min()
    high = np.clip(known.mean + NUM_STD * known.std, 0, 6).max()
    found = range_of(encodings["t2"])
    step = float(encodings["t2"].scale)
    np.testing.assert_allclose(found, (min(low, 0), high), atol=step / 2)  # the zero point is rounded


def test_the_inputs_range_is_that_of_the_estimate():
    model = network()
    known, encoding = input_moments(model)["x"], calibrate(model, None)["x"]
    low = (known.mean - NUM_STD_OF_INPUTS * known.std).min()
    high = (known.mean + NUM_STD_OF_INPUTS * known.std).max()
    np.testing.assert_allclose(range_of(encoding), (low, high), atol=float(encoding.scale) / 2)


def test_it_repeats_to_the_bit_and_says_nothing_of_biases_that_fit():
    first, second = (calibrate_and_report(network(), None) for _ in range(2))
    for name, encoding in first[0].items():
        np.testing.assert_array_equal(encoding.scale, second[0][name].scale)
        np.testing.assert_array_equal(encoding.zero_point, second[0][name].zero_point)
    assert first[1] == second[1]


def test_without_batch_norms_the_error_names_the_tensors_and_the_way_out():
    model = Chain(3, dtype=np.float32).conv(4).add("Relu").conv(4).add("Relu").conv(4).build()
    with pytest.raises(DataError) as found:
        calibrate(model, None)
    message = str(found.value)
    for words in ("4 of 4 activations", "the graph input 'x'", "'t1'", "and 1 more", "has no batch norms", "samples"):
        assert words in message


def test_what_batch_norms_do_not_reach_is_an_error_that_names_it():
    nodes = [node("Conv", ["x", "w"], "a"), node("Erf", ["a"], "y")]
    params = {"w": np.random.default_rng(0).normal(size=(4, 3, 1, 1)).astype(np.float32)}
    model = build(nodes, params, input_shape=("N", 3, 4, 4), outputs=["y"])
    model = model.replace(statistics={"a": Statistics(mean=np.zeros(4), std=np.ones(4))})
    with pytest.raises(DataError, match=r"1 of 3 activations: Erf \(producing 'y'\); batch norms do not tell"):
        calibrate(model, None, QuantizationConfig(rules=(Rule(tensors=("y",), enabled=True),)))
    assert calibrate(model, None).keys() == {"x", "a", "w"}


def test_a_range_that_the_runtime_fixes_is_kept():
    nodes = [node("Conv", ["x", "w"], "a"), node("Sigmoid", ["a"], "y")]
    params = {"w": np.random.default_rng(0).normal(size=(4, 3, 1, 1)).astype(np.float32)}
    model = build(nodes, params, input_shape=("N", 3, 4, 4), outputs=["y"])
    model = model.replace(statistics={"a": Statistics(mean=np.zeros(4), std=np.ones(4))})
    data = [{"x": np.random.default_rng(1).normal(size=(2, 3, 4, 4)).astype(np.float32)}]
    fixed = [site.tensor for site in place(model).sites if site.fixed_range is not None]
    for name in fixed:
        np.testing.assert_array_equal(calibrate(model, None)[name].scale, calibrate(model, data)[name].scale)
    assert fixed
