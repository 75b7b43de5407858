"""Rounding that is solved: kernels against brute force and NumPy, the walk against the laws that it promises."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import onnx.helper as oh
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

import ptqjax
from ptqjax.encodings.encoding import make_encoding
from ptqjax.experiments.sensitivities import sensitivity
from ptqjax.fit.layer_moments import POSITIONS, moments_of_halves
from ptqjax.fit.layer_problem import Problem
from ptqjax.fit.rounding import solve_rounding
from ptqjax.kernels import rounding
from ptqjax.kernels.rounding import Grid
from ptqjax.lowering import Value, stretches
from ptqjax.placement.tensors import floating_tensors
from ptqjax.report.depth import measure_depth
from ptqjax.simulation import round_parameters
from ptqjax.transforms.linear import linear_layers


def grid_of(shape, *, scale=0.3, low=-7, high=7):
    return Grid(*(np.full(shape, value, np.float32) for value in (scale, low, high)))


def gram_of(seed, size, rows=200):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, size)) @ rng.normal(size=(size, size))
    return (x.T @ x / rows / size).astype(np.float32)


def cost(codes, target, gram, scale):
    error = np.asarray(codes, np.float64) * scale - target
    return np.einsum("nk,kl,nl->n", error, np.asarray(gram, np.float64), error)


def gptq_of_numpy(target, gram, scale, low, high):
    """Column by column in float64, by the textbook: the inverse is formed, and shrinks by one row a step."""
    order = np.argsort(-np.diagonal(gram), kind="stable")
    rest = np.asarray(target, np.float64)[:, order].copy()
    inverse = np.linalg.inv(np.asarray(gram, np.float64)[order][:, order])
    codes = np.zeros_like(rest)
    for k in range(rest.shape[1]):
        codes[:, k] = np.clip(np.round(rest[:, k] / scale), low, high)
        error = (rest[:, k] - codes[:, k] * scale) / inverse[0, 0]
        rest[:, k:] -= error[:, None] * inverse[0]
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    back = np.zeros_like(codes)
    back[:, order] = codes
    return back


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([32, 64]))
def test_error_feedback_is_the_textbooks(seed, size):
    gram = np.asarray(rounding.with_ridge(gram_of(seed, size), 0.1))
    target = np.random.default_rng(seed + 1).normal(size=(5, size)).astype(np.float32)
    codes = np.asarray(rounding.error_feedback(target, gram, grid_of(target.shape)))
    wanted = gptq_of_numpy(target, gram, 0.3, -7, 7)
    assert np.mean(codes == wanted) > 0.97  # a tie in float32 turns what follows
    assert cost(codes, target, gram, 0.3) == pytest.approx(cost(wanted, target, gram, 0.3), rel=0.1)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_exhaustive_is_brute_force(seed):
    gram = np.asarray(rounding.with_ridge(gram_of(seed, 5), 0.01))
    target = np.random.default_rng(seed + 1).normal(size=(3, 5)).astype(np.float32)
    codes = np.asarray(rounding.exhaustive(target, gram, grid_of(target.shape)))
    near = np.floor(target / 0.3)
    every = [np.clip(near + up, -7, 7) for up in product((0, 1), repeat=5)]
    best = np.min([cost(each, target, gram, 0.3) for each in every], axis=0)
    np.testing.assert_allclose(cost(codes, target, gram, 0.3), best, rtol=1e-4, atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_sweep_is_never_worse_and_ends_where_no_code_can_move_alone(seed):
    gram = np.asarray(rounding.with_ridge(gram_of(seed, 8), 0.05))
    target = np.random.default_rng(seed + 1).normal(size=(4, 8)).astype(np.float32)
    grid = grid_of(target.shape)
    codes = np.asarray(grid.codes(target))
    for _ in range(12):
        after = np.asarray(rounding.descend(codes, target, gram, grid))
        assert np.all(cost(after, target, gram, 0.3) <= cost(codes, target, gram, 0.3) * (1 + 1e-5))
        codes = after
    for column, step in product(range(8), (-1, 1)):
        moved = codes.copy()
        moved[:, column] = np.clip(moved[:, column] + step, -7, 7)
        assert np.all(cost(codes, target, gram, 0.3) <= cost(moved, target, gram, 0.3) * (1 + 1e-4))


def test_without_errors_before_the_layer_the_best_weights_are_its_own():
    gram = jnp.asarray(gram_of(0, 16))
    damped = rounding.with_ridge(gram, 0.1)
    np.testing.assert_allclose(rounding.best_without_grid(gram, gram, damped), np.eye(16), atol=1e-4)


def test_no_moments_at_all_leave_the_nearest_codes():
    target = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    gram = rounding.with_ridge(np.zeros((32, 32), np.float32), 0.1)
    grid = grid_of(target.shape)
    np.testing.assert_array_equal(rounding.error_feedback(target, gram, grid), grid.codes(target))


LAYERS = {
    "padded, strided": ("Conv", (6, 4, 3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "asymmetric, dilated": ("Conv", (6, 4, 3, 2), {"pads": [0, 1, 2, 1], "dilations": [2, 1]}),
    "same": ("Conv", (6, 4, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "depthwise": ("Conv", (4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    "depthwise, 5 x 5": ("Conv", (4, 1, 5, 5), {"group": 4, "pads": [2, 2, 2, 2]}),
    "two groups": ("Conv", (6, 2, 3, 3), {"group": 2}),
    "transposed": ("ConvTranspose", (4, 5, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    "transposed, two groups": ("ConvTranspose", (4, 3, 2, 2), {"strides": [2, 2], "group": 2}),
}


def layer_model(op, shape, attributes):
    rng = np.random.default_rng(1)
    groups = attributes.get("group", 1)
    outputs = shape[1] * groups if op == "ConvTranspose" else shape[0]
    params = {"w": rng.normal(size=shape).astype(np.float32), "b": rng.normal(size=outputs).astype(np.float32)}
    node = oh.make_node(op, ["x", "w", "b"], ["y"], **attributes)
    return onnx_model([node], {"x": ("n", 4, "h", "w")}, ["y"], params)


def onnx_model(nodes, inputs, outputs, params):
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [oh.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in params.items()],
    )
    proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)
    return ptqjax.read(proto.SerializeToString())


@pytest.mark.parametrize("case", LAYERS)
def test_moments_are_those_of_what_the_layer_multiplies(case):
    """W H W^T is the power of the outputs, W m their mean: all outputs are looked at where there are few."""
    model = layer_model(*LAYERS[case])
    (layer,) = linear_layers(model).values()
    rng = np.random.default_rng(0)
    sizes = (4, 5) if case.startswith("transposed") else (7, 6)
    x = rng.normal(size=(4, 4, *sizes)).astype(np.float32)
    first, second = moments_of_halves(layer, (model.params["w"].shape[2:]), [(Value(x), Value(x))], 0)
    weight = np.asarray(model.params["w"])
    encoding = make_encoding(np.float32(1), np.float32(0), dtype="int8")
    problem = Problem.of(layer, weight, encoding)
    out = np.asarray(ptqjax.apply(model.graph, model.params, {"x": x})["y"]) - model.params["b"].reshape(1, -1, 1, 1)
    assert out.shape[2] * out.shape[3] <= POSITIONS
    for half, rows in ((first, out[::2]), (second, out[1::2])):
        assert half.count == rows[:, 0].size
        assert problem.signal(half.means()) == pytest.approx(float((rows**2).sum() / rows[:, 0].size), rel=1e-4)
        mean = np.einsum("gnk,gk->gn", problem.weights, half.means().mean).ravel()
        np.testing.assert_allclose(mean, rows.mean(axis=(0, 2, 3)), atol=1e-4)


def small_network(seed=0):
    """Convolutions of several kinds, a sum of two branches, a product: layers behind layers."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    params = {
        "w1": normal(8, 3, 3, 3), "b1": normal(8), "w2": normal(8, 1, 3, 3), "b2": normal(8),
        "w3": normal(8, 8, 1, 1), "w4": normal(8, 5), "b4": normal(5),
    }  # fmt: skip
    nodes = [
        oh.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        oh.make_node("Relu", ["c1"], ["r1"]),
        oh.make_node("Conv", ["r1", "w2", "b2"], ["c2"], group=8, pads=[1, 1, 1, 1]),
        oh.make_node("Relu", ["c2"], ["r2"]),
        oh.make_node("Conv", ["r2", "w3"], ["c3"]),
        oh.make_node("Add", ["c3", "r1"], ["s"]),
        oh.make_node("GlobalAveragePool", ["s"], ["p"]),
        oh.make_node("Flatten", ["p"], ["f"]),
        oh.make_node("Gemm", ["f", "w4", "b4"], ["y"]),
    ]
    return onnx_model(nodes, {"x": ("n", 3, 8, 8)}, ["y"], params)


def pictures(seed, count):
    """Smooth in space and alike in their channels, as pictures are: only then is there something to make up for."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.normal(size=(count, 3, 2, 2)) + rng.normal(size=(count, 1, 1, 1)), np.ones((4, 4)))
    return {"x": (coarse + 0.1 * rng.normal(size=(count, 3, 8, 8))).astype(np.float32)}


@pytest.fixture(scope="module")
def solved():
    model = small_network()
    batches = [pictures(seed, 16) for seed in range(4)]
    config = ptqjax.QuantizationConfig(weights="int4", equalize=False, correct="none", headroom=3.0, rounding="nearest")
    result = ptqjax.quantize(model, batches, config)
    rounded, report = solve_rounding(result.model, result.encodings, batches)
    return result, rounded, report, batches


def noise(model, encodings, reference, batches):
    simulated = ptqjax.simulate(model, encodings)
    pairs = [
        (simulated(model.params, encodings, batch)["y"], ptqjax.apply(reference.graph, reference.params, batch)["y"])
        for batch in batches
    ]
    return float(np.mean([np.square(np.asarray(one) - np.asarray(other)) for one, other in pairs]))


def test_what_is_solved_lies_on_its_grid(solved):
    result, rounded, _, _ = solved
    again, _ = round_parameters(rounded, result.encodings, biases=False)
    for name in ("w1", "w2", "w3", "w4"):
        np.testing.assert_array_equal(again.params[name], rounded.params[name])


def test_it_leaves_less_noise_on_new_samples(solved):
    result, rounded, report, batches = solved
    new = [pictures(100, 64)]
    corrected, _ = ptqjax.correct_biases(result.model, result.encodings, batches)
    to_nearest = noise(corrected, result.encodings, result.model, new)
    assert noise(rounded, result.encodings, result.model, new) < 0.5 * to_nearest
    assert {record.where[1] for record in report} == {"w1", "w2", "w3", "w4"}


def test_reports_say_what_was_gained_on_samples_held_back(solved):
    figures = [(*record.before.values(), *record.after.values()) for record in solved[2]]
    assert all(after >= before for before, after in figures)
    assert sum(after - before for before, after in figures) > 4


def test_two_runs_are_equal_to_the_bit(solved):
    result, rounded, _, batches = solved
    again, _ = solve_rounding(result.model, result.encodings, batches)
    for name, value in rounded.params.items():
        np.testing.assert_array_equal(again.params[name], value)


def test_the_model_in_float_stays_as_it_was(solved):
    result, rounded, _, _ = solved
    np.testing.assert_array_equal(result.model.params["w1"], small_network().params["w1"])
    assert not np.array_equal(rounded.params["w1"], result.model.params["w1"])


def test_stretches_compute_what_the_graph_does():
    model = small_network()
    layers = [layer.node.output for layer in linear_layers(model).values()]
    parts = stretches(model.graph, layers, floating_tensors(model))
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    values = {"x": x}
    for part in parts:
        inputs = {part.names[name]: values[name] for name in part.inputs}
        own = {part.names[name]: value for name, value in model.params.items() if name in part.names}
        found = ptqjax.apply(part.graph, own, inputs)
        values |= {name: found[part.names[name]] for name in part.outputs}
    wanted = ptqjax.apply(model.graph, model.params, {"x": x})["y"]
    np.testing.assert_allclose(values["y"], wanted, rtol=1e-5, atol=1e-5)


def test_equal_stretches_have_one_name_each():
    """Two blocks alike are one program: their stretches are the same graph."""
    rng = np.random.default_rng(0)
    params = {f"w{i}": rng.normal(size=(4, 4, 1, 1)).astype(np.float32) for i in range(4)}
    nodes, name = [], "x"
    for index in range(4):
        nodes += [
            oh.make_node("Conv", [name, f"w{index}"], [f"c{index}"]),
            oh.make_node("Relu", [f"c{index}"], [f"r{index}"]),
        ]
        name = f"r{index}"
    model = onnx_model(nodes, {"x": ("n", 4, 3, 3)}, [name], params)
    layers = [layer.node.output for layer in linear_layers(model).values()]
    parts = [part for part in stretches(model.graph, layers, floating_tensors(model)) if part.graph.nodes]
    assert len(parts) == 4
    assert len({part.graph for part in parts}) == 1


def test_a_layer_that_reads_too_much_is_named():
    model = small_network()
    batch = {"x": np.full((2, 3, 8, 8), 1e30, np.float32)}
    config = ptqjax.QuantizationConfig(weights="int4", equalize=False, correct="none", rounding="nearest")
    result = ptqjax.quantize(model, [{"x": np.ones((2, 3, 8, 8), np.float32)}], config)
    with pytest.raises(ptqjax.DataError, match=r"reads, 'x', is NaN or infinite"):
        solve_rounding(result.model, result.encodings, [batch])


def test_a_single_sample_solves_and_judges():
    model = small_network()
    batch = {"x": np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)}
    config = ptqjax.QuantizationConfig(weights="int4", equalize=False, correct="none", rounding="nearest")
    result = ptqjax.quantize(model, [batch], config)
    rounded, _ = solve_rounding(result.model, result.encodings, [batch])
    assert all(np.isfinite(np.asarray(value)).all() for value in rounded.params.values())


def test_solvers_map_over_groups():
    grams = np.stack([np.asarray(rounding.with_ridge(gram_of(seed, 32), 0.1)) for seed in range(2)])
    targets = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)
    grid = grid_of(targets.shape)
    mapped = jax.vmap(rounding.error_feedback)(targets, grams, grid)
    for index in range(2):
        alone = rounding.error_feedback(targets[index], grams[index], grid_of(targets.shape[1:]))
        assert np.mean(np.asarray(mapped[index]) == np.asarray(alone)) > 0.97


PLAIN = {"equalize": False, "correct": "none"}


@pytest.mark.parametrize(
    ("settings", "is_solved"),
    [
        ({"weights": "int4"}, True),
        ({"weights": "int4", "effort": "fast"}, True),
        ({"weights": "int4", "rounding": "nearest"}, False),
        ({"weights": "int8"}, False),
        ({"weights": "int8", "rounding": "solved"}, True),
        ({"weights": "int8", "granularity": "tensor"}, True),
        ({"weights": "int8", "granularity": "tensor", "effort": "fast"}, False),
        ({"weights": "int8", "effort": "thorough"}, True),
        ({"rules": (ptqjax.Rule(tensors=("w3",), dtype="int4"),)}, True),
        ({"weights": "float8_e4m3fn", "activations": "float8_e4m3fn", "target": "generic-per-channel"}, False),
    ],
    ids=lambda value: (
        ", ".join(f"{k}={v}" for k, v in value.items() if k != "rules") if isinstance(value, dict) else ""
    ),
)
def test_what_is_solved_by_default(settings, is_solved):
    result = ptqjax.quantize(small_network(), [pictures(0, 8)], ptqjax.QuantizationConfig(**PLAIN, **settings))
    done = [r for r in result.reports.get("correct", ()) if r.transform == "solve_rounding" and r.done]
    assert bool(done) == is_solved


def test_solving_needs_data():
    with pytest.raises(ptqjax.ConfigError, match="rounding='solved' needs calibration data, and there are none"):
        ptqjax.quantize(small_network(), None, ptqjax.QuantizationConfig(rounding="solved", equalize=False))


def test_the_file_of_solved_weights_is_what_is_simulated_and_is_read_back_whole(tmp_path):
    batches = [pictures(0, 16)]
    result = ptqjax.quantize(small_network(), batches, ptqjax.QuantizationConfig(**PLAIN, weights="int4"))
    ptqjax.export(result.model, result.encodings, tmp_path, "q")
    found = ptqjax.validate(tmp_path / "q.onnx", batches, in_float=False)
    assert found.largest <= 1
    model, encodings, _ = ptqjax.read_quantized(tmp_path / "q.onnx")
    again = ptqjax.quantize(
        model, batches, ptqjax.QuantizationConfig(**PLAIN, weights="int4"), frozen={"w1": encodings["w1"]}
    )
    np.testing.assert_array_equal(again.model.params["w1"], result.model.params["w1"])


def test_layers_without_a_bias_get_one_where_biases_are_corrected(solved):
    result, rounded, _, batches = solved
    (layer,) = [layer for layer in linear_layers(rounded).values() if layer.weight == "w3"]
    assert layer.bias
    plain, _ = solve_rounding(result.model, result.encodings, batches, ptqjax.Solving(corrects=False))
    assert not next(each for each in linear_layers(plain).values() if each.weight == "w3").bias
    np.testing.assert_array_equal(plain.params["b1"], result.model.params["b1"])


def test_reports_hold_solved_weights_against_the_float_ones():
    """Solved weights lie on their grid: rounded once more, they would seem to lose nothing, and the float ones more."""
    batches = [pictures(seed, 16) for seed in range(2)]
    config = ptqjax.QuantizationConfig(weights="int3", equalize=False)
    result = ptqjax.quantize(small_network(), batches, config)
    exact, rounded = small_network().params["w2"], np.asarray(result.model.params["w2"])
    depth = measure_depth(small_network(), result.model, result.encodings, batches).sums["w2"]
    assert depth.own_noise == pytest.approx(float(np.square(rounded - exact).sum()), rel=1e-5)
    only = {"w2": result.encodings["w2"]}
    alone = [
        sensitivity(small_network(), batches, only, method=method, solved={"w2": rounded})[0].noise
        for method in ("on-only", "one-pass")
    ]
    moved = small_network()
    moved = moved.replace(params={**moved.params, "w2": rounded})
    outputs = [[np.asarray(ptqjax.apply(m.graph, m.params, b)["y"]) for b in batches] for m in (small_network(), moved)]
    wanted = sum(np.square(a - b).sum() for a, b in zip(*outputs, strict=True))
    wanted /= sum(np.square(a).sum() for a in outputs[0])
    assert alone[0] == pytest.approx(wanted, rel=1e-3)
    assert alone[1] == pytest.approx(wanted, rel=0.5)  # an estimate
    assert sensitivity(small_network(), batches, only, method="on-only")[0].noise != pytest.approx(wanted, rel=0.05)
