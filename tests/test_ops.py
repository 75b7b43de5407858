"""Operators: which version holds, that the layout does not change the meaning, and what ONNX's cases leave out."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.kernels.convolution import convolve, convolve_channels_last
from ptqjax.kernels.pooling import average_pool
from ptqjax.ops import find_lowering, lowers, registered
from ptqjax.ops.layout import channels_last_axis, to_channels_last, to_onnx
from ptqjax.ops.quantization import dequantize_linear, quantize_linear

_GRIDS = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15), "int16": (-32768, 32767)}
_GRIDS |= {"uint16": (0, 65535)}


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _lowering(op_type, opset):
    return find_lowering(op_type, opset=opset)


def _onnx_operators():
    """Those of ONNX's own domain that ONNX has (ONNX Runtime adds some to it)."""
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    return [operator for operator in registered() if not operator[0] and operator[1] in known]


def test_every_lowering_knows_the_attributes_of_the_schemas_it_serves():
    """For every opset up to the newest: schema attributes are keywords, with the same default."""
    found = {operator[1]: _unknown_attributes(operator) for operator in _onnx_operators()}
    assert {op_type: unknown for op_type, unknown in found.items() if unknown} == {}


def _unknown_attributes(operator):
    """The attributes of the operator's schemas that are no keywords, or have another default, with their opsets."""
    domain, op_type = operator
    unknown = []
    introduced = min(known.since_version for known in onnx.defs.get_all_schemas_with_history() if known.name == op_type)
    for opset in range(max(7, introduced, registered()[operator][0]), onnx.defs.onnx_opset_version() + 1):
        lowering = _lowering(op_type, opset)
        parameters = inspect.signature(lowering.function).parameters
        for name, attribute in onnx.defs.get_schema(op_type, opset, domain).attributes.items():
            if name in _LEFT_OUT.get(op_type, ()):
                continue
            if name not in lowering.parameters or not _has_default(parameters[name], attribute, op_type):
                unknown.append(f"{name} in opset {opset}")
    return unknown


def _has_default(parameter, attribute, op_type):
    """Tells whether the parameter has the attribute's default, if that has one."""
    default = attribute.default_value
    if default.type == onnx.AttributeProto.UNDEFINED:
        return True
    value = helper.get_attribute_value(default)
    value = value.decode() if isinstance(value, bytes) else value
    value = tuple(part.decode() for part in value) if op_type == "RNN" and attribute.name == "activations" else value
    return parameter.default == pytest.approx(value)


_LEFT_OUT = {"Constant": ("sparse_value", "value_string", "value_strings")}


@pytest.mark.parametrize(
    ("op_type", "opset", "since"),
    [
        ("Softmax", 12, 1),
        ("Softmax", 13, 13),
        ("Clip", 10, 6),
        ("Clip", 11, 11),
        ("Clip", 99, 11),
        ("ReduceMean", 17, 1),
        ("ReduceMean", 18, 18),
        ("ReduceSum", 13, 13),
        ("Squeeze", 12, 1),
        ("Squeeze", 13, 13),
        ("Pad", 10, 2),
        ("Pad", 11, 11),
        ("Slice", 9, 1),
        ("Slice", 10, 10),
    ],
)
def test_the_newest_version_that_is_not_newer_holds(op_type, opset, since):
    assert _lowering(op_type, opset).since == since


def test_an_operator_older_than_its_first_version_is_refused():
    with pytest.raises(UnsupportedOperatorError, match="it is known from opset 6 on"):
        find_lowering("Add", opset=5)


def test_a_lowering_can_be_registered_for_another_domain():
    @lowers("Double", since=2, domain="test.registry")
    def double(x, /, *, times=2):
        return x * times

    found = find_lowering("Double", opset=3, domain="test.registry")
    assert found.function is double
    assert found.parameters == {"times"}


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_axes_follow_the_layout(rank):
    x = np.zeros(range(2, 2 + rank), np.float32)
    for axis in range(-rank, rank):
        assert to_channels_last(x).shape[channels_last_axis(axis, rank)] == x.shape[axis]
    assert np.asarray(to_onnx(to_channels_last(x))).shape == x.shape


@st.composite
def _convolutions(draw):
    """A convolution of few elements: groups, one channel, multipliers, dilations, strides, uneven pads, 1 to 3 axes."""
    num_axes = draw(st.integers(1, 3))
    each = st.integers(1, 2)
    axes = [
        draw(st.tuples(st.integers(1, 3), each, each, st.integers(0, 2), st.integers(0, 2))) for _ in range(num_axes)
    ]
    kernel, strides, dilations, low, high = zip(*axes, strict=True)
    sizes = [(taps - 1) * dilation + draw(st.integers(1, 3)) for taps, dilation in zip(kernel, dilations, strict=True)]
    groups, inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    return {
        "x": _random(2, groups * inputs, *sizes),
        "w": _random(groups * outputs, inputs, *kernel, seed=1),
        "strides": strides,
        "dilations": dilations,
        "padding": tuple(zip(low, high, strict=True)),
        "groups": groups,
    }


@settings(max_examples=20, deadline=None, derandomize=True)
@given(_convolutions())
def test_convolutions_are_the_same_in_both_layouts(case):
    x, w = case.pop("x"), case.pop("w")
    expected = jax.jit(partial(convolve, **case))(x, w)
    found = jax.jit(partial(convolve_channels_last, **case))(to_channels_last(x), w)
    np.testing.assert_allclose(
        to_onnx(found), expected, rtol=1e-5, atol=1e-5
    )  # at most 54 products, summed in another order


def _jax(x):
    return jnp.asarray(x)


def _by_onnx_runtime(op_type, inputs, *, num_outputs=1, opset=17, **attributes):
    names = [f"i{k}" for k in range(len(inputs))]
    outputs = [f"o{k}" for k in range(num_outputs)]
    kinds = [helper.np_dtype_to_tensor_dtype(value.dtype) for value in inputs]
    graph = helper.make_graph(
        [helper.make_node(op_type, names, outputs, **attributes)],
        "g",
        [helper.make_tensor_value_info(n, k, v.shape) for n, k, v in zip(names, kinds, inputs, strict=True)],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, inputs, strict=True)))


def _in_both_layouts(op_type, inputs, *, opset=17, **attributes):
    """Returns the operator's results by its two functions, in ONNX's layout."""
    lowering = _lowering(op_type, opset)
    variant = lowering.channels_last
    first, *rest = map(_jax, inputs)
    return [
        lowering.function(first, *rest, **attributes),
        to_onnx(variant.function(to_channels_last(first), *rest, **attributes)),
    ]


@pytest.mark.parametrize("auto_pad", ["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("settings", [{"strides": [2, 3]}, {"group": 2}, {"group": 4, "strides": [2, 1]}])
def test_conv_is_that_of_onnx_runtime(auto_pad, settings):
    pads = {"pads": [0, 1, 2, 1]} if auto_pad == "NOTSET" else {}
    inputs = [_random(2, 4, 8, 7), _random(8, 4 // settings.get("group", 1), 3, 2, seed=1), _random(8, seed=2)]
    (expected,) = _by_onnx_runtime("Conv", inputs, auto_pad=auto_pad, **pads, **settings)
    for found in _in_both_layouts("Conv", inputs, auto_pad=auto_pad, **pads, **settings):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"pads": [1, 0, 2, 1], "strides": [2, 3]},
        {"group": 2, "dilations": [2, 1], "output_padding": [1, 0], "strides": [2, 2]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    ],
)
def test_conv_transpose_is_that_of_onnx_runtime(settings):
    inputs = [_random(2, 4, 5, 4), _random(4, 3, 3, 2, seed=1), _random(3 * settings.get("group", 1), seed=2)]
    (expected,) = _by_onnx_runtime("ConvTranspose", inputs, **settings)
    found = _lowering("ConvTranspose", 17).function(*map(_jax, inputs), **settings)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [3, 3], "pads": [0, 1, 2, 1], "strides": [2, 1]},
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [3, 3], "ceil_mode": 1},
        {"kernel_shape": [6, 5]},  # more taps than are taken one by one
        {"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER", "strides": [2, 2]},
    ],
)
def test_pools_are_those_of_onnx_runtime(op_type, settings):
    x = _random(2, 3, 8, 7)
    (expected,) = _by_onnx_runtime(op_type, [x], **settings)
    for found in _in_both_layouts(op_type, [x], **settings):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_mean_of_ones_over_any_window_is_one():
    """Neither padding nor what ceil_mode adds takes part where padding is not counted."""
    window = {"kernel": (3, 3), "strides": (2, 2), "padding": ((1, 0), (0, 1)), "dilations": (1, 2)}
    means = average_pool(_jax(np.ones((1, 6, 7, 1), np.float32)), ceil_mode=True, count_include_pad=False, **window)
    np.testing.assert_array_equal(means, np.ones_like(means))


@pytest.mark.parametrize(
    ("op_type", "extra", "attributes"),
    [
        ("Softmax", [], {"axis": 1}),
        ("ReduceMean", [], {"axes": (1, -1)}),
        ("ReduceMax", [], {}),
        ("Concat", [], {"axis": -1}),
        ("Pad", [np.array([0, 1, -1, 2, 1, 0, 3, 0])], {}),
        ("Pad", [np.array([0, 1, 1, 2, 0, 0, 1, 0])], {"mode": "reflect"}),
        ("Slice", [np.array([2, -1]), np.array([0, -(2**62)]), np.array([1, -2]), np.array([-1, -2])], {}),
        ("BatchNormalization", [np.abs(_random(3, seed=seed)) for seed in range(4)], {"epsilon": 0.5}),
        ("GlobalAveragePool", [], {}),
        ("Split", [np.array([1, 2])], {"axis": 1, "num_node_outputs": 2}),
        ("QuantizeLinear", [np.array([0.1, 0.02, 0.3], np.float32), np.array([3, 0, 7], np.uint8)], {"axis": 1}),
        ("QuantizeLinear", [np.arange(1, 6, dtype=np.float32) / 50], {"axis": -1}),
        ("DequantizeLinear", [np.arange(1, 5, dtype=np.float32)], {"axis": 2}),
    ],
)
def test_the_layout_does_not_change_the_meaning(op_type, extra, attributes):
    """Axis by axis of different sizes; the first input alone has its channels last."""
    x = _random(2, 3, 4, 5) if op_type != "DequantizeLinear" else np.arange(120, dtype=np.int8).reshape(2, 3, 4, 5)
    lowering = _lowering(op_type, 17)
    shared = [value if value.dtype.kind == "i" else _jax(value) for value in extra]
    expected = lowering.function(_jax(x), *shared, **attributes)
    found = lowering.channels_last.function(_jax(to_channels_last(x)), *shared, **attributes)
    parts = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for part, other in parts:
        np.testing.assert_allclose(to_onnx(part), other, rtol=1e-6, atol=1e-6)


def _spread(scale, axis, block_size, shape):
    """NumPy's own way to lay scales out over a tensor."""
    if scale.ndim == 0:
        return np.broadcast_to(scale, shape)
    if block_size:
        index = np.minimum(np.arange(shape[axis]) // block_size, scale.shape[axis] - 1)
        return np.take(scale, index, axis=axis)
    return np.broadcast_to(np.expand_dims(scale, [k for k in range(len(shape)) if k != axis % len(shape)]), shape)


def _scales(axis, block_size, shape):
    if axis is None:
        return np.float32(0.037).reshape(())
    if block_size:
        sizes = [-(-size // block_size) if k == axis % len(shape) else size for k, size in enumerate(shape)]
        return (np.random.default_rng(1).uniform(0.01, 0.3, sizes)).astype(np.float32)
    return np.random.default_rng(1).uniform(0.01, 0.3, shape[axis]).astype(np.float32)


@pytest.mark.parametrize("dtype", _GRIDS)
@pytest.mark.parametrize(("axis", "block_size"), [(None, 0), (0, 0), (1, 0), (-1, 0), (0, 2), (1, 3), (2, 4)], ids=str)
def test_quantization_rounds_half_to_even_on_the_grid(dtype, axis, block_size):
    shape = (2, 5, 8)
    low, high = _GRIDS[dtype]
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    scale = _scales(axis, block_size, shape)
    zero_point = np.random.default_rng(2).integers(max(low, -5), min(high, 5), scale.shape).astype(kind)
    step, offset = (_spread(value, axis, block_size, shape) for value in (scale, zero_point.astype(np.int64)))
    # ties, ends of the grid and beyond: multiples of half a step (exact in float32 for the steps used)
    x = (np.random.default_rng(3).integers(2 * low - 20, 2 * high + 20, shape) / 2 * step).astype(np.float32)
    settings = {"axis": 1 if axis is None else axis, "block_size": block_size}
    found = quantize_linear(_jax(x), _jax(scale), _jax(zero_point), **settings)
    expected = np.clip(np.rint(x / step) + offset, low, high)  # float32 division, rounded correctly, then exact
    assert found.dtype == kind
    np.testing.assert_array_equal(np.asarray(found).astype(np.int64), expected)
    back = dequantize_linear(found, _jax(scale), _jax(zero_point), **settings)
    np.testing.assert_array_equal(back, (expected - offset).astype(np.float32) * step)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_quantization_is_that_of_onnx_runtime(dtype, axis):
    x = 3 * _random(3, 4, 5)
    scale = np.random.default_rng(1).uniform(0.01, 0.03, x.shape[axis]).astype(np.float32)
    zero_point = np.random.default_rng(2).integers(0, 9, x.shape[axis]).astype(dtype)
    (expected,) = _by_onnx_runtime("QuantizeLinear", [x, scale, zero_point], opset=21, axis=axis)
    found = quantize_linear(_jax(x), _jax(scale), _jax(zero_point), axis=axis)
    np.testing.assert_array_equal(found, expected)
    (expected,) = _by_onnx_runtime("DequantizeLinear", [expected, scale, zero_point], opset=21, axis=axis)
    np.testing.assert_array_equal(dequantize_linear(found, _jax(scale), _jax(zero_point), axis=axis), expected)


def test_int32_is_dequantized_without_a_zero_point():
    x = np.array([[2**24, -3], [5, 0]], np.int32)
    scale = np.array([0.5, 0.25], np.float32)
    np.testing.assert_array_equal(dequantize_linear(_jax(x), _jax(scale), axis=0), x * scale[:, None])


@pytest.mark.parametrize("a", [(3,), (2, 3), (4, 2, 3)])
@pytest.mark.parametrize("b", [(3,), (3, 5), (4, 3, 5), (7, 1, 3, 5)])
def test_matmul_takes_any_ranks(a, b):
    found = _lowering("MatMul", 17).function(_jax(_random(*a)), _jax(_random(*b, seed=1)))
    expected = np.matmul(_random(*a).astype(np.float64), _random(*b, seed=1))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
