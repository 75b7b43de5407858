"""Rounding that is learned: blocks, the numbers that gradients move, and what learning promises beside solving."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx.helper as oh
import pytest
from onnx import numpy_helper

import ptqjax
from ptqjax.encodings.encoding import dynamic_encoding
from ptqjax.fit.block_problem import BlockProblem
from ptqjax.fit.blocks import MANY, blocks, layers_of_blocks
from ptqjax.fit.walking import Walk, layers_in, layers_to_round
from ptqjax.kernels.soft_rounding import codes_of, start_of, straight_codes
from ptqjax.placement.tensors import floating_tensors
from ptqjax.simulation import round_parameters
from ptqjax.transforms.linear import linear_layers

SETTINGS = {"weights": "int4", "equalize": False, "headroom": 3.0, "weight_ranges": "min-max"}  # scales as given


def test_learning_begins_at_the_codes_it_is_given():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 4, 1000).astype(np.float32)
    codes = np.clip(np.round(values) + rng.integers(-2, 3, 1000), -7, 7)
    np.testing.assert_array_equal(codes_of(start_of(values, codes), -7, 7), codes)


def test_gradients_pass_straight_through_inside_of_the_grid():
    numbers = jnp.asarray([-9.0, -6.6, 0.4, 0.6, 7.4], jnp.float32)
    codes, slope = jax.value_and_grad(lambda u: jnp.sum(straight_codes(u, -7.0, 7.0)))(numbers)
    assert float(codes) == -7 - 7 + 0 + 1 + 7
    np.testing.assert_array_equal(slope, [0, 1, 1, 1, 0])


def residual_network(channels=8, num_blocks=2, seed=0):
    """A convolution, residual blocks that are alike (the Relu behind the sum included), and a dense layer."""
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(0, 0.4, (channels, 3, 3, 3)).astype(np.float32)}
    nodes = [oh.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4), oh.make_node("Relu", ["c"], ["r"])]
    name = "r"
    for i in range(num_blocks):
        for j in "ab":
            params[f"w{i}{j}"] = rng.normal(0, 0.15, (channels, channels, 3, 3)).astype(np.float32)
            params[f"b{i}{j}"] = rng.normal(0, 0.1, channels).astype(np.float32)
        nodes += [
            oh.make_node("Conv", [name, f"w{i}a", f"b{i}a"], [f"a{i}"], pads=[1] * 4),
            oh.make_node("Relu", [f"a{i}"], [f"ra{i}"]),
            oh.make_node("Conv", [f"ra{i}", f"w{i}b", f"b{i}b"], [f"s{i}"], pads=[1] * 4),
            oh.make_node("Add", [f"s{i}", name], [f"sum{i}"]),
            oh.make_node("Relu", [f"sum{i}"], [f"r{i}"]),
        ]
        name = f"r{i}"
    params["v"] = rng.normal(0, 0.3, (channels, 5)).astype(np.float32)
    nodes += [
        oh.make_node("GlobalAveragePool", [name], ["p"]),
        oh.make_node("Flatten", ["p"], ["f"]),
        oh.make_node("Gemm", ["f", "v"], ["y"]),
    ]
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", 1, ["n", 3, 8, 8])],
        [oh.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(value, key) for key, value in params.items()],
    )
    return ptqjax.read(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)]).SerializeToString())


def pictures(seed, count):
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.normal(size=(count, 3, 2, 2)) + rng.normal(size=(count, 1, 1, 1)), np.ones((4, 4)))
    return {"x": (coarse + 0.1 * rng.normal(size=(count, 3, 8, 8))).astype(np.float32)}


def cut(model, how=blocks):
    layers = {layer.node.output: layer for layer in linear_layers(model).values()}
    return layers, how(model.graph, layers, floating_tensors(model))


def test_residual_blocks_are_blocks_and_equal_ones_one_program():
    layers, found = cut(residual_network(num_blocks=4))
    assert [len(layers_in(block, layers)) for block in found] == [3, 2, 2, 2, 1]
    assert all(len(block.inputs) == len(block.outputs) == 1 for block in found)
    assert found[1].graph == found[2].graph


def test_blocks_hold_every_layer_once_and_no_more_than_many():
    """A network in which every tensor is read at the end has no place where one crosses."""
    rng = np.random.default_rng(0)
    nodes, name, params = [], "x", {}
    for i in range(20):
        params[f"w{i}"] = rng.normal(size=(4, 4)).astype(np.float32)
        nodes.append(oh.make_node("Gemm", [name, f"w{i}"], [f"t{i}"]))
        name = f"t{i}"
    nodes.append(oh.make_node("Sum", [f"t{i}" for i in range(20)], ["y"]))
    info = [oh.make_tensor_value_info(name, 1, ["n", 4]) for name in "xy"]
    inits = [numpy_helper.from_array(value, key) for key, value in params.items()]
    graph = oh.make_graph(nodes, "g", info[:1], info[1:], inits)
    model = ptqjax.read(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)]).SerializeToString())
    layers, found = cut(model)
    counts = [len(layers_in(block, layers)) for block in found]
    assert sum(counts) == 20
    assert max(counts) <= MANY
    assert [part for part in cut(model, layers_of_blocks)[1] if len(layers_in(part, layers)) > 1] == []


@pytest.fixture(scope="module")
def learned():
    batches = [pictures(seed, 16) for seed in range(8)]
    config = ptqjax.QuantizationConfig(**SETTINGS, rounding="learned")
    return batches, [ptqjax.quantize(residual_network(), batches, config) for _ in range(2)]


def records(result):
    return [record for record in result.reports["correct"] if record.transform == "learn_rounding"]


def test_two_runs_are_equal_to_the_bit(learned):
    first, second = learned[1]
    assert first.reports["correct"] == second.reports["correct"]
    for name, value in first.model.params.items():
        np.testing.assert_array_equal(second.model.params[name], value)
    for name, encoding in first.encodings.items():
        np.testing.assert_array_equal(second.encodings[name].scale, encoding.scale)


def test_nothing_is_worse_on_samples_held_back_and_the_network_is_better(learned):
    *found, whole = records(learned[1][0])
    assert [len(record.where) for record in found] == [3, 2, 1]
    for record in found:
        (before,), (after,) = record.before.values(), record.after.values()
        assert after > before if record.done else after == before
    (before,), (after,) = whole.before.values(), whole.after.values()
    assert whole.done
    assert after > before + 0.2


def test_what_is_learned_lies_on_its_grid(learned):
    result = learned[1][0]
    again, _ = round_parameters(result.model, result.encodings, biases=False)
    for name in (name for name in result.encodings if name in result.model.params):
        np.testing.assert_array_equal(again.params[name], result.model.params[name])


def test_the_file_is_what_is_simulated_and_its_integers_are_read_back(learned, tmp_path):
    batches, (result, _) = learned
    ptqjax.export(result.model, result.encodings, tmp_path, "q")
    assert ptqjax.validate(tmp_path / "q.onnx", batches[:1], in_float=False).largest <= 1
    model, encodings, _ = ptqjax.read_quantized(tmp_path / "q.onnx")
    for name in ("w", "w0a", "w1b", "v"):
        np.testing.assert_array_equal(model.params[name], result.model.params[name])
        np.testing.assert_array_equal(encodings[name].scale, result.encodings[name].scale)


def to_nearest(model, batches):
    config = ptqjax.QuantizationConfig(**SETTINGS, correct="none", rounding="nearest")
    return ptqjax.quantize(model, batches, config)


def test_the_first_value_is_what_was_solved_for():
    batches = [pictures(0, 8)]
    result = to_nearest(residual_network(), batches)
    solved, _ = ptqjax.solve_rounding(result.model, result.encodings, batches, ptqjax.Solving(corrects=False))
    layers, _ = layers_to_round(result.model, result.encodings, ())
    walk = Walk.through(result.model, result.encodings, batches, layers, blocks)
    for block in walk.parts:
        inside, solving = layers_in(block, layers), ptqjax.Solving()
        free = frozenset(result.encodings)
        given = ptqjax.Solving(corrects=False)
        assert not BlockProblem.of(walk, block, solved.params, inside, solving=given, free=frozenset()).start.shifts
        problem = BlockProblem.of(walk, block, solved.params, inside, solving=solving, free=free)
        params, encodings = problem.hardened(problem.start)
        assert {layer.weight for layer in inside} <= set(params)
        for name, value in params.items():
            np.testing.assert_array_equal(value, solved.params[name])
        for name, encoding in encodings.items():
            np.testing.assert_array_equal(encoding.scale, result.encodings[name].scale)
        walk.advance(block, solved.params)


def test_what_grids_found_at_run_time_say_of_a_block_is_nothing():
    """Units of biases are those behind floats, and no step is learned."""
    batches = [pictures(0, 8)]
    result = to_nearest(residual_network(), batches)
    weights = {name: each for name, each in result.encodings.items() if name in result.model.params}
    layers, _ = layers_to_round(result.model, weights, ())
    found = []
    for others in ({}, dict.fromkeys(result.encodings.keys() - weights.keys(), dynamic_encoding())):
        walk = Walk.through(result.model, weights | others, batches, layers, blocks)
        inside = layers_in(walk.parts[0], layers)
        free = frozenset(result.encodings)
        problem = BlockProblem.of(walk, walk.parts[0], result.model.params, inside, solving=ptqjax.Solving(), free=free)
        found.append(problem.units)
        assert not problem.tied
    assert found[0]
    assert {name: unit.tobytes() for name, unit in found[0].items()} == {
        name: unit.tobytes() for name, unit in found[1].items()
    }


def dense_network(weight, behind):
    graph = oh.make_graph(
        [oh.make_node("Gemm", ["x", "w"], ["t"]), oh.make_node(behind, ["t"], ["y"])],
        "g",
        [oh.make_tensor_value_info("x", 1, ["n", 4])],
        [oh.make_tensor_value_info("y", 1, ["n", 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    return ptqjax.read(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)]).SerializeToString())


def test_dead_inputs_and_a_single_sample_are_no_fault():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 4)).astype(np.float32)
    x[:, 0] = 0
    config = ptqjax.QuantizationConfig(**SETTINGS, rounding="learned", effort="fast")
    model = dense_network(rng.normal(size=(4, 4)).astype(np.float32), "Relu")
    result = ptqjax.quantize(model, [{"x": x}], config)
    assert all(np.isfinite(np.asarray(value)).all() for value in result.model.params.values())
    result = ptqjax.quantize(model, [{"x": x[:1]}], config)
    assert [record.reason for record in records(result)] == ["there are too few samples to hold some back"]


def test_a_block_that_gives_no_number_is_named():
    model = dense_network(np.eye(4, dtype=np.float32), "Exp")
    result = to_nearest(model, [{"x": np.ones((8, 4), np.float32)}])
    with pytest.raises(ptqjax.DataError, match=r"the block from Gemm \(producing 't'\) to 'y' gives NaN or infinite"):
        ptqjax.learn_rounding(result.model, result.encodings, [{"x": np.full((8, 4), 100.0, np.float32)}])


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ptqjax.ConfigError, match="learnt"):
        ptqjax.QuantizationConfig(rounding="learnt")
    with pytest.raises(ptqjax.ConfigError, match="num_steps=0"):
        ptqjax.RoundingLearning(num_steps=0)
    with pytest.raises(ptqjax.ConfigError, match=r"mixed=2\.0"):
        ptqjax.RoundingLearning(mixed=2.0)
    with pytest.raises(ptqjax.ConfigError, match="rounding='learned' needs calibration data, and there are none"):
        ptqjax.quantize(residual_network(), None, ptqjax.QuantizationConfig(rounding="learned", equalize=False))
