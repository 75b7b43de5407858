"""Pools: old versions, Indices and odd settings against ONNX Runtime; layouts, derivatives, inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.ops import find_lowering
from ptqjax.ops.layout import to_channels_last, to_onnx
from ptqjax.ops.pooling import global_lp_pool, lrn, max_pool, max_unpool
from tests.single_node import assert_as_in_onnxruntime

_SUMS = 1e-5  # sums in another order
_WINDOW = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 2, 1]}


def _values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("storage_order", [0, 1])
@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        ((9,), {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
        ((7, 8), _WINDOW),
        ((7, 8), _WINDOW | {"ceil_mode": 1, "dilations": [1, 2]}),
        ((5, 4, 6), {"kernel_shape": [2, 3, 2], "strides": [1, 2, 2], "pads": [0, 1, 1, 1, 0, 0]}),
    ],
)
def test_indices_are_onnxruntimes(sizes, window, storage_order):
    x = _values(2, 3, *sizes).round(1)  # with equal elements: the first one counts
    settings = {"outputs": (np.float32, np.int64), "storage_order": storage_order}
    assert_as_in_onnxruntime("MaxPool", [x], atol=0, opset=12, **settings, **window)
    if "ceil_mode" not in window:
        assert_as_in_onnxruntime("MaxPool", [x], atol=0, opset=8, **settings, **window)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_integers_are_pooled_with_their_indices(dtype):
    x = np.random.default_rng(0).integers(np.iinfo(dtype).min, np.iinfo(dtype).min + 9, (1, 2, 7, 8)).astype(dtype)
    assert_as_in_onnxruntime("MaxPool", [x], atol=0, opset=12, outputs=(dtype, np.int64), **_WINDOW)
    assert_as_in_onnxruntime("MaxPool", [x], atol=0, opset=12, outputs=(dtype,), **_WINDOW)


def test_padding_is_never_the_largest():
    x = np.full((1, 1, 4, 5), -np.inf, np.float32)
    values, indices = max_pool(x, num_node_outputs=2, **_WINDOW)
    assert np.all(np.isneginf(values))
    assert np.all((indices >= 0) & (indices < x.size))


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding_is_onnxruntimes(auto_pad):
    window = {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": auto_pad}
    assert_as_in_onnxruntime("MaxPool", [_values(1, 2, 7, 8)], atol=0, opset=10, **window)
    assert_as_in_onnxruntime("AveragePool", [_values(1, 2, 7, 8)], atol=_SUMS, opset=10, **window)
    assert_as_in_onnxruntime("LpPool", [_values(1, 2, 7, 8)], atol=_SUMS, opset=11, **window)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool", "LpPool"])
def test_ceil_mode_holds_with_automatic_padding_too(op_type, auto_pad):
    window = {"kernel_shape": [3, 2], "strides": [3, 2], "auto_pad": auto_pad, "ceil_mode": 1}
    assert_as_in_onnxruntime(op_type, [_values(1, 2, 4, 7)], atol=_SUMS, opset=18, **window)


@pytest.mark.parametrize("count_include_pad", [0, 1])
@pytest.mark.parametrize(
    ("opset", "more"),
    [(7, {}), (10, {"ceil_mode": 1}), (11, {"ceil_mode": 1}), (19, {"ceil_mode": 1, "dilations": [2, 1]})],
)
def test_means_are_onnxruntimes(opset, more, count_include_pad):
    settings = {"count_include_pad": count_include_pad, **_WINDOW, **more}
    assert_as_in_onnxruntime("AveragePool", [_values(2, 3, 8, 9)], atol=_SUMS, opset=opset, **settings)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize(("opset", "more"), [(7, {}), (11, {}), (18, {"ceil_mode": 1, "dilations": [2, 1]})])
def test_norms_are_onnxruntimes(opset, more, p):
    assert_as_in_onnxruntime("LpPool", [_values(2, 3, 8, 9)], atol=_SUMS, opset=opset, p=p, **_WINDOW, **more)


@pytest.mark.parametrize("op_type", ["GlobalMaxPool", "GlobalLpPool", "GlobalAveragePool"])
@pytest.mark.parametrize("sizes", [(5,), (4, 6), (3, 2, 4)])
def test_pools_over_planes_are_onnxruntimes(op_type, sizes):
    assert_as_in_onnxruntime(op_type, [_values(2, 3, *sizes)], atol=_SUMS, opset=7)


def test_a_norm_over_planes_has_any_power():
    x = _values(2, 3, 4, 5)
    expected = (np.abs(x.astype(np.float64)) ** 3).sum((2, 3), keepdims=True) ** (1 / 3)
    np.testing.assert_allclose(global_lp_pool(x, p=3), expected, rtol=_SUMS)


def test_lrn_is_onnxruntimes():
    settings = {"size": 5, "alpha": 0.3, "beta": 0.6, "bias": 1.5}
    assert_as_in_onnxruntime("LRN", [_values(2, 7, 3, 4)], atol=_SUMS, opset=7, **settings)


@pytest.mark.parametrize("size", [2, 4, 27])
def test_an_even_number_of_neighbours_has_one_more_behind(size):
    x = _values(2, 30, 3, seed=1)
    sums = [
        np.square(x[:, max(0, c - (size - 1) // 2) : c + size // 2 + 1].astype(np.float64)).sum(1) for c in range(30)
    ]
    expected = x / (2 + 0.5 / size * np.stack(sums, 1)) ** 0.75
    np.testing.assert_allclose(lrn(x, size=size, alpha=0.5, bias=2.0), expected, rtol=_SUMS)


@pytest.mark.parametrize(
    ("op_type", "settings"),
    [
        ("MaxPool", {"num_node_outputs": 2, "storage_order": 1, **_WINDOW}),
        ("AveragePool", _WINDOW),
        ("LpPool", {"p": 3, **_WINDOW}),
        ("GlobalMaxPool", {}),
        ("GlobalLpPool", {"p": 3}),
        ("LRN", {"size": 3, "alpha": 0.5}),
    ],
)
def test_channels_last_is_the_same(op_type, settings):
    lowering = find_lowering(op_type, opset=22)
    x = jnp.asarray(_values(2, 3, 6, 7))
    expected = jax.tree.leaves(lowering.function(x, **settings))
    found = jax.tree.leaves(lowering.channels_last.function(to_channels_last(x), **settings))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(to_onnx(one), other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_node_outputs", [1, 2])
def test_the_gradient_of_a_largest_element_goes_to_its_place(num_node_outputs):
    x = jnp.asarray(_values(1, 2, 5, 6))

    def total(image):
        return jnp.sum(jax.tree.leaves(max_pool(image, num_node_outputs=num_node_outputs, **_WINDOW))[0])

    _, indices = max_pool(x, num_node_outputs=2, **_WINDOW)
    expected = np.bincount(np.ravel(indices), minlength=x.size).reshape(x.shape)
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(x), expected)


def test_unpooling_is_an_inverse_on_what_was_pooled():
    window = {"kernel_shape": [2, 3], "strides": [2, 3]}
    x = _values(2, 3, 6, 9) + 10
    values, indices = max_pool(x, num_node_outputs=2, **window)
    unpooled = jax.jit(lambda v, i: max_unpool(v, i, **window))(values, indices)
    assert unpooled.shape == x.shape
    np.testing.assert_array_equal(max_pool(unpooled, **window), values)
    np.testing.assert_array_equal(np.asarray(unpooled)[np.asarray(unpooled) > 0].sum(), np.asarray(values).sum())


def test_unpooling_is_onnxruntimes():
    window = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 0, 0, 1]}
    values, indices = max_pool(_values(1, 2, 7, 7), num_node_outputs=2, **window)
    inputs = [np.asarray(values), np.asarray(indices, np.int64)]
    assert_as_in_onnxruntime("MaxUnpool", inputs, atol=0, opset=11, **window)


@pytest.mark.parametrize(
    ("op_type", "domain", "attributes"),
    [
        ("LpPool", "", {"kernel_shape": [2, 2]}),
        ("LpPool", "", {"kernel_shape": [2, 2], "p": 3}),
        ("GlobalLpPool", "", {}),
        ("MeanVarianceNormalization", "", {}),
        ("Normalizer", "ai.onnx.ml", {"norm": "L2"}),
    ],
)
def test_roots_have_a_finite_gradient_at_zero(op_type, domain, attributes):
    lowering = find_lowering(op_type, opset=18, domain=domain).function
    gradient = jax.grad(lambda x: jnp.sum(lowering(x, **attributes)))(jnp.zeros((1, 2, 4, 4)))
    assert np.isfinite(gradient).all()
