"""Laws of absorption: what moves keeps the function wherever the channel is above what moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import ndtr

from ptqjax.errors import ConfigError, DataError
from ptqjax.ir import Model, Record
from ptqjax.kernels.absorption import mass_below, nearly_always_there
from ptqjax.kernels.grouped import respond_to_constant
from ptqjax.transforms import absorb_biases, equalize, fold_batch_norms
from tests.models import Chain, assert_same_function


def always_open(activation: str, *, pad: int = 0, bias: float = 50.0) -> Model:
    """A layer whose input is bounded and whose bias is so high that its channels are always above zero."""
    chain = Chain(3, seed=1).conv(4, kernel=1, bias=True).clip(0.0, 1.0).conv(5, kernel=1, bias=True)
    chain.params[chain.nodes[-1].inputs[2]][:] = [bias, bias, bias, 0.0, 0.0]
    chain = chain.add("Relu") if activation == "Relu" else chain.clip(0.0, float(activation))
    return chain.conv(4, pad=pad).build()


@pytest.mark.parametrize("activation", ["Relu", "80", "49"])
def test_what_is_always_there_moves_into_the_next_layer(activation: str) -> None:
    model = always_open(activation)
    after, report = absorb_biases(model)
    assert report[1].done
    assert report[1].after["channels"] >= 3
    before_bias, after_bias = (m.params[model.graph.nodes[2].inputs[2]] for m in (model, after))
    assert (after_bias[:3] < before_bias[:3]).all()
    assert_same_function(after, model, 1e-12)


def test_upper_limits_move_along() -> None:
    model = always_open("80")
    after, _ = absorb_biases(model)
    kinds = [found.op_type for found in after.graph.nodes]
    assert kinds == ["Conv", "Clip", "Conv", "Relu", "Min", "Conv"]


def test_nothing_moves_into_a_layer_that_pads() -> None:
    after, report = absorb_biases(always_open("Relu", pad=1))
    assert not any(record.done for record in report)
    assert "pads" in report[1].reason
    assert after.graph == always_open("Relu", pad=1).graph


def test_nothing_moves_where_a_channel_may_close() -> None:
    _, report = absorb_biases(always_open("Relu", bias=0.0))
    assert not report[1].done
    assert "no channel has a provable part" in report[1].reason


@pytest.mark.parametrize("pad", [0, 1])
def test_the_mean_moves_between_layers_without_an_activation(pad: int) -> None:
    model, _ = fold_batch_norms(Chain(3).conv(4, pad=1).norm().conv(5, pad=pad).norm().build())
    after, report = absorb_biases(model)
    assert report[0].done == (pad == 0)
    if pad == 0:
        np.testing.assert_array_equal(after.statistics[model.graph.nodes[0].output].mean, 0.0)
    assert_same_function(after, model, 1e-12)


def test_gemms_absorb_with_alpha_and_beta() -> None:
    chain = Chain(4, rank=0).gemm(5, alpha=0.5, beta=2.0).norm().gemm(3, alpha=2.0, beta=0.5, trans_b=0)
    model, _ = fold_batch_norms(chain.build())
    after, report = absorb_biases(model)
    assert report[0].done
    assert_same_function(after, model, 1e-12)


def test_off_absorbs_nothing_and_exact_keeps_the_function() -> None:
    model = Chain(3).conv(4, pad=1).norm().conv(5).norm().build()
    off, report = equalize(model, absorb="off")
    assert not [record for record in report if record.transform == "absorb_biases"]
    exact, report = equalize(model, absorb="exact")
    assert [record.done for record in report if record.transform == "absorb_biases"] == [True]
    for after in (off, exact):
        assert_same_function(after, model, 1e-12)


def test_a_second_run_changes_nothing() -> None:
    after, _ = absorb_biases(always_open("80"))
    again, report = absorb_biases(after)
    assert not any(record.done for record in report)
    assert again.graph == after.graph


def test_the_kernel_differentiates_and_batches() -> None:
    view = jnp.ones((2, 3, 2, 4))
    assert jax.grad(lambda value: respond_to_constant(view, value).sum())(jnp.ones(4)).shape == (4,)
    assert jax.jit(jax.vmap(lambda value: respond_to_constant(view, value)))(jnp.ones((5, 4))).shape == (5, 6)


def nearly_always_open(activation: str = "Relu", *, pad: int = 0, mean: float = 7.0, channels: int = 3) -> Model:
    """Layer, batch norm of known mean and deviation, activation, layer: the first channels are high."""
    chain = Chain(3, seed=2, dtype=np.float64).conv(5, kernel=1).norm()
    gamma, beta = chain.nodes[-1].inputs[1:3]
    chain.params[gamma][:] = [1.0, -2.0, 0.5, 1.0, 1.0]
    chain.params[beta][:] = [mean if index < channels else 0.5 for index in range(5)]
    if activation in {"Relu", "LeakyRelu"}:
        chain.add(activation)
    elif activation == "PRelu":
        chain.prelu()
    elif activation:
        chain.clip(*(float(limit) for limit in activation.split()))
    return fold_batch_norms(chain.conv(4, pad=pad).build())[0]


def absorbed(model: Model, **settings: dict) -> tuple[Model, Record]:
    after, (record,) = absorb_biases(model, by="statistics", **settings)
    return after, record


def produced(model: Model, x: np.ndarray) -> np.ndarray:
    """What the first layer makes of a 1x1 input, bias included."""
    first = model.graph.nodes[0]
    return (
        np.einsum("oi,nihw->nohw", model.params[first.inputs[1]][:, :, 0, 0], x)
        + model.params[first.inputs[2]][:, None, None]
    )


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "PRelu", "0 30", "-5 30", "0.5 30"])
def test_statistics_move_the_mean_less_three_deviations(activation: str) -> None:
    model = nearly_always_open(activation)
    tensor = model.graph.nodes[0].output
    known = model.statistics[tensor]
    after, record = absorbed(model)
    expected = np.array([7 - 3.0, 7 - 6.0, 7 - 1.5, 0.0, 0.0])
    bias = model.graph.nodes[0].inputs[2]
    np.testing.assert_allclose(model.params[bias] - after.params[bias], expected, atol=1e-12)
    np.testing.assert_allclose(known.mean - after.statistics[tensor].mean, expected, atol=1e-12)
    np.testing.assert_array_equal(after.statistics[tensor].std, known.std)
    assert record.done
    assert record.after["channels"] == 3
    assert record.after["largest"] == pytest.approx(5.5)
    assert record.after["clipped mass"] == pytest.approx(float(ndtr(-3.0)), rel=1e-5)


@pytest.mark.parametrize("activation", ["Relu", "0 9", "LeakyRelu"])
def test_the_function_changes_only_where_a_channel_lies_below_what_moved(activation: str) -> None:
    model = nearly_always_open(activation)
    after, _ = absorbed(model)
    bias, weight = (model.graph.nodes[0].inputs[index] for index in (2, 1))
    amount = model.params[bias] - after.params[bias]
    still = {weight: model.params[weight] * 1e-2}  # so steady that nothing falls below
    assert (model.params[bias] > amount + 0.2)[:3].all()
    assert_same_function(after.replace(params=after.params | still), model.replace(params=model.params | still), 1e-12)
    loud = {weight: model.params[weight] * 10}
    with pytest.raises(AssertionError):
        assert_same_function(
            after.replace(params=after.params | loud), model.replace(params=model.params | loud), 1e-12
        )


def test_statistics_move_nothing_into_a_layer_that_pads() -> None:
    after, record = absorbed(nearly_always_open(pad=1))
    assert not record.done
    assert "pads" in record.reason
    assert after.graph == nearly_always_open(pad=1).graph


def test_statistics_move_the_whole_mean_between_layers_without_an_activation() -> None:
    model = nearly_always_open("")
    after, record = absorbed(model)
    assert record.done
    assert "clipped mass" not in record.after
    assert_same_function(after, model, 1e-12)


@pytest.mark.parametrize(
    ("activation", "channels"),
    [("0 4.5", 2), ("0 3", 1), ("4.5 30", 1)],  # amounts 4, 1 and 5.5
)
def test_statistics_move_only_what_the_activation_passes(activation: str, channels: int) -> None:
    _, record = absorbed(nearly_always_open(activation))
    assert record.after["channels"] == channels


def test_statistics_need_to_be_known() -> None:
    model = nearly_always_open()
    after, record = absorbed(model.replace(statistics={}))
    assert not record.done
    assert "nothing is known" in record.reason
    assert after.graph == model.graph


def test_observed_minima_lose_nothing_of_the_data_that_they_come_from() -> None:
    model = nearly_always_open("0 30")
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8))  # what `assert_same_function` feeds
    minimum = produced(model, x).min(axis=(0, 2, 3))
    after, record = absorbed(model, minima={model.graph.nodes[0].output: minimum})
    bias = model.graph.nodes[0].inputs[2]
    assert (minimum > 0).any()
    np.testing.assert_allclose(model.params[bias] - after.params[bias], np.maximum(minimum, 0), atol=1e-12)
    assert record.after["clipped mass"] == 0
    assert "observed" in record.reason
    assert_same_function(after, model, 1e-12)


def test_observed_minima_do_without_statistics() -> None:
    model = nearly_always_open().replace(statistics={})
    _, record = absorbed(model, minima={model.graph.nodes[0].output: np.full(5, 0.25)})
    assert record.after["channels"] == 5
    assert record.after["largest"] == 0.25


def test_statistics_that_were_used_up_move_nothing_more() -> None:
    after, _ = absorbed(nearly_always_open("0 30"))
    again, record = absorbed(after)
    assert not record.done
    assert again.graph == after.graph
    np.testing.assert_array_equal(
        again.params[after.graph.nodes[0].inputs[2]], after.params[after.graph.nodes[0].inputs[2]]
    )


def test_what_does_not_fit_is_refused() -> None:
    model = nearly_always_open()
    tensor = model.graph.nodes[0].output
    with pytest.raises(ConfigError, match="by='mean'"):
        absorb_biases(model, by="mean")
    with pytest.raises(ConfigError, match="by='exact'"):
        absorb_biases(model, minima={tensor: np.zeros(5)})
    for wrong in (np.zeros(4), np.full(5, np.nan)):
        with pytest.raises(DataError, match=f"minima of '{tensor}'"):
            absorb_biases(model, by="statistics", minima={tensor: wrong})


def test_absorption_by_statistics_works_under_jit_and_differentiates() -> None:
    model = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), nearly_always_open("0 30"))
    expected, _ = absorbed(model)
    found = jax.jit(lambda model: absorbed(model)[0])(model)
    for name in model.params.keys() & expected.params.keys():
        np.testing.assert_allclose(found.params[name], expected.params[name], rtol=1e-5, atol=1e-5)

    def bias_left(std: jax.Array) -> jax.Array:
        amount = nearly_always_there(jnp.full(5, 7.0), std)
        return (amount + mass_below(amount, jnp.full(5, 7.0), std)).sum()

    assert jax.grad(bias_left)(jnp.ones(5)) == pytest.approx(-3.0)
    assert jax.vmap(bias_left)(jnp.ones((2, 5))).shape == (2,)


@pytest.mark.parametrize("std", [0.0, 0.5, 2.0])
def test_the_clipped_mass_agrees_between_libraries(std: float) -> None:
    amount, mean, std_ = np.array([0.5, 1.5]), np.array([1.0, 1.0]), np.full(2, std)
    np.testing.assert_allclose(
        mass_below(*map(jnp.asarray, (amount, mean, std_))), mass_below(amount, mean, std_), atol=1e-6
    )
