"""Samples along other axes than the first, along none, and of unlike size in one file: what reaches the model."""

import json
from pathlib import Path

import click.testing
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import ptqjax
from ptqjax.commands.cli import commands
from ptqjax.data.files import Batches, Samples, load_samples
from ptqjax.data.object_arrays import read_array_of_arrays
from ptqjax.data.sample_axes import SampleAxis, sample_axes
from ptqjax.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
FAST = ("--quiet", "--no-cache", "--scaling", "off", "--correct", "none", "--report", "short")
FREE = {"x": ["N", 1, 6], "state": [2, "N", 5], "mask": ["K"], "gain": []}
FIXED = {"x": [1, 1, 6], "state": [2, 1, 5], "mask": [5], "gain": []}
SAMPLES = 6


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def stateful(shapes: dict[str, list]) -> onnx.ModelProto:
    """A step of a network with state: y = W x + state[0], times gain and mask; the state's batch axis is the second."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Gather", ["state", "first"], ["s0"], axis=0),
        helper.make_node("Unsqueeze", ["s0", "one"], ["s1"]),
        helper.make_node("Add", ["h", "s1"], ["a"]),
        helper.make_node("Tanh", ["a"], ["t"]),
        helper.make_node("Mul", ["t", "mask"], ["m"]),
        helper.make_node("Mul", ["m", "gain"], ["y"]),
        helper.make_node("MatMul", ["state", "v"], ["next"]),
    ]
    graph = helper.make_graph(
        nodes,
        "stateful",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "next")],
        [
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in {"w": floats(6, 5), "v": floats(5, 5), "first": np.int64(0), "one": [1]}.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


FEEDS = [
    {
        "x": floats(1, 1, 6),
        "state": floats(2, 1, 5),
        "mask": np.array([1, 0, 1, 1, 0], np.float32),
        "gain": np.array(2, np.float32),
    }
    for _ in range(SAMPLES)
]


def stacked(name: str) -> np.ndarray:
    return np.stack([feed[name] for feed in FEEDS])


def joined(name: str, axis: int) -> np.ndarray:
    return np.concatenate([feed[name] for feed in FEEDS], axis)


ALIKE = {"mask": FEEDS[0]["mask"], "gain": FEEDS[0]["gain"]}
WAYS = {
    "along the axis of that symbol": (FREE, {"x": joined("x", 0), "state": joined("state", 1), **ALIKE}, {}),
    "whole feeds": (FREE, {name: stacked(name) for name in FREE} | {"mask": ALIKE["mask"]}, {}),
    "fixed, told": (FIXED, {"x": joined("x", 0), "state": joined("state", 1), **ALIKE}, {"state": 1}),
    "fixed, whole feeds": (FIXED, {name: stacked(name) for name in FIXED}, {}),
    "fixed, joined": (FIXED, {"x": joined("x", 0), "state": joined("state", 0), **ALIKE}, {}),
    "of lists": (FREE, {"x": [*joined("x", 0)], "state": [feed["state"] for feed in FEEDS], **ALIKE}, {}),
}


def saved(folder: Path, arrays: dict) -> Path:
    found = {}
    for name, value in arrays.items():
        found[name] = value
        if isinstance(value, list):
            found[name] = np.empty(len(value), object)
            found[name][:] = value
    np.savez(folder / "data.npz", **found)
    return folder / "data.npz"


def graph_of(shapes: dict[str, list]) -> ptqjax.ir.Graph:
    return ptqjax.read(stateful(shapes)).graph


@pytest.mark.parametrize(("shapes", "arrays", "axes"), WAYS.values(), ids=WAYS)
def test_each_way_to_lay_samples_out_feeds_the_same(tmp_path, shapes: dict, arrays: dict, axes: dict) -> None:
    graph = graph_of(shapes)
    groups = load_samples(saved(tmp_path, arrays), graph, axes={"mask": None, **axes})
    batches = list(Batches(groups, graph, size=4))
    assert len(batches) == (2 if shapes is FREE else SAMPLES)
    one_by_one = [feed for batch in batches for feed in _taken_apart(batch)]
    assert len(one_by_one) == SAMPLES
    for feed, wanted in zip(one_by_one, FEEDS, strict=True):
        for name, value in wanted.items():
            np.testing.assert_array_equal(feed[name], value, err_msg=name)


def _taken_apart(batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [batch | {"x": batch["x"][i : i + 1], "state": batch["state"][:, i : i + 1]} for i in range(len(batch["x"]))]


def test_numbers_that_differ_are_fed_apart_and_labels_follow(tmp_path) -> None:
    gains, graph = np.array([1, 2, 1, 1, 2, 1], np.float32), graph_of(FREE)
    arrays = {"x": joined("x", 0), "state": joined("state", 1), "mask": ALIKE["mask"], "gain": gains}
    groups = load_samples(saved(tmp_path, arrays | {"labels": np.arange(6) % 3}), graph, axes={"mask": None})
    assert [group.inputs["gain"].tolist() for group in groups] == [1.0, 2.0]
    assert [np.asarray(group.labels).tolist() for group in groups] == [
        [0, 2, 0, 2],
        [1, 1],
    ]  # of samples 0, 2, 3, 5 and 1, 4
    np.testing.assert_array_equal(groups[1].inputs["state"], arrays["state"][:, [1, 4]])


def test_samples_of_unlike_size_in_one_file_come_in_their_sizes(tmp_path) -> None:
    graph = ptqjax.read(_of_any_length()).graph
    texts = [floats(5, 4), floats(7, 4), floats(5, 4)]
    groups = load_samples(saved(tmp_path, {"x": texts, "labels": np.array([0, 1, 2])}), graph)
    assert [group.inputs["x"].shape for group in groups] == [(2, 5, 4), (1, 7, 4)]
    assert [np.asarray(group.labels).tolist() for group in groups] == [[0, 2], [1]]
    np.testing.assert_array_equal(groups[0].inputs["x"], np.stack([texts[0], texts[2]]))


def _of_any_length() -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=0)],
        "mean",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "T", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("dtype", ["f4", ">f8", "i8", "u1", "?"])
def test_an_array_of_arrays_is_read_to_the_bit(tmp_path, dtype: str) -> None:
    wanted = [floats(3, 2).astype(dtype), np.asfortranarray(floats(4, 5)).astype(dtype), floats(0, 2).astype(dtype)]
    objects = np.empty(3, object)
    objects[:] = wanted
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    with (tmp_path / "a.npy").open("rb") as file:
        found = read_array_of_arrays(file)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype.newbyteorder("=")


class _Harmful:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize(
    "content", [_Harmful(), "text", {"a": 1}, np.array(["a"])], ids=["call", "text", "dict", "str"]
)
def test_a_pickle_of_anything_else_is_refused_and_runs_nothing(tmp_path, monkeypatch, content: object) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.empty(1, object)
    objects[0] = content
    np.savez("data.npz", x=objects)
    with pytest.raises(DataError, match=r"'data.npz': 'x' is an array of Python objects that are no arrays of numbers"):
        load_samples("data.npz", ptqjax.read(_of_any_length()).graph)
    assert not Path("harm").exists()


WRONG = {
    "counts": ({"x": floats(6, 1, 6), "state": floats(2, 4, 5), **ALIKE}, {}, "'x' 6, 'state' 4.*--batch-axis NAME"),
    "a number": ({"x": np.float32(1), "state": joined("state", 1), **ALIKE}, {}, "'x' is a single number; expected"),
    "a state": (
        {"x": joined("x", 0), "state": np.float32(1), **ALIKE},
        {},
        "'state' is a single number; expected an array whose second axis counts samples.*--batch-axis state=none",
    ),
}


@pytest.mark.parametrize(("arrays", "axes", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_said_with_the_way_out(tmp_path, arrays: dict, axes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_samples(saved(tmp_path, arrays), graph_of(FREE), axes={"mask": None, **axes})


@pytest.mark.parametrize(
    ("axes", "message"),
    [({"stat": 1}, "no such input; it has x, state"), ({"x": 3}, "the input has 3 axes; expected 0 to 2")],
)
def test_an_axis_that_the_model_has_not_is_an_error(axes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample_axes(graph_of(FREE), axes)


def test_samples_without_axes_lie_along_the_first() -> None:
    assert sample_axes(ptqjax.read(_of_any_length()).graph) == {"x": SampleAxis(axis=0, rows=1)}
    assert Samples(inputs={"x": floats(3, 2)}, labels=None).num_samples == 3


# The commands


def run(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(commands, [str(argument) for argument in arguments])


@pytest.mark.parametrize("way", ["along the axis of that symbol", "fixed, told"])
def test_commands_take_states_and_numbers(tmp_path, way: str) -> None:
    shapes, arrays, axes = WAYS[way]
    onnx.save(stateful(shapes), tmp_path / "net.onnx")
    data = saved(tmp_path, arrays)
    told = [text for name, axis in axes.items() for text in ("--batch-axis", f"{name}={axis}")]
    told += ["--batch-axis", "mask=none"]
    found = run("quantize", tmp_path / "net.onnx", "--calibration", data, *told, "--out", tmp_path / "q", *FAST)
    assert found.exit_code == 0, found.output
    assert json.loads((tmp_path / "q" / "report.json").read_text())["source"]["num_samples"] == SAMPLES
    file = tmp_path / "q" / "model.onnx"
    found = run("evaluate", file, "--data", data, *told, "--reference", tmp_path / "net.onnx", "--quiet")
    assert found.exit_code == 0, found.output
    session, reference = (onnxruntime.InferenceSession(path) for path in (file, tmp_path / "net.onnx"))
    for feed in FEEDS[:2]:
        y, wanted = (np.asarray(each.run(["y"], feed)[0]) for each in (session, reference))
        assert np.abs(y - wanted).max() < 0.1 * np.abs(wanted).max()
    found = run("validate", file, "--data", data, *told, "--quiet", "--no-cache")
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize("text", ["state", "state=one", "=1", "state=-1"])
def test_an_option_of_another_form_is_said_so(tmp_path, text: str) -> None:
    found = run("evaluate", tmp_path / "net.onnx", "--data", "data.npz", "--batch-axis", text)
    assert found.exit_code == 2
    assert f"{text!r}: expected NAME=AXIS" in " ".join(found.stderr.split())


def test_an_expected_number_is_said_so(tmp_path) -> None:
    onnx.save(stateful(FREE), tmp_path / "net.onnx")
    arrays = {"x": joined("x", 0), "state": joined("state", 1), "mask": ALIKE["mask"], "gain": floats(2, 2)}
    data = saved(tmp_path, arrays)
    told = ("--batch-axis", "mask=none", "--batch-axis", "gain=none")
    found = run("evaluate", tmp_path / "net.onnx", "--data", data, *told, "--quiet")
    assert found.exit_code == 1
    assert "'gain' has the shape 2x2; expected a single number" in " ".join(found.stderr.split())
