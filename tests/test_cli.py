"""The command line: what it writes, what it says, and that every fault is one line with a cause and a remedy."""

import json
import subprocess
import sys
from pathlib import Path

import click.testing
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import ptqjax
from ptqjax import report
from ptqjax.cli import commands

FILES = {"model.onnx", "model.encodings", "report.json", "report.html"}


def tensor(name: str, value: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(value.astype(np.float32), name)


def network(*, last: str = "Relu") -> onnx.ModelProto:
    """Conv, batch norm, ReLU6, pool and dense layer: channels so uneven that a grid for all of them loses most."""
    rng = np.random.default_rng(0)
    size = 10.0 ** np.linspace(-2, 1, 8)
    nodes = [
        helper.make_node("Conv", ["input", "w1"], ["conv1"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["conv1", "gamma", "beta", "mean", "var"], ["norm1"]),
        helper.make_node("Clip", ["norm1", "zero", "six"], ["clip1"]),
        helper.make_node("Conv", ["clip1", "w2"], ["conv2"], kernel_shape=[1, 1]),
        helper.make_node(last, ["conv2"], ["last"]),
        helper.make_node("GlobalAveragePool", ["last"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["output"]),
    ]
    weights = {
        "w1": rng.normal(size=(8, 3, 3, 3)),
        "gamma": size,
        "beta": size * rng.normal(size=8),
        "mean": rng.normal(size=8),
        "var": rng.uniform(1, 3, size=8),
        "zero": np.zeros(()),
        "six": np.full((), 6.0),
        "w2": rng.normal(size=(5, 8, 1, 1)) / size.reshape(1, 8, 1, 1),
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 6, 6])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 5])],
        [tensor(name, value) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(commands, [str(argument) for argument in arguments])


def assert_fault(result: click.testing.Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    assert [word for word in words if word not in result.stderr] == [], result.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and samples, labelled by the model itself."""
    folder = tmp_path_factory.mktemp("cli")
    onnx.save(network(), folder / "net.onnx")
    samples = np.random.default_rng(1).normal(size=(40, 3, 6, 6)).astype(np.float32)
    logits = onnxruntime.InferenceSession(folder / "net.onnx").run(None, {"input": samples})[0]
    np.savez(folder / "data.npz", input=samples, labels=logits.argmax(1))
    return folder


@pytest.fixture(scope="module")
def quantized(place) -> click.testing.Result:
    """The result of one run with default settings, in `place / "q"`."""
    return run("quantize", place / "net.onnx", "--calibration", place / "data.npz", "--out", place / "q")


def quantize(place: Path, out: Path, **changed: Path) -> click.testing.Result:
    model, data = changed.get("model", place / "net.onnx"), changed.get("data", place / "data.npz")
    return run("quantize", model, "--calibration", data, "--out", out)


def test_quantize_writes_four_files_and_says_what_each_stage_kept(place, quantized):
    assert quantized.exit_code == 0, quantized.output
    assert {path.name for path in (place / "q").iterdir()} == FILES
    rows = [line.split()[0] for line in quantized.stdout.splitlines() if line.strip()]
    assert [row for row in rows if row in ("float", "fold", "equalize", "correct")] == [
        "float",
        "fold",
        "equalize",
        "correct",
    ]
    assert "top-1" in quantized.stdout


def test_quantized_file_runs_and_says_where_it_comes_from(place, quantized):
    session = onnxruntime.InferenceSession(place / "q" / "model.onnx")
    assert session.run(None, {"input": np.zeros((2, 3, 6, 6), np.float32)})[0].shape == (2, 5)
    settings = json.loads(session.get_modelmeta().custom_metadata_map["ptqjax.settings"])
    assert settings["granularity"] == "channel"


def test_report_holds_settings_records_stages_and_grids(place, quantized):
    found = json.loads((place / "q" / "report.json").read_text())
    assert found["settings"]["weights"] == "int8"
    assert found["source"]["num_samples"] == 40
    assert [stage["stage"] for stage in found["stages"]] == ["float", "fold", "equalize", "correct"]
    assert found["stages"][1]["metrics"]["float_sqnr_db"] > 100  # float32 rounding alone: 130 dB and more
    assert found["encodings"]["input"]["dtype"] == "uint8"
    assert {"fold_batch_norms", "scale_channels"} <= {record["transform"] for record in found["records"]}


def test_evaluate_counts_agreement_with_the_reference(place, quantized):
    result = run("evaluate", place / "net.onnx", "--data", place / "data.npz", "--reference", place / "net.onnx")
    assert result.exit_code == 0, result.output
    figures = [line.split()[-1] for line in result.stdout.splitlines()[1:] if line.strip()]
    assert figures == ["40", "100.00", "100.00", "100.00", "inf"]


@pytest.mark.parametrize("name", ["q", "q/model.onnx"])
def test_validate_takes_a_folder_or_a_file_and_counts_steps(place, quantized, name):
    result = run("validate", place / name, "--data", place / "data.npz")
    assert result.exit_code == 0, result.output
    assert "QLinearConv" in result.stdout
    largest = int(result.stdout.rpartition("largest difference in a group: ")[2].split()[0])
    assert largest <= 1


def test_inspect_shows_operators_transforms_and_grids(place):
    result = run("inspect", place / "net.onnx")
    assert result.exit_code == 0, result.output
    for words in ("N x 3 x 6 x 6", "GlobalAveragePool", "fold_batch_norms", "weight of Conv", "inside Conv"):
        assert words in result.stdout


def test_inspect_names_operators_without_lowering(place, tmp_path):
    onnx.save(network(last="Det"), tmp_path / "net.onnx")
    assert "no lowering" in run("inspect", tmp_path / "net.onnx").stdout


def test_inspect_of_a_quantized_model_says_why_it_cannot_be_quantized(place, quantized):
    result = run("inspect", place / "q" / "model.onnx")
    assert result.exit_code == 0
    assert "quantized already" in result.stdout


def test_a_file_that_is_not_onnx(place, tmp_path):
    (tmp_path / "net.onnx").write_text("not a model")
    assert_fault(quantize(place, tmp_path / "q", model=tmp_path / "net.onnx"), "net.onnx")
    assert not (tmp_path / "q").exists()


def test_a_truncated_file(place, tmp_path):
    data = (place / "net.onnx").read_bytes()
    (tmp_path / "net.onnx").write_bytes(data[: len(data) // 2])
    assert_fault(quantize(place, tmp_path / "q", model=tmp_path / "net.onnx"), "net.onnx", "truncated")


def test_a_model_that_is_missing(place, tmp_path):
    assert_fault(quantize(place, tmp_path / "q", model=tmp_path / "absent.onnx"), "absent.onnx")


def test_missing_external_data(place, tmp_path):
    onnx.save(network(), tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    (tmp_path / "net.data").unlink()
    assert_fault(quantize(place, tmp_path / "q", model=tmp_path / "net.onnx"), "net.onnx", "net.data")


def test_an_operator_without_lowering(place, tmp_path):
    onnx.save(network(last="Det"), tmp_path / "net.onnx")
    result = quantize(place, tmp_path / "q", model=tmp_path / "net.onnx")
    assert_fault(result, "Det", "'last'", "no lowering")
    assert not list((tmp_path / "q").iterdir())


def test_a_model_that_is_quantized_already(place, quantized, tmp_path):
    assert_fault(quantize(place, tmp_path / "q", model=place / "q" / "model.onnx"), "quantized")


@pytest.mark.parametrize(
    "case",
    [
        ({"inputs": np.zeros((4, 3, 6, 6), np.float32)}, ["'input'", "did you mean 'inputs'"]),
        ({"input": np.zeros((4, 3, 6, 6), np.float32), "x": np.zeros(4)}, ["'x'", "no input of the model"]),
        ({"input": np.zeros((4, 3, 5, 6), np.float32)}, ["4x3x5x6", "Nx3x6x6"]),
        ({"input": np.zeros((4, 3, 6, 6))}, ["float64", "astype('float32')"]),
        ({"input": np.zeros((0, 3, 6, 6), np.float32)}, ["no samples"]),
        ({"input": np.full((4, 3, 6, 6), np.nan, np.float32)}, ["nan", "'input'"]),
        (
            {"input": np.zeros((4, 3, 6, 6), np.float32), "labels": np.zeros(3, int)},
            ["different numbers", "'labels' 3"],
        ),
        ({"input": np.array([None])}, ["plain arrays"]),
    ],
    ids=["name", "surplus", "shape", "dtype", "empty", "nan", "labels", "pickle"],
)
@pytest.mark.parametrize("command", ["quantize", "evaluate", "validate"])
def test_data_that_does_not_fit(place, quantized, tmp_path, case, command):
    arrays, words = case
    np.savez(tmp_path / "data.npz", **arrays)
    if command == "quantize":
        result = quantize(place, tmp_path / "q", data=tmp_path / "data.npz")
        assert not [path for path in tmp_path.rglob("*") if path.name in FILES]
    else:
        result = run(command, place / "q" / "model.onnx", "--data", tmp_path / "data.npz")
    assert_fault(result, *words)


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04half an archive"])
def test_data_that_is_no_archive(place, tmp_path, content):
    path = tmp_path / "data.npz"
    if content is not None:
        path.write_bytes(content)
    assert_fault(quantize(place, tmp_path / "q", data=path), "data.npz", ".npz")


def test_calibration_without_data_says_what_is_missing(place, tmp_path):
    result = run("quantize", place / "net.onnx", "--calibration", "none", "--out", tmp_path / "q")
    assert_fault(result, "statistics")


def test_an_output_place_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_fault(quantize(place, tmp_path / "file"), "--out", "file")
    assert_fault(quantize(place, tmp_path / "file" / "below"), "--out")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_leaves_nothing_new_and_nothing_damaged(place, quantized, tmp_path, monkeypatch, fault):
    earlier = (place / "q" / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(earlier)

    def interrupt(_):
        raise fault

    monkeypatch.setattr(report, "to_json", interrupt)  # after the model was written
    assert quantize(place, tmp_path).exit_code != 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == earlier


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no-such-option"], "No such option"),
        (["--weights", "int7"], "int8"),
        (["--granularity", "blocks"], "block:N"),
        (["--ranges", "snqr"], "sqnr"),
        (["--target", "ort-gpu"], "ort-cpu"),
        (["--device", "tpu"], "cuda"),
        (["--seed", "x"], "--seed"),
    ],
)
def test_usage_is_exit_code_two_and_names_what_is_allowed(place, tmp_path, options, words):
    result = run("quantize", place / "net.onnx", "--calibration", place / "data.npz", "--out", tmp_path, *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_said_so(place):
    result = run("evaluate", place / "net.onnx", "--data", place / "data.npz", "--device", "cuda")
    assert result.exit_code == 2
    assert "ptqjax[cuda12]" in result.stderr


@pytest.mark.parametrize("command", ["", "quantize", "evaluate", "inspect", "validate"])
def test_help_teaches_by_example(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"ptqjax {command or 'quantize'} " in result.stdout.partition("Usage:")[2].partition("\n")[2]


def test_help_does_not_wait_for_jax():
    code = (
        "import sys; from ptqjax.cli import commands; commands(['--help'], standalone_mode=False);"
        "print(sorted({'jax', 'onnx', 'onnxruntime', 'click'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert found.splitlines()[-1] == "['click']"


def test_errors_of_the_package_are_one_family():
    assert issubclass(ptqjax.DataError, ptqjax.PtqjaxError)
