"""Operators element by element: older operator sets against ONNX Runtime, corner cases, gradients, both ways to run."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.ops import find_lowering
from tests.single_node import assert_as_in_onnxruntime, by_us, single_node

_ROUNDING = 4e-6  # a few units of float32 in functions of numbers around 1

_UNARY = {
    "Abs": 13,
    "Acos": 22,
    "Acosh": 22,
    "Asin": 22,
    "Asinh": 22,
    "Atan": 22,
    "Atanh": 22,
    "Ceil": 13,
    "Celu": 12,
    "Cos": 22,
    "Cosh": 22,
    "Elu": 22,
    "Erf": 13,
    "Exp": 13,
    "Floor": 13,
    "Gelu": 20,
    "HardSigmoid": 22,
    "HardSwish": 22,
    "Hardmax": 13,
    "Identity": 13,
    "IsInf": 20,
    "IsNaN": 20,
    "LeakyRelu": 16,
    "Log": 13,
    "LogSoftmax": 13,
    "Mish": 22,
    "Neg": 13,
    "Reciprocal": 13,
    "Relu": 14,
    "Round": 22,
    "Selu": 22,
    "Shrink": 9,
    "Sigmoid": 13,
    "Sign": 13,
    "Sin": 22,
    "Sinh": 22,
    "Softmax": 13,
    "Softplus": 22,
    "Softsign": 22,
    "Sqrt": 13,
    "Swish": 24,
    "Tan": 22,
    "Tanh": 13,
    "ThresholdedRelu": 22,
}
_BOOLEAN = {"IsInf", "IsNaN"}


def _random(*shape, seed=0, dtype=np.float32):
    return (3 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def _integers(*shape, dtype, seed=0):
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(max(info.min, -50), 50, shape, endpoint=True).astype(dtype)


def _function(op_type, opset=28):
    return find_lowering(op_type, opset=opset).function


def _static(op_type, *inputs, opset=28, **attributes):
    """What the operator gives while tracing, of known inputs."""
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        return np.asarray(_function(op_type, opset)(*inputs, **attributes))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("op_type", _UNARY)
def test_static_and_traced_values_agree(op_type, dtype):
    x = np.array([[-2.5, -1.0, -0.5, 0.0], [0.25, 0.5, 1.5, 200.0]]).astype(getattr(ml_dtypes, dtype, dtype))
    static = _static(op_type, x, opset=_UNARY[op_type])
    traced = np.asarray(jax.jit(_function(op_type, _UNARY[op_type]))(x))
    assert static.dtype == traced.dtype == (np.bool_ if op_type in _BOOLEAN else x.dtype)
    # fused by XLA, a chain of narrow operations is rounded less often
    tolerance = {"float32": _ROUNDING, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    np.testing.assert_allclose(static.astype(np.float32), traced.astype(np.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op_type", sorted(set(_UNARY) - _BOOLEAN - {"Acos", "Acosh", "Asin", "Atanh", "Log", "Sqrt"}))
def test_gradients_are_finite(op_type):
    x = jnp.asarray([[-80.0, -3.0, -1.0, 0.5], [1.0, 2.0, 6.0, 80.0]])
    gradient = jax.grad(lambda x: jnp.sum(jnp.tanh(_function(op_type, _UNARY[op_type])(x))))(x)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("op_type", "opset", "attributes"),
    [
        ("Celu", 12, {"alpha": 0.7}),
        ("Clip", 7, {"min": -0.5, "max": 1.5}),
        ("Clip", 7, {"max": 1.5}),
        ("Elu", 7, {"alpha": 0.7}),
        ("HardSigmoid", 7, {"alpha": 0.3, "beta": 0.4}),
        ("Hardmax", 7, {}),
        ("Hardmax", 12, {"axis": -2}),
        ("Hardmax", 13, {"axis": 1}),
        ("LeakyRelu", 7, {"alpha": 0.3}),
        ("LogSoftmax", 7, {}),
        ("LogSoftmax", 12, {"axis": -1}),
        ("LogSoftmax", 13, {"axis": 0}),
        ("Selu", 7, {"alpha": 1.1, "gamma": 1.3}),
        ("Shrink", 9, {"bias": 0.25, "lambd": 1.0}),
        ("Softmax", 7, {"axis": 2}),
        ("Softplus", 7, {}),
        ("Softsign", 7, {}),
        ("ThresholdedRelu", 10, {"alpha": 0.8}),
        ("Round", 11, {}),
        ("Sign", 9, {}),
        ("Asinh", 9, {}),
        ("Sinh", 9, {}),
        ("Tan", 7, {}),
    ],
)
def test_older_operators_are_those_of_onnx_runtime(op_type, opset, attributes):
    assert_as_in_onnxruntime(op_type, [_random(2, 3, 4)], atol=_ROUNDING, opset=opset, **attributes)


@pytest.mark.parametrize(
    ("op_type", "opset", "dtype"),
    [
        ("Add", 7, np.int64),
        ("And", 7, np.bool_),
        ("BitwiseXor", 18, np.uint16),
        ("Div", 7, np.int32),
        ("Div", 14, np.int8),
        ("Equal", 7, np.int64),
        ("Equal", 11, np.float32),
        ("Greater", 9, np.int32),
        ("GreaterOrEqual", 12, np.float32),
        ("Less", 7, np.float32),
        ("LessOrEqual", 16, np.int64),
        ("Max", 8, np.float32),
        ("Max", 12, np.uint64),
        ("Mean", 8, np.float32),
        ("Min", 13, np.int32),
        ("Mod", 10, np.int16),
        ("Mod", 13, np.int64),
        ("Mul", 14, np.uint8),
        ("Or", 7, np.bool_),
        ("PRelu", 9, np.float32),
        ("Pow", 7, np.float32),
        ("Pow", 12, np.int32),
        ("Sub", 13, np.int32),
        ("Sum", 8, np.float32),
        ("Xor", 7, np.bool_),
    ],
)
@pytest.mark.parametrize("shapes", [((2, 3, 4), (4,)), ((2, 3, 4), (3, 1)), ((2, 3, 4), ())], ids=str)
def test_operands_are_broadcast_as_in_onnx_runtime(op_type, opset, dtype, shapes):
    if dtype is np.bool_:
        inputs = [_random(*shape, seed=seed) > 0 for seed, shape in enumerate(shapes)]
    elif dtype is np.float32:
        inputs = [np.abs(_random(*shape, seed=seed)) for seed, shape in enumerate(shapes)]
    else:
        inputs = [_integers(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
        inputs[1] = np.where(inputs[1] == 0, 3, np.clip(inputs[1], None, 4) if op_type == "Pow" else inputs[1])
        inputs[1] = (np.abs(inputs[1]) if op_type == "Pow" else inputs[1]).astype(dtype)
    inputs = [np.asarray(value) for value in inputs]
    is_boolean = op_type in {"And", "Or", "Xor"} or op_type.startswith(("Equal", "Greater", "Less"))
    outputs = (np.bool_ if is_boolean else dtype,)
    assert_as_in_onnxruntime(op_type, inputs, atol=_ROUNDING, opset=opset, outputs=outputs)


@pytest.mark.parametrize("op_type", ["Max", "Min", "Sum", "Mean"])
@pytest.mark.parametrize("opset", [7, 13])
def test_many_operands_of_one_shape_and_one_alone(op_type, opset):
    for count in (1, 3):
        inputs = [_random(2, 3, seed=seed) for seed in range(count)]
        assert_as_in_onnxruntime(op_type, inputs, atol=_ROUNDING, opset=opset)


@pytest.mark.parametrize(
    ("base", "exponent"),
    [(np.int32, np.float32), (np.int64, np.float64), (np.float32, np.int64), (np.int64, np.int32)],
)
def test_powers_have_the_type_of_their_base(base, exponent):
    x, y = np.arange(-4, 5).astype(base), np.array([0, 1, 2, 3, 5, 3, 2, 1, 4]).astype(exponent)
    assert_as_in_onnxruntime("Pow", [x, y], atol=1e-7, opset=15, outputs=(base,))


def test_powers_of_integers_are_exact_under_jit():
    base = np.arange(1, 60, dtype=np.int32)
    found = jax.jit(_function("Pow"))(base, np.full(base.shape, 5, np.float32))
    np.testing.assert_array_equal(found, base**5)
    roots = jax.jit(_function("Pow"))(base, np.full(base.shape, 0.5, np.float32))
    np.testing.assert_array_equal(roots, np.floor(np.sqrt(base.astype(np.float64))).astype(np.int32))


@pytest.mark.parametrize("exponent", [np.uint64, np.int8, np.float32])
def test_integers_to_any_kind_of_power_stay_integers(exponent):
    base, power = np.array([-3, 2, 10], np.int64), np.array([3, 31, 9]).astype(exponent)
    found = _static("Pow", base, power)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, [-27, 2**31, 10**9])


@pytest.mark.parametrize("op_type", ["Equal", "Div", "Mod", "Max", "Where", "BitwiseAnd", "BitShift", "Pow"])
def test_a_known_64_bit_operand_meets_a_traced_one(op_type):
    """Under 32-bit JAX, constants of the graph stay wide until they meet what is traced."""
    known, traced = np.array([1, 2, 3], np.uint64 if op_type == "BitShift" else np.int64), np.array([3, 2, 1], np.int32)
    first = [known > 1] if op_type == "Where" else []
    more = {"direction": "LEFT"} if op_type == "BitShift" else {}
    traced = traced.astype(np.uint32) if op_type == "BitShift" else traced
    found = jax.jit(lambda x: _function(op_type)(*first, known, x, **more))(traced)
    np.testing.assert_array_equal(found, _static(op_type, *first, known, traced.astype(known.dtype), **more))


@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_integers_are_divided_towards_zero_from_end_to_end(dtype):
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    a = np.array([low, low, low + 1, high, -7, 7, -7, 0], dtype)
    b = np.array([2, 3, -2, -2, 2, -2, -3, 5], dtype)
    expected = [int(x / y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    np.testing.assert_array_equal(_static("Div", a, b), expected)
    np.testing.assert_array_equal(jax.jit(_function("Div"))(a, b), expected)


@pytest.mark.parametrize("fmod", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_remainders_take_the_sign_of_one_operand(fmod, dtype):
    values = np.array([-7, -3, -2, -1, 0, 1, 2, 3, 5, 7], dtype)
    a, b = values[:, None], values[values != 0][None]
    expected = (np.fmod if fmod else np.mod)(a, b)
    for found in (_static("Mod", a, b, fmod=fmod), jax.jit(lambda a, b: _function("Mod")(a, b, fmod=fmod))(a, b)):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("fmod", [0, 1])
def test_remainders_of_special_numbers_are_those_of_the_specification(fmod):
    numbers = np.array([0.0, -0.0, 1.5, -1.5, np.inf, -np.inf, np.nan], np.float32)
    a, b = np.broadcast_arrays(numbers[:, None], numbers[None])
    with np.errstate(invalid="ignore"):
        expected = (np.fmod if fmod else np.mod)(a, b)
    found = np.asarray(jax.jit(lambda a, b: _function("Mod")(a, b, fmod=fmod))(a, b))
    np.testing.assert_array_equal(found, expected)
    comparable = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found)[comparable], np.signbit(expected)[comparable])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32])
@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_bits_are_shifted_out(direction, dtype):
    info = np.iinfo(dtype)
    x, amount = np.meshgrid(np.array([info.min, -5, 5, info.max]), np.arange(-1, info.bits + 2))
    x, amount = x.astype(dtype), amount.astype(dtype)
    shifts = np.clip(np.where(amount.astype(np.int64) < 0, 63, amount.astype(np.int64)), 0, 40)
    wide = x.astype(np.int64)
    expected = (wide << np.minimum(shifts, 40) if direction == "LEFT" else wide >> shifts).astype(dtype)
    np.testing.assert_array_equal(_static("BitShift", x, amount, direction=direction), expected)
    found = jax.jit(lambda x, amount: _function("BitShift")(x, amount, direction=direction))(x, amount)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("dtype", "to"), [("float32", 6), ("bool", 2), ("int4", 23), ("float8_e5m2", 3), ("int2", 25)])
def test_bit_cast_keeps_the_bits(dtype, to):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = np.array([0, 1, 1]).astype(kind)
    static, traced = _static("BitCast", x, to=to), np.asarray(jax.jit(lambda x: _function("BitCast")(x, to=to))(x))
    assert static.dtype == traced.dtype
    assert static.tobytes() == traced.tobytes() == x.tobytes()


def test_bit_cast_to_another_width_is_refused():
    with pytest.raises(UnsupportedOperatorError, match="from float32 to int8 has no meaning: the widths differ"):
        _function("BitCast")(jnp.ones(3), to=3)


def test_bit_cast_to_64_bits_is_refused_where_jax_narrows():
    x = np.ones(3)
    proto = single_node("BitCast", [x], opset=26, outputs=(np.int64,), to=7)
    np.testing.assert_array_equal(by_us(proto, [x])[0], x.view(np.int64))
    with pytest.raises(UnsupportedOperatorError, match="set jax_enable_x64"):
        by_us(proto, [x], jit=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8, np.uint64])
def test_clip_brings_into_bounds_either_of_which_may_be_absent(dtype):
    x = np.array([[0, 3], [50, 120]], dtype)
    for low, high in ((2, 100), (None, 100), (2, None), (100, 2)):
        inputs = [x] + [None if bound is None else np.asarray(bound, dtype) for bound in (low, high)]
        assert_as_in_onnxruntime("Clip", inputs, atol=0, opset=12, outputs=(dtype,))


def test_clip_of_float16_without_bounds_leaves_infinity():
    x = np.array([np.inf, -np.inf, 1], np.float16)
    np.testing.assert_array_equal(_static("Clip", x, opset=10), x)
    np.testing.assert_array_equal(jax.jit(_function("Clip", 10))(x), x)


def test_the_greatest_of_nan_is_nan():
    x, y = np.array([np.nan, 1], np.float32), np.array([0, np.nan], np.float32)
    for op_type in ("Max", "Min"):
        assert np.isnan(_static(op_type, x, y)).all()
        assert np.isnan(jax.jit(_function(op_type))(x, y)).all()


@pytest.mark.parametrize("op_type", ["Div", "Log", "Reciprocal", "Exp", "Sqrt"])
def test_static_values_that_leave_the_reals_give_no_warning(op_type):
    x = np.array([0.0, -1.0, 1e5], np.float32)
    inputs = (x, np.zeros_like(x)) if op_type == "Div" else (x,)
    np.testing.assert_allclose(_static(op_type, *inputs), jax.jit(_function(op_type))(*inputs), rtol=_ROUNDING)


def test_where_takes_operands_of_any_rank():
    condition, x, y = _random(3, 1) > 0, _random(2, 1, 4, seed=1), _random(seed=2)
    assert_as_in_onnxruntime("Where", [condition, x, np.asarray(y)], atol=0, opset=9)


@pytest.mark.parametrize(("negative", "positive"), [(0, 1), (1, 0), (1, 1), (0, 0)])
def test_infinities_are_found_by_sign(negative, positive):
    x = np.array([np.inf, -np.inf, np.nan, 1], np.float32)
    settings = {"detect_negative": negative, "detect_positive": positive}
    np.testing.assert_array_equal(_static("IsInf", x, **settings), [positive, negative, 0, 0])


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax", "Hardmax", "Elu", "Max"])
def test_empty_tensors_stay_empty(op_type, shape):
    assert _static(op_type, np.zeros(shape, np.float32)).shape == shape


@pytest.mark.parametrize("alpha", [1.0, 1.7])
def test_swiglu_is_swish_of_the_gate_times_the_value(alpha):
    gate, x = _random(2, 3), _random(2, 3, seed=1)
    expected = gate / (1 + np.exp(-alpha * gate.astype(np.float64))) * x
    found = _function("SwiGLU")(jnp.asarray(gate), jnp.asarray(x), alpha=alpha)
    np.testing.assert_allclose(found, expected, rtol=_ROUNDING, atol=_ROUNDING)
