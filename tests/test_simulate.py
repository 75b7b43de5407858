"""The two programs of a quantized model: what they compute, how they differentiate, batch and compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax import apply, calibrate, simulate
from ptqjax.config import QuantizationConfig
from ptqjax.encodings.biases import bias_encoding, bias_sites
from ptqjax.encodings.encoding import dequantize, fake_quantize, make_encoding, quantize
from ptqjax.errors import ConfigError, DataError
from ptqjax.qdq.insert import insert_qdq
from tests.models import Chain, build, node

MIN_MAX = QuantizationConfig(ranges="min-max")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network():
    chain = Chain(3, dtype=np.float32)
    chain.conv(6, pad=1, bias=True).clip().depthwise(pad=1, bias=True).add("Relu").conv(4, kernel=1, bias=True)
    return chain.add("GlobalAveragePool").add("Flatten").gemm(5).build()


@pytest.fixture(scope="module")
def case():
    model, batch = network(), {"x": normal(4, 3, 8, 8)}
    return model, calibrate(model, [batch], MIN_MAX), batch


def output(outputs):
    return np.asarray(next(iter(outputs.values())))


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_simulation_is_what_the_qdq_model_denotes(case, arithmetic):
    model, encodings, batch = case
    quantized = insert_qdq(model, encodings)
    y = output(simulate(model, encodings, arithmetic=arithmetic)(model.params, encodings, batch))
    expected = output(apply(quantized.graph, quantized.params, batch))
    step = float(encodings[model.graph.outputs[0].name].scale)
    np.testing.assert_allclose(y, expected, atol=1.01 * step)  # a rounding that falls the other way is one step
    assert np.mean(np.abs(y - expected) < step / 2) >= 0.9


def test_outputs_lie_on_their_grid(case):
    model, encodings, batch = case
    y = output(simulate(model, encodings)(model.params, encodings, batch))
    encoding = encodings[model.graph.outputs[0].name]
    np.testing.assert_array_equal(fake_quantize(y, encoding), y)


def test_without_enabled_encodings_simulation_is_the_float_model(case):
    model, encodings, batch = case
    off = {name: encoding.replace(enabled=np.asarray(False)) for name, encoding in encodings.items()}
    expected = output(apply(model.graph, model.params, batch))
    for arithmetic in ("float", "integer"):
        y = output(simulate(model, off, arithmetic=arithmetic)(model.params, off, batch))
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_biases_lie_on_the_grid_of_input_and_weight():
    chain = Chain(3, dtype=np.float32)
    model = chain.conv(4, kernel=1, bias=True).build()
    zero = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    encodings = calibrate(model, [{"x": normal(2, 3, 8, 8)}], MIN_MAX)
    del encodings[model.graph.outputs[0].name]
    (site,) = bias_sites(model)
    encoding = bias_encoding(encodings, site)
    assert encoding is not None
    expected = dequantize(quantize(model.params[site.bias], encoding), encoding)
    y = output(simulate(model, encodings)(model.params, encodings, zero))
    np.testing.assert_array_equal(y[0, :, 0, 0], expected)


def test_gradients_pass_straight_through_inside_the_grid_and_not_outside():
    model = build([node("Identity", ["x"], "y")], {}, input_shape=("n",), outputs=["y"])
    encodings = {"x": make_encoding(np.float32(0.5), np.float32(0), dtype="uint8")}
    run = simulate(model, encodings)
    x = jnp.asarray([-3.0, 1.2, 100.0, 127.9])
    slope = jax.grad(lambda value: run({}, encodings, {"x": value})["y"].sum())(x)
    np.testing.assert_array_equal(slope, [0, 1, 1, 0])


def test_gradients_reach_parameters_scales_and_inputs(case):
    model, encodings, batch = case
    run = simulate(model, encodings)
    arrays = {name: jnp.asarray(value) for name, value in model.params.items()}

    def loss(params, grids_of, x):
        return jnp.sum(run(params, grids_of, {"x": x})[model.graph.outputs[0].name] ** 2)

    leaves = jax.grad(loss, argnums=(0, 1, 2), allow_int=True)(arrays, encodings, jnp.asarray(batch["x"]))
    slopes = [leaves[0][name] for name in arrays if arrays[name].ndim == 4]
    slopes += [leaves[1]["x"].scale, leaves[2]]
    assert all(np.all(np.isfinite(slope)) and np.any(np.asarray(slope) != 0) for slope in slopes)


def test_one_trace_serves_all_widths_and_switches(case):
    model, encodings, batch = case
    traces = []
    run = simulate(model, encodings)

    @jax.jit
    def counted(grids_of):
        traces.append(None)
        return run(model.params, grids_of, batch)

    outputs = []
    for bits in (2, 4, 8):
        top = np.float32(2 ** (bits - 1) - 1)
        width = {
            name: encoding.replace(qmin=-top - 1, qmax=top, scale=encoding.scale * np.float32(127 / top))
            if name in model.params
            else encoding
            for name, encoding in encodings.items()
        }
        width = jax.tree.map(jnp.asarray, width)
        outputs.append(output(counted(width)))
    assert len(traces) == 1
    assert not np.array_equal(outputs[0], outputs[2])


def test_vmap_over_scales_equals_one_by_one(case):
    model, encodings, batch = case
    run = simulate(model, encodings)
    factors = jnp.asarray([0.5, 1.0, 2.0])

    def with_factor(factor):
        scaled = encodings | {"x": encodings["x"].replace(scale=encodings["x"].scale * factor)}
        return next(iter(run(model.params, scaled, batch).values()))

    together = jax.vmap(with_factor)(factors)
    apart = np.stack([with_factor(factor) for factor in factors])
    step = float(encodings[model.graph.outputs[0].name].scale)
    np.testing.assert_allclose(together, apart, atol=1.01 * step)


def test_a_second_call_compiles_nothing(case, caplog):
    model, encodings, batch = case
    simulate(model, encodings)(model.params, encodings, batch)
    with jax.log_compiles():
        jax.jit(lambda x: x + 1)(np.float32(1))
        assert "Compiling" in caplog.text
        caplog.clear()
        simulate(model, encodings)(model.params, encodings, batch)
    assert not [record for record in caplog.records if "Compiling" in record.message]


def test_an_encoding_of_no_tensor_is_an_error_with_near_names(case):
    model, encodings, _ = case
    with pytest.raises(ConfigError, match=r"'xx'.*near names: x"):
        simulate(model, encodings | {"xx": encodings["x"]})


def test_an_unknown_arithmetic_is_an_error(case):
    model, encodings, _ = case
    with pytest.raises(ConfigError, match="expected float or integer"):
        simulate(model, encodings, arithmetic="int")


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_a_wrong_input_is_an_error(case, arithmetic):
    model, encodings, batch = case
    with pytest.raises(DataError, match="input 'y' is unknown"):
        simulate(model, encodings, arithmetic=arithmetic)(model.params, encodings, {"y": batch["x"]})


def test_a_shared_bias_lies_on_the_grid_of_each_of_its_layers():
    """As in the exported model: coarse grids make the rounding of the bias visible."""
    nodes = [node("Conv", ["x", "w", "b"], "c"), node("Conv", ["x", "v", "b"], "d"), node("Concat", ["c", "d"], "y")]
    nodes[2] = node("Concat", ["c", "d"], "y", axis=1)
    params = {"w": normal(2, 3, 1, 1), "v": normal(2, 3, 1, 1, seed=1), "b": np.array([0.3, -0.7], np.float32)}
    model = build(nodes, params, input_shape=("n", 3, 1, 1), outputs=["y"])
    step = {"x": 0.5, "w": 0.5, "v": 0.25}
    encodings = {name: make_encoding(np.float32(scale), np.float32(0), dtype="int8") for name, scale in step.items()}
    y = output(simulate(model, encodings)(params, encodings, {"x": np.zeros((1, 3, 1, 1), np.float32)}))
    np.testing.assert_allclose(y.ravel(), [0.25, -0.75, 0.25, -0.75], atol=0)
    quantized = insert_qdq(model, encodings)
    expected = output(apply(quantized.graph, quantized.params, {"x": np.zeros((1, 3, 1, 1), np.float32)}))
    np.testing.assert_array_equal(y, expected)
