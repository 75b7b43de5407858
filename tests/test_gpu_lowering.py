"""Laws of the programs for GPUs, which run on CPUs too: the functions, and the integers, of the programs for CPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax import QuantizationConfig, calibrate, simulate
from ptqjax.encodings.activations import Switches, fake_quantize_activation
from ptqjax.encodings.encoding import dynamic_encoding, fake_quantize, make_encoding
from ptqjax.kernels.convolution import convolve as convolve_in_floats
from ptqjax.kernels.depthwise import convolve_depthwise
from ptqjax.kernels.fixed_part import in_two_parts
from ptqjax.kernels.gpu_integer import Integers, convolve, multiply_matrices, signed
from ptqjax.kernels.platforms import current, made_for, told
from ptqjax.kernels.ways import WAYS, kind_of_convolution, way_of
from ptqjax.kernels.windows import are_tiles
from ptqjax.lowering import interpret
from ptqjax.ops.integer import matmul_integer
from tests.models import Chain
from tests.test_depthwise import WINDOWS, arrays

ROUNDING = 1e-5  # float32 sums of some hundred terms in another order


def network():
    """Layers of every kind, with strides, padding on one side, and a sum of two branches."""
    chain = Chain(3, dtype=np.float32, size=12).conv(16, pad=1, strides=(2, 2), bias=True).clip()
    start = chain.conv(16, kernel=1, bias=True).tensor
    chain.depthwise(pad=1, bias=True).clip().conv(16, kernel=1, bias=True)
    chain.add("Add", start).add("Relu").conv(32, pads=(0, 1, 1, 0), group=2, bias=True).add("Relu")
    chain.conv(32, group=8, pad=1, bias=True).add("Relu").depthwise(pad=1, strides=(2, 2), bias=True)
    chain.conv(32, kernel=2, strides=(2, 2), bias=True)
    return chain.add("GlobalAveragePool").add("Flatten", axis=1).gemm(7).build()


def batch(seed=0, size=3):
    return {"x": np.random.default_rng(seed).normal(size=(size, 3, 12, 12)).astype(np.float32)}


def encodings_of(model, **settings):
    return calibrate(model, [batch(1, 8)], QuantizationConfig(ranges="min-max", **settings))


@pytest.mark.parametrize(
    "settings", [{}, {"activations": "int8"}, {"weights": "uint8"}], ids=["uint8 and int8", "int8", "uint8 weights"]
)
def test_the_integer_program_gives_the_bits_of_that_for_cpus(settings):
    model = network()
    encodings = encodings_of(model, **settings)
    run = simulate(model, encodings, arithmetic="integer")
    expected = run(model.params, encodings, batch())
    with made_for("gpu"):
        found = run(model.params, encodings, batch())
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_the_simulated_program_is_that_for_cpus_but_for_roundings_that_flip():
    model = network()
    encodings = encodings_of(model)
    off = {name: each.replace(enabled=np.asarray(False)) for name, each in encodings.items()}
    run = simulate(model, encodings)
    for grids, share in ((off, ROUNDING), (encodings, 0.02)):  # a flipped rounding is a step of a later layer's 255
        expected = run(model.params, grids, batch())
        with made_for("gpu"):
            found = run(model.params, grids, batch())
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=share * np.abs(value).max())


def test_what_was_prepared_is_kept_for_the_same_arrays_alone():
    model = network()
    encodings = encodings_of(model)
    run = simulate(model, encodings)
    params, grids = jax.device_put((model.params, encodings))
    with made_for("gpu"):
        first = run(params, grids, batch())
        again = run(params, grids, batch())
        doubled = run({**params, "b0": 2 * params["b0"] + 1}, grids, batch())
        mutable = {name: np.array(value) for name, value in model.params.items()}
        before = run(mutable, grids, batch())
        mutable["b0"] += 1
        after = run(mutable, grids, batch())
    (name,) = first
    np.testing.assert_array_equal(first[name], again[name])
    np.testing.assert_array_equal(first[name], before[name])
    assert not np.array_equal(first[name], doubled[name])
    assert not np.array_equal(before[name], after[name])


@pytest.mark.parametrize("kind", [kind for kind, way in WAYS.items() if way.others and "integer" not in kind])
def test_every_way_computes_the_same(kind):
    model = network()
    run = jax.jit(lambda x: interpret(model.graph, model.params, x)[0], static_argnums=())
    with made_for("gpu"):
        (expected,) = run(batch()).values()
    for other in WAYS[kind].others:
        assert other != WAYS[kind].way
        with made_for("gpu", {kind: other}):
            assert way_of(kind) == other
            (found,) = interpret(model.graph, model.params, batch())[0].values()
        np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


def test_kinds_of_convolutions():
    shapes = {
        ((8, 4, 1, 1), 1): "pointwise",
        ((8, 4, 3, 3), 1): "dense",
        ((8, 1, 3, 3), 8): "depthwise",
        ((16, 1, 3, 3), 8): "small groups",
        ((16, 4, 3, 3), 4): "small groups",
        ((64, 32, 3, 3), 2): "groups",
    }
    assert {key: kind_of_convolution(*key) for key in shapes} == shapes
    assert kind_of_convolution((8, 4, 2, 2), 1, has_tiles=True) == "tiles"
    assert {*shapes.values(), "tiles"} == set(WAYS)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_windows_side_by_side_see_what_other_windows_see(rank, groups):
    """With padding, and a rest behind the last window; the sums are those of int64, in any order."""
    random = np.random.default_rng(0)
    x = random.integers(-128, 128, (2, *range(9, 9 + rank), 12)).astype(np.int8)
    w = random.integers(-128, 128, (24, 12 // groups, *(4, 2, 3)[:rank])).astype(np.int8)
    strides, ones, padding = (4, 2, 3)[:rank], (1,) * rank, ((1, 2), (0, 1), (2, 0))[:rank]
    window = {"strides": strides, "padding": padding, "dilations": ones, "groups": groups}
    assert are_tiles(w.shape[2:], strides=strides, dilations=ones)
    assert not are_tiles(w.shape[2:], strides=strides, dilations=(2,) * rank)
    zero = np.full((1,) * (rank + 2), 5, np.int32)
    found = convolve(Integers(jnp.asarray(x), jnp.asarray(zero)), Integers(jnp.asarray(w), None), **window)
    numbers, kernels = jnp.moveaxis(jnp.asarray(x, jnp.float32), -1, 1) - 5, jnp.asarray(w, jnp.float32)
    expected = jnp.moveaxis(convolve_in_floats(numbers, kernels, **window), 1, -1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", WINDOWS)
def test_a_depthwise_layer_in_one_loop_has_the_function_and_the_gradients_of_the_other(case):
    strides, padding, dilations, spatial, kernel = case
    x, w = arrays(spatial, kernel)

    def total(x, w):
        return jnp.sum(jnp.sin(convolve_depthwise(x, w, strides=strides, padding=padding, dilations=dilations)))

    expected = jax.value_and_grad(total, (0, 1))(x, w)
    with made_for("gpu"):
        found = jax.value_and_grad(total, (0, 1))(x, w)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint4"])
@pytest.mark.parametrize("axis", [None, -1])
def test_a_chain_rounds_as_the_grid_does_and_has_its_derivatives(dtype, axis):
    random = np.random.default_rng(0)
    x = jnp.asarray(np.concatenate([random.normal(scale=3, size=200), np.arange(-20, 20) / 2]).reshape(-1, 4), "f4")
    scale = np.float32(0.25) if axis is None else np.asarray([0.25, 0.5, 0.125, 0.3], np.float32)
    encoding = make_encoding(scale, np.full_like(scale, 3), dtype=dtype, axis=axis)

    def outcome(function, encoding):
        def total(x, encoding):
            y = function(x, encoding)
            return jnp.sum(jnp.cos(y)), y

        def of_scale(scale, zero_point):
            return total(x, encoding.replace(scale=scale, zero_point=zero_point))[0]

        return (
            total(x, encoding)[1],
            jax.grad(lambda x: total(x, encoding)[0])(x),
            jax.grad(of_scale, (0, 1))(jnp.asarray(encoding.scale), jnp.asarray(encoding.zero_point)),
        )

    expected = outcome(fake_quantize, encoding)
    with made_for("gpu"):
        found = outcome(fake_quantize_activation, encoding)
        known = fake_quantize_activation(x, encoding, is_on=True)
        left = fake_quantize_activation(x, encoding.replace(enabled=np.asarray(False)))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5), found[2], expected[2])
    np.testing.assert_array_equal(left, x)
    np.testing.assert_array_equal(known, expected[0])


@pytest.mark.parametrize("zero_point", [0, 3])
def test_a_chain_cuts_nothing_off_below_where_nothing_is_negative(zero_point):
    x = jnp.asarray([0, 0.1, 0.125, 0.3, 7, 62, 63, 64, 1e9, np.inf], jnp.float32)
    encoding = make_encoding(np.float32(0.25), np.float32(zero_point), dtype="uint8")

    def outcome(function):
        return function(x, encoding), jax.grad(lambda x: jnp.sum(jnp.cos(function(x, encoding)[:-1])))(x)

    with made_for("gpu"):
        found = outcome(partial(fake_quantize_activation, is_on=True, has_negatives=False))
        operations = str(
            jax.make_jaxpr(partial(fake_quantize_activation, is_on=True, has_negatives=False))(x, encoding)
        )
    jax.tree.map(np.testing.assert_array_equal, found, outcome(fake_quantize))
    assert " max " not in operations


@pytest.mark.parametrize("lowest", [0, 3])
def test_only_a_grid_with_zero_on_it_cuts_nothing_off_below(lowest):
    """Behind Relu, a grid of 3 to 255 whose zero point is 0 gives no 0."""
    model = Chain(3, dtype=np.float32, size=4).add("Relu").build()
    grid = make_encoding(np.float32(0.1), np.float32(0), dtype="uint8").replace(qmin=np.float32(lowest))
    run = simulate(model, {model.graph.outputs[0].name: grid})
    x = {"x": np.linspace(-1, 30, 48, dtype=np.float32).reshape(1, 3, 4, 4)}
    (expected,) = run(model.params, {model.graph.outputs[0].name: grid}, x).values()
    with made_for("gpu"):
        (found,) = run(model.params, {model.graph.outputs[0].name: grid}, x).values()
    np.testing.assert_array_equal(found, expected)
    assert found.min() == np.float32(lowest) * np.float32(0.1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_off_stays_to_the_bit_however_large_or_small(dtype):
    ends = np.finfo(dtype)
    x = jnp.asarray([ends.min, ends.max, ends.max / 3, ends.tiny, -ends.tiny, 0.3, -np.inf], dtype)
    off = make_encoding(np.float32(0.25), np.float32(3), dtype="uint8").replace(enabled=np.asarray(False))
    with made_for("gpu"):
        for function in (fake_quantize_activation, jax.jit(fake_quantize_activation)):
            np.testing.assert_array_equal(function(x, off), x)
            slopes = jax.grad(lambda x, function=function: jnp.sum(function(x, off)[:-1]))(x)
            np.testing.assert_array_equal(slopes[:-1], 1)


@pytest.mark.parametrize("block_size", [None, 16])
def test_grids_found_at_run_time_are_found_in_programs_for_gpus(block_size):
    x = jnp.asarray(np.random.default_rng(0).normal(scale=0.1, size=(4, 32)), jnp.float32)
    encoding = dynamic_encoding(block_size)
    with made_for("gpu"):
        found = fake_quantize_activation(x, encoding, is_on=True)
    np.testing.assert_array_equal(found, fake_quantize(x, encoding))
    assert 0 < np.max(np.abs(found - x)) < 0.01


def test_a_program_asks_what_is_on_where_something_is_off_alone():
    """A mask's lowest number passes an encoding that is off; where all are on, no value is read twice."""
    model = Chain(3, dtype=np.float32, size=4).add("Add", "x").add("Relu").build()
    grid = make_encoding(np.float32(0.1), np.float32(0), dtype="uint8")
    encodings = {"x": grid, model.graph.outputs[0].name: grid}
    off = {name: each.replace(enabled=np.asarray(False)) for name, each in encodings.items()}
    x = np.full((1, 3, 4, 4), 1e25, np.float32)
    run = simulate(model, encodings)
    with made_for("gpu"):
        for put in (lambda tree: tree, jax.device_put):
            (clipped,) = run(model.params, put(encodings), {"x": x}).values()
            (left,) = run(model.params, put(off), {"x": x}).values()
            (traced,) = jax.jit(run)(model.params, put(off), {"x": x}).values()
            np.testing.assert_allclose(clipped, 25.5, rtol=1e-6)
            np.testing.assert_array_equal(left, np.float32(2e25))
            np.testing.assert_array_equal(traced, left)
        switches = Switches()
        assert [switches.are_on(jax.device_put(each)) for each in (encodings, off, encodings)] == [True, False, True]
    assert not Switches().are_on(encodings)  # programs for CPUs are one, whatever is on


@pytest.mark.parametrize("types", [("uint8", "int8"), ("int8", "uint8"), ("uint8", "uint8")])
@pytest.mark.parametrize("columns", [False, True])
def test_products_of_bytes_are_exact(types, columns):
    random = np.random.default_rng(0)
    a, b = (
        random.integers(np.iinfo(t).min, np.iinfo(t).max + 1, size).astype(t)
        for t, size in zip(types, ((5, 300), (300, 4)), strict=True)
    )
    a_zero = np.full((1, 1), 7, types[0])
    b_zero = np.arange(4, dtype=types[1]).reshape(1, 4) if columns else np.full((1, 1), 9, types[1])
    expected = (a.astype(np.int64) - a_zero) @ (b.astype(np.int64) - b_zero)
    found = multiply_matrices(signed(jnp.asarray(a), jnp.asarray(a_zero)), signed(jnp.asarray(b), jnp.asarray(b_zero)))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(Integers(jnp.asarray([[1]], jnp.int8), None).centred(), [[1]])


@pytest.mark.parametrize("shapes", [((5, 40), (40, 6)), ((2, 5, 40), (40, 6)), ((2, 3, 5, 12), (2, 3, 12, 6))])
@pytest.mark.parametrize("rows", [False, True])
def test_integer_products_for_gpus_are_those_for_cpus(shapes, rows):
    """MatMulInteger: a zero for each row and column, numbers of terms that are no multiple of 16."""
    random = np.random.default_rng(0)
    a, b = (
        jnp.asarray(random.integers(low, low + 256, size), t)
        for low, size, t in zip((0, -128), shapes, ("uint8", "int8"), strict=True)
    )
    a_zero = random.integers(0, 256, (a.shape[-2], 1) if rows else ()).astype(np.uint8)
    b_zero = random.integers(-128, 128, b.shape[-1]).astype(np.int8)
    expected = matmul_integer(a, b, jnp.asarray(a_zero), jnp.asarray(b_zero))
    with made_for("gpu"):
        found = matmul_integer(a, b, jnp.asarray(a_zero), jnp.asarray(b_zero))
        assert "f32" not in str(jax.make_jaxpr(matmul_integer)(a, b, a_zero, b_zero))
    np.testing.assert_array_equal(found, expected)


def test_a_program_in_two_parts_is_the_program():
    def program(fixed, x):
        w = jnp.where(fixed["on"], jnp.tanh(fixed["w"]), fixed["w"])
        zeros = jnp.zeros((1, 4), jnp.float32)
        return {"y": x @ w.T + jnp.broadcast_to(fixed["b"], (3, 4)) + zeros, "w": w, "b": fixed["b"]}

    random = np.random.default_rng(0)
    fixed = {"w": random.normal(size=(4, 5)).astype("f4"), "b": np.float32(2), "on": np.asarray(True)}
    x = jnp.asarray(random.normal(size=(3, 5)), jnp.float32)
    prepare, finish = in_two_parts(program, fixed, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert "tanh" not in str(jax.make_jaxpr(finish)(prepare(fixed), x))
    assert max(each.size for each in prepare(fixed)) <= 20
    found, expected = finish(prepare(fixed), x), program(fixed, x)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), found, expected)


def test_a_context_says_what_programs_are_made_for():
    assert told() is None
    assert current().platform == jax.default_backend()
    with made_for("cuda", {"dense": "columns"}):
        assert current().platform == "gpu"
        with made_for("gpu"):
            assert way_of("dense") == "columns"
        assert way_of("pointwise") == "dot"
    assert told() is None
