"""The law of folding to scale: the integers of a folded weight are those before, up to sign."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqjax.encodings.encoding import Encoding, along_axis, dequantize, make_encoding, quantize
from ptqjax.ir import Model
from ptqjax.kernels.mirroring import mirrored_codes, mirrored_zero_point, multiplied_scale
from ptqjax.ranges.fold_to_scale import fold_to_scale
from ptqjax.simulation import simulate
from tests.models import Chain, assert_same_function, random_input
from tests.test_fold import num_norms

AXES = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0, "Gemm transposed": 1, "MatMul": -1}


def chain_of(kind: str, *, seed: int = 0, dtype: type = np.float32, group: int = 1) -> Chain:
    chain = Chain(4, rank=2 if kind.startswith("Conv") else 0, seed=seed, dtype=dtype)
    if kind == "Conv":
        chain.conv(6, bias=True, group=group, pad=1)
    elif kind == "ConvTranspose":
        chain.conv_transpose(6, group=group)
    elif kind == "MatMul":
        chain.matmul(6)
    else:
        chain.gemm(6, alpha=-0.5, beta=2.0, trans_b=int(kind == "Gemm"))
    return chain.norm()


def encoding_of(weight: np.ndarray, axis: int, dtype: str, *, centred: bool) -> Encoding:
    """Scales per channel that let a few codes be clipped at either end."""
    others = tuple(other for other in range(weight.ndim) if other != axis % weight.ndim)
    bits = int(dtype.removeprefix("u").removeprefix("int"))
    low, high = weight.min(axis=others), weight.max(axis=others)
    if centred:
        scale = 0.8 * np.maximum(-low, high) / 2 ** (bits - 1)
        return make_encoding(scale, np.zeros_like(scale), dtype=dtype, axis=axis)
    scale = 0.8 * (high - low) / (2**bits - 1)
    zero_point = np.clip(np.round((0.0 if dtype.startswith("u") else -(2 ** (bits - 1))) - low / scale), -8, 7)
    return make_encoding(scale, np.abs(zero_point) if dtype.startswith("u") else zero_point, dtype=dtype, axis=axis)


def law(model: Model, kind: str, dtype: str, *, centred: bool) -> None:
    layer, norm = model.graph.nodes
    name = layer.inputs[1]
    weight = np.asarray(model.params[name])
    old = encoding_of(weight, AXES[kind], dtype, centred=centred)
    folded, encodings, (record,) = fold_to_scale(model, {name: old})
    assert record.done
    assert num_norms(folded) == 0
    gamma, _, _, variance = (np.float64(model.params[key]) for key in norm.inputs[1:5])
    k = gamma / np.sqrt(variance + norm.attribute("epsilon")) * layer.attribute("alpha", 1.0)
    new = encodings[name]
    k = along_axis(k, old, weight.shape)
    before, after = quantize(weight, old), quantize(np.asarray(folded.params[name]), new)
    sign = np.sign(k)
    zero_points = (along_axis(found.zero_point, found, weight.shape) for found in (new, old))
    new_zero, old_zero = zero_points
    expected = new_zero + sign * (before - old_zero)
    has_no_mirror = centred and -old.qmin > old.qmax
    is_end = has_no_mirror & (k < 0) & ((before == old.qmin) | ((before == old.qmax) & (after == old.qmin)))
    np.testing.assert_array_equal(after[~is_end], expected[~is_end])
    np.testing.assert_array_equal(np.abs(after - expected)[is_end], 1)
    assert record.after["a step off"] == np.count_nonzero(is_end)
    exact, found = k * dequantize(before, old), dequantize(after, new)
    np.testing.assert_allclose(found[~is_end], exact[~is_end], rtol=3e-7)
    assert_same_function(folded, model, 2e-5)


@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize(("dtype", "centred"), [("int8", True), ("int8", False), ("uint8", False), ("int4", True)])
def test_a_folded_weight_keeps_its_integers_up_to_sign(kind: str, dtype: str, *, centred: bool) -> None:
    law(chain_of(kind).build(), kind, dtype, centred=centred)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(list(AXES)),
    seed=st.integers(0, 10**6),
    grid=st.sampled_from([("int8", True), ("int8", False), ("uint8", False), ("int4", True), ("uint4", False)]),
)
def test_every_variant_keeps_its_integers_up_to_sign(kind: str, seed: int, grid: tuple[str, bool]) -> None:
    law(chain_of(kind, seed=seed).build(), kind, grid[0], centred=grid[1])


def test_ties_stay_on_their_side() -> None:
    """Weights that lie on ties of the grid: the product with k is rounded, and would fall on either side."""
    model = chain_of("Conv").build()
    name = model.graph.nodes[0].inputs[1]
    shape = model.params[name].shape
    scale = np.array([0.1, 0.3, 0.7, 1.1, 1.3, 1.7], np.float32)
    codes = np.random.default_rng(0).integers(-100, 100, size=shape) + 0.5
    weight = np.float32(codes * scale.reshape(-1, 1, 1, 1))
    old = make_encoding(scale, np.zeros(6), dtype="int8", axis=0)
    model = model.replace(params=model.params | {name: weight})
    folded, encodings, (record,) = fold_to_scale(model, {name: old})
    assert record.after["moved"] > 0
    gamma = model.params[model.graph.nodes[1].inputs[1]].reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(
        quantize(folded.params[name], encodings[name]), np.sign(gamma) * quantize(weight, old)
    )
    exact, _, _ = fold_to_scale(model, {})
    np.testing.assert_allclose(folded.params[name], exact.params[name], rtol=1e-6)


def test_the_quantized_function_is_the_one_before() -> None:
    model = Chain(4, dtype=np.float32).conv(6, bias=True, pad=1).norm().add("Relu").build()
    name = model.graph.nodes[0].inputs[1]
    encodings = {name: encoding_of(model.params[name], 0, "int4", centred=False)}
    folded, new, _ = fold_to_scale(model, encodings)
    x = random_input(model, 0)
    (before,) = simulate(model, encodings)(model.params, encodings, x).values()
    (after,) = simulate(folded, new)(folded.params, new, x).values()
    (plain,) = simulate(model, {})(model.params, {}, x).values()
    np.testing.assert_allclose(after, before, atol=1e-5 * float(np.abs(before).max()))
    assert float(np.abs(np.asarray(plain) - before).max()) > 1e-2


def test_channels_that_a_norm_switches_off_keep_a_scale() -> None:
    model = chain_of("Conv").build()
    layer, norm = model.graph.nodes
    gamma = np.array(model.params[norm.inputs[1]])
    gamma[2] = 0
    model = model.replace(params=model.params | {norm.inputs[1]: gamma})
    old = encoding_of(model.params[layer.inputs[1]], 0, "int8", centred=True)
    folded, encodings, _ = fold_to_scale(model, {layer.inputs[1]: old})
    new = encodings[layer.inputs[1]]
    assert new.scale[2] == old.scale[2]
    assert not quantize(folded.params[layer.inputs[1]], new)[2].any()


def test_norms_in_a_row_multiply() -> None:
    model = chain_of("Conv").norm().build()
    name = model.graph.nodes[0].inputs[1]
    old = encoding_of(model.params[name], 0, "int8", centred=False)
    folded, encodings, report = fold_to_scale(model, {name: old})
    assert [record.done for record in report] == [True, True]
    signs = np.prod([np.sign(model.params[node.inputs[1]]) for node in model.graph.nodes[1:]], axis=0)
    before, after = quantize(model.params[name], old), quantize(folded.params[name], encodings[name])
    mirrored = old.qmin + old.qmax - before
    np.testing.assert_array_equal(after, np.where(signs.reshape(-1, 1, 1, 1) < 0, mirrored, before))


def left(chain: Chain, encodings: dict[str, Encoding], reason: str) -> None:
    model = chain.build()
    folded, kept, report = fold_to_scale(model, encodings)
    assert folded.graph == model.graph
    assert kept.keys() == encodings.keys()
    assert [record.done for record in report] == [False]
    assert reason in report[0].reason


def test_scales_that_cannot_be_multiplied_leave_the_norm() -> None:
    chain = chain_of("Conv")
    name = chain.nodes[0].inputs[1]
    left(chain, {name: make_encoding(0.1, 0, dtype="int8")}, "one scale serves all")
    left(chain, {name: make_encoding(np.ones(4), np.zeros(4), dtype="int8", axis=1)}, "along the inputs")
    blocks = make_encoding(np.ones((6, 2, 3, 3)), np.zeros((6, 2, 3, 3)), dtype="int8", axis=1, block_size=2)
    left(chain, {name: blocks}, "by blocks")
    grouped = chain_of("ConvTranspose", group=2)
    name = grouped.nodes[0].inputs[1]
    left(grouped, {name: make_encoding(np.ones(3), np.zeros(3), dtype="int8", axis=1)}, "of all groups")


def test_what_is_rounded_between_leaves_the_norm() -> None:
    chain = chain_of("Conv")
    left(chain, {chain.nodes[0].output: make_encoding(0.1, 0, dtype="uint8")}, "has an encoding")
    left(chain, {chain.nodes[0].inputs[2]: make_encoding(0.1, 0, dtype="int32")}, "has an encoding")


def test_a_norm_ahead_of_its_layer_is_left() -> None:
    left(Chain(4, dtype=np.float32).norm().conv(6), {}, "no linear layer")


def test_a_weight_without_an_encoding_folds_and_others_keep_theirs() -> None:
    chain = chain_of("Conv")
    model = chain.build()
    result = {model.graph.outputs[0].name: make_encoding(0.1, 3, dtype="uint8")}
    folded, encodings, (record,) = fold_to_scale(model, result)
    assert num_norms(folded) == 0
    assert encodings == result
    assert "no encoding" in record.reason


def test_folding_to_scale_works_under_jit_and_its_kernels_differentiate_and_batch() -> None:
    model = chain_of("Conv").build()
    name = model.graph.nodes[0].inputs[1]
    encodings = {name: encoding_of(model.params[name], 0, "int8", centred=False)}
    expected = fold_to_scale(model, encodings)[1]

    def scales(params: dict) -> dict:
        return fold_to_scale(model.replace(params=params), encodings)[1]

    for found, value in zip(*map(jax.tree.leaves, (jax.jit(scales)(model.params), expected)), strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-6)
    assert float(jax.grad(lambda k: multiplied_scale(2.0, k))(-3.0)) == -2.0
    factors = jax.numpy.array([-1.0, 0.0, 2.0])
    np.testing.assert_array_equal(
        jax.vmap(lambda k: mirrored_codes(jax.numpy.float32(5), 3.0, k, 0.0, 15.0))(factors), [10, 3, 5]
    )
    np.testing.assert_array_equal(jax.jit(mirrored_zero_point)(3.0, factors, 0.0, 15.0), [12, 3, 3])
