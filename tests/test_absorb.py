"""Laws of absorption: only what provably keeps the function moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.ir import Model
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
