"""Decoders with past: batches made by feeding the past along, branches merged by an If, and what does not fit."""

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import ptqjax
from ptqjax.agreement import run, session
from ptqjax.commands.cli import commands
from ptqjax.data.past import interface_of
from ptqjax.decoders import decoding_batches
from ptqjax.errors import ConfigError, DataError
from ptqjax.fit.behaviour import observe_behaviour
from tests.decoders import GROUPS, VOCABULARY, decoder, merged_decoder

RANDOM = np.random.default_rng(1)
SEQUENCES = [RANDOM.integers(0, VOCABULARY, length) for length in (7, 7, 4, 2, 1)]
FAST = {"effort": "fast", "rounding": "nearest", "equalize": False, "correct": "none"}
SEEN = [RANDOM.integers(0, VOCABULARY, 7) for _ in range(16)]


@pytest.fixture(scope="module")
def model():
    return ptqjax.read(decoder())


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    batches = decoding_batches(model, SEEN)
    result = ptqjax.quantize(model, batches, ptqjax.QuantizationConfig(**FAST))
    ptqjax.export(result.model, result.encodings, folder, "q")
    return result, folder / "q.onnx"


def test_steps_with_the_past_fed_along_are_the_whole_sequence_at_once(model):
    runtime = session(model)
    (whole,) = decoding_batches(model, SEQUENCES[:2], cuts=lambda _: ())
    for cuts in (range, lambda length: (length // 2,), None):
        steps = decoding_batches(model, SEQUENCES[:2], cuts=cuts)
        found = np.concatenate([run(runtime, batch)["logits"] for batch in steps], axis=1)
        np.testing.assert_allclose(found, run(runtime, whole)["logits"], atol=1e-4)  # sums in another order
    assert [batch["past_key_values.0.key"].shape[2] for batch in steps] == [0, 3, 6]
    assert all(batch["attention_mask"].shape[1] == 3 + 3 * (i > 0) + (i > 1) for i, batch in enumerate(steps))


def test_tokens_of_unlike_length_are_cut_each_with_its_labels(model):
    told = [sequence + 100 for sequence in SEQUENCES]
    found = decoding_batches(model, SEQUENCES, labels=told, size=2)
    at, num_tokens = 0, 0
    for batch in found:
        ids = batch["input_ids"]
        labels = found.labels[at : at + len(ids)]
        np.testing.assert_array_equal(labels[:, : ids.shape[1]], ids + 100)
        assert np.all(labels[:, ids.shape[1] :] == -100)
        at, num_tokens = at + len(ids), num_tokens + ids.size
    assert at == len(found.labels)
    assert num_tokens == sum(map(len, SEQUENCES))  # each token goes in once


def test_a_decoder_is_quantized_past_and_all_and_its_file_is_the_simulation(model, quantized):
    result, file = quantized
    steps = decoding_batches(model, SEQUENCES)
    assert all(np.all(np.isfinite(encoding.scale)) for encoding in result.encodings.values())
    found = ptqjax.evaluate(
        file, steps, labels=decoding_batches(model, SEQUENCES, labels=SEQUENCES).labels, reference=model_run(model)
    )
    assert found.outputs["logits"] > 20
    assert found.outputs["present.0.key"] > 20
    likeness = ptqjax.validate(file, decoding_batches(model, SEQUENCES[:2]), in_float=False)
    assert likeness.largest <= 1
    assert likeness.integer.sqnr > 60


def test_scales_are_looked_for_where_the_first_steps_have_no_past(model):
    """A past of no length has no range and no power: it says nothing, and what later steps show is as without it."""
    steps = decoding_batches(model, SEEN[:8])
    whole, later = (observe_behaviour(model, batches) for batches in (steps, steps.batches[1:]))
    key = "past_key_values.0.key"
    for what in ("low", "high", "mean", "power"):
        np.testing.assert_allclose(getattr(whole[key], what), getattr(later[key], what), rtol=1e-6)
    config = ptqjax.QuantizationConfig(scaling="noise", effort="fast", correct="none", rounding="nearest")
    result = ptqjax.quantize(model, steps, config)
    assert all(np.all(np.isfinite(encoding.scale)) for encoding in result.encodings.values())


def model_run(model):
    runtime = session(model)
    return lambda batch: run(runtime, batch)


def test_a_merged_file_becomes_the_branch_that_a_fixed_input_picks(model):
    steps = decoding_batches(model, SEQUENCES[:2]).batches
    for has_past, taken in ((True, steps[1]), (False, steps[0])):
        merged = ptqjax.read(merged_decoder(), fixed={"use_cache_branch": has_past})
        assert not any(node.subgraphs for node in merged.graph.nodes)
        assert "use_cache_branch" not in {spec.name for spec in merged.graph.inputs}
        assert {"wq", "head", "table"} <= set(merged.graph.parameters)
        fed = {spec.name: taken[spec.name] for spec in merged.graph.inputs}
        unmerged = run(session(merged), fed)
        given = {**taken, "use_cache_branch": np.array([has_past])}
        whole = session(merged_decoder().SerializeToString()).run(None, given)
        for value, (name, other) in zip(whole, unmerged.items(), strict=True):
            np.testing.assert_array_equal(value, other, err_msg=name)


def test_the_driver_feeds_a_merged_file_as_it_is():
    merged = ptqjax.read(merged_decoder())
    steps = decoding_batches(merged, SEQUENCES[:1], run_model=model_run(merged))
    assert [batch["use_cache_branch"].tolist() for batch in steps] == [[False], [True], [True]]
    apart = decoding_batches(ptqjax.read(decoder()), SEQUENCES[:1])
    for one, other in zip(steps, apart, strict=True):
        np.testing.assert_array_equal(one["past_key_values.0.key"], other["past_key_values.0.key"])


def test_branches_within_branches_and_names_that_two_ifs_share():
    def branch(name, nodes):
        return onnx.helper.make_graph(nodes, name, [], [onnx.helper.make_tensor_value_info("o", 1, None)])

    def of(value):  # the same inner names in each branch
        constant = onnx.helper.make_node("Constant", [], ["c"], value_float=value)
        return [constant, onnx.helper.make_node("Mul", ["x", "c"], ["h"]), onnx.helper.make_node("Relu", ["h"], ["o"])]

    def either(output, one, other):
        branches = {"then_branch": branch("one", one), "else_branch": branch("other", other)}
        return onnx.helper.make_node("If", ["b"], [output], **branches)

    inner = either("o", of(2.0), of(3.0))
    nodes = [either("y1", [inner], of(5.0)), either("y2", of(7.0), of(5.0))]
    nodes += [onnx.helper.make_node("Sub", ["y1", "y2"], ["y"])]
    info = onnx.helper.make_tensor_value_info
    inputs = [info("x", 1, ["n"]), info("b", 9, [])]
    graph = onnx.helper.make_graph(nodes, "g", inputs, [info("y", 1, None), info("y2", 1, None)])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    x = np.array([1.0, -1, 3], np.float32)
    for picked, factors in ((True, (2, 7)), (False, (5, 5))):
        model = ptqjax.read(proto, fixed={"b": picked})
        assert not any(node.subgraphs for node in model.graph.nodes)
        found = ptqjax.apply(model.graph, model.params, {"x": x})
        np.testing.assert_array_equal(found["y2"], factors[1] * x.clip(0))
        np.testing.assert_array_equal(found["y"], (factors[0] - factors[1]) * x.clip(0))


def test_a_fixed_input_that_there_is_not_is_an_error():
    with pytest.raises(ConfigError, match="has no such input; it takes input_ids"):
        ptqjax.read(decoder(), fixed={"use_cache_branch": True})


def changed(batch, **inputs):
    return {**batch, **inputs}


def test_a_past_that_does_not_fit_is_an_error(model):
    first, second, _ = decoding_batches(model, SEQUENCES[:2]).batches
    longer = np.zeros((2, GROUPS, 5, 4), np.float32)
    config = ptqjax.QuantizationConfig(**FAST)
    key, value = "past_key_values.0.key", "past_key_values.0.value"
    short = np.ones((2, 3), np.int64)
    for batch, words in (
        (changed(second, attention_mask=short), r"'attention_mask' has the shape \[2, 3\]; expected \[2, 6\]"),
        (changed(second, **{key: longer}), r"'past_key_values.0.value' has the shape 2x2x3x4"),
        (changed(first, **{key: longer[:1], value: longer[:1]}), "shape 1x2x5x4; expected"),
    ):
        with pytest.raises(DataError, match=words):
            ptqjax.calibrate(model, [batch], config)


@pytest.mark.parametrize(
    ("sequences", "words"),
    [
        ([np.array([1, VOCABULARY])], f"holds the id {VOCABULARY}; .*has {VOCABULARY} rows"),
        ([np.array([], int)], "sequence 0 is of type int64 and holds 0 ids"),
        ([np.array([0.5, 1])], "of type float64"),
        ([], "there are no sequences"),
    ],
)
def test_sequences_that_do_not_fit_are_errors(model, sequences, words):
    with pytest.raises(DataError, match=words):
        decoding_batches(model, sequences)


def test_a_model_without_past_is_named(model):
    other = ptqjax.read(merged_decoder(), fixed={"use_cache_branch": False})
    assert interface_of(other.graph) is not None  # its inputs are declared all the same
    x = onnx.helper.make_tensor_value_info("x", 1, ["n"])
    y = onnx.helper.make_tensor_value_info("y", 1, ["n"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    plain = ptqjax.read(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8))
    with pytest.raises(DataError, match=r"no decoder with past: expected inputs 'input_ids'.*it takes x"):
        decoding_batches(plain, SEQUENCES)
    with pytest.raises(DataError, match="expected one for each token"):
        decoding_batches(model, SEQUENCES, labels=SEQUENCES[:2])


def token_ids(folder):
    """Writes a merged decoder, and sequences of unlike length with their labels."""
    onnx.save(merged_decoder(), folder / "merged.onnx")
    ids, labels = (np.empty(3, object) for _ in range(2))
    for i, sequence in enumerate(SEQUENCES[:3]):
        ids[i], labels[i] = sequence, np.append(sequence[1:], -100)
    np.savez(folder / "ids.npz", input_ids=ids, labels=labels)


def test_the_command_line_makes_the_past_of_token_ids(tmp_path):
    token_ids(tmp_path)
    given = [f"{tmp_path}/merged.onnx", "--calibration", f"{tmp_path}/ids.npz", "--out", f"{tmp_path}/q"]
    done = CliRunner().invoke(commands, ["quantize", *given, "--report", "none", "--no-equalize", "--correct", "none"])
    assert done.exit_code == 0, done.output
    assert "the one with past is quantized" in done.output
    given = [f"{tmp_path}/q/model.onnx", "--data", f"{tmp_path}/ids.npz", "--reference", f"{tmp_path}/merged.onnx"]
    done = CliRunner().invoke(commands, ["evaluate", *given])
    assert done.exit_code == 0, done.output
    assert "perplexity, of the reference" in done.output


def test_a_recipe_makes_the_past_of_token_ids_as_the_command_line_does(tmp_path):
    token_ids(tmp_path)
    recipe = """model = "merged.onnx"
report = "none"
[data]
calibration = "ids.npz"
evaluation = "ids.npz"
[config]
equalize = false
correct = "none"
"""
    (tmp_path / "recipe.toml").write_text(recipe)
    done = ptqjax.run_recipe(tmp_path / "recipe.toml", tmp_path / "runs")
    assert {"sqnr_db", "perplexity"} <= done.metrics.keys()
    assert done.metrics["num_samples"] == sum(
        len(batch["input_ids"]) for batch in decoding_batches(ptqjax.read(decoder()), SEQUENCES[:3])
    )
    given = [f"{tmp_path}/merged.onnx", "--calibration", f"{tmp_path}/ids.npz", "--out", f"{tmp_path}/q"]
    by_hand = CliRunner().invoke(
        commands, ["quantize", *given, "--report", "none", "--no-equalize", "--correct", "none"]
    )
    assert by_hand.exit_code == 0, by_hand.output
    assert ptqjax.read(done.model).params.keys() == ptqjax.read(tmp_path / "q" / "model.onnx").params.keys()
    assert done.model.read_bytes() == (tmp_path / "q" / "model.onnx").read_bytes()


def with_states():
    """Writes a decoder that adds the mean of an encoder's states to what it decodes."""
    info = onnx.helper.make_tensor_value_info
    node, arrays = onnx.helper.make_node, onnx.numpy_helper.from_array
    table = RANDOM.normal(size=(VOCABULARY, 4)).astype(np.float32)
    nodes = [
        node("Gather", ["table", "input_ids"], ["x"]),
        node("ReduceMean", ["states"], ["m"], axes=[1]),
        node("Add", ["x", "m"], ["h"]),
        node("MatMul", ["h", "head"], ["logits"]),
        node("Unsqueeze", ["h", "heads"], ["k"]),
        node("Concat", ["past_0", "k"], ["present_0"], axis=2),
    ]
    inputs = [info("input_ids", 7, ["n", "t"]), info("states", 1, ["n", "s", 4]), info("past_0", 1, ["n", 1, "p", 4])]
    outputs = [info("logits", 1, ["n", "t", VOCABULARY]), info("present_0", 1, ["n", 1, "q", 4])]
    params = [arrays(table, "table"), arrays(np.ascontiguousarray(table.T), "head"), arrays(np.array([1]), "heads")]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, params)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def test_each_sequence_is_fed_its_own_states_whatever_they_are_fed_with(tmp_path):
    sequences = [np.full(length, index) for index, length in enumerate((4, 7, 4, 7, 4))]
    states = [np.full((1 + index % 2, 4), index, np.float32) for index in range(5)]
    model = ptqjax.read(with_states())
    for size in (1, 32):
        found = decoding_batches(model, sequences, others={"states": states}, size=size)
        for batch in found:
            for row, own in zip(batch["input_ids"], batch["states"], strict=True):
                assert set(own.flat) == set(row)
    ids, beside = (np.empty(5, object) for _ in range(2))
    ids[:], beside[:] = sequences, states
    np.savez(tmp_path / "ids.npz", input_ids=ids, states=beside)
    onnx.save(with_states(), tmp_path / "model.onnx")
    given = [f"{tmp_path}/model.onnx", "--calibration", f"{tmp_path}/ids.npz", "--out", f"{tmp_path}/q"]
    done = CliRunner().invoke(commands, ["quantize", *given, "--report", "none", "--no-equalize", "--correct", "none"])
    assert done.exit_code == 0, done.output
    with pytest.raises(DataError, match=r"'states' besides ids and past; give it for each sequence.*DATA.npz"):
        decoding_batches(model, sequences)
    with pytest.raises(DataError, match=r"'states' is given 3 times; expected 5, one for each sequence"):
        decoding_batches(model, sequences, others={"states": states[:3]})
