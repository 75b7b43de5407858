"""A model as a Flax module: the same function, trainable as any other, and the way back to a file."""

from pathlib import Path

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime as ort
import optax
import pytest
from flax import nnx, traverse_util
from flax.training.train_state import TrainState

import ptqjax
from ptqjax.encodings.encoding import make_encoding
from ptqjax.ir import Statistics
from ptqjax.onnx_io import to_proto
from tests.models import build, node, random_input

KEY = jax.random.key(0)
W1, B1, W2, HIGH = "a/b:0", "/block.1/bias", "name", "clip.high"
"""Names as exporters give them; `name` is one that no Flax module lets its parameters have."""


def network():
    """Conv, Relu, a bound, MaxPool, Conv with a second output: activations tied over the bound and over the pool."""
    random = np.random.default_rng(0)
    params = {
        W1: random.normal(size=(4, 3, 3, 3)) / 4,
        B1: random.normal(size=4),
        W2: random.normal(size=(2, 4, 1, 1)),
        HIGH: np.array(1.0),  # below the end of the grid, 1.35, so that it binds
    }
    nodes = [
        node("Conv", ("x", W1, B1), "c", pads=(1, 1, 1, 1)),
        node("Relu", ("c",), "r"),
        node("Min", ("r", HIGH), "m"),
        node("MaxPool", ("m",), "p", kernel_shape=(2, 2), strides=(2, 2)),
        node("Conv", ("p", W2), "y"),
    ]
    params = {name: value.astype(np.float32) for name, value in params.items()}
    return build(nodes, params, input_shape=("N", 3, 6, 6), outputs=("y",))


MODEL = network()
X = random_input(MODEL, 1)["x"]


def encodings():
    """Scales that clip some values and leave others far inside, so that each kind of gradient is there."""
    shared = make_encoding(np.float32(0.09), np.float32(0), dtype="uint4")
    return {
        "x": make_encoding(np.float32(0.3), np.float32(7), dtype="uint4"),
        "r": shared,
        "m": shared,
        "p": shared,
        "y": make_encoding(np.float32(0.25), np.float32(6), dtype="uint4"),
        W1: make_encoding(np.float32([0.1, 0.2, 0.1, 0.15]), np.zeros(4, np.float32), dtype="int4", axis=0),
        W2: make_encoding(np.float32(0.2), np.float32(0), dtype="int4"),
    }


def assert_trees_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def learned_module():
    module = ptqjax.to_flax(MODEL, encodings(), learn_scales=True)
    return module, module.init(KEY, X)


# --- the same function


def test_variables_are_the_parameters_under_their_own_names():
    assert_trees_equal(ptqjax.to_flax(MODEL).init(KEY, X), {"params": MODEL.params})


def test_the_module_is_the_model_to_the_bit():
    module = ptqjax.to_flax(MODEL)
    variables = module.init(KEY, X)
    expected = ptqjax.apply(MODEL.graph, MODEL.params, {"x": X})
    assert_trees_equal(module.apply(variables, {"x": X}), expected)
    np.testing.assert_array_equal(module.apply(variables, X), expected["y"])


def test_the_variables_decide_and_not_the_model():
    module = ptqjax.to_flax(MODEL)
    changed = {name: 2 * value + 1 for name, value in MODEL.params.items()}
    expected = ptqjax.apply(MODEL.graph, changed, {"x": X})["y"]
    np.testing.assert_array_equal(module.apply({"params": changed}, X), expected)


@pytest.mark.parametrize("learn_scales", [False, True])
def test_with_encodings_it_is_the_simulation_to_the_bit(learn_scales):
    module = ptqjax.to_flax(MODEL, encodings(), learn_scales=learn_scales)
    expected = ptqjax.simulate(MODEL, encodings())(MODEL.params, encodings(), {"x": X})["y"]
    assert not np.array_equal(expected, ptqjax.to_flax(MODEL).apply({"params": MODEL.params}, X))
    np.testing.assert_array_equal(module.apply(module.init(KEY, X), X), expected)


def test_several_inputs_and_outputs_are_mappings():
    nodes = [node("Add", ("x", "w"), "s"), node("Relu", ("s",), "r")]
    two = build(nodes, {"w": np.float32([1, -1])}, input_shape=("N", 2), outputs=("s", "r"))
    module = ptqjax.to_flax(two)
    x = np.float32([[0.5, 0.25]])
    outputs = module.apply(module.init(KEY, x), x)  # one input: its array will do
    assert_trees_equal(outputs, {"r": np.float32([[1.5, 0]]), "s": np.float32([[1.5, -0.75]])})


def test_an_array_for_a_graph_of_several_inputs_is_refused():
    spec = MODEL.graph.inputs[0]
    graph = MODEL.graph.__class__(name="two", inputs=(spec, spec.__class__(name="z", dtype=spec.dtype, shape=None)),
                                  outputs=MODEL.graph.outputs, nodes=MODEL.graph.nodes,
                                  parameters=MODEL.graph.parameters)  # fmt: skip
    module = ptqjax.to_flax(MODEL.replace(graph=graph))
    with pytest.raises(ptqjax.DataError, match=r"the graph has the inputs \['x', 'z'\]; give a mapping"):
        module.init(KEY, X)


def test_the_callers_arrays_stay_out_of_reach():
    params = {name: value.copy() for name, value in MODEL.params.items()}
    model = MODEL.replace(params=params)
    variables = ptqjax.to_flax(model).init(KEY, X)
    params[W2] += 1
    np.testing.assert_array_equal(variables["params"][W2], MODEL.params[W2])


def test_64_bit_parameters_keep_their_width():
    nodes = [node("Mul", ("x", "w"), "y")]
    model = build(nodes, {"w": np.float64([1 / 3])}, input_shape=("N",), outputs=("y",), dtype=np.float64)
    module = ptqjax.to_flax(model)
    variables = module.init(KEY, np.float64([3.0]))
    np.testing.assert_array_equal(variables["params"]["w"], model.params["w"], strict=True)
    np.testing.assert_array_equal(ptqjax.from_flax(module, variables)[0].params["w"], model.params["w"], strict=True)


# --- as any other Flax module


def test_transformations_work_through_it():
    module = ptqjax.to_flax(MODEL, encodings())
    variables = module.init(KEY, X)
    expected = module.apply(variables, X)
    np.testing.assert_array_equal(jax.jit(module.apply)(variables, X), expected)
    one_by_one = jax.vmap(lambda x: module.apply(variables, x[None])[0])(X)
    # sums in another order: a few units of float32 ahead of a rounding to steps of 0.25, which none here flips
    np.testing.assert_allclose(one_by_one, expected, atol=1e-5)
    assert_trees_equal(jax.eval_shape(module.init, KEY, X)["params"], jax.eval_shape(lambda: dict(MODEL.params)))


def test_gradients_are_those_of_the_simulation():
    module = ptqjax.to_flax(MODEL, encodings())
    simulate = ptqjax.simulate(MODEL, encodings())
    found = jax.grad(lambda params: module.apply({"params": params}, X).var())(MODEL.params)
    expected = jax.grad(lambda params: simulate(params, encodings(), {"x": X})["y"].var())(MODEL.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
    assert all(np.any(np.asarray(gradient) != 0) for gradient in found.values())


def test_it_can_be_part_of_another_module():
    class Scaled(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.param("gain", nn.initializers.constant(3.0), ()) * self.inner(x)

    module = Scaled(ptqjax.to_flax(MODEL))
    variables = module.init(KEY, X)
    assert_trees_equal(variables["params"]["inner"], MODEL.params)
    expected = 3 * ptqjax.apply(MODEL.graph, MODEL.params, {"x": X})["y"]
    np.testing.assert_array_equal(module.apply(variables, X), expected)


def test_names_survive_paths_and_serialization():
    module, variables = learned_module()
    expected = module.apply(variables, X)
    cut = traverse_util.unflatten_dict(traverse_util.flatten_dict(variables, sep="/"), sep="/")
    assert W1 not in cut["params"]  # cut at its "/"
    np.testing.assert_array_equal(module.apply(cut, X), expected)
    kept = flax.serialization.from_bytes(variables, flax.serialization.to_bytes(variables))
    assert_trees_equal(kept, variables)
    assert_trees_equal(ptqjax.from_flax(module, cut), ptqjax.from_flax(module, variables))


def test_a_train_state_trains_what_the_mask_leaves():
    module = ptqjax.to_flax(MODEL, encodings())
    params = module.init(KEY, X)["params"]
    optimizer = optax.partition(
        {"train": optax.adam(0.05), "freeze": optax.set_to_zero()},
        {name: "freeze" if name == HIGH else "train" for name in params},
    )
    state = TrainState.create(apply_fn=module.apply, params=params, tx=optimizer)
    wanted = jnp.roll(module.apply({"params": params}, X), 1, axis=0)

    def loss(params):
        return jnp.square(state.apply_fn({"params": params}, X) - wanted).mean()

    before = loss(params)
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
    for _ in range(20):
        state = step(state)
    assert loss(state.params) < 0.9 * before
    np.testing.assert_array_equal(state.params[HIGH], params[HIGH])


def test_nnx_takes_it_across_its_own_bridge():
    module, variables = learned_module()
    bridged = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(X)
    np.testing.assert_array_equal(bridged(X), module.apply(variables, X))


def test_hashing_looks_at_no_array_and_printing_prints_none():
    module = ptqjax.to_flax(MODEL)
    assert hash(module) == hash(module.copy())
    assert module == module.copy() != ptqjax.to_flax(MODEL)
    assert len(repr(module)) < 100


# --- grids that are learned


def test_what_is_learned_starts_at_zero_and_what_is_tied_is_one_variable():
    _, variables = learned_module()
    expected = {
        "x/log_factor": (),
        "x/offset": (),
        "r/log_factor": (),  # r, m and p: 0 is the end of the grid, and stays it
        "y/log_factor": (),
        "y/offset": (),
        f"{W1}/log_factor": (4,),
        f"{W2}/log_factor": (),
    }
    assert {name: value.shape for name, value in variables["encodings"].items()} == expected
    assert not any(np.any(np.asarray(value)) for value in variables["encodings"].values())


def test_moved_grids_are_what_is_simulated_and_what_comes_back():
    module, variables = learned_module()
    moves = {"x/log_factor": 0.3, "x/offset": -1.6, "r/log_factor": -0.2, "y/offset": 100.0}
    moves = {name: jnp.float32(value) for name, value in moves.items()}
    moves[f"{W1}/log_factor"] = jnp.float32([0.1, 0, -0.3, 0.2])
    variables = {**variables, "encodings": {**variables["encodings"], **moves}}
    model, found = ptqjax.from_flax(module, variables)
    assert found.keys() == encodings().keys()
    given = encodings()
    np.testing.assert_allclose(found["x"].scale, given["x"].scale * np.exp(0.3), rtol=1e-6)
    assert float(found["x"].zero_point) == 5  # 7 - 1.6, rounded
    assert float(found["y"].zero_point) == 15  # kept on the grid
    assert {float(found[name].scale) for name in "rmp"} == {float(found["r"].scale)}
    np.testing.assert_allclose(found["r"].scale, given["r"].scale * np.exp(-0.2), rtol=1e-6)
    np.testing.assert_allclose(found[W1].scale, given[W1].scale * np.exp([0.1, 0, -0.3, 0.2]), rtol=1e-6)
    np.testing.assert_array_equal(found[W2].scale, given[W2].scale)
    expected = ptqjax.simulate(model, found)(model.params, found, {"x": X})["y"]
    np.testing.assert_array_equal(module.apply(variables, X), expected)


def test_gradients_of_log_factors_follow_from_those_of_scales():
    module, variables = learned_module()
    simulate, given = ptqjax.simulate(MODEL, encodings()), encodings()

    def by_scale(scales, zero_points):
        moved = {n: e.replace(scale=scales[n], zero_point=zero_points[n]) for n, e in given.items()}
        return simulate(MODEL.params, moved, {"x": X})["y"].var()

    leaves = [{n: jnp.asarray(getattr(e, leaf)) for n, e in given.items()} for leaf in ("scale", "zero_point")]
    ds, dz = jax.grad(by_scale, argnums=(0, 1))(*leaves)
    found = jax.grad(lambda moves: module.apply({**variables, "encodings": moves}, X).var())(variables["encodings"])
    expected = {f"{name}/log_factor": ds[name] * given[name].scale for name in ("x", "y", W1, W2)}
    expected |= {"x/offset": dz["x"], "y/offset": dz["y"]}
    expected |= {"r/log_factor": sum(ds[name] for name in "rmp") * given["r"].scale}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found, expected)
    assert all(np.any(np.asarray(gradient) != 0) for gradient in found.values())


def test_equal_grids_on_both_sides_of_a_layer_are_not_tied():
    grids = {name: make_encoding(np.float32(0.1), np.float32(0), dtype="int8") for name in ("x", "c", W1)}
    variables = ptqjax.to_flax(MODEL, grids, learn_scales=True).init(KEY, X)
    assert set(variables["encodings"]) == {f"{name}/log_factor" for name in grids}


def test_what_has_no_free_scale_stays_as_it_is():
    half = make_encoding(np.float32(1), np.float32(0), dtype="float16")
    blocks = make_encoding(np.float32(0.1), np.float32(0), dtype="int4", scale_bits=4)
    off = encodings()["x"].replace(enabled=np.asarray(False))
    grids = {W1: half, W2: blocks, "x": off, "y": encodings()["y"]}
    variables = ptqjax.to_flax(MODEL, grids, learn_scales=True).init(KEY, X)
    assert set(variables["encodings"]) == {"y/log_factor", "y/offset"}
    with pytest.raises(ptqjax.ConfigError, match="no grid can be learned"):
        ptqjax.to_flax(MODEL, {"x": off}, learn_scales=True)


# --- and back


def test_there_and_back_is_the_model():
    model = MODEL.replace(statistics={"c": Statistics(mean=np.zeros(4), std=np.ones(4))})
    module = ptqjax.to_flax(model)
    found, none = ptqjax.from_flax(module, module.init(KEY, X))
    assert_trees_equal(found, model)
    assert none == {}


def test_statistics_do_not_outlive_the_parameters_that_implied_them():
    model = MODEL.replace(statistics={"c": Statistics(mean=np.zeros(4), std=np.ones(4))})
    module = ptqjax.to_flax(model)
    params = {**MODEL.params, B1: MODEL.params[B1] + 1}
    found, _ = ptqjax.from_flax(module, {"params": params})
    assert found.statistics == {}
    assert_trees_equal(found.params, params)


def test_what_comes_back_is_what_the_exported_file_computes(tmp_path):
    module, variables = learned_module()
    noise = iter(jax.random.split(KEY, 100))
    moved = jax.tree.map(lambda value: value + 0.05 * jax.random.normal(next(noise), value.shape), variables)
    model, found = ptqjax.from_flax(module, moved)
    ptqjax.export(model, found, tmp_path, "net")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # float between the roundings
    options.log_severity_level = 3
    session = ort.InferenceSession(tmp_path / "net.onnx", options, providers=["CPUExecutionProvider"])
    steps = np.abs(session.run(None, {"x": X})[0] - module.apply(moved, X)) / float(found["y"].scale)
    assert np.mean(steps > 0.5) < 0.02  # sums in another order flip a rounding now and then


def test_integers_of_a_quantized_file_are_no_parameters(tmp_path):
    ptqjax.export(MODEL, encodings(), tmp_path, "net")
    quantized = ptqjax.read(tmp_path / "net.onnx")
    module = ptqjax.to_flax(quantized)
    variables = module.init(KEY, X)
    assert {value.dtype.kind for value in variables["params"].values()} == {"f"}
    assert not {value.dtype.kind for value in variables["integers"].values()} & {"f"}
    assert variables["params"].keys() | variables["integers"].keys() == quantized.params.keys()
    expected = ptqjax.apply(quantized.graph, quantized.params, {"x": X})["y"]
    np.testing.assert_array_equal(module.apply(variables, X), expected)
    back, _ = ptqjax.from_flax(module, variables)
    assert to_proto(back) == to_proto(quantized)


# --- variables that do not fit


@pytest.mark.parametrize("use", ["apply", "from_flax"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({W2: None}, "variable 'name' of 'params' is missing"),
        ({"clip.hihg": np.float32(1)}, "variable 'clip.hihg' of 'params' is unknown.* mean 'clip.high'"),
        ({B1: np.zeros(3, np.float32)}, r"variable '/block.1/bias' of 'params' has shape \[3\]; expected \[4\]"),
    ],
)
def test_variables_that_do_not_fit_are_named(use, change, message):
    module = ptqjax.to_flax(MODEL)
    params = {name: value for name, value in {**MODEL.params, **change}.items() if value is not None}
    with pytest.raises(ptqjax.DataError, match=message):
        module.apply({"params": params}, X) if use == "apply" else ptqjax.from_flax(module, {"params": params})


def test_parameters_without_their_collection_are_explained():
    module = ptqjax.to_flax(MODEL)
    with pytest.raises(ptqjax.DataError, match=r"collection 'params' is missing; found \['/block.1/bias'"):
        ptqjax.from_flax(module, MODEL.params)


def test_parameters_of_another_type_are_named():
    module = ptqjax.to_flax(MODEL)
    params = {**MODEL.params, W1: jnp.asarray(MODEL.params[W1], jnp.bfloat16)}
    with pytest.raises(ptqjax.DataError, match=f"variable '{W1}' is of type bfloat16; expected float32"):
        ptqjax.from_flax(module, {"params": params})


def test_a_parameter_may_come_back_as_a_list():
    module = ptqjax.to_flax(MODEL)
    found, _ = ptqjax.from_flax(module, {"params": {**MODEL.params, B1: [np.float32(1)] * 4}})
    np.testing.assert_array_equal(found.params[B1], np.ones(4, np.float32), strict=True)


def test_encodings_of_unknown_tensors_are_refused():
    with pytest.raises(ptqjax.ConfigError, match="nowhere"):
        ptqjax.to_flax(MODEL, {"nowhere": encodings()["x"]})


def test_flax_is_imported_by_the_bridge_alone():
    package = Path(ptqjax.__file__).parent
    found = [path.name for path in package.rglob("*.py") if "flax.linen" in path.read_text()]
    assert found == ["bridges.py"]
