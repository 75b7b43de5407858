"""Laws of folding: the function stays, what cannot be folded stays and says why, damaged numbers are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqjax.errors import ModelError
from ptqjax.ir import Model, text
from ptqjax.kernels.folding import batch_norm_as_affine, fold_after, fold_before
from ptqjax.kernels.grouped import grouped_view, ungrouped_view
from ptqjax.transforms import fold_batch_norms
from tests.models import Chain, assert_same_function, build, node


def num_norms(model: Model) -> int:
    return sum(found.op_type == "BatchNormalization" for found in model.graph.nodes)


def assert_folds(model: Model, tolerance: float = 1e-12) -> Model:
    before = text(model)
    folded, report = fold_batch_norms(model)
    assert num_norms(folded) == 0
    assert all(record.done for record in report)
    assert sum(record.transform == "fold_batch_norms" for record in report) == num_norms(model)
    assert text(model) == before, "the caller's model is unchanged"
    assert_same_function(folded, model, tolerance)
    return folded


def assert_leaves(model: Model, reason: str) -> None:
    folded, report = fold_batch_norms(model)
    assert num_norms(folded) == num_norms(model)
    assert [record.done for record in report] == [False] * len(report)
    assert reason in report[0].reason
    assert_same_function(folded, model, 1e-12)


def assert_becomes_affine(model: Model, reason: str, tolerance: float = 1e-12) -> Model:
    before = text(model)
    folded, report = fold_batch_norms(model)
    assert num_norms(folded) == 0
    assert [(record.done, record.what) for record in report] == [(True, "became a per-channel affine")]
    assert reason in report[0].reason
    assert text(model) == before, "the caller's model is unchanged"
    assert_same_function(folded, model, tolerance)
    assert fold_batch_norms(folded)[1] == (), "a second run has nothing to do"
    return folded


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("group", "pad"), [(None, 0), (1, 1), (2, 1), (4, 1)])
def test_fold_behind_a_convolution_preserves_the_function(
    *, rank: int, bias: bool, group: int | None, pad: int
) -> None:
    size = 4 if rank == 3 else 6
    assert_folds(Chain(4, rank=rank, size=size).conv(8, group=group, pad=pad, bias=bias).norm().build())


@pytest.mark.parametrize(
    ("group", "channels", "rank"), [(1, 6, 2), (2, 6, 2), (4, 8, 2), (4, 4, 1), (1, 3, 3), (4, 8, 3)]
)
def test_fold_behind_a_transposed_convolution_preserves_the_function(group: int, channels: int, rank: int) -> None:
    assert_folds(Chain(4, rank=rank, size=4).conv_transpose(channels, group=group, bias=group == 2).norm().build())


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 3.0), (2.0, 0.0)])
def test_fold_behind_a_gemm_heeds_alpha_and_beta(trans_b: int, alpha: float, beta: float) -> None:
    assert_folds(Chain(5, rank=0).gemm(7, trans_b=trans_b, alpha=alpha, beta=beta).norm().build())


@pytest.mark.parametrize("bias", [False, True])
def test_fold_behind_a_matmul_gives_a_gemm(*, bias: bool) -> None:
    folded = assert_folds(Chain(5, rank=0).matmul(7, bias=bias).norm().build())
    assert [found.op_type for found in folded.graph.nodes] == (["MatMul", "Add"] if bias else ["Gemm"])


def test_fold_leaves_a_matmul_whose_channels_are_not_axis_1() -> None:
    model = Chain(5, rank=1, size=5).matmul(5).norm().build()
    assert_leaves(model, "axis 1 may not be the layer's channels")


@pytest.mark.parametrize("group", [None, 1, 2, 4])
def test_fold_ahead_of_an_unpadded_convolution_preserves_the_function(group: int | None) -> None:
    assert_folds(Chain(4).norm().conv(8, group=group, bias=True).build())


def test_fold_ahead_of_a_gemm_preserves_the_function() -> None:
    assert_folds(Chain(4, rank=0).norm().gemm(3, alpha=0.5, beta=2.0).build())


@pytest.mark.parametrize("settings_", [{"pad": 1}, {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}])
def test_fold_ahead_leaves_a_convolution_that_pads(settings_: dict) -> None:
    assert_becomes_affine(Chain(4).norm().conv(8, **settings_).build(), "pads with zeros")


def test_fold_ahead_of_padding_is_exact_where_the_shift_is_zero() -> None:
    model = Chain(4).norm().conv(8, pad=1).build()
    mean, beta = (model.params[name] for name in (model.graph.nodes[0].inputs[3], model.graph.nodes[0].inputs[2]))
    zeros = {model.graph.nodes[0].inputs[i]: np.zeros_like(beta) for i in (2, 3)}
    assert mean.any()
    assert_folds(model.replace(params=model.params | zeros))


def test_norms_in_a_row_fold_into_one_layer() -> None:
    assert_folds(Chain(4).conv(4, pad=1).norm().norm().build())
    assert_folds(Chain(4).norm().norm().conv(4).build())


def test_norms_on_both_sides_fold_into_one_layer() -> None:
    assert_folds(Chain(4).norm().conv(4, bias=True).norm().build())


def test_fold_leaves_a_layer_whose_output_is_a_graph_output() -> None:
    chain = Chain(4).conv(4)
    after = assert_becomes_affine(chain.norm().build(chain.nodes[0].output), "is a graph output")
    assert [found.op_type for found in after.graph.nodes] == ["Conv", "Mul", "Add"]


def test_fold_leaves_a_layer_with_another_reader() -> None:
    chain = Chain(4).conv(4).norm()
    assert_becomes_affine(chain.add("Add", chain.nodes[0].output).build(), "read elsewhere")


def test_fold_does_not_touch_a_shared_weight() -> None:
    chain = Chain(4).conv(4).norm()
    chain.add("Conv", chain.nodes[0].inputs[1])
    assert_leaves(chain.build(), "shared")


def test_fold_does_not_touch_a_shared_bias() -> None:
    chain = Chain(4).conv(4, bias=True).norm()
    chain.add("Relu").add("Conv", chain.param("w", np.ones((4, 4, 1, 1))), chain.nodes[0].inputs[2])
    assert_leaves(chain.build(), "shared")


def test_fold_leaves_a_norm_in_training_mode() -> None:
    chain = Chain(4).conv(4).norm(training_mode=1)
    folded, report = fold_batch_norms(chain.build())
    assert num_norms(folded) == 1
    assert "training mode" in report[0].reason


def test_fold_leaves_a_norm_with_computed_parameters() -> None:
    chain = Chain(4).conv(4).norm()
    name = chain.nodes[-1].inputs[1]
    chain.nodes.insert(0, node("Relu", ["raw"], name))
    chain.params["raw"] = chain.params.pop(name)
    assert_leaves(chain.build(), f"'{name}' is not a constant")


def test_folded_output_keeps_its_name_and_its_statistics() -> None:
    model = Chain(4).conv(4).norm().add("Relu").build()
    norm = model.graph.nodes[1]
    folded = assert_folds(model)
    assert folded.graph.nodes[0].output == norm.output
    known = folded.statistics[norm.output]
    np.testing.assert_array_equal(known.mean, model.params[norm.inputs[2]])
    np.testing.assert_array_equal(known.std, np.abs(model.params[norm.inputs[1]]))


def test_epsilon_of_zero_is_zero() -> None:
    model = Chain(4).conv(4).norm(epsilon=0.0).build()
    name = model.graph.nodes[1].inputs[4]
    assert_folds(model.replace(params=model.params | {name: np.full(4, 1e-6)}))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_bias_that_is_new_has_the_type_of_the_weight(dtype: type) -> None:
    # One rounding of weights and one of products each: a few units in the last place of the largest output.
    folded = assert_folds(Chain(4, dtype=dtype).conv(4).norm().build(), tolerance=16 * float(np.finfo(dtype).eps))
    assert {value.dtype for value in folded.params.values()} == {np.dtype(dtype)}


def test_fold_leaves_what_a_type_cannot_hold() -> None:
    model = Chain(4, dtype=np.float16).conv(4).norm(epsilon=1e-7).build()
    name = model.graph.nodes[1].inputs[4]
    big = {model.graph.nodes[1].inputs[1]: np.full(4, 6e4, np.float16), name: np.zeros(4, np.float16)}
    _, report = fold_batch_norms(model.replace(params=model.params | big))
    assert "float16 can hold" in report[0].reason


@pytest.mark.parametrize(
    ("index", "value", "message"), [(1, np.nan, "nan or inf"), (3, np.inf, "nan or inf"), (4, -1.0, "at least zero")]
)
def test_damaged_parameters_are_refused_by_name(index: int, value: float, message: str) -> None:
    model = Chain(4).conv(4).norm().build()
    name = model.graph.nodes[1].inputs[index]
    damaged = np.array(model.params[name])
    damaged[1] = value
    with pytest.raises(ModelError, match=f"'{name}'.*{message}"):
        fold_batch_norms(model.replace(params=model.params | {name: damaged}))


def test_a_second_run_changes_nothing() -> None:
    folded = assert_folds(Chain(3).conv(4, pad=1).norm().clip().depthwise().norm().build())
    again, report = fold_batch_norms(folded)
    assert again.graph == folded.graph
    assert report == ()


def test_fold_works_under_jit() -> None:
    model = Chain(3, dtype=np.float32).conv(4).norm().build()
    expected, _ = fold_batch_norms(model)
    found = jax.jit(lambda params: fold_batch_norms(model.replace(params=params))[0].params)(model.params)
    for name, value in expected.params.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), group=st.sampled_from([1, 2, 4]), inputs_first=st.booleans(), rank=st.integers(0, 3))
def test_the_grouped_view_has_an_inverse(*, seed: int, group: int, inputs_first: bool, rank: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(8, 4, *(3,) * rank))
    view = grouped_view(weight, groups=group, inputs_first=inputs_first)
    np.testing.assert_array_equal(ungrouped_view(view, weight.shape, inputs_first=inputs_first), weight)


def test_folding_kernels_differentiate_and_batch() -> None:
    view, ones = jnp.ones((2, 3, 2, 4)), jnp.ones(6)

    def weight_after(gamma: jax.Array) -> jax.Array:
        scale, shift = batch_norm_as_affine(gamma, ones, ones, ones, epsilon=1.0)
        folded, bias = fold_after(view, ones, scale, shift)
        return folded.sum() + bias.sum()

    assert bool(jnp.isfinite(jax.grad(weight_after)(ones)).all())
    assert jax.vmap(weight_after)(jnp.ones((5, 6))).shape == (5,)
    assert jax.jit(fold_before)(view, ones, jnp.ones(4), jnp.ones(4))[1].shape == (6,)


def test_each_node_is_known_by_its_tensor_not_by_its_name() -> None:
    model = Chain(4).conv(4).norm().build()
    assert {found.name for found in model.graph.nodes} == {""}
    assert_folds(build(model.graph.nodes, model.params, input_shape=("N", 4, 8, 8), outputs=["t1"], dtype=np.float64))
