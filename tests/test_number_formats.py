"""Laws of short floating-point formats: rounding as ml_dtypes and ONNX Runtime have it, scales, gradients, files."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from ptqjax import QuantizationConfig, calibrate, export, read, simulate
from ptqjax.agreement import run, session
from ptqjax.encodings.biases import bias_encoding, bias_sites
from ptqjax.encodings.encoding import dequantize, fake_quantize, integers, make_encoding, quantize, storage_dtype
from ptqjax.errors import ConfigError
from ptqjax.kernels.float_formats import array_type, largest_number, round_to_format
from ptqjax.kernels.grid import FLOAT_FORMATS
from ptqjax.kernels.ranges import scale_of_float_range
from tests.models import Chain, build, node

EIGHT_BITS, SIXTEEN_BITS = FLOAT_FORMATS[:2], FLOAT_FORMATS[2:]
ELEMENT = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def numbers(name):
    """All finite numbers of a format."""
    dtype = array_type(name)
    codes = np.arange(2 ** (8 * dtype.itemsize), dtype=f"uint{8 * dtype.itemsize}").view(dtype)
    with np.errstate(invalid="ignore"):
        wide = codes.astype(np.float32)
    return np.unique(wide[np.isfinite(wide)])


def hard_cases(name):
    """All bfloat16 numbers; each number of the format; each tie and both its neighbours in float32; the overflow."""
    own, (bfloats,) = numbers(name), (numbers("bfloat16"),)
    wide = own.astype(np.float64)
    ties = ((wide[1:] + wide[:-1]) / 2).astype(np.float32)
    beyond = np.float32(min(wide[-1] + (wide[-1] - wide[-2]) / 2, np.finfo(np.float32).max))
    ties = np.concatenate([ties, [beyond, -beyond]]).astype(np.float32)
    around = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    ends = np.asarray([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    return np.concatenate([bfloats, own, ties, *around, ends])


def cast(x, name):
    """What ml_dtypes makes of it; formats of 8 bits saturate, as ONNX has it by default."""
    x = np.clip(x, -largest_number(name), largest_number(name)) if name in EIGHT_BITS else x
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(array_type(name)).astype(np.float32)


def assert_same_bits(found, expected):
    """Signs of zero count; NaN is NaN."""
    found = np.asarray(found)
    assert found.dtype == np.float32
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    assert same.all(), (found[~same][:5], expected[~same][:5])


@pytest.mark.parametrize("name", FLOAT_FORMATS)
@pytest.mark.parametrize("where", ["numpy", "jax", "jit"])
def test_rounding_is_that_of_ml_dtypes(name, where):
    """XLA may leave out a conversion there and back, or go to float8 by way of float16, and round twice."""
    x = hard_cases(name)
    run = {
        "numpy": lambda: round_to_format(x, name),
        "jax": lambda: round_to_format(jnp.asarray(x), name),
        "jit": lambda: jax.jit(lambda v: round_to_format(v, name))(x),
    }[where]
    assert_same_bits(run(), cast(x, name))


def run_in_onnx_runtime(nodes, initializers, x, opset):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("scale", [1.0, 0.3, 7e-3, 2.0**-5])
def test_eight_bits_are_what_onnx_runtime_makes_of_them(name, scale):
    x = hard_cases(name)
    x = x[np.isfinite(x)] * np.float32(scale)
    x = x[np.abs(x) >= np.finfo(np.float32).tiny]  # XLA flushes subnormals to 0; they become 0 in any case
    ends = [
        numpy_helper.from_array(np.asarray(scale, np.float32), "s"),
        numpy_helper.from_array(np.zeros((), array_type(name)), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    expected = run_in_onnx_runtime(nodes, ends, x, 19)
    encoding = make_encoding(np.float32(scale), np.float32(0), dtype=name)
    np.testing.assert_array_equal(fake_quantize(x, encoding), expected)
    np.testing.assert_array_equal(jax.jit(fake_quantize)(x, encoding), expected)


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_sixteen_bits_are_what_onnx_runtime_makes_of_them(name):
    x = hard_cases(name)
    nodes = [
        helper.make_node("Cast", ["x"], ["q"], to=ELEMENT[name]),
        helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT),
    ]
    encoding = make_encoding(np.float32(1), np.float32(0), dtype=name)
    assert_same_bits(fake_quantize(x, encoding), run_in_onnx_runtime(nodes, [], x, 13))


def test_what_an_encoding_says_of_its_format():
    expected = {"float8_e4m3fn": (8, 448.0), "float8_e5m2": (8, 57344.0), "float16": (16, 65504.0)}
    expected["bfloat16"] = (16, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max))
    for name, (bits, largest) in expected.items():
        encoding = make_encoding(np.float32(1), np.float32(0), dtype=name)
        assert (encoding.dtype, encoding.num_bits, encoding.float_format) == (name, bits, name)
        assert (float(encoding.qmin), float(encoding.qmax)) == (-largest, largest)
        assert storage_dtype(name) == array_type(name)
        codes = integers(np.asarray([0.3, -1.7], np.float32), encoding)
        assert codes.dtype == array_type(name)
        np.testing.assert_array_equal(codes.astype(np.float32), cast(np.asarray([0.3, -1.7], np.float32), name))


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_the_scale_brings_the_largest_value_onto_the_largest_number(name):
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    scale = scale_of_float_range(x.min(), x.max(), name)
    assert float(scale) == pytest.approx(np.abs(x).max() / largest_number(name), rel=1e-6)
    encoding = make_encoding(scale, np.float32(0), dtype=name)
    codes = quantize(x, encoding)
    assert np.abs(codes).max() == largest_number(name)
    # Half a step of the fraction, of the number itself; below the normal numbers, half the smallest step.
    fraction, smallest = {"float8_e4m3fn": (2.0**-4, 2.0**-9), "float8_e5m2": (2.0**-3, 2.0**-16)}[name]
    error = np.abs(dequantize(codes, encoding) - x)
    assert np.all(error <= np.maximum(np.abs(x) * fraction, smallest / 2 * scale) * (1 + 1e-5))
    once = fake_quantize(x, encoding)
    np.testing.assert_array_equal(fake_quantize(once, encoding), once)


@pytest.mark.parametrize("name", FLOAT_FORMATS)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1.0, 1e38, float(np.finfo(np.float32).max)])
def test_scales_of_extreme_ranges_keep_every_code_finite(name, power_of_two, value):
    for low, high in ((-value, 0), (0, value), (-value, value)):
        scale = scale_of_float_range(np.float32(low), np.float32(high), name, power_of_two=power_of_two)
        assert scale.dtype == np.float32
        assert scale >= np.finfo(np.float32).tiny
        assert np.isfinite(np.float32(largest_number(name)) * scale)
        assert scale == 1 or (value > 0 and name in EIGHT_BITS)
        assert not power_of_two or np.frexp(scale)[0] == 0.5
    if name in EIGHT_BITS and value <= 1e38:
        assert largest_number(name) * float(scale) >= value * (1 - 1e-6)


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_gradients_pass_straight_through_below_the_largest_number(name):
    top = np.float32(largest_number(name))
    scale = np.float32(0.5 if name in EIGHT_BITS else 1)
    encoding = make_encoding(scale, np.float32(0), dtype=name)
    inside = np.asarray([0, 0.3, -1.7, 100], np.float32)
    outside = np.asarray([2 * top, -2 * top] if name != "bfloat16" else [np.inf, -np.inf], np.float32)
    slope = jax.grad(lambda v: fake_quantize(v, encoding).sum())
    np.testing.assert_array_equal(slope(jnp.asarray(inside)), np.ones(4))
    _, tangent = jax.jvp(lambda v: fake_quantize(v, encoding), (jnp.asarray(outside),), (jnp.ones(2),))
    np.testing.assert_array_equal(tangent, np.zeros(2))

    def of_scale(s):
        return fake_quantize(jnp.asarray(inside), encoding.replace(scale=s))

    found = jax.jacobian(of_scale)(jnp.asarray(scale))
    expected = quantize(inside, encoding) - inside / scale if name in EIGHT_BITS else np.zeros(4)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_format_has_no_zero_point_and_sixteen_bits_no_scale():
    with pytest.raises(ConfigError, match=r"float8_e5m2.*zero point 0 alone; found \[3"):
        make_encoding(np.float32(1), np.float32(3), dtype="float8_e5m2")
    with pytest.raises(ConfigError, match=r"bfloat16.*is a cast and has the scale 1; found \[2"):
        make_encoding(np.float32(2), np.float32(0), dtype="bfloat16")


def test_disabled_formats_pass_values_and_gradients_through():
    x = jnp.asarray([-9.0, 0.3, 1e6])
    off = make_encoding(np.float32(0.1), np.float32(0), dtype="float8_e4m3fn").replace(enabled=jnp.asarray(False))
    np.testing.assert_array_equal(fake_quantize(x, off), x)
    np.testing.assert_array_equal(jax.grad(lambda v: fake_quantize(v, off).sum())(x), [1, 1, 1])


def test_scales_along_an_axis_and_in_blocks():
    x = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    along = make_encoding(np.asarray([0.1, 0.2, 0.3, 0.4], np.float32), np.float32(0), dtype="float8_e4m3fn", axis=0)
    rows = [fake_quantize(x[i], along.replace(scale=along.scale[i], axis=None)) for i in range(4)]
    np.testing.assert_array_equal(fake_quantize(x, along), np.stack(rows))
    scale = np.full((4, 3), 0.1, np.float32) * np.arange(1, 4, dtype=np.float32)
    blocks = make_encoding(scale, np.float32(0), dtype="float8_e5m2", axis=1, block_size=2)
    parts = zip(np.split(x, 3, axis=1), scale[0], strict=True)
    columns = [fake_quantize(part, make_encoding(s, np.float32(0), dtype="float8_e5m2")) for part, s in parts]
    np.testing.assert_array_equal(fake_quantize(x, blocks), np.concatenate(columns, axis=1))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network(*, opset=13):
    """Two convolutions and a linear layer, with biases."""
    chain = Chain(3, dtype=np.float32, opset=opset)
    chain.conv(6, pad=1, bias=True).add("Relu").conv(4, kernel=1, bias=True).add("GlobalAveragePool")
    model = chain.add("Flatten").gemm(5).build()
    return model, {"x": normal(4, 3, 8, 8)}


def float_encodings(model, batch, dtypes):
    """Encodings of int8 for all tensors, but for those that `dtypes` names."""
    encodings = calibrate(model, [batch], QuantizationConfig(ranges="min-max"))
    values = dict(model.params)
    for name, dtype in dtypes.items():
        largest = np.abs(values[name]).max() if name in values else np.float32(4)
        scale = scale_of_float_range(-largest, largest, dtype)
        encodings[name] = make_encoding(scale, np.float32(0), dtype=dtype)
    return encodings


def names_of(model):
    weights = [name for name, value in model.params.items() if np.ndim(value) > 1]
    activations = [each.output for each in model.graph.nodes if each.op_type in ("Conv", "Relu")]
    return weights, activations


def mixed(model):
    """A type for each tensor: fp8, bytes and 16 bits side by side."""
    weights, activations = names_of(model)
    dtypes = {"x": "float8_e4m3fn", weights[0]: "float8_e4m3fn", weights[1]: "float16", activations[-1]: "bfloat16"}
    return dtypes | {weights[2]: "float8_e5m2"}


@pytest.mark.parametrize("kind", ["mixed", *FLOAT_FORMATS])
@pytest.mark.parametrize("weights", ["integer", "float"])
def test_the_file_of_a_network_equals_the_simulation(tmp_path, kind, weights):
    model, batch = network()
    everywhere = [name for each in names_of(model) for name in each] + ["x"]
    dtypes = mixed(model) if kind == "mixed" else dict.fromkeys(everywhere, kind)
    encodings = float_encodings(model, batch, dtypes)
    export(model, encodings, tmp_path, "model", weights=weights)
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    (opset,) = proto.opset_import
    assert opset.version == (19 if kind == "mixed" or kind in EIGHT_BITS else 13)
    (y,) = run(session(tmp_path / "model.onnx"), batch).values()
    output = encodings[model.graph.outputs[0].name]
    for arithmetic in ("float", "integer"):
        (simulated,) = simulate(model, encodings, arithmetic=arithmetic)(model.params, encodings, batch).values()
        # A code before the last layer that falls the other way moves outputs by one step at most here.
        np.testing.assert_allclose(simulated, y, atol=1.01 * float(output.scale))
        assert np.mean(simulated == y) >= 0.9


def test_biases_beside_floats_stay_floats(tmp_path):
    model, batch = network()
    encodings = float_encodings(model, batch, mixed(model))
    export(model, encodings, tmp_path, "model")
    written = read(tmp_path / "model.onnx").params
    sites = bias_sites(model)
    assert len(sites) == 3
    assert [bias_encoding(encodings, site) is None for site in sites] == [True, True, True]
    for site in sites:
        np.testing.assert_array_equal(written[site.bias], model.params[site.bias])


def test_gradients_reach_weights_and_scales_through_a_mixed_network():
    model, batch = network()
    encodings = jax.tree.map(jnp.asarray, float_encodings(model, batch, mixed(model)))
    runs = simulate(model, encodings)
    params = {name: jnp.asarray(value) for name, value in model.params.items()}

    def loss(params, encodings):
        return jnp.sum(next(iter(runs(params, encodings, batch).values())) ** 2)

    of_params, of_encodings = jax.grad(loss, argnums=(0, 1), allow_int=True)(params, encodings)
    for name, dtype in mixed(model).items():
        if name in params:
            assert np.all(np.isfinite(of_params[name]))
            assert np.any(np.asarray(of_params[name]) != 0)
        slope = np.asarray(of_encodings[name].scale)
        assert np.isfinite(slope)
        assert (slope != 0) == (dtype in EIGHT_BITS)


def test_a_weight_beyond_a_format_is_named_before_anything_is_written(tmp_path):
    model, batch = network()
    weight = names_of(model)[0][0]
    large = model.replace(params={**model.params, weight: model.params[weight] * np.float32(1e6)})
    encodings = float_encodings(model, batch, {weight: "float16"})
    with pytest.raises(ConfigError, match=rf"'{weight}' cannot be written.*larger than 65504.*bfloat16"):
        export(large, encodings, tmp_path / "out", "model")
    assert not (tmp_path / "out").exists()


def test_an_operator_that_bars_the_way_to_the_opset_of_a_format_is_named(tmp_path):
    """Softmax over several axes at once: from opset 13 on it has but one; ONNX Runtime's own QuantizeLinear no fp8."""
    nodes = [node("Softmax", ["x"], "p", axis=2), node("MatMul", ["p", "w"], "y")]
    model = build(nodes, {"w": normal(8, 6)}, input_shape=("n", 3, 8, 8), outputs=["y"], opset=12)
    for dtype, opset in (("float8_e5m2", 19), ("bfloat16", 13)):
        encodings = {"w": make_encoding(np.float32(1), np.float32(0), dtype=dtype)}
        with pytest.raises(ConfigError, match=rf"grid of 'w' needs opset {opset}; .*opset 12.*producing 'p'"):
            export(model, encodings, tmp_path / "out", "model")
    encodings = {"w": make_encoding(np.float32(1), np.float32(0), dtype="float16")}
    export(model, encodings, tmp_path / "out", "model")


def test_activations_of_sixteen_bits_overflow_to_infinity_in_file_and_simulation(tmp_path):
    """As hardware casts do; bfloat16 has float32's range."""
    model = build([node("Identity", ["x"], "y")], {}, input_shape=("n",), outputs=["y"], opset=13)
    encodings = {"x": make_encoding(np.float32(1), np.float32(0), dtype="float16")}
    x = np.asarray([65504, 65519, 65520, -1e6, 1], np.float32)
    expected = np.asarray([65504, 65504, np.inf, -np.inf, 1], np.float32)
    export(model, encodings, tmp_path, "model")
    np.testing.assert_array_equal(run(session(tmp_path / "model.onnx"), {"x": x})["y"], expected)
    np.testing.assert_array_equal(simulate(model, encodings)({}, encodings, {"x": x})["y"], expected)
