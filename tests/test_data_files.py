"""Samples of unlike size on the command line: several files, a folder, a pattern; and errors that name the file."""

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
from ptqjax.data.files import Batches, Samples, grouped, load_each
from ptqjax.errors import DataError

RNG = np.random.default_rng(0)
COUNTS = {"a": (3, 5), "b": (2, 7), "c": (4, 5)}  # file: samples, and their length
FAST = ("--quiet", "--no-cache", "--scaling", "off", "--correct", "none", "--report", "short")


def texts(shape: tuple[object, ...] = ("N", "T", 4)) -> onnx.ModelProto:
    """A model of sequences of any length: the mean of what a layer makes of each element."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("GlobalAveragePool", ["t"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    nodes.insert(2, helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]))
    graph = helper.make_graph(
        nodes,
        "texts",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], 5])],
        [numpy_helper.from_array(RNG.normal(size=(4, 5)).astype(np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, and a folder of three files of samples of two lengths, labelled by the model."""
    folder = tmp_path_factory.mktemp("files")
    onnx.save(texts(), folder / "net.onnx")
    session = onnxruntime.InferenceSession(folder / "net.onnx")
    (folder / "data").mkdir()
    for name, (count, length) in COUNTS.items():
        x = RNG.normal(size=(count, length, 4)).astype(np.float32)
        np.savez(folder / "data" / f"{name}.npz", x=x, labels=session.run(None, {"x": x})[0].argmax(1))
    return folder


def run(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(commands, [str(argument) for argument in arguments])


def error_of(*arguments: object) -> str:
    """The one line that a command ends with."""
    result = run(*arguments)
    assert result.exit_code in (1, 2), result.output
    return result.stderr.splitlines()[-1]


def graph_of(place: Path) -> object:
    return ptqjax.read(place / "net.onnx").graph


def test_samples_of_one_size_come_together_and_labels_in_the_order_of_the_batches(place):
    graph, files = graph_of(place), [place / "data" / f"{name}.npz" for name in "abc"]
    parts = [part for (part,) in load_each(files, graph)]
    groups = grouped(parts)
    assert [group.inputs["x"].shape for group in groups] == [(7, 5, 4), (2, 7, 4)]
    np.testing.assert_array_equal(groups[0].inputs["x"], np.concatenate([parts[0].inputs["x"], parts[2].inputs["x"]]))
    np.testing.assert_array_equal(groups[0].labels, np.concatenate([parts[0].labels, parts[2].labels]))
    assert groups[1] is parts[1]
    batches = Batches(groups, graph, size=4)
    assert [batch["x"].shape for batch in batches] == [(4, 5, 4), (3, 5, 4), (2, 7, 4)]
    assert len(batches) == 3


def test_a_fixed_batch_size_has_to_divide_the_samples_of_each_size():
    graph = ptqjax.read(texts((2, "T", 4))).graph
    sizes = [
        Samples(inputs={"x": np.zeros((count, length, 4), np.float32)}, labels=None)
        for count, length in ((4, 5), (3, 7))
    ]
    with pytest.raises(DataError, match="does not divide the 3 of one size: 'x' 7x4"):
        Batches(sizes, graph, size=32)


def given(place: Path, way: str) -> list[object]:
    """The three files as an option names them."""
    if way == "files":
        return [each for name in COUNTS for each in ("--data", place / "data" / f"{name}.npz")]
    return ["--data", place / "data" / {"folder": "", "pattern": "?.npz"}[way]]


@pytest.fixture(scope="module")
def quantized(place) -> click.testing.Result:
    return run("quantize", place / "net.onnx", "--calibration", place / "data", "--out", place / "q", *FAST)


def test_a_model_is_quantized_on_samples_of_unlike_size(place, quantized):
    assert quantized.exit_code == 0, quantized.output
    source = json.loads((place / "q" / "report.json").read_text())["source"]
    assert source["num_samples"] == 9
    assert source["data"] == "a.npz, b.npz, c.npz"
    assert len(source["data_sha256"]) == 64


@pytest.mark.parametrize("way", ["files", "folder", "pattern"])
def test_a_folder_and_a_pattern_are_their_files_in_the_order_of_their_names(place, quantized, way):
    result = run(
        "evaluate", place / "q" / "model.onnx", *given(place, way), "--reference", place / "net.onnx", "--quiet"
    )
    assert result.exit_code == 0, result.output
    words = result.stdout.split()
    assert words[words.index("samples") + 1] == "9"
    assert "100.00" in words  # the reference has the labels that it gave: they go with their samples


def test_validation_takes_samples_of_unlike_size(place, quantized):
    result = run("validate", place / "q", "--data", place / "data", "--quiet", "--no-cache")
    assert result.exit_code == 0, result.output
    assert "9 samples" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros((2, 5, 3), np.float32), "labels": np.zeros(2, int)}, ["'x' has the shape 2x5x3", "?xTx4"]),
        ({"x": np.zeros((2, 5, 4)), "labels": np.zeros(2, int)}, ["float64", "astype('float32')"]),
        ({"x": np.full((2, 5, 4), np.nan, np.float32), "labels": np.zeros(2, int)}, ["nan"]),
        ({"x": np.zeros((2, 5, 4), np.float32)}, ["has no 'labels'", "a.npz' has", "or of none"]),
        ({"y": np.zeros((2, 5, 4), np.float32)}, ["has no array 'x'"]),
        (
            {"x": np.array([{}, Path()], object)},
            ["Python objects", "may run any code", "np.array([first, second, ...], dtype=object)"],
        ),
    ],
    ids=["shape", "type", "nan", "labels", "name", "objects"],
)
def test_an_error_names_the_file_of_many(place, tmp_path, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    files = ("--calibration", place / "data" / "a.npz", "--calibration", tmp_path / "bad.npz")
    line = error_of("quantize", place / "net.onnx", *files, "--out", tmp_path / "q", *FAST)
    assert [word for word in ("bad.npz'", *words) if word not in line] == [], line
    assert "batch 0" not in line
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["absent.npz"], "'absent.npz' cannot be opened"),
        (["data/*.npy"], "no data file fits 'data/*.npy'"),
        (["empty"], "data folder 'empty' has no .npz file"),
        (["none", "data/a.npz"], "--calibration none beside --calibration data/a.npz"),
        (["data/a.npz", "absent.npz"], "'absent.npz' cannot be opened"),
        ([""], "--calibration is given an empty name"),
    ],
)
def test_names_that_mean_no_file_are_errors(place, monkeypatch, names, words):
    monkeypatch.chdir(place)
    (place / "empty").mkdir(exist_ok=True)
    files = [each for name in names for each in ("--calibration", name)]
    assert words in error_of("quantize", "net.onnx", *files, "--out", "out", *FAST)
    assert not (place / "out").exists()


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(place, tmp_path):
    name = tmp_path / "data[1].npz"
    name.write_bytes((place / "data" / "a.npz").read_bytes())
    result = run("evaluate", place / "net.onnx", "--data", name, "--quiet")
    assert result.exit_code == 0, result.output


def test_a_file_that_is_named_twice_counts_once(place):
    file = place / "data" / "a.npz"
    result = run("evaluate", place / "net.onnx", "--data", file, "--data", place / "data", "--data", file, "--quiet")
    assert "9" in result.stdout.split()
