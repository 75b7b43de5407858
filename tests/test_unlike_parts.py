"""Laws of common grids: no part of a tensor loses more than three bits to the others, and alike parts share a grid."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

import ptqjax
from ptqjax import QuantizationConfig
from ptqjax.ir import Model, Node, rebuild
from ptqjax.placement.place import place
from ptqjax.placement.unlike import LEAST_STEPS, TIMES_AS_COARSE
from ptqjax.ranges.calibrate import calibrate_and_report
from ptqjax.ranges.headroom import widened
from tests.models import build, node

PLAIN = QuantizationConfig(ranges="min-max", equalize=False, correct="none")
EVERYWHERE = replace(PLAIN, target="generic-per-channel")  # rounds what no kernel asks for as well
WIDE = 600.0  # times as far as the other part reaches


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def head(nodes, outputs, *, times=WIDE, more=None) -> Model:
    """The nodes behind convolutions of the input: `wide` and `small` have Relus, `both` is the two without, at once."""
    first = np.abs(normal(3, 2, 1, 1, seed=1))
    params = {"v": first * np.float32(times), "w": first, "b": np.concatenate([first * np.float32(times), first])}
    layers = [node("Conv", ["x", "v"], "a"), node("Relu", ["a"], "wide"), node("Conv", ["x", "w"], "c")]
    layers += [node("Relu", ["c"], "small"), node("Conv", ["x", "b"], "both"), *nodes]
    return rebuild(build(layers, params | (more or {}), input_shape=("n", 2, 4, 4), outputs=outputs))


def split(tensor, *results, axis=1):
    return Node(op_type="Split", inputs=(tensor, "sizes"), outputs=results, attributes=(("axis", axis),))


SIZES = {"sizes": np.asarray([3, 3])}
CONCAT = node("Concat", ["wide", "small"], "y", axis=1)
"""Ways in which parts come to share a grid -> nodes, outputs, parameters, what stays in float."""
WAYS = {
    "Concat": ([CONCAT], ["y"], {}, {"y"}),
    "Concat of a fixed range": (
        [node("Sigmoid", ["small"], "s"), node("Concat", ["wide", "s"], "y", axis=1)],
        ["y"],
        {},
        {"y"},
    ),
    "Concat, moved": (
        [
            node("Concat", ["wide", "small"], "k", axis=1),
            node("Transpose", ["k"], "t", perm=(0, 2, 3, 1)),
            node("Flatten", ["t"], "y", axis=3),
        ],
        ["y"],
        {},
        {"k", "t", "y"},
    ),
    "Concat in Concat": (
        [
            node("Concat", ["small", "small"], "k", axis=2),
            node("Concat", ["wide", "wide"], "l", axis=2),
            node("Concat", ["k", "l"], "y", axis=1),
        ],
        ["y"],
        {},
        {"y"},
    ),
    "Concat, by channel": (
        [
            node("Concat", ["wide", "small"], "k", axis=1),
            node("MaxPool", ["k"], "m", kernel_shape=(2, 2)),
            node("Mul", ["m", "half"], "h"),
            node("Transpose", ["h"], "y", perm=(0, 2, 3, 1)),
        ],
        ["y"],
        {"half": np.float32(0.5)},
        {"k", "m", "h", "y"},
    ),
    "Concat, Split": ([node("Concat", ["wide", "small"], "k", axis=1), split("k", "p", "q")], ["p", "q"], SIZES, {"k"}),
    "Split of a product": ([split("both", "p", "q")], ["p", "q"], SIZES, {"both"}),
    "Split, Concat": (
        [split("both", "p", "q"), node("Sigmoid", ["q"], "s"), node("Concat", ["p", "s"], "y", axis=1)],
        ["y"],
        SIZES,
        {"both", "y"},
    ),
    "Split of an input": ([split("x", "p", "q", axis=2)], ["p", "q"], {"sizes": np.asarray([2, 2])}, {"x"}),
}


def plain_for(way) -> QuantizationConfig:
    return EVERYWHERE if way == "Split of an input" else PLAIN


def batch_for(way) -> dict[str, np.ndarray]:
    x = np.abs(normal(8, 2, 4, 4, seed=2)) + np.float32(0.1)
    if way == "Split of an input":
        x[:, :, 2:] *= WIDE
    return {"x": x}


def in_runtime(folder, model, encodings, batch):
    ptqjax.export(model, encodings, folder, "q")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(folder / "q.onnx", options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, batch)), strict=True))


@pytest.mark.parametrize("ranges", ["min-max", "sqnr"])
@pytest.mark.parametrize("way", WAYS)
def test_no_part_loses_more_than_three_bits_to_another(tmp_path, way, ranges):
    """The smallest output values are as exact as if they were alone; and the file is what is simulated."""
    nodes, outputs, more, _ = WAYS[way]
    model, batch = head(nodes, outputs, more=more), batch_for(way)
    encodings, report = calibrate_and_report(model, [batch], replace(plain_for(way), ranges=ranges))
    assert any(record.transform == "give_up_grids" and record.done for record in report)
    exact = {name: np.asarray(y) for name, y in ptqjax.apply(model.graph, model.params, batch).items()}
    found = in_runtime(tmp_path, model, encodings, batch)
    for name, y in exact.items():
        small = np.abs(y) < 20 if "y" in exact else np.full(y.shape, np.abs(y).max() < 20)
        reach = np.abs(y[small]).max(initial=0)
        assert np.abs(found[name] - y)[small].max(initial=0) <= TIMES_AS_COARSE * reach / 255
    simulated = ptqjax.simulate(model, encodings, arithmetic="integer")(model.params, encodings, batch)
    for name in outputs:
        np.testing.assert_array_equal(np.asarray(simulated[name]), found[name])


@pytest.mark.parametrize("way", WAYS)
def test_only_what_holds_unlike_parts_stays_in_float_and_the_report_says_why(way):
    nodes, outputs, more, in_float = WAYS[way]
    model = head(nodes, outputs, more=more)
    encodings, report = calibrate_and_report(model, [batch_for(way)], plain_for(way))
    planned = {site.tensor for site in place(model, plain_for(way)).sites}
    assert planned - set(encodings) == in_float
    told = [record for record in report if record.transform == "give_up_grids"]
    assert {record.where[0] for record in told} <= in_float
    assert all("steps" in record.reason and f"'{record.where[1]}'" in record.reason for record in told)


@pytest.mark.parametrize("way", ["Concat", "Concat, moved", "Concat, Split", "Split of a product"])
def test_alike_parts_share_one_grid(way):
    nodes, outputs, more, in_float = WAYS[way]
    model = head(nodes, outputs, times=4, more=more)
    encodings, report = calibrate_and_report(model, [batch_for(way)], PLAIN)
    assert report == ()
    assert {site.tensor for site in place(model, PLAIN).sites} == set(encodings)
    joint = min(in_float)
    tied = {name: each for name, each in encodings.items() if name in {"wide", "small", "p", "q", *in_float}}
    assert {float(each.scale) for each in tied.values()} == {float(encodings[joint].scale)}


@pytest.mark.parametrize(("times", "is_given_up"), [(4, False), (20, True), (WIDE, True)])
def test_what_a_layer_reads_keeps_its_grid_longer(times, is_given_up):
    """In float the layer would be computed in float: only where hardly a step is left of the part."""
    shapes = {"k": normal(2, 6, 1, 1)}
    plain = head([CONCAT], ["y"], times=times)
    read = head([CONCAT, node("Conv", ["y", "k"], "z")], ["z"], times=times, more=shapes)
    batch = batch_for("Concat")
    assert ("y" not in ptqjax.calibrate(plain, [batch], PLAIN)) == is_given_up
    assert ("y" not in ptqjax.calibrate(read, [batch], PLAIN)) == (times == WIDE)


def test_wider_grids_leave_every_part_enough_steps():
    model = head([CONCAT], ["y"])
    wide = QuantizationConfig(activations="uint16", ranges="min-max")
    assert "y" in ptqjax.calibrate(model, [batch_for("Concat")], wide)
    assert 2**16 / WIDE > LEAST_STEPS


def test_a_target_without_float_keeps_the_grid_and_says_what_is_lost():
    model = head([CONCAT], ["y"])
    encodings, report = calibrate_and_report(
        model, [batch_for("Concat")], QuantizationConfig(target="qnn-htp", ranges="min-max")
    )
    assert "y" in encodings
    (record,) = [record for record in report if record.transform == "give_up_grids"]
    assert not record.done
    assert "'qnn-htp' has no float" in record.reason


def test_what_is_frozen_is_kept_and_parts_may_be_frozen():
    model, batch = head([CONCAT], ["y"]), batch_for("Concat")
    found = ptqjax.calibrate(model, [batch], PLAIN)
    again = ptqjax.calibrate(model, [batch], PLAIN, frozen={name: found[name] for name in ("wide", "small", "x")})
    assert set(again) == set(found)
    tied = ptqjax.calibrate(model, [batch], PLAIN, frozen={"y": found["wide"]})
    assert float(tied["small"].scale) == float(tied["y"].scale) == float(found["wide"].scale)


def test_parts_keep_their_grids_through_headroom_and_files(tmp_path):
    model, batch = head([CONCAT], ["y"]), batch_for("Concat")
    found = ptqjax.calibrate(model, [batch], PLAIN)
    wide = widened(model, found, 1.25, PLAIN, {})
    assert set(wide) == set(found)
    for name in ("wide", "small"):
        assert float(wide[name].scale) == pytest.approx(1.25 * float(found[name].scale))
    ptqjax.write_encodings(tmp_path / "some.encodings", model, found)
    assert ptqjax.read_encodings(tmp_path / "some.encodings", model, config=PLAIN)[1] == ()


def test_without_data_the_parts_are_told_by_batch_norms():
    """As far as these tell: two normalized layers of unlike deviation."""

    def norm(tensor, result, scale):
        params = {f"{result}.{i}": np.full(3, value, np.float32) for i, value in enumerate((scale, 0.0, 0.0, 1.0))}
        return node("BatchNormalization", [tensor, *params], result), params

    (first, more), (second, others) = norm("a", "m", WIDE), norm("c", "n", 1.0)
    params = {"v": normal(3, 2, 1, 1), "w": normal(3, 2, 1, 1, seed=1)} | more | others
    nodes = [node("Conv", ["x", "v"], "a"), first, node("Conv", ["x", "w"], "c"), second]
    nodes.append(node("Concat", ["m", "n"], "y", axis=1))
    model = ptqjax.fold_batch_norms(build(nodes, params, input_shape=("n", 2, 4, 4), outputs=["y"]))[0]
    encodings = ptqjax.calibrate(model, None, PLAIN)
    assert "y" not in encodings
    parts = sorted(float(each.scale) for name, each in encodings.items() if name not in ("x", *model.params))
    assert parts[1] == pytest.approx(WIDE * parts[0], rel=0.05)
