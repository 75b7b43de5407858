"""Gathering, scattering, ordering and running sums: old opsets, negative and foreign indices, ties, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.ops import find_lowering
from tests.both_modes import assert_both_as_in_onnxruntime, assert_same, in_jit, in_numpy

_REDUCTIONS = ("none", "add", "mul", "max", "min")


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _drawn(*shape, low=-2, high=2, dtype=np.int64, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def _places_without_repeats(*shape, axis):
    """Indices that differ along `axis`: what is written twice is left open by ONNX."""
    return np.argsort(_random(*shape, seed=1), axis=axis).astype(np.int64)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gathering_along_an_axis_is_that_of_onnx_runtime(axis):
    x = _random(2, 3, 4)
    for opset, indices in ((11, _drawn(2, 2)), (13, np.array(-1)), (13, np.zeros((0, 2), np.int32))):
        assert_both_as_in_onnxruntime("Gather", [x, indices], opset=opset, data=(0, 1), axis=axis)
    for opset in (11, 13):
        fewer = _drawn(2, 2, 2, dtype=np.int32)
        assert_both_as_in_onnxruntime("GatherElements", [x, fewer], opset=opset, data=(0, 1), axis=axis)


@pytest.mark.parametrize(
    ("opset", "shape", "attributes"),
    [(11, (2, 3, 3), {}), (12, (2, 2, 1), {}), (12, (2, 2, 2), {"batch_dims": 1}), (13, (2, 3, 1), {"batch_dims": 2})],
)
def test_gathering_parts_is_that_of_onnx_runtime(opset, shape, attributes):
    assert_both_as_in_onnxruntime(
        "GatherND", [_random(2, 3, 4), _drawn(*shape)], opset=opset, data=(0, 1), **attributes
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("reduction", _REDUCTIONS)
def test_scattering_elements_is_that_of_onnx_runtime(axis, reduction):
    indices = _places_without_repeats(2, 2, 2, axis=axis) - 1
    settings = {"opset": 18, "data": (0, 1, 2), "axis": axis, "reduction": reduction, "tolerance": 1e-6}
    for x, updates in ((_random(2, 3, 4), _random(2, 2, 2)), (_drawn(2, 3, 4), _drawn(2, 2, 2))):
        assert_both_as_in_onnxruntime("ScatterElements", [x, indices, updates], **settings)


@pytest.mark.parametrize(("op_type", "opset"), [("Scatter", 9), ("ScatterElements", 11), ("ScatterElements", 13)])
def test_old_scatterings_are_those_of_onnx_runtime(op_type, opset):
    inputs = [_random(2, 3, 4), _places_without_repeats(2, 2, 2, axis=1), _random(2, 2, 2)]
    assert_both_as_in_onnxruntime(op_type, inputs, opset=opset, data=(0, 1, 2), axis=1)


@pytest.mark.parametrize("reduction", _REDUCTIONS)
def test_scattering_parts_is_that_of_onnx_runtime(reduction):
    x = _random(2, 3, 4)
    settings = {"opset": 18, "data": (0, 1, 2), "reduction": reduction, "tolerance": 1e-6}
    rows, elements = np.array([[0, 1], [-1, -2]]), np.array([[0, 1, 2], [-1, -2, -1], [0, 1, -1]])
    assert_both_as_in_onnxruntime("ScatterND", [x, rows, _random(2, 4)], **settings)
    assert_both_as_in_onnxruntime("ScatterND", [x, elements, _random(3)], **settings)
    if reduction == "none":
        assert_both_as_in_onnxruntime("ScatterND", [x, rows, _random(2, 4)], opset=11, data=(0, 1, 2))


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
def test_all_that_is_written_to_one_place_is_reduced(reduction):
    x, updates = np.array([2, 3, 5]), np.array([[7, 11], [13, -1]])
    function = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}[reduction]
    expected = x.copy()
    function.at(expected, np.array([[1, 1], [-2, 0]]), updates)
    inputs = [x, np.array([[[1], [1]], [[-2], [0]]]), updates]
    for way, settings in ((in_numpy, {}), (in_jit, {"data": (0, 1, 2)})):
        (found,) = way("ScatterND", inputs, opset=18, reduction=reduction, **settings)
        np.testing.assert_array_equal(found, expected)


def test_what_is_scattered_and_gathered_again_is_what_was_scattered():
    indices, updates = _places_without_repeats(4, 3, 5, axis=1), _random(4, 3, 5)
    (written,) = in_jit("ScatterElements", [_random(4, 3, 5), indices, updates], opset=18, data=(0, 1, 2), axis=1)
    (found,) = in_jit("GatherElements", [written, indices], opset=13, data=(0, 1), axis=1)
    np.testing.assert_array_equal(found, updates)


@pytest.mark.parametrize("mode", ["linear", "circular"])
@pytest.mark.parametrize("axis", [1, -2])
def test_a_cache_is_written_sample_by_sample(mode, axis):
    cache, update = _random(2, 5, 5, 3), _random(2, 5, 5, 3, seed=1)
    update = np.take(update, [0, 1], axis=axis)
    starts = np.array([3, 0]) if mode == "linear" else np.array([4, 8])
    expected = cache.copy()
    for sample, start in enumerate(starts):
        for step in range(2):
            place = [sample, slice(None), slice(None)]
            source = [sample, slice(None), slice(None)]
            place[axis % 4], source[axis % 4] = (start + step) % 5, step
            expected[tuple(place)] = update[tuple(source)]
    for way, settings in ((in_numpy, {}), (in_jit, {"data": (0, 1, 2)})):
        (found,) = way("TensorScatter", [cache, update, starts], opset=24, axis=axis, mode=mode, **settings)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("op_type", "inputs"),
    [
        ("Gather", [_random(2, 3), np.array([2])]),
        ("GatherElements", [_random(2, 3), np.array([[-3, 0, 0]])]),
        ("GatherND", [_random(2, 3), np.array([[0, 3]])]),
        ("ScatterElements", [_random(2, 3), np.array([[2]]), _random(1, 1)]),
        ("ScatterND", [_random(2, 3), np.array([[0, -4]]), _random(1)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_constant_index_outside_is_refused(op_type, inputs):
    """Also where it points into data that are traced; an index that is data itself cannot be looked at under jit."""
    function = find_lowering(op_type, opset=18).function
    with pytest.raises(IndexError):
        function(*inputs)
    with pytest.raises(IndexError, match="expected -"):
        jax.jit(lambda x: function(x, *inputs[1:]))(inputs[0])


@pytest.mark.parametrize("opset", [9, 11])
def test_one_hot_is_on_where_the_index_is(opset):
    indices = np.array([[0, 3, 4], [-1, -4, -5]])
    on = [[0], [3], [], [3] if opset > 9 else [], [0] if opset > 9 else [], []]
    expected = np.array([[7.0 if k in places else 2.0 for k in range(4)] for places in on], np.float32).reshape(2, 3, 4)
    inputs = [indices, np.array([4.0], np.float32), np.array([2, 7], np.float32)]
    for axis in (0, 1, -1):
        found = in_jit("OneHot", inputs, opset=opset, data=(0, 2), axis=axis)
        assert_same(found, [np.moveaxis(expected, -1, axis)])
    if opset > 9:
        inputs[1] = np.array(4)
        assert_both_as_in_onnxruntime("OneHot", inputs, opset=opset, data=(0, 2), outputs=[np.float32], axis=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
def test_indices_of_any_type_are_hot(dtype):
    """Unsigned ones are not taken for negative; floats are cut, as a cast to integers does."""
    indices = np.array([1.7, 0, 255, 3]).astype(dtype)
    (found,) = in_numpy("OneHot", [indices, np.array(300), np.array([0, 1])], opset=11)
    np.testing.assert_array_equal(found.argmax(axis=1), [1, 0, 255, 3])
    np.testing.assert_array_equal(found.sum(axis=1), 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64])
@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("axis", [0, -1])
def test_the_top_and_the_order_of_equals_are_those_of_onnx_runtime(dtype, largest, axis):
    x = _drawn(4, 6, low=0, high=4, dtype=dtype)
    settings = {"opset": 11, "outputs": [dtype, np.int64], "largest": largest, "axis": axis}
    assert_both_as_in_onnxruntime("TopK", [x, np.array([3])], **settings)


@pytest.mark.parametrize("largest", [0, 1])
def test_both_zeros_are_equal(largest):
    x = np.array([0.0, -0.0, 1, -0.0, 0], np.float32)
    settings = {"opset": 11, "outputs": [np.float32, np.int64], "largest": largest}
    assert_both_as_in_onnxruntime("TopK", [x, np.array([4])], **settings)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint64, np.int64])
@pytest.mark.parametrize("largest", [0, 1])
def test_the_ends_of_integer_types_are_ordered(dtype, largest):
    info = np.iinfo(dtype)
    x = np.array([info.max, info.min, 1, info.max - 1, info.min + 1], dtype)
    values, places = in_numpy("TopK", [x, np.array([5])], opset=24, largest=largest)
    expected = np.sort(x)[::-1] if largest else np.sort(x)
    assert_same([values], [expected])
    np.testing.assert_array_equal(x[places], expected)


def test_old_tops_are_those_of_onnx_runtime():
    x, outputs = _random(3, 4), [np.float32, np.int64]
    assert_both_as_in_onnxruntime("TopK", [x], opset=9, outputs=outputs, k=2, axis=0)
    assert_both_as_in_onnxruntime("TopK", [x, np.array([4])], opset=10, outputs=outputs)
    assert_both_as_in_onnxruntime("TopK", [x, np.array([0])], opset=11, outputs=outputs)


@pytest.mark.parametrize("op_type", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_places_of_extremes_are_those_of_onnx_runtime(op_type, dtype):
    x = _drawn(4, 6, low=0, high=3, dtype=dtype)
    for opset, settings in (
        (11, {"axis": -1}),
        (13, {"axis": 1, "select_last_index": 1}),
        (13, {"axis": -2, "keepdims": 0}),
        (13, {"axis": 0, "keepdims": 0, "select_last_index": 1}),
    ):
        assert_both_as_in_onnxruntime(op_type, [x], opset=opset, outputs=[np.int64], **settings)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.int8])
@pytest.mark.parametrize("is_sorted", [0, 1])
@pytest.mark.parametrize("axis", [{}, {"axis": 0}, {"axis": -1}], ids=str)
def test_what_is_unique_is_that_of_onnx_runtime(dtype, is_sorted, axis):
    x = _drawn(4, 3, low=0, high=2, dtype=dtype)
    outputs = [dtype, np.int64, np.int64, np.int64]
    assert_both_as_in_onnxruntime("Unique", [x], opset=11, data=(), outputs=outputs, sorted=is_sorted, **axis)


def test_nothing_is_unique_in_nothing():
    x = np.zeros(0, np.float32)
    outputs = [np.float32, np.int64, np.int64, np.int64]
    assert_both_as_in_onnxruntime("Unique", [x], opset=11, data=(), outputs=outputs)


@pytest.mark.parametrize("x", [_drawn(3, 4, low=0), np.zeros((2, 2), bool), np.ones((2, 0), np.float32)], ids=str)
def test_what_is_not_zero_is_that_of_onnx_runtime(x):
    assert_both_as_in_onnxruntime("NonZero", [x], opset=13, data=(), outputs=[np.int64])


def test_a_scalar_has_no_axes_to_be_found_along():
    assert [found.shape for found in in_numpy("NonZero", [np.array(3)], opset=13)] == [(0, 1)]


@pytest.mark.parametrize(
    ("opset", "condition", "attributes"),
    [(9, [True, False, True], {"axis": -1}), (11, [False, True, True], {}), (11, [False, False], {"axis": 0})],
    ids=str,
)
def test_a_condition_that_is_known_selects_under_jit(opset, condition, attributes):
    assert_both_as_in_onnxruntime("Compress", [_random(2, 3, 4), np.array(condition)], opset=opset, **attributes)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_running_sums_are_those_of_onnx_runtime(dtype, exclusive, reverse):
    x = _drawn(3, 4, low=-5, high=5, dtype=dtype)
    settings = {"exclusive": exclusive, "reverse": reverse}
    assert_both_as_in_onnxruntime("CumSum", [x, np.array(-1)], opset=14, **settings)
    assert_both_as_in_onnxruntime("CumSum", [x, np.array(0, np.int32)], opset=11, **settings)


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("k", [-1, 0, 2, 9])
def test_triangles_are_those_of_onnx_runtime_whether_the_diagonal_is_data_or_not(upper, k):
    for x in (_random(2, 3, 4), _drawn(3, 3), np.ones((3, 3), bool)):
        assert_both_as_in_onnxruntime("Trilu", [x, np.array(k)], opset=14, data=(0, 1), upper=upper)


@pytest.mark.parametrize(
    ("x", "lengths", "attributes"),
    [
        (_random(4, 3, 2), [1, 4, 2], {}),
        (_random(3, 4, 2), [1, 3, 2], {"batch_axis": 0, "time_axis": 1}),
    ],
    ids=str,
)
def test_reversed_sequences_are_those_of_onnx_runtime(x, lengths, attributes):
    inputs = [x, np.array(lengths)]
    assert_both_as_in_onnxruntime("ReverseSequence", inputs, opset=10, data=(0, 1), **attributes)


@pytest.mark.parametrize(
    ("op_type", "others", "attributes"),
    [
        ("Gather", [np.array([1, 1])], {}),
        ("GatherND", [np.array([[0, 1], [2, -1]])], {}),
        ("ScatterElements", [np.array([[1]]), _random(1, 1)], {"reduction": "mul"}),
        ("TopK", [np.array([2])], {"largest": 0}),
        ("CumSum", [np.array(0)], {"exclusive": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gradients_and_maps_go_through(op_type, others, attributes):
    x = _random(2, 3, 4)
    function = find_lowering(op_type, opset=18).function

    def first(x):
        result = function(x, *others, **attributes)
        return jnp.asarray(result[0] if isinstance(result, tuple) else result)

    mapped = jax.vmap(first)(x)
    for one, expected in zip(mapped, map(first, x), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-6)
    direction, step = _random(2, 3, 4, seed=5)[0], 1e-2
    slope = jnp.vdot(jax.grad(lambda x: jnp.sum(jnp.square(first(x))))(x[0]), direction)
    ends = [float(jnp.sum(jnp.square(first(x[0] + sign * step * direction)))) for sign in (1, -1)]
    # a quadratic function: central differences are exact but for the rounding of values around 20
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-2, atol=1e-2)
