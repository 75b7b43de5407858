"""Shapes, parts, pads, blocks and generated tensors: old opsets, ends of ranges, empty tensors, what stays in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx.parser
import onnxruntime
import pytest

from ptqjax.errors import DataDependentError, ModelError, UnsupportedOperatorError
from ptqjax.lowering import apply
from ptqjax.onnx_io import read
from ptqjax.ops import find_lowering
from ptqjax.ops.layout import to_channels_last, to_onnx
from tests.both_modes import assert_both_as_in_onnxruntime, assert_same, in_jit, in_numpy
from tests.single_node import by_us, single_node


def _random(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def _id(value):
    if isinstance(value, list):
        return "-".join(_id(each) for each in value)
    return str(list(value.shape)) if isinstance(value, np.ndarray) else str(value)


def _integers(*values):
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("op_type", "opset", "inputs", "attributes"),
    [
        ("Squeeze", 11, [_random(1, 2, 1)], {}),
        ("Squeeze", 11, [_random(1, 2, 1)], {"axes": [-1]}),
        ("Squeeze", 13, [_random(1, 2, 1)], {}),
        ("Squeeze", 13, [_random(1, 2, 1), _integers()], {}),
        ("Squeeze", 13, [_random(1, 2, 1), _integers(-3)], {}),
        ("Unsqueeze", 11, [_random(2, 3)], {"axes": [-1, 0]}),
        ("Unsqueeze", 13, [_random(2, 3), _integers(3, 0)], {}),
        ("Reshape", 13, [_random(2, 3, 4), _integers(0, -1)], {}),
        ("Reshape", 13, [_random(2, 3, 4), _integers(4, 0, -1)], {}),
        ("Reshape", 13, [_random(1), _integers()], {}),
        ("Reshape", 13, [_random(0, 3, 4), _integers(-1, 12)], {}),
        ("Reshape", 14, [_random(0, 3, 4), _integers(3, 0, 4)], {"allowzero": 1}),
        ("Flatten", 11, [_random(2, 3, 4)], {"axis": -1}),
        ("Flatten", 11, [_random(2, 3, 4)], {"axis": 3}),
        ("Flatten", 11, [np.array(1, np.float32)], {"axis": 0}),
        ("Expand", 8, [_random(3, 1), _integers(2, 1, 4)], {}),
        ("Expand", 13, [_random(3, 1), _integers(1)], {}),
        ("Expand", 13, [_random(1), _integers(0, 3)], {}),
        ("Tile", 6, [_random(2, 3, 4), _integers(2, 1, 3)], {}),
        ("Tile", 13, [_random(2, 3), _integers(0, 2)], {}),
        ("Concat", 11, [_random(2, 3), _random(2, 0)], {"axis": -1}),
        ("Slice", 9, [_random(2, 3, 4)], {"starts": [1, -3], "ends": [1000, -1], "axes": [1, 2]}),
        ("Slice", 9, [_random(2, 3, 4)], {"starts": [1], "ends": [-1]}),
        ("Slice", 11, [_random(4, 2), np.array([1], np.int32), np.array([3], np.int32)], {}),
        ("Slice", 10, [_random(2, 3, 4), *map(_integers, (2**62, -(2**63), -1, -2))], {}),
        ("Slice", 13, [_random(2, 3, 4), *map(_integers, (2, 1, 1, 1))], {}),
        ("Pad", 10, [_random(2, 3, 4)], {"pads": [0, 1, -1, 1, 0, 2], "mode": "edge"}),
        ("Pad", 10, [_random(2, 3, 4)], {"pads": [0, 1, -1, 1, 0, 2], "value": 0.5}),
        ("Pad", 11, [_random(2, 3), _integers(0, -1, 2, 3), np.array(7, np.float32)], {}),
        ("Pad", 13, [_random(2, 3), _integers(0, -1, 1, 1)], {"mode": "reflect"}),
        ("Pad", 18, [_random(2, 3, 4), _integers(1, -1, 1, 2), None, _integers(-1, 1)], {}),
        ("Pad", 19, [_random(3, 4), _integers(2, 5, 3, 9)], {"mode": "wrap"}),
        ("Pad", 19, [_random(3, 4), _integers(-1, 3, 2, -1)], {"mode": "wrap"}),
        ("CenterCropPad", 18, [_random(5, 4, 3), _integers(2, 7)], {"axes": [0, -1]}),
        ("CenterCropPad", 18, [_random(5, 4, 3), _integers(8, 1, 4)], {}),
        ("DepthToSpace", 10, [_random(2, 8, 2, 3)], {"blocksize": 2}),
        ("DepthToSpace", 11, [_random(2, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
        ("SpaceToDepth", 13, [_random(2, 3, 4, 6)], {"blocksize": 2}),
        ("EyeLike", 9, [_random(2, 4)], {"k": 1}),
    ],
    ids=_id,
)
def test_what_moves_elements_is_that_of_onnx_runtime(op_type, opset, inputs, attributes):
    data = [at for at, value in enumerate(inputs) if value is not None and value.dtype == np.float32]
    assert_both_as_in_onnxruntime(op_type, inputs, opset=opset, data=data, **attributes)


@pytest.mark.parametrize(
    ("opset", "inputs", "attributes", "parts"),
    [
        (2, [_random(2, 6)], {"axis": 1, "split": [1, 0, 5]}, 3),
        (11, [_random(2, 6)], {"axis": -1}, 3),
        (13, [_random(0, 6)], {"axis": 0}, 2),
        (13, [_random(2, 6), _integers(2, 4)], {"axis": 1}, 2),
        (18, [_random(2, 7)], {"axis": 1, "num_outputs": 3}, 3),
    ],
)
def test_parts_are_those_of_onnx_runtime(opset, inputs, attributes, parts):
    assert_both_as_in_onnxruntime("Split", inputs, opset=opset, outputs=[np.float32] * parts, **attributes)


@pytest.mark.parametrize("lengths", [(1, 1), (2, 5), (1, 1, 4)])
def test_parts_that_are_not_the_whole_are_refused(lengths):
    with pytest.raises(ModelError, match=r"Split \(producing 'y0'\).*expected 2 that add up to 6"):
        by_us(
            single_node("Split", [_random(6), _integers(*lengths)], opset=13, outputs=[np.float32] * 2),
            [_random(6), _integers(*lengths)],
        )


@pytest.mark.parametrize(
    ("op_type", "opset", "inputs", "attributes"),
    [
        ("ConstantOfShape", 9, [_integers(2, 3)], {}),
        ("ConstantOfShape", 9, [_integers()], {}),
        ("ConstantOfShape", 20, [_integers(0, 2)], {}),
        ("EyeLike", 9, [np.zeros((3, 3), np.int32)], {"k": -1, "dtype": 1}),
        ("Range", 11, [np.array(value, np.float32) for value in (0.5, 2.5, 0.25)], {}),
        ("Range", 11, [np.array(value, np.float32) for value in (0.1, 1, 0.1)], {}),
    ],
    ids=_id,
)
def test_what_is_generated_is_that_of_onnx_runtime(op_type, opset, inputs, attributes):
    # ONNX Runtime adds the step again and again, ONNX multiplies it: a unit in the last place
    settings = {"outputs": [np.float32], "tolerance": 3e-7}
    assert_both_as_in_onnxruntime(op_type, inputs, opset=opset, data=(), **settings, **attributes)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
@pytest.mark.parametrize("limits", [(10, -3, -4), (10, 20, -4), (3, 9, 3), (3, 10, 3), (5, 5, 1)])
def test_ranges_of_integers_are_those_of_onnx_runtime(dtype, limits):
    assert_both_as_in_onnxruntime("Range", [np.array(limit, dtype) for limit in limits], opset=11, data=())


def test_a_range_of_64_bit_integers_does_not_wrap_around():
    ends = np.array(-(2**63)), np.array(2**63 - 1), np.array(2**62)
    (found,) = in_numpy("Range", ends, opset=11)
    assert found.tolist() == [-(2**63), -(2**62), 0, 2**62]


@pytest.mark.parametrize("delta", [0.0, np.nan])
def test_a_range_without_an_end_is_refused(delta):
    limits = [np.array(value, np.float32) for value in (0, 1, delta)]
    with pytest.raises(ModelError, match=r"Range \(producing 'y0'\).*has no end"):
        by_us(single_node("Range", limits, opset=11), limits)


def test_a_range_of_halves_is_rounded_once_since_opset_27():
    limits = [np.array(value, np.float16) for value in (2048, 2056, 1)]
    (found,) = in_numpy("Range", limits, opset=27)
    np.testing.assert_array_equal(found, np.arange(2048, 2056, dtype=np.float32).astype(np.float16))


def test_a_copied_size_of_zero_says_nothing_about_what_remains():
    (found,) = in_jit("Reshape", [np.zeros((0, 3, 4), np.float32), _integers(0, -1)], opset=13)
    assert found.shape == (0, 12)


@pytest.mark.parametrize(
    ("op_type", "inputs", "attributes"),
    [
        ("Shape", [_random(2, 3)], {}),
        ("Size", [_random(2, 3)], {}),
        ("Gather", [_integers(2, 3), np.array(-1)], {}),
        ("GatherElements", [_integers(2, 3), _integers(1, 0)], {}),
        ("GatherND", [_integers(2, 3), _integers([1], [0])], {}),
        ("ScatterND", [_integers(2, 3), _integers([1]), _integers(5)], {}),
        ("ScatterElements", [_integers(2, 3), _integers(1), _integers(5)], {}),
        ("Concat", [_integers(2, 3), _integers(-1)], {"axis": 0}),
        ("Slice", [_integers(2, 3, 4), _integers(1), _integers(2**63 - 1)], {}),
        ("Split", [_integers(2, 3)], {"num_node_outputs": 2}),
        ("Pad", [_integers(2, 3), _integers(1, 1)], {}),
        ("Squeeze", [_integers(2)], {}),
        ("Unsqueeze", [np.array(2), _integers(0)], {}),
        ("Reshape", [_integers(2, 3), _integers(-1, 1)], {}),
        ("Expand", [_integers(2), _integers(3)], {}),
        ("Tile", [_integers(2), _integers(3)], {}),
        ("Transpose", [_integers([2, 3])], {}),
        ("ConstantOfShape", [_integers(3)], {"value": _integers(-1)}),
        ("Range", [np.array(0), np.array(3), np.array(1)], {}),
        ("OneHot", [_integers(1), np.array(3), _integers(0, 1)], {}),
        ("NonZero", [_integers(1, 0)], {}),
        ("Compress", [_integers(1, 0), np.array([True, False])], {}),
        ("Trilu", [_integers([1, 0])], {}),
        ("CumSum", [_integers(1, 0), np.array(0)], {}),
        ("ReduceProd", [_integers(2**40, 3)], {}),
        ("ReduceSum", [_integers(2**40, 3)], {}),
        ("ReduceMax", [_integers(2**40, 3)], {}),
        ("ReduceMin", [_integers(2**40, 3)], {"keepdims": 0}),
        ("ArgMax", [_integers(2**40, 3)], {}),
    ],
    ids=_id,
)
def test_what_shapes_are_made_of_stays_in_numpy_in_64_bits(op_type, inputs, attributes):
    """Even where JAX is in 32 bits, and nothing is compiled."""
    results = find_lowering(op_type, opset=20).function(*inputs, **attributes)
    for result in results if isinstance(results, tuple) else (results,):
        assert isinstance(result, np.ndarray | np.generic)
        assert result.dtype == np.int64


@pytest.mark.parametrize(
    ("op_type", "inputs"),
    [
        ("Reshape", [_random(2), _integers(2)]),
        ("Expand", [_random(2), _integers(2)]),
        ("Tile", [_random(2), _integers(2)]),
        ("ConstantOfShape", [_integers(2)]),
        ("Range", [np.array(2), np.array(3), np.array(1)]),
        ("NonZero", [_integers(2)]),
        ("Unique", [_integers(2)]),
        ("Compress", [_random(2), np.array([True])]),
        ("TopK", [_random(2), _integers(1)]),
    ],
    ids=_id,
)
def test_a_shape_that_depends_on_data_is_refused_under_jit_alone(op_type, inputs):
    outputs = {"TopK": 2, "Unique": 4}.get(op_type, 1)
    proto = single_node(op_type, inputs, opset=13, outputs=[inputs[0].dtype, *[np.int64] * (outputs - 1)])
    assert by_us(proto, inputs)
    with pytest.raises(DataDependentError, match=f"of {op_type} depends on data, but must be known while tracing"):
        by_us(proto, inputs, jit=True)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "uint2", "float8_e4m3fn", "float4_e2m1fn", "bfloat16"])
@pytest.mark.parametrize(
    ("op_type", "others", "attributes"),
    [
        ("Transpose", [], {}),
        ("Reshape", [_integers(-1)], {}),
        ("Slice", [_integers(1), _integers(3)], {}),
        ("Gather", [_integers(1, 0)], {}),
        ("Pad", [_integers(1, 0, 0, 2)], {}),
        ("Tile", [_integers(2, 1)], {}),
        ("Expand", [_integers(2, 1, 1)], {}),
    ],
    ids=_id,
)
def test_narrow_elements_are_moved_as_they_are(dtype, op_type, others, attributes):
    values = np.random.default_rng(0).integers(0, 2, (3, 2)).astype(np.float32)
    narrow = values.astype(getattr(ml_dtypes, dtype))
    (expected,) = in_numpy(op_type, [values, *others], opset=21, **attributes)
    for way in (in_numpy, in_jit):
        (found,) = way(op_type, [narrow, *others], opset=21, **attributes)
        assert found.dtype.name == dtype
        np.testing.assert_array_equal(found.astype(np.float32), expected)


@pytest.mark.parametrize("dtype", ["int4", "uint2", "int2", "float8_e5m2"])
def test_narrow_elements_are_joined_as_they_are(dtype):
    parts = [np.array(values, np.int8).astype(getattr(ml_dtypes, dtype)) for values in ([1, 0], [1, 1, 0])]
    for way in (in_numpy, in_jit):
        (found,) = way("Concat", parts, opset=21, axis=0)
        assert found.dtype.name == dtype
        np.testing.assert_array_equal(found.astype(np.float32), [1, 0, 1, 1, 0])


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_blocks_are_the_same_in_both_layouts_and_undone_by_each_other(mode):
    x = _random(2, 12, 4, 6)
    for op_type, inverse in (("DepthToSpace", "SpaceToDepth"), ("SpaceToDepth", "DepthToSpace")):
        lowering = find_lowering(op_type, opset=28)
        expected = lowering.function(x, blocksize=2, mode=mode)
        found = lowering.channels_last.function(jnp.asarray(to_channels_last(x)), blocksize=2, mode=mode)
        np.testing.assert_array_equal(to_onnx(found), expected)
        back = find_lowering(inverse, opset=28).function(expected, blocksize=2, mode=mode)
        np.testing.assert_array_equal(back, x)


def test_a_traced_value_fills_a_pad():
    gradient = jax.grad(
        lambda value: jnp.sum(find_lowering("Pad", opset=13).function(_random(2), _integers(1, 2), value))
    )
    assert gradient(jnp.float32(3)) == 3


def test_a_constant_of_any_size_takes_no_memory_before_it_is_used():
    (found,) = in_numpy("ConstantOfShape", [_integers(2**20, 2**20)], opset=9)
    assert found.strides == (0, 0)


@pytest.mark.parametrize(("opset", "mask"), [(7, np.float32), (10, np.bool_), (12, np.bool_), (22, np.bool_)])
def test_nothing_is_dropped_at_inference(opset, mask):
    for way in (in_numpy, in_jit):
        found = way("Dropout", [_random(2, 3)], opset=opset)
        assert_same(found, [_random(2, 3), np.ones((2, 3), mask)])


@pytest.mark.parametrize(
    ("opset", "others", "attributes"),
    [(6, [], {}), (12, [None, np.array(True)], {}), (12, [np.array(0.25, np.float32), np.array(True)], {})],
)
def test_dropping_at_random_is_refused(opset, others, attributes):
    with pytest.raises(UnsupportedOperatorError, match=r"Dropout of 0\.\d+ in training mode has no lowering"):
        in_numpy("Dropout", [_random(2), *others], opset=opset, **attributes)


def test_dropping_none_in_training_is_no_change():
    x = _random(2, 3)
    inputs = [x, np.array(0, np.float32), np.array(True)]
    for way in (in_numpy, in_jit):
        np.testing.assert_array_equal(way("Dropout", inputs, opset=12)[0], x)
    np.testing.assert_array_equal(in_numpy("Dropout", [x], opset=6, is_test=1)[0], x)


_SHAPE_ARITHMETIC = """
<ir_version: 10, opset_import: ["": 18]>
agraph (float[N, 3] x) => (float[N, A] y, int64[N] steps)
<int64 zero = {0}, int64 one = {1}, int64[1] minus = {-1}, int64[1] origin = {0}, int64[1] next = {1},
 int64[1, 1] second = {1}> {
    sizes = Shape (x)
    n = Gather <axis = 0> (sizes, zero)
    column = Unsqueeze (n, origin)
    asked = Concat <axis = 0> (column, minus)
    unknown = Equal (asked, minus)
    rank = Shape (asked)
    ones = ConstantOfShape <value = int64[1] {1}> (rank)
    given = Where (unknown, ones, asked)
    first = Slice (x, origin, next)
    row = Squeeze (first, origin)
    spread = Expand (row, given)
    count = ReduceProd <keepdims = 0> (given)
    steps = Range (zero, count, one)
    picked = Gather <axis = 0> (x, steps)
    sum = Add (spread, picked)
    target = ScatterND (given, second, minus)
    y = Reshape (sum, target)
}
"""


@pytest.mark.parametrize("batch", [1, 5])
def test_shape_arithmetic_of_exporters_is_done_while_tracing(batch):
    proto = onnx.parser.parse_model(_SHAPE_ARITHMETIC)
    model = read(proto)
    x = _random(batch, 3)
    expected = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )
    with jax.enable_x64(True):
        found = jax.jit(lambda x: apply(model.graph, model.params, {"x": x}))(x)
    assert_same([np.asarray(found["y"]), np.asarray(found["steps"])], expected)
