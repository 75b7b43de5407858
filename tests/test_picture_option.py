"""Folders and lists of pictures on the command line: which pictures, as what arrays, and with which labels."""

import json
from pathlib import Path

import click.testing
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import ptqjax
from ptqjax.commands.cli import commands
from ptqjax.commands.data import data_files, load
from ptqjax.data import pictures as images
from ptqjax.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
FAST = ("--quiet", "--no-cache", "--scaling", "off", "--correct", "none", "--report", "short")
CLASSES = ("cat", "dog", "owl")


def classifier(shape: tuple = ("N", 3, 8, 8), dtype: int = TensorProto.FLOAT, classes: int = 3) -> onnx.ModelProto:
    """A convolution and a mean, of pictures with their channels first or last."""
    channels_first = [helper.make_node("Transpose", ["f"], ["p"], perm=[0, 3, 1, 2])]
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        *(channels_first if shape[-1] == 3 else [helper.make_node("Identity", ["f"], ["p"])]),
        helper.make_node("Conv", ["p", "w"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], classes])],
        [numpy_helper.from_array(RNG.normal(size=(classes, 3, 3, 3)).astype(np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, and pictures in folders of classes, in one folder, and in a list."""
    folder = tmp_path_factory.mktemp("pictures")
    onnx.save(classifier(), folder / "net.onnx")
    (folder / "flat").mkdir()
    lines = []
    for label, name in enumerate(CLASSES):
        (folder / "classes" / name).mkdir(parents=True)
        for index in range(2):
            picture = Image.fromarray(RNG.integers(0, 256, (10, 12, 3), dtype=np.uint8))
            picture.save(folder / "classes" / name / f"{index}.png")
            picture.save(folder / "flat" / f"{name}{index}.png")
            lines.append(f"flat/{name}{index}.png\t{label}")
    (folder / "list.tsv").write_text("\n".join(lines))
    return folder


def loaded(place: Path, name: str, preprocessing: str, model: onnx.ModelProto | None = None) -> tuple:
    graph = ptqjax.read(model or classifier()).graph
    labels, batches = load(data_files([str(place / name)], "--data", preprocessing), graph)
    return labels, np.concatenate([batch["x"] for batch in batches])


@pytest.mark.parametrize("name", ["classes", "flat", "list.tsv"])
def test_a_folder_and_a_list_hold_the_same_pictures_and_labels_where_they_are_known(place: Path, name: str) -> None:
    labels, x = loaded(place, name, "tf")
    paths = [place / "classes" / each / f"{index}.png" for each in CLASSES for index in range(2)]
    decoded = np.stack([images.decode(path, crop=8, short_side=9) for path in paths])  # 256/224 of 8
    np.testing.assert_array_equal(x, images.to_symmetric(decoded.astype(np.float32)).transpose(0, 3, 1, 2))
    assert (labels is None) if name == "flat" else labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_folder_with_val_is_that(place: Path, tmp_path: Path) -> None:
    (tmp_path / "val").symlink_to(place / "classes")
    np.testing.assert_array_equal(loaded(tmp_path, ".", "unit")[1], loaded(place, "classes", "unit")[1])


LAYOUTS = {
    "last": (classifier(("N", 8, 8, 3)), "unit", np.float32, (8, 8, 3)),
    "bytes": (classifier(("N", 8, 8, 3), TensorProto.UINT8), "none", np.uint8, (8, 8, 3)),
    "free": (classifier(("N", 3, "H", "W")), "torch:6/9", np.float32, (3, 6, 6)),
    "not square": (classifier(("N", 3, 6, 10)), "caffe", np.float32, (3, 6, 10)),
}


@pytest.mark.parametrize(("model", "preprocessing", "dtype", "shape"), LAYOUTS.values(), ids=LAYOUTS)
def test_pictures_come_as_the_model_takes_them(place, model, preprocessing: str, dtype: type, shape: tuple) -> None:
    _, x = loaded(place, "flat", preprocessing, model)
    assert (x.dtype, x.shape) == (dtype, (6, *shape))


def test_channels_last_are_the_same_values(place: Path) -> None:
    first, last = loaded(place, "flat", "torch")[1], loaded(place, "flat", "torch", classifier(("N", 8, 8, 3)))[1]
    np.testing.assert_array_equal(first, last.transpose(0, 3, 1, 2))


def test_labels_by_folders_are_left_out_where_the_model_has_other_classes(place: Path, capsys) -> None:
    labels, _ = loaded(place, "classes", "unit", classifier(classes=5))
    assert labels is None
    assert "3 folders of classes and the model 5 classes" in capsys.readouterr().err


WRONG = {
    "nothing said": ("flat", None, ConfigError, r"holds pictures; say what the network expects.*--preprocessing torch"),
    "a list": ("list.tsv", None, ConfigError, "is a list of pictures; say what the network expects"),
    "unknown": ("flat", "keras", ConfigError, r"--preprocessing keras: expected torch \(torchvision's"),
    "sizes": ("flat", "torch:9/8", ConfigError, "the shorter side before, no smaller"),
    "no number": ("flat", "torch:/", ConfigError, "expected torch"),
    "arrays": ("data.npz", "torch", ConfigError, "is for a folder or a list of pictures, and --data names none"),
    "empty": ("empty", "torch", ConfigError, "names none"),
    "neither": ("empty", None, DataError, "has no .npz file and no picture"),
}


@pytest.mark.parametrize(("name", "preprocessing", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_with_what_to_give(place, name: str, preprocessing, error: type, message: str) -> None:
    (place / "empty").mkdir(exist_ok=True)
    with pytest.raises(error, match=message):
        data_files([str(place / name)], "--data", preprocessing)


UNFIT = {
    "grey": (classifier(("N", 1, 8, 8)), "unit", "'x' Nx1x8x8; expected one input of pictures in color"),
    "a crop": (classifier(), "unit:6", "asks for a crop of 6, and the model takes 8x8"),
    "bytes": (classifier(("N", 8, 8, 3), TensorProto.UINT8), "unit", "'x' is of uint8; pictures come as float32"),
    "batch": (classifier((4, 3, 8, 8)), "unit", "exactly 4 samples at a time.*6 pictures.*leave 2 out"),
}


@pytest.mark.parametrize(("model", "preprocessing", "message"), UNFIT.values(), ids=UNFIT)
def test_a_model_that_takes_no_such_pictures_is_an_error(place, model, preprocessing: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        loaded(place, "flat", preprocessing, model)


def run(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(commands, [str(argument) for argument in arguments])


def test_quantize_and_evaluate_take_folders_and_lists(place: Path, tmp_path: Path) -> None:
    told = ("--preprocessing", "torch")
    net = place / "net.onnx"
    found = run("quantize", net, "--calibration", place / "classes", *told, "--out", tmp_path, *FAST)
    assert found.exit_code == 0, found.output
    source = json.loads((tmp_path / "report.json").read_text())["source"]
    assert (source["num_samples"], len(source["data_sha256"])) == (6, 64)
    found = run("evaluate", tmp_path / "model.onnx", "--data", place / "list.tsv", *told, "--reference", net, "--quiet")
    assert found.exit_code == 0, found.output
    assert "top-1" in found.stdout
