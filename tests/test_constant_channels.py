"""Laws of removing constant channels: only what is proven goes, the function stays, borders are heeded."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqjax.ir import Model
from ptqjax.kernels.equalization import constant_channels
from ptqjax.kernels.intervals import linear_interval
from ptqjax.transforms import fold_batch_norms, remove_constant_channels
from ptqjax.transforms.bounds import channel_bounds
from ptqjax.transforms.linear import linear_layers
from tests.models import Chain, assert_same_function, mobile_block, random_input


def with_row(model: Model, layer: int, channel: int, *, weight: float, bias: float) -> Model:
    """The model with one output channel of its `layer`-th convolution set to nearly nothing but a bias."""
    convolutions = [found for found in model.graph.nodes if found.op_type == "Conv"]
    names = convolutions[layer].inputs
    changed = {names[1]: model.params[names[1]].copy(), names[2]: model.params[names[2]].copy()}
    changed[names[1]][channel] *= weight
    changed[names[2]][channel] = bias
    return model.replace(params=model.params | changed)


def folded_block(pad: int = 1) -> Model:
    return fold_batch_norms(mobile_block(pad=pad))[0]


def counts(report: tuple) -> list[tuple[float, float]]:
    return [(record.after.get("removed", 0), record.after.get("pinned", 0)) for record in report]


def test_a_channel_that_never_opens_goes_even_where_the_next_layer_pads() -> None:
    model = with_row(folded_block(), 0, 2, weight=1e-9, bias=-3.0)
    after, report = remove_constant_channels(model)
    weights = [after.params[found.inputs[1]] for found in after.graph.nodes if found.op_type == "Conv"]
    assert not weights[0][2].any()
    assert not weights[1][2].any()
    assert counts(report)[0] == (1, 0)
    assert_same_function(after, model, 1e-12)


def test_what_follows_a_removed_channel_is_constant_too_and_goes() -> None:
    model = with_row(folded_block(), 0, 2, weight=0.0, bias=-3.0)
    after, report = remove_constant_channels(model)
    assert counts(report) == [(1, 0), (1, 0)]
    last = [found for found in after.graph.nodes if found.op_type == "Conv"][2]
    assert not after.params[last.inputs[1]][:, 2].any()


def test_a_value_that_is_not_zero_is_pinned_where_the_next_layer_pads() -> None:
    model = with_row(folded_block(), 0, 2, weight=0.0, bias=2.5)
    model = with_row(model, 0, 3, weight=1e-12, bias=9.0)  # beyond the upper bound: 6 behind the Clip
    after, report = remove_constant_channels(model)
    assert counts(report)[0] in {(0, 1), (0, 2)}
    assert_same_function(after, model, 1e-12)


def test_a_value_that_is_not_zero_moves_where_the_next_layer_does_not_pad() -> None:
    model = with_row(folded_block(pad=0), 0, 2, weight=0.0, bias=2.5)
    after, report = remove_constant_channels(model)
    assert counts(report)[0] == (1, 0)
    assert_same_function(after, model, 1e-12)


def test_a_channel_that_is_nearly_constant_stays() -> None:
    model = with_row(folded_block(), 0, 2, weight=1e-3, bias=2.5)
    _, report = remove_constant_channels(model)
    assert counts(report)[0] == (0, 0)
    assert "no channel is provably constant" in report[0].reason


def test_a_channel_that_seldom_opens_stays_whatever_its_statistics_say() -> None:
    model = folded_block()
    name = model.graph.nodes[0].output
    known = model.statistics[name]
    unlikely = known.replace(mean=known.mean - 100.0)
    _, report = remove_constant_channels(model.replace(statistics=model.statistics | {name: unlikely}))
    assert counts(report)[0] == (0, 0)


def test_a_channel_that_nothing_uses_goes() -> None:
    model = folded_block(pad=0)
    last = [found for found in model.graph.nodes if found.op_type == "Conv"][2].inputs[1]
    weight = model.params[last].copy()
    weight[:, 1] = 0.0
    model = model.replace(params=model.params | {last: weight})
    after, report = remove_constant_channels(model)
    assert counts(report) == [(1, 0), (1, 0)]
    assert_same_function(after, model, 1e-12)


def test_statistics_say_what_a_removed_channel_holds() -> None:
    model = with_row(folded_block(), 0, 2, weight=0.0, bias=-3.0)
    after, _ = remove_constant_channels(model)
    known = after.statistics[model.graph.nodes[0].output]
    assert (known.mean[2], known.std[2]) == (0.0, 0.0)
    assert (known.std[[0, 1, 3]] > 0).all()


def test_a_second_run_changes_nothing() -> None:
    model = with_row(with_row(folded_block(), 0, 2, weight=0.0, bias=-3.0), 0, 3, weight=0.0, bias=2.5)
    after, _ = remove_constant_channels(model)
    again, report = remove_constant_channels(after)
    assert not any(record.done for record in report)
    assert all((again.params[name] == value).all() for name, value in after.params.items())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 100))
def test_no_input_exceeds_the_bounds(seed: int, scale: float) -> None:
    from ptqjax.lowering import interpret  # noqa: PLC0415

    chain = (
        Chain(3, seed=seed, size=4).conv(4, pad=1, bias=True).clip(-1.0, 2.0).conv(4, group=2, pad=1).add("LeakyRelu")
    )
    model = chain.conv(3, kernel=1).clip(0.0, 6.0).build()
    bounds = channel_bounds(model, linear_layers(model))
    x = {name: np.float32(scale * value) for name, value in random_input(model, seed).items()}

    def observe(name: str, value: jax.Array, axis: int | None) -> tuple[jax.Array, tuple | None]:
        others = tuple(k for k in range(value.ndim) if k != axis)
        return value, (value.min(others), value.max(others)) if name in bounds else None

    params = {name: value.astype(np.float32) for name, value in model.params.items()}
    _, found = interpret(model.graph, params, x, intercept=observe)
    assert set(found) == set(bounds)
    for name, (least, largest) in found.items():
        low, high = bounds[name]
        slack = 1e-5 * np.maximum(abs(low), abs(high))  # the network was run in float32
        assert (np.asarray(least) >= low - slack).all()
        assert (np.asarray(largest) <= high + slack).all()


def test_linear_bounds_are_attained() -> None:
    view = np.array([[[[1.0], [-2.0]]]])
    low, high = linear_interval(view, np.array([0.5]), np.array([-1.0, 0.0]), np.array([1.0, 3.0]))
    np.testing.assert_allclose((low[0], high[0]), (-6.5, 1.5), rtol=1e-14)


def test_constancy_is_relative_to_the_value() -> None:
    low, high = np.array([0.0, 0.0, 5.0, 5.0]), np.array([0.0, 1e-9, 5.0 + 1e-7, 5.1])
    np.testing.assert_array_equal(constant_channels(low, high), [True, False, True, False])
