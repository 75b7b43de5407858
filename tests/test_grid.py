"""Laws of integer grids: what rounding keeps, where zero lies, which way gradients flow, and what ONNX Runtime does."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ptqjax.encodings.encoding import integers, make_encoding, storage_dtype
from ptqjax.errors import ConfigError
from ptqjax.kernels import grid
from ptqjax.kernels.ranges import SYMMETRIES, GridKind, grid_kind, grid_of_range

FINITE = st.floats(min_value=-1e6, max_value=1e6, width=32)


WIDTHS = [f"{sign}int{bits}" for bits in range(2, 17) for sign in ("", "u")]
ANY_FLOAT = st.floats(allow_nan=False, allow_infinity=False, width=32)


def kind(dtype: str, *, symmetric=False, power_of_two: bool = False) -> GridKind:
    return grid_kind(dtype, symmetric=symmetric, power_of_two=power_of_two)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("int8", (-128, 127)),
        ("uint8", (0, 255)),
        ("int4", (-8, 7)),
        ("int6", (-32, 31)),
        ("uint16", (0, 65535)),
        ("int2", (-2, 1)),
        ("int9", (-256, 255)),
        ("uint15", (0, 32767)),
        ("int32", (-(2**31), 2**31 - 1)),
    ],
)
def test_integer_range(dtype: str, expected: tuple[int, int]) -> None:
    assert grid.integer_range(dtype) == expected


@pytest.mark.parametrize("dtype", ["int1", "int17", "int64", "int08", "float16", "int"])
def test_integer_range_names_what_it_expects(dtype: str) -> None:
    with pytest.raises(ConfigError, match=rf"{dtype}.*expected int or uint with 2 to 16 or 32 bits"):
        grid.integer_range(dtype)


@pytest.mark.parametrize("dtype", [*WIDTHS, "int32", "uint32"])
def test_every_width_is_held_by_the_narrowest_array_type(dtype: str) -> None:
    encoding = make_encoding(np.float32(0.1), np.float32(0), dtype=dtype)
    bits = int(dtype.lstrip("uint"))
    assert encoding.num_bits == bits
    holder = next(size for size in (2, 4, 8, 16, 32) if size >= bits)
    assert encoding.dtype == dtype.rstrip("0123456789") + str(holder)
    codes = integers(np.asarray([-np.inf, np.inf, 0], np.float32), encoding)
    assert codes.dtype == storage_dtype(encoding.dtype)
    assert codes.tolist() == [int(encoding.qmin), int(encoding.qmax), 0]


def test_the_grid_of_32_bits_has_ends_that_float32_holds() -> None:
    """The largest float32 below 2^31 is 2^31 - 128; and both ends are as far from 0."""
    k = kind("int32")
    assert (float(k.qmin), float(k.qmax)) == (128 - 2**31, 2**31 - 128)
    scale, zero_point = grid_of_range(np.float32(-3), np.float32(2), kind("int32", symmetric=True))
    assert (float(scale), float(zero_point)) == (np.float32(3 / (2**31 - 128)), 0)


SYMMETRY_CASES = [
    # dtype, symmetric, range, scale, zero point
    ("int8", True, (-3, 2), 3 / 127, 0),
    ("int8", "strict", (-3, 2), 3 / 127, 0),
    ("int8", "unsigned", (0, 2), 2 / 255, -128),
    ("int8", "unsigned", (1, 2), 2 / 255, -128),
    ("int8", "unsigned", (-1e-3, 2), 2 / 127, 0),
    ("int8", "strict unsigned", (0, 2), 2 / 254, -127),
    ("uint8", True, (-3, 2), 3 / 127, 128),
    ("uint8", "unsigned", (0, 2), 2 / 255, 0),
    ("uint8", False, (-1, 2), 3 / 255, 85),
    ("int8", False, (-1, 2), 3 / 255, -43),
    ("int2", True, (-3, 2), 3, 0),
    ("int2", "strict", (-3, 2), 3, 0),
    ("int2", "unsigned", (0, 3), 1, -2),
    ("uint2", False, (-1, 2), 1, 1),
]


@pytest.mark.parametrize(("dtype", "symmetric", "limits", "scale", "zero_point"), SYMMETRY_CASES)
def test_how_zero_lies_on_the_grid(dtype, symmetric, limits, scale, zero_point) -> None:
    found = grid_of_range(np.float32(limits[0]), np.float32(limits[1]), kind(dtype, symmetric=symmetric))
    assert float(found[0]) == pytest.approx(scale, rel=1e-6)
    assert float(found[1]) == zero_point


@given(
    ends=st.tuples(ANY_FLOAT, ANY_FLOAT),
    dtype=st.sampled_from([*WIDTHS, "int32"]),
    symmetric=st.sampled_from(SYMMETRIES),
    power_of_two=st.booleans(),
)
@example(ends=(-3.4028235e38, 3.4028235e38), dtype="int8", symmetric=True, power_of_two=True)
@example(ends=(-3.4028235e38, 3.4028235e38), dtype="int2", symmetric=True, power_of_two=False)
@example(ends=(0.0, 3.4028235e38), dtype="uint16", symmetric=False, power_of_two=True)
@example(ends=(-1e-45, 1e-45), dtype="int8", symmetric=False, power_of_two=True)
@settings(max_examples=500, deadline=None)
def test_laws_of_every_grid(ends, dtype, symmetric, power_of_two) -> None:
    """Whatever the range: 0 has a code, each code a finite number, and the whole range is covered up to float32's end.

    Steps are never subnormal, and powers of two are exactly that and at most twice as wide as needed.
    """
    low, high = map(np.float32, (min(ends), max(ends)))
    k = kind(dtype, symmetric=symmetric, power_of_two=power_of_two)
    scale, zero_point = grid_of_range(low, high, k)
    assert k.qmin <= zero_point <= k.qmax
    assert zero_point == np.round(zero_point)
    assert scale >= np.finfo(np.float32).tiny
    assert grid.fake_quantize(np.float32(0), scale, zero_point, k.qmin, k.qmax, enabled=True) == 0
    codes = np.asarray([k.qmin, k.qmax], np.float32)
    assert np.isfinite(grid.dequantize(codes, scale, zero_point)).all()
    if power_of_two:
        assert np.frexp(scale)[0] == 0.5
        free = grid_of_range(low, high, kind(dtype, symmetric=symmetric))[0]
        assert scale < 2 * free
    largest = 1.5e38 if power_of_two or k.qmax < 4 else 3.3e38
    x = np.clip(np.asarray([low, high], np.float32), -largest, largest)
    rounded = grid.fake_quantize(x, scale, zero_point, k.qmin, k.qmax, enabled=True)
    # Half a step for the value and half for the zero point; in 32 bits, x / scale has roundings of its own.
    steps = 1.001 if dtype != "int32" else 2**9
    assert np.all(np.abs(rounded.astype(np.float64) - x) <= steps * float(scale))


@given(low=FINITE, high=FINITE, dtype=st.sampled_from(["int8", "uint8", "int4", "uint16"]), symmetric=st.booleans())
@settings(max_examples=200, deadline=None)
def test_zero_is_on_the_grid_and_the_range_is_covered(low: float, high: float, dtype: str, symmetric) -> None:
    low, high = min(low, high), max(low, high)
    k = kind(dtype, symmetric=symmetric)
    scale, zero_point = grid_of_range(low, high, k)
    assert k.qmin <= zero_point <= k.qmax
    assert zero_point == round(float(zero_point))
    assert scale > 0
    ends = np.asarray([low, high, 0.0], dtype=np.float32)
    rounded = grid.fake_quantize(ends, scale, zero_point, k.qmin, k.qmax, enabled=True)
    assert rounded[2] == 0
    # Rounding the zero point moves the ends by half a step, rounding the value by another; float32 adds its own.
    assert np.all(np.abs(rounded - ends) <= scale * (1 + 1e-3))


def test_range_to_grid_equals_the_equations_in_float64() -> None:
    rng = np.random.default_rng(0)
    low, high = -rng.uniform(0, 5, 100).astype(np.float32), rng.uniform(0, 5, 100).astype(np.float32)
    scale, zero_point = grid_of_range(low, high, kind("uint8"))
    expected = ((high.astype(np.float64) - low.astype(np.float64)) / 255).astype(np.float32)
    # The sum of two quotients rounds once more in float64 than the quotient of the sum: seldom an ulp of float32.
    np.testing.assert_allclose(scale, expected, rtol=1.2e-7)
    np.testing.assert_array_equal(zero_point, np.round(-low.astype(np.float64) / scale))
    scale, zero_point = grid_of_range(low, high, kind("int8", symmetric=True))
    np.testing.assert_array_equal(scale, (np.maximum(high, -low).astype(np.float64) / 127).astype(np.float32))
    assert not zero_point.any()


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1.0, 1e38, float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint16", "int2"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_code_stands_for_a_finite_number(value: float, dtype: str, symmetric) -> None:
    k = kind(dtype, symmetric=symmetric)
    for low, high in ((-value, value), (0, value), (-value, 0)):
        scale, zero_point = grid_of_range(low, high, k)
        codes = np.asarray([k.qmin, k.qmax, zero_point], dtype=np.float32)
        assert np.isfinite(grid.dequantize(codes, scale, zero_point)).all()
        assert scale >= np.finfo(np.float32).tiny
        assert value > 0 or scale == 1


def test_ranges_agree_between_numpy_and_jax() -> None:
    rng = np.random.default_rng(1)
    low, high = -rng.uniform(0, 5, 100).astype(np.float32), rng.uniform(0, 5, 100).astype(np.float32)
    expected = grid_of_range(low, high, kind("uint8"))
    found = jax.jit(grid_of_range)(low, high, jax.tree.map(jnp.asarray, kind("uint8")))
    np.testing.assert_allclose(found[0], expected[0], rtol=3e-7)  # float32 against float64: two ulps
    np.testing.assert_allclose(found[1], expected[1], atol=1)  # a tie of the zero point may fall the other way


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "int16", "uint16"])
def test_quantize_inverts_dequantize(dtype: str) -> None:
    qmin, qmax = grid.integer_range(dtype)
    codes = np.arange(qmin, qmax + 1, dtype=np.float32)
    scale, zero_point = np.float32(0.0173), np.float32((qmin + qmax) // 3)
    real = grid.dequantize(codes, scale, zero_point)
    np.testing.assert_array_equal(grid.quantize(real, scale, zero_point, qmin, qmax), codes)


def test_fake_quantize_is_idempotent_and_monotone() -> None:
    x = np.sort(np.random.default_rng(2).normal(size=4000).astype(np.float32))
    once = grid.fake_quantize(x, np.float32(0.013), np.float32(100), 0.0, 255.0, enabled=True)
    twice = grid.fake_quantize(once, np.float32(0.013), np.float32(100), 0.0, 255.0, enabled=True)
    np.testing.assert_array_equal(once, twice)
    assert np.all(np.diff(once) >= 0)
    assert len(np.unique(once)) <= 256


def quantize_linear(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int) -> np.ndarray:
    """Returns ONNX Runtime's codes."""
    element = helper.np_dtype_to_tensor_dtype(zero_point.dtype)
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], axis=axis)],
        "g",
        [helper.make_tensor_value_info(n, t, a.shape) for n, t, a in
         (("x", TensorProto.FLOAT, x), ("s", TensorProto.FLOAT, scale), ("z", element, zero_point))],
        [helper.make_tensor_value_info("y", element, x.shape)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x, "s": scale, "z": zero_point})[0])


def ties(scale: np.ndarray) -> np.ndarray:
    """Returns multiples of half a step: every other one is a tie, before float32 rounds it up or down."""
    halves = np.arange(-700, 701, dtype=np.float32) / 2
    return (halves[None, :] * scale.reshape(-1, 1)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize("where", ["numpy", "jax", "constant scale", "argument scale"])
def test_codes_equal_onnx_runtime_bit_by_bit(dtype: str, where: str) -> None:
    scale = np.asarray([0.017, 0.1, 1 / 255, 0.3, 7e-3, 1.0, 2.0**-5, 123.456, 1e-20], dtype=np.float32)
    noise = np.random.default_rng(3).normal(size=(len(scale), 3000)) * 100 * scale[:, None]
    x = np.concatenate([ties(scale), noise.astype(np.float32), np.full((len(scale), 1), 3e38, np.float32)], axis=1)
    zero_point = np.arange(3, 3 + len(scale)).astype(dtype)
    qmin, qmax = (np.float32(limit) for limit in grid.integer_range(dtype))
    z = zero_point.astype(np.float32)[:, None]
    s = scale[:, None]
    with np.errstate(over="ignore"):
        found = {
            "numpy": lambda: grid.quantize(x, s, z, qmin, qmax),
            "jax": lambda: grid.quantize(jnp.asarray(x), s, z, qmin, qmax),
            "constant scale": lambda: jax.jit(lambda x: grid.quantize(x, s, z, qmin, qmax))(x),
            "argument scale": lambda: jax.jit(grid.quantize)(x, s, z, qmin, qmax),
        }[where]()
    np.testing.assert_array_equal(np.asarray(found), quantize_linear(x, scale, zero_point, 0).astype(np.float32))


@pytest.mark.parametrize("scale", [0.017, 0.3, 7e-3])
def test_one_scale_under_jit_divides_as_numpy_does(scale: float) -> None:
    s = np.float32(scale)
    x = ties(np.asarray([scale], dtype=np.float32))[0]
    expected = grid.quantize(x, s, np.float32(3), np.float32(0), np.float32(255))
    for found in (
        jax.jit(lambda x: grid.quantize(x, s, np.float32(3), np.float32(0), np.float32(255)))(x),
        jax.jit(grid.quantize)(x, s, np.float32(3), np.float32(0), np.float32(255)),
    ):
        np.testing.assert_array_equal(found, expected)
    # The trap that this guards against: a plain division is compiled into a product with the reciprocal.
    assert np.any(np.round(x * (np.float32(1) / s)) != np.round(x / s))


def fake(x, scale=0.5, zero_point=2.0, qmin=0.0, qmax=7.0, *, enabled: bool | jax.Array = True):
    return grid.fake_quantize(x, scale, zero_point, qmin, qmax, enabled=enabled)


def test_gradient_in_x_is_one_on_the_grid_and_zero_outside() -> None:
    x = jnp.asarray([-1.3, -1.2, -0.9, 0.0, 0.3, 2.5, 2.7, 2.8, 9.0])  # the grid spans -1 to 2.5, its cells 1.25 more
    gradient = jax.grad(lambda x: fake(x).sum())(x)
    np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 1, 1, 1, 0, 0])


def test_gradient_in_scale_is_that_of_learned_step_sizes() -> None:
    x = jnp.asarray([-9.0, 0.3, 0.1, 9.0])
    gradient = jax.jacobian(lambda s: fake(x, scale=s))(0.5)
    expected = [0 - 2, 1 - 0.6, 0 - 0.2, 7 - 2]  # outside c - z; on the grid (c - z) - x / s
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_gradient_in_zero_point_moves_the_ends_alone() -> None:
    x = jnp.asarray([-9.0, 0.3, 9.0])
    np.testing.assert_array_equal(jax.jacobian(lambda z: fake(x, zero_point=z))(2.0), [-0.5, 0, -0.5])


def test_forward_and_reverse_gradients_agree() -> None:
    x = jnp.linspace(-3, 4, 41)
    forward = jax.jacfwd(fake, argnums=(0, 1, 2))(x, 0.5, 2.0)
    reverse = jax.jacrev(fake, argnums=(0, 1, 2))(x, 0.5, 2.0)
    for a, b in zip(forward, reverse, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_disabled_passes_values_and_gradients_through() -> None:
    x = jnp.asarray([-9.0, 0.3, np.pi])
    np.testing.assert_array_equal(fake(x, enabled=jnp.asarray(False)), x)
    np.testing.assert_array_equal(fake(np.asarray(x), enabled=False), x)
    np.testing.assert_array_equal(jax.grad(lambda x: fake(x, enabled=jnp.asarray(False)).sum())(x), [1, 1, 1])
    assert jax.grad(lambda s: fake(x, scale=s, enabled=jnp.asarray(False)).sum())(0.5) == 0


def test_one_trace_serves_all_widths_ranges_and_switches() -> None:
    traces = []

    @jax.jit
    def run(x, scale, zero_point, limits, enabled):
        traces.append(1)
        return grid.fake_quantize(x, scale, zero_point, *limits, enabled=enabled)

    x = np.linspace(-1, 1, 101, dtype=np.float32)
    for dtype in ("int4", "uint8", "int16"):
        for enabled in (True, False):
            qmin, qmax = (np.float32(limit) for limit in grid.integer_range(dtype))
            expected = grid.fake_quantize(x, np.float32(0.1), np.float32(1), qmin, qmax, enabled=enabled)
            found = run(x, np.float32(0.1), np.float32(1), (qmin, qmax), np.asarray(enabled))
            np.testing.assert_array_equal(found, expected)
    assert len(traces) == 1


def test_vmap_over_scales_equals_a_loop() -> None:
    x, scales = jnp.linspace(-1, 1, 50), jnp.asarray([0.1, 0.02, 0.3])
    together = jax.vmap(lambda s: fake(x, scale=s))(scales)
    np.testing.assert_array_equal(together, jnp.stack([fake(x, scale=s) for s in scales]))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_short_floats_are_rounded_in_float32_and_keep_their_type(dtype) -> None:
    x = jnp.linspace(-1, 3, 64).astype(dtype)
    found = fake(x, scale=0.01, qmax=255.0)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, fake(x.astype(jnp.float32), scale=0.01, qmax=255.0).astype(dtype))
