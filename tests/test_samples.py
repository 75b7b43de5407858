"""Running a graph's first layers on a few samples at a time: what it equals, what goes through it, what stays whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.kernels.chunks import map_chunks
from ptqjax.lowering import interpret, samples
from ptqjax.lowering.samples import interpret_by_samples
from ptqjax.ranges.calibrate import calibrate
from ptqjax.simulation import fake_quantization
from tests.models import Chain, build, mobile_block, node

_ROUNDING = 1e-5  # float32 sums of up to 54 terms in another order


@pytest.fixture(autouse=True)
def small_bound(monkeypatch):
    """A core holds 4 KiB, so that small models are large."""
    monkeypatch.setattr(samples, "_BYTES_PER_CORE", 2**12)
    monkeypatch.setattr(samples, "_cores", lambda: {0})


def _network():
    """A network with a skip, a padded pool, a part that mixes samples, and outputs on both sides of the cut."""
    chain = Chain(3, dtype=np.float32, size=16)
    chain.conv(8, pad=1, bias=True).norm().clip()
    skip = chain.tensor
    chain.depthwise(pad=1).clip().add("Add", skip).add("MaxPool", kernel_shape=(2, 2), strides=(2, 2))
    middle = chain.tensor
    chain.conv(6, kernel=1).add("Concat", middle, axis=1)
    chain.channels += 8
    chain.add("GlobalAveragePool").add("Flatten", axis=1).add("Softmax", axis=0)  # over the batch
    return chain.gemm(5).build(skip, middle)


def _inputs(batch, seed=0):
    return {"x": np.random.default_rng(seed).normal(size=(batch, 3, 16, 16)).astype(np.float32)}


def _num_loops(program, *arguments):
    return str(jax.make_jaxpr(program)(*arguments)).count(" scan[")


@pytest.mark.parametrize("batch", [2, 5, 7, 8])
def test_the_outputs_are_those_of_the_whole_batch(batch):
    model = _network()
    expected, _ = interpret(model.graph, model.params, _inputs(batch), platform="cpu")
    found = interpret_by_samples(model.graph, model.params, _inputs(batch))
    assert _num_loops(lambda x: interpret_by_samples(model.graph, model.params, x), _inputs(batch)) == 1
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=_ROUNDING, atol=_ROUNDING)


def test_gradients_are_those_of_the_whole_batch():
    model, inputs = _network(), _inputs(5)

    def gradients(run):
        return jax.grad(lambda params, x: sum(jnp.sum(jnp.square(y)) for y in run(params, x).values()), (0, 1))(
            model.params, inputs
        )

    found = gradients(lambda params, x: interpret_by_samples(model.graph, params, x))
    expected = gradients(lambda params, x: interpret(model.graph, params, x, platform="cpu")[0])
    for value, oracle in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # sums over all samples and places in another order, of terms that cancel
        np.testing.assert_allclose(value, oracle, rtol=0, atol=1e-4 * np.abs(oracle).max())


def test_it_maps_over_parameters():
    model, inputs = _network(), _inputs(5)
    both = {name: np.stack([value, 2 * value]) for name, value in model.params.items()}
    mapped = jax.vmap(lambda params: interpret_by_samples(model.graph, params, inputs))(both)
    for position in range(2):
        params = {name: value[position] for name, value in both.items()}
        expected, _ = interpret(model.graph, params, inputs, platform="cpu")
        for name, value in expected.items():
            np.testing.assert_allclose(mapped[name][position], value, rtol=1e-4, atol=1e-4)


def test_fake_quantization_is_that_of_the_whole_batch():
    model, inputs = mobile_block(dtype=np.float32), {"x": _inputs(6)["x"][:, :, :8, :8]}
    intercept = fake_quantization(model, calibrate(model, [inputs]))
    seen = []

    def watched(name, value, channel_axis):
        seen.append(name)
        return intercept(name, value, channel_axis)

    expected, _ = interpret(model.graph, model.params, inputs, intercept=intercept, platform="cpu")
    found = interpret_by_samples(model.graph, model.params, inputs, intercept=watched)
    for name, value in expected.items():
        scale = np.abs(value).max()
        # a value in the middle of two grid points may go to either
        assert np.mean(np.abs(found[name] - value) > _ROUNDING * scale) < 0.01
    assert len(seen) == len(set(seen)), "each tensor meets the intercept once"


def test_what_parameters_alone_decide_is_computed_once():
    def program(fixed, x):
        return x * (jnp.exp(fixed) + 1).reshape(1, -1)

    x = np.ones((6, 4), np.float32)
    jaxpr = jax.make_jaxpr(lambda w: map_chunks(program, w, x, num_chunks=3))(np.zeros(4, np.float32)).jaxpr
    (loop,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    assert "exp" in {equation.primitive.name for equation in jaxpr.eqns}
    assert {equation.primitive.name for equation in loop.params["jaxpr"].eqns} <= {"broadcast_in_dim", "mul"}


def test_uneven_chunks_lose_no_sample_and_give_none_twice():
    x = np.arange(7, dtype=np.float32)
    np.testing.assert_array_equal(map_chunks(lambda _, part: 2 * part, (), x, num_chunks=3), 2 * x)


@pytest.mark.parametrize(
    ("nodes", "params"),
    [
        ((node("Mul", ("x", "w"), "y"),), {"w": np.ones((4, 1, 1, 1), np.float32)}),
        ((node("Softmax", ("x",), "y", axis=-4),), {}),
        ((node("Concat", ("x", "x"), "y", axis=-4),), {}),
        ((node("Transpose", ("x",), "y", perm=(1, 0, 2, 3)),), {}),
        ((node("Conv", ("w", "x"), "y"),), {"w": np.ones((1, 3, 16, 16), np.float32)}),
    ],
    ids=["a factor per sample", "softmax over samples", "samples joined", "samples elsewhere", "samples as kernels"],
)
def test_what_mixes_samples_runs_on_the_whole_batch(nodes, params):
    model = build(nodes, params, input_shape=("N", 3, 16, 16), outputs=["y"])
    inputs = _inputs(4)
    expected, _ = interpret(model.graph, model.params, inputs, platform="cpu")
    assert _num_loops(lambda x: interpret_by_samples(model.graph, model.params, x), inputs) == 0
    np.testing.assert_array_equal(interpret_by_samples(model.graph, model.params, inputs)["y"], expected["y"])


def test_images_cross_from_the_chunks_to_the_rest_with_their_channels_last():
    model = _network()
    jaxpr = jax.make_jaxpr(lambda x: interpret_by_samples(model.graph, model.params, x))(_inputs(8)).jaxpr
    (loop,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    moved = [
        equation.params["permutation"]
        for equation in (*loop.params["jaxpr"].eqns, *jaxpr.eqns)
        if equation.primitive.name == "transpose" and equation.outvars[0].aval.ndim == 4
    ]
    assert moved.count((0, 2, 3, 1)) == 1, "the image comes in"
    assert moved.count((0, 3, 1, 2)) == 2, "the two outputs go out"


def test_small_activations_run_on_the_whole_batch(monkeypatch):
    monkeypatch.setattr(samples, "_BYTES_PER_CORE", 2**20)
    model = _network()
    assert _num_loops(lambda x: interpret_by_samples(model.graph, model.params, x), _inputs(8)) == 0
