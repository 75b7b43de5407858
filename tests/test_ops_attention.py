"""Attention: the laws behind its options, and ONNX Runtime where it has the operator."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import ptqjax
from ptqjax.errors import ModelError
from ptqjax.ops import find_lowering
from tests.single_node import assert_as_in_onnxruntime, by_us, single_node

_ROUNDING = 2e-6  # of float32 sums of values around 1


def _normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def _attention(*operands, opset=24, num_outputs=1, **attributes):
    return by_us(
        single_node("Attention", operands, opset=opset, outputs=(np.float32,) * num_outputs, **attributes), operands
    )


_Q, _K, _V = _normal(2, 4, 3, 6), _normal(2, 2, 5, 6), _normal(2, 2, 5, 7)


def test_groups_of_queries_share_a_head_of_keys():
    """As if each head of keys and values were there once for each of its queries."""
    repeated = [np.repeat(x, 2, axis=1) for x in (_K, _V)]
    np.testing.assert_allclose(_attention(_Q, _K, _V)[0], _attention(_Q, *repeated)[0], atol=_ROUNDING)


def test_causal_is_a_mask_of_the_lower_triangle():
    mask = np.tri(3, 5, dtype=bool)
    causal = _attention(_Q, _K, _V, is_causal=1)
    np.testing.assert_allclose(causal[0], _attention(_Q, _K, _V, mask)[0], atol=_ROUNDING)


def test_a_window_of_one_takes_the_value_beside_the_query():
    y = _attention(_Q, _K, _V, opset=25, left_window_size=0, right_window_size=0)[0]
    np.testing.assert_allclose(y, np.repeat(_V[:, :, :3], 2, axis=1), atol=_ROUNDING)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (4, 1, 5), (2, 1, 3, 5), (1, 4, 1, 5)])
@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_masks_broadcast_like_arrays(shape, dtype):
    mask = (_normal(*shape) > -0.5) if dtype is bool else _normal(*shape)
    full = np.broadcast_to(mask, (2, 4, 3, 5))
    np.testing.assert_allclose(_attention(_Q, _K, _V, mask)[0], _attention(_Q, _K, _V, full)[0], atol=_ROUNDING)


def test_a_mask_that_is_too_short_forbids_the_rest():
    short = np.ones((3, 4), bool)
    np.testing.assert_allclose(
        _attention(_Q, _K, _V, short)[0], _attention(_Q, _K[:, :, :4], _V[:, :, :4])[0], atol=_ROUNDING
    )


def test_the_past_is_as_if_it_came_with_the_rest():
    past = _attention(_Q, _K[:, :, 2:], _V[:, :, 2:], None, _K[:, :, :2], _V[:, :, :2], num_outputs=3)
    np.testing.assert_allclose(past[0], _attention(_Q, _K, _V)[0], atol=_ROUNDING)
    np.testing.assert_array_equal(past[1], _K)
    np.testing.assert_array_equal(past[2], _V)


def test_packed_heads_are_heads():
    q, k, v = (x.swapaxes(1, 2).reshape(2, x.shape[2], -1) for x in (_Q, _K, _V))
    y = _attention(q, k, v, q_num_heads=4, kv_num_heads=2)[0]
    np.testing.assert_allclose(y, _attention(_Q, _K, _V)[0].swapaxes(1, 2).reshape(2, 3, -1), atol=_ROUNDING)


@pytest.mark.parametrize("mode", range(4))
def test_scores_are_given_at_each_stage(mode):
    mask = np.tri(3, 5, dtype=bool)
    expected = np.einsum("bhsd,bhtd->bhst", _Q, np.repeat(_K, 2, axis=1), dtype=np.float64) / np.sqrt(6)
    expected = 2 * np.tanh(expected / 2) if mode > 0 else expected
    expected = np.where(mask, expected, -np.inf) if mode > 1 else expected
    expected = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True) if mode > 2 else expected
    scores = _attention(_Q, _K, _V, mask, num_outputs=4, softcap=2.0, qk_matmul_output_mode=mode)[3]
    np.testing.assert_allclose(scores, expected, atol=_ROUNDING)


def test_a_query_that_sees_nothing_gets_nothing_and_gives_no_gradient():
    mask = np.array([[True] * 5, [False] * 5, [True] * 5])
    model = ptqjax.read(single_node("Attention", [_Q, _K, _V, mask], opset=23))

    def total(q):
        return jnp.sum(jnp.square(ptqjax.apply(model.graph, {}, {"x0": q, "x1": _K, "x2": _V, "x3": mask})["y0"]))

    gradient = np.asarray(jax.grad(total)(jnp.asarray(_Q)))
    assert np.all(gradient[:, :, 1] == 0)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[:, :, 0]).min() > 0
    np.testing.assert_array_equal(_attention(_Q, _K, _V, mask, opset=23)[0][:, :, 1], 0)


def test_the_number_of_valid_keys_may_be_data_under_jit():
    operands = [_Q, _K, _V, None, None, None, np.array([2, 5], np.int64)]
    proto = single_node("Attention", operands, opset=24, is_causal=1)
    np.testing.assert_allclose(by_us(proto, operands, jit=True)[0], by_us(proto, operands)[0], atol=_ROUNDING)


@pytest.mark.parametrize("attributes", [{}, {"is_causal": 1}, {"scale": 0.3, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("mask", [None, bool, np.float32], ids=str)
def test_attention_is_the_runtimes(mask, attributes):
    masks = {None: None, bool: _normal(3, 5) > -1, np.float32: _normal(3, 5)}
    if mask is bool:
        masks[bool][:, 0] = True
    assert_as_in_onnxruntime("Attention", [_Q, _K, _V, masks[mask]], atol=1e-5, opset=23, **attributes)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("size", [0, 4])
def test_rotation_depends_on_the_distance_of_positions_alone(interleaved, size):
    """Products of rotated vectors are those of vectors that lie both ten positions further."""
    angles = np.arange(32)[:, None] * 0.5 ** np.arange((size or 6) // 2)
    tables = [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]

    def products(first):
        positions = np.tile(np.arange(first, first + 3), (2, 1))
        operands = [_Q, *tables, positions]
        attributes = {"interleaved": interleaved, "rotary_embedding_dim": size}
        y = by_us(single_node("RotaryEmbedding", operands, opset=23, **attributes), operands)[0]
        return np.einsum("bhsd,bhtd->bhst", y, y)

    np.testing.assert_allclose(products(10), products(0), atol=1e-5)


@pytest.mark.parametrize(
    ("packed", "interleaved", "size", "offset"),
    [(False, 0, 0, False), (False, 1, 4, True), (True, 1, 0, True), (True, 0, 4, False)],
)
def test_microsofts_rotary_embedding_is_the_runtimes(packed, interleaved, size, offset):
    x = _Q.swapaxes(1, 2).reshape(2, 3, 24) if packed else _Q
    tables = [_normal(16, (size or 6) // 2, seed=seed) for seed in (1, 2)]
    positions = np.array([4]) if offset else np.array([[0, 3, 7], [1, 2, 9]])
    attributes = {"interleaved": interleaved, "rotary_embedding_dim": size}
    attributes |= {"num_heads": 4} if size else {}
    assert_as_in_onnxruntime(
        "RotaryEmbedding", [x, positions, *tables], atol=_ROUNDING, opset=1, domain="com.microsoft", **attributes
    )


def test_linear_attention_without_gates_is_attention_without_softmax():
    q, k, v = (_normal(2, 5, 4 * 3, seed=seed) for seed in range(3))
    operands = [q, k, v]
    attributes = {"update_rule": "linear", "q_num_heads": 4, "kv_num_heads": 4, "scale": 1.0}
    y = by_us(single_node("LinearAttention", operands, opset=27, outputs=(np.float32,) * 2, **attributes), operands)[0]
    heads = [x.reshape(2, 5, 4, 3) for x in (q, k, v)]
    scores = np.einsum("bshd,bthd->bhst", heads[0], heads[1]) * np.tri(5)
    np.testing.assert_allclose(y.reshape(2, 5, 4, 3), np.einsum("bhst,bthd->bshd", scores, heads[2]), atol=1e-5)


def test_linear_attention_names_the_input_that_its_rule_needs():
    operands = [_normal(2, 5, 12)] * 3
    proto = single_node("LinearAttention", operands, opset=27, update_rule="gated", q_num_heads=4, kv_num_heads=4)
    with pytest.raises(ModelError, match="update rule 'gated' needs input 'decay'"):
        by_us(proto, operands)


def test_flex_attention_takes_functions():
    lowering = find_lowering("FlexAttention", opset=1, domain="ai.onnx.preview").function
    y = lowering(_Q, _K, _V, score_mod=lambda scores: (scores * 0,), prob_mod=lambda weights: (weights * 2,))
    expected = np.repeat(2 * _V.mean(axis=2, keepdims=True), 2, axis=1)
    np.testing.assert_allclose(y, np.broadcast_to(expected, (2, 4, 3, 7)), atol=_ROUNDING)


def test_scores_of_static_bfloat16_are_bfloat16():
    """NumPy's product of bfloat16 with a Python float is float32."""
    x = _normal(1, 2, 3, 4).astype(ml_dtypes.bfloat16)
    with jax.ensure_compile_time_eval():
        results = find_lowering("Attention", opset=24).function(x, x, x)
    assert [result.dtype for result in results] == [ml_dtypes.bfloat16] * 4


@pytest.mark.parametrize(("shape", "heads"), [((0, 2, 3, 4), {}), ((0, 3, 8), {"q_num_heads": 2, "kv_num_heads": 2})])
def test_attention_of_no_samples_is_empty(shape, heads):
    x = jnp.ones(shape)
    assert find_lowering("Attention", opset=24).function(x, x, x, **heads)[0].shape == shape
