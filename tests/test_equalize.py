"""Laws of cross-layer equalization: the function stays, ranges meet, a second run finds nothing to do."""

import time
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ptqjax
from ptqjax.errors import ConfigError, PtqjaxWarning
from ptqjax.ir import Model, Report, text
from ptqjax.kernels.equalization import common_factors, imbalance, log_scales, tap_ranges
from ptqjax.transforms import equalize, fold_batch_norms, scale_channels
from ptqjax.transforms.interfaces import Interface, find_interfaces
from ptqjax.transforms.linear import linear_layers, weight_view
from ptqjax.transforms.ties import find_ties
from tests.models import Chain, assert_same_function, mobile_block


def interfaces_of(model: Model) -> tuple[Interface, ...]:
    return find_interfaces(model, linear_layers(model))[0]


def ranges(model: Model, interface: Interface) -> tuple[np.ndarray, np.ndarray]:
    r1 = np.abs(weight_view(model, interface.producer)).max(axis=(2, 3)).ravel()
    r2 = np.abs(weight_view(model, interface.consumer)).max(axis=(1, 3)).ravel()
    return r1, r2


def scaled(report: Report) -> list[bool]:
    return [record.done for record in report if record.transform == "scale_channels"]


def assert_equalizes(model: Model, *, tolerance: float = 1e-12, count: int | None = None) -> Model:
    """Function kept, caller's model untouched, idempotent; `count` interfaces are scaled."""
    before, values = text(model), {name: value.copy() for name, value in model.params.items()}
    equalized, report = equalize(model)
    assert text(model) == before
    for name, value in values.items():
        np.testing.assert_array_equal(model.params[name], value)
    assert_same_function(equalized, model, tolerance)
    if count is not None:
        assert sum(scaled(report)) == count
    again, second = equalize(equalized)
    assert again.graph == equalized.graph
    for name, value in equalized.params.items():
        np.testing.assert_array_equal(again.params[name], value, err_msg=name)
    assert not any(record.done for record in second)
    return equalized


# --- where and how it scales


def test_a_pair_of_convolutions_gets_equal_ranges_from_weights_alone() -> None:
    folded, _ = fold_batch_norms(Chain(3).conv(6, pad=1).norm().add("Relu").conv(4, pad=1).norm().build())
    after, report = scale_channels(folded, limit=None)
    assert scaled(report) == [True, False]
    np.testing.assert_allclose(*ranges(after, interfaces_of(after)[0]), rtol=1e-9)
    assert_same_function(after, folded, 1e-12)


def test_a_depthwise_triple_gets_equal_ranges_from_weights_alone() -> None:
    folded, _ = fold_batch_norms(mobile_block())
    after, report = scale_channels(folded, limit=None)
    assert scaled(report) == [True, True, False]
    for interface in interfaces_of(after):
        np.testing.assert_allclose(*ranges(after, interface), rtol=2e-3)  # where the sweeps stop
    assert_same_function(after, folded, 1e-12)


def test_a_longer_chain_converges_to_equal_ranges() -> None:
    chain = Chain(3, size=12)
    for channels in (4, 5, 6, 4, 3):
        chain.conv(channels, kernel=1).add("Relu")
    model = chain.build()
    after, report = scale_channels(model, limit=None)
    assert sum(scaled(report)) == 4
    for interface in interfaces_of(after):
        np.testing.assert_allclose(*ranges(after, interface), rtol=3e-3)
    for record in report[:4]:
        assert record.after["largest |log(r1 / r2)|"] < 3e-3 < record.before["largest |log(r1 / r2)|"]


def test_no_activation_reaches_past_the_limit() -> None:
    random = np.random.default_rng(0)
    r1, r2, size = (np.exp(3 * random.normal(size=64)) for _ in range(3))
    scale = log_scales(r1, r2, size, limit=1.5)
    largest = 1.5 * np.median(size / np.sqrt(r1 / r2))
    assert (size / np.exp(scale)).max() <= largest * (1 + 1e-12)
    balanced = log_scales(r1, r2)
    assert (scale >= balanced).all()
    assert (size / np.exp(balanced)).max() > 2 * largest, "the limit matters"


def test_clip_becomes_relu_and_min_and_stays_exact() -> None:
    after = assert_equalizes(mobile_block(), count=2)
    kinds = [found.op_type for found in after.graph.nodes]
    assert kinds == ["Conv", "Relu", "Min", "Conv", "Relu", "Min", "Conv"]
    assert [value.shape for name, value in after.params.items() if name.endswith("_high")] == [(6, 1, 1)] * 2


def test_clip_with_a_lower_bound_becomes_max_and_min() -> None:
    after = assert_equalizes(Chain(3).conv(6, pad=1).norm().clip(-0.5, 0.5).conv(4, pad=1).build(), count=1)
    assert [found.op_type for found in after.graph.nodes] == ["Conv", "Max", "Min", "Conv"]


@pytest.mark.parametrize(("low", "high"), [(0.0, None), (None, 0.0), (None, None), (0.0, np.inf)])
def test_clip_that_commutes_with_scaling_stays(low: float | None, high: float | None) -> None:
    after = assert_equalizes(Chain(3).conv(6, pad=1).norm().clip(low, high).conv(4, pad=1).build(), count=1)
    assert [found.op_type for found in after.graph.nodes] == ["Conv", "Clip", "Conv"]


def test_clip_with_attributes_for_bounds_stays_exact() -> None:
    chain = Chain(3, opset=9, dtype=np.float32).conv(6, pad=1).norm().add("Clip", min=0.0, max=6.0).conv(4, pad=1)
    after = assert_equalizes(chain.build(), count=1, tolerance=1e-5)
    assert [found.op_type for found in after.graph.nodes] == ["Conv", "Relu", "Min", "Conv"]


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "PRelu", ""])
def test_homogeneous_activations_are_kept(activation: str) -> None:
    chain = Chain(3).conv(6, pad=1).norm()
    chain = chain.prelu() if activation == "PRelu" else chain.add(activation) if activation else chain
    assert_equalizes(chain.conv(4, pad=1).norm().build(), count=1)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("group", [2, 3])
def test_grouped_convolutions_of_any_rank_are_scaled(rank: int, group: int) -> None:
    size = 4 if rank == 3 else 6
    chain = Chain(6, rank=rank, size=size).conv(6, group=group, pad=1).norm().clip().conv(12, group=group, pad=1)
    assert_equalizes(chain.build(), count=1)


def test_transposed_convolutions_are_scaled() -> None:
    chain = Chain(4).conv_transpose(6, group=2).norm().add("Relu").conv_transpose(4, group=2)
    assert_equalizes(chain.build(), count=1)


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("activation", ["Relu", "Clip"])
def test_gemms_with_alpha_and_beta_are_scaled(trans_b: int, activation: str) -> None:
    chain = Chain(5, rank=0).gemm(7, trans_b=trans_b, alpha=0.5, beta=3.0).norm()
    chain = chain.clip() if activation == "Clip" else chain.add("Relu")
    assert_equalizes(chain.gemm(4, trans_b=trans_b, alpha=2.0, beta=0.5).build(), count=1)


def test_a_matmul_with_its_add_is_scaled() -> None:
    assert_equalizes(Chain(5, rank=0).matmul(7, bias=True).norm().add("Relu").matmul(3).build(), count=1)


def test_statistics_follow_the_scales() -> None:
    model, _ = fold_batch_norms(mobile_block())
    after, _ = scale_channels(model)
    for interface in interfaces_of(after):
        name = interface.producer.output
        scale = model.statistics[name].std / after.statistics[name].std
        np.testing.assert_allclose(model.statistics[name].mean, after.statistics[name].mean * scale, rtol=1e-12)
        old = np.abs(weight_view(model, interface.consumer)).max(axis=(1, 3)).ravel()
        assert np.isfinite(scale).all()
        assert old.shape == scale.shape


def test_observed_magnitudes_take_the_place_of_statistics() -> None:
    folded, _ = fold_batch_norms(Chain(3).conv(6, pad=1).norm().add("Relu").conv(4, pad=1).build())
    tensor = interfaces_of(folded)[0].tensors[-1]
    one_large = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1000.0])
    without, _ = scale_channels(folded, limit=1.0)
    with_it, _ = scale_channels(folded, limit=1.0, magnitudes={tensor: one_large})
    name = interfaces_of(folded)[0].producer.weight
    assert not np.allclose(with_it.params[name], without.params[name])
    assert_same_function(with_it, folded, 1e-12)


# --- what it leaves alone


def test_a_tensor_that_is_a_graph_output_is_not_scaled() -> None:
    chain = Chain(3).conv(6, pad=1).norm().add("Relu")
    name = chain.tensor
    assert_equalizes(chain.conv(4, pad=1).build(name), count=0)


def test_a_tensor_before_the_activation_that_is_a_graph_output_is_not_scaled() -> None:
    chain = Chain(3).conv(6, pad=1).norm()
    name = chain.tensor
    assert_equalizes(chain.clip().conv(4, pad=1).build(name), count=0)


def test_a_tensor_with_two_readers_is_not_scaled() -> None:
    chain = Chain(3).conv(6, pad=1).norm()
    name = chain.tensor
    assert_equalizes(chain.clip().conv(6, pad=1).add("Add", name).build(), count=0)


def test_a_shared_weight_is_not_scaled() -> None:
    chain = Chain(4).conv(4, pad=1).add("Relu").conv(4, pad=1).add("Relu")
    chain.add("Conv", chain.nodes[0].inputs[1])
    after, report = equalize(chain.norm().build())
    assert_same_function(after, chain.build(), 1e-12)
    reasons = [record.reason for record in report if record.transform == "scale_channels" and not record.done]
    assert any("shared" in reason for reason in reasons)


def test_bounds_that_nodes_share_stay_as_they_are() -> None:
    chain = Chain(3).conv(6, pad=1).norm().clip()
    lo, hi = chain.nodes[-1].inputs[1:]
    model = chain.conv(6, pad=1).norm().add("Clip", lo, hi).conv(4, pad=1).norm().add("Clip", lo, hi).build()
    after = assert_equalizes(model, count=2)
    assert (after.params[lo], after.params[hi]) == (0.0, 6.0)


def test_other_operators_end_an_interface_with_a_reason() -> None:
    chain = Chain(3).conv(6, pad=1).norm().add("Sigmoid").conv(4, pad=1).norm().build()
    _, report = equalize(chain)
    reasons = {record.where[0]: record.reason for record in report if record.transform == "scale_channels"}
    assert any("Sigmoid" in reason for reason in reasons.values())


def test_it_warns_where_batch_norms_were_folded_before_and_works_on_bounds() -> None:
    folded, _ = fold_batch_norms(mobile_block())
    stripped = folded.replace(statistics={})
    with pytest.warns(PtqjaxWarning, match="2 of 2 tensors between layers have no statistics"):
        after, report = equalize(stripped)
    assert sum(scaled(report)) == 2
    assert_same_function(after, folded, 1e-12)


def test_without_statistics_and_bounds_it_says_that_weights_alone_decide() -> None:
    model = Chain(3).conv(6, pad=1).add("Relu").conv(4, pad=1).build()
    with pytest.warns(PtqjaxWarning):
        _, report = equalize(model)
    assert "by weights alone" in next(record.reason for record in report if record.done)


def test_an_unknown_absorption_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of 'exact', 'statistics', 'off'"):
        equalize(mobile_block(), "exakt")


@pytest.mark.parametrize(("scaling", "message"), [("learned", "needs data"), ("best", "expected one of 'off'")])
def test_scaling_that_is_unknown_or_needs_data_is_refused(scaling: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        equalize(mobile_block(), scaling=scaling)


# --- types, dead channels, any chain


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_types_are_kept(dtype: type) -> None:
    # A layer sums some 50 products, each of operands rounded once: a few tens of units in the last place.
    after = assert_equalizes(mobile_block(dtype=dtype), tolerance=40 * float(np.finfo(dtype).eps))
    assert {value.dtype for value in after.params.values()} == {np.dtype(dtype)}


def test_dead_channels_do_not_disturb_the_living() -> None:
    model = mobile_block(channels=8)
    weight = model.graph.nodes[0].inputs[1]
    dead = model.params[weight].copy()
    dead[2] = 0.0
    after = assert_equalizes(model.replace(params=model.params | {weight: dead}))
    assert all(np.isfinite(value).all() for value in after.params.values())


LAYERS = st.sampled_from(["conv", "pointwise", "depthwise", "grouped"])
ACTIVATIONS = st.sampled_from(["Relu", "clip", "band", "LeakyRelu", "prelu", "none"])
BLOCKS = st.lists(st.tuples(LAYERS, ACTIVATIONS, st.booleans(), st.booleans()), min_size=2, max_size=4)


@settings(max_examples=20, deadline=None)
@given(blocks=BLOCKS, seed=st.integers(0, 10_000), limit=st.sampled_from([None, 1.0, 2.0]))
def test_equalize_preserves_the_function_of_any_chain(
    blocks: list[tuple[str, str, bool, bool]], seed: int, limit: float | None
) -> None:
    chain = Chain(4, seed=seed, size=7)
    for layer, activation, has_norm, has_pad in blocks:
        pad = int(has_pad)
        if layer == "conv":
            chain.conv(6, pad=1, bias=has_norm)
        elif layer == "pointwise":
            chain.conv(4, kernel=1, bias=not has_norm)
        elif layer == "depthwise":
            chain.depthwise(kernel=2 - pad, pad=pad)
        else:
            chain.conv(8, group=2, pad=1)
        chain = chain.norm() if has_norm else chain
        if activation in {"Relu", "LeakyRelu"}:
            chain.add(activation)
        elif activation != "none":
            chain = (
                chain.prelu()
                if activation == "prelu"
                else chain.clip(*((0.0, 6.0) if activation == "clip" else (0.25, 1.5)))
            )
    model = chain.build()
    folded, _ = fold_batch_norms(model)
    is_unknown = any(folded.statistics.keys().isdisjoint(found.tensors) for found in find_ties(folded).sets)
    if limit is None:
        after, _ = equalize(model, scaling="weights")
    else:
        with pytest.warns(PtqjaxWarning) if is_unknown else nullcontext():
            after, _ = equalize(model, limit=limit)
    assert_same_function(after, model, 1e-11, seed)  # scales of e^10 and back cost a digit


# --- kernels


def test_kernels_differentiate_batch_and_compile() -> None:
    r1, r2, size = jnp.array([1.0, 2.0, 0.0, 4.0]), jnp.array([3.0, 1.0, 2.0, 0.5]), jnp.array([1.0, 2.0, 0.5, 9.0])
    gradient = jax.grad(lambda r: log_scales(r, r2, size).sum())(r1)
    assert bool(jnp.isfinite(gradient).all())
    batched = jax.vmap(lambda r: log_scales(r, r2))(jnp.stack([r1, 2 * r1]))
    assert batched.shape == (2, 4)
    compiled = jax.jit(log_scales)(r1, r2, size)
    np.testing.assert_allclose(compiled, log_scales(*map(np.asarray, (r1, r2, size))), rtol=1e-6)


def test_scales_without_magnitudes_balance_and_dead_channels_follow() -> None:
    r1, r2 = np.array([4.0, 1.0, 0.0]), np.array([1.0, 1.0, 3.0])
    scale = log_scales(r1, r2)
    np.testing.assert_allclose(scale, [np.log(2), 0.0, np.log(2) / 2])
    assert imbalance(r1, r2, scale) < 1e-15


def test_a_common_factor_is_found_at_once() -> None:
    neighbours = np.array([[False, True], [True, False]])
    g = common_factors(np.array([1.0, 0.0]), neighbours)
    np.testing.assert_allclose(2 * g - g[::-1], [1.0, 0.0], atol=1e-15)


def test_tap_ranges_are_maxima_over_taps() -> None:
    view = np.arange(12.0).reshape(1, 2, 2, 3) - 5
    np.testing.assert_array_equal(tap_ranges(view), np.abs(view).max(axis=3))


# --- the real networks


@pytest.mark.parametrize(("name", "count"), [("mobilenet_v2_1.0_224", 42), ("mobilenet_v1_0.25_224", 27)])
def test_real_networks_are_equalized_in_no_time(shared: Path, name: str, count: int) -> None:
    model = ptqjax.read(shared / "models" / f"{name}.onnx")
    start = time.process_time()
    after, report = equalize(model)
    assert time.process_time() - start < 15.0  # 0.2 s alone; 5 s were seen with type checks and a busy machine
    assert sum(scaled(report)) == count
    _, second = equalize(after)
    assert not any(record.done for record in second)


def test_scaling_that_is_switched_off_says_so_at_every_interface():
    model = mobile_block()
    _, report = equalize(model)
    left, left_report = equalize(model, scaling="off")
    looked_at = [record.where[0] for record in report if record.transform == "scale_channels" and record.done]
    off = [record for record in left_report if record.transform == "scale_channels"]
    assert looked_at
    assert [record.where[0] for record in off] == looked_at
    assert not any(record.done for record in off)
    assert "Min" not in {node.op_type for node in left.graph.nodes}
    assert_same_function(left, model, 1e-12)
