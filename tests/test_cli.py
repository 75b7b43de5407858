"""The command line: what it writes, what it says, and that every fault is one line with a cause and a remedy."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click.testing
import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import ptqjax
from ptqjax import report
from ptqjax.commands import cli
from ptqjax.commands.cli import commands

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
    return run("quantize", model, "--calibration", data, "--out", out, "--quiet")


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
    assert re.search(r"in ONNX Runtime (\d+) of \1 layers run in integers\na run takes ", quantized.stdout)
    execution = json.loads((place / "q" / "report.json").read_text())["execution"]
    assert execution["num_bytes"] == (place / "q" / "model.onnx").stat().st_size
    assert "layers run in integers" in (place / "q" / "report.html").read_text()


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


def test_inspect_says_for_a_target_which_grid_and_why(place):
    result = run("inspect", place / "net.onnx", "--target", "tensorrt")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "Target tensorrt: NVIDIA TensorRT" in words
    assert "int8 symmetric" in words
    assert "added in float by target 'tensorrt'" in words


def test_settings_of_a_file_count_and_options_win_over_them(place, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(
        'weights = "int4"\nactivations = "uint16"\n[[rules]]\noperators = ["Conv"]\nof = "weights"\ndtype = "int5"\n'
    )
    result = run("inspect", place / "net.onnx", "--config", file)
    assert result.exit_code == 0, result.output
    assert " int5 " in result.stdout
    assert " uint16 " in result.stdout
    options = ["--calibration", place / "data.npz", "--no-equalize", "--correct", "none", "--ranges", "min-max"]
    options += ["--effort", "fast"]
    out = tmp_path / "q"
    done = run("quantize", place / "net.onnx", "--out", out, "--config", file, "--activations", "uint8", *options)
    assert done.exit_code == 0, done.output
    settings = json.loads((out / "report.json").read_text())["settings"]
    assert (settings["weights"], settings["activations"], settings["equalize"]) == ("int4", "uint8", False)
    assert settings["effort"] == "fast"


def test_a_bad_file_of_settings_is_an_error_with_line_and_key(place, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('\nweigths = "int4"\n')
    result = run("inspect", place / "net.onnx", "--config", file)
    assert result.exit_code == 2
    assert "line 2: unknown key 'weigths'; near names: weights" in result.stderr


def test_a_file_of_aimet_is_read_and_what_means_nothing_is_said(place, tmp_path):
    file = tmp_path / "htp.json"
    file.write_text(
        json.dumps(
            {
                "defaults": {
                    "ops": {"is_output_quantized": "True"},
                    "params": {"is_quantized": "True", "is_symmetric": "True"},
                },
                "params": {},
                "op_type": {"Relu": {"encoding_constraints": {"min": 0.0}}},
                "supergroups": [{"op_list": ["Conv", "Relu"]}],
                "model_input": {"is_input_quantized": "True"},
                "model_output": {},
            }
        )
    )
    result = run("inspect", place / "net.onnx", "--config", file)
    assert result.exit_code == 0, result.output
    assert "Target aimet" in result.stdout
    assert "Note: htp.json: op_type.Relu.encoding_constraints" in result.stderr


def test_inspect_names_operators_without_lowering(place, tmp_path):
    onnx.save(network(last="RandomNormalLike"), tmp_path / "net.onnx")
    result = run("inspect", tmp_path / "net.onnx")
    assert result.exit_code == 0, result.output
    assert "no lowering" in result.stdout
    assert "ai.onnx RandomNormalLike 17 1 producing 'last'" in " ".join(result.stdout.split())


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
    onnx.save(network(last="RandomNormalLike"), tmp_path / "net.onnx")
    result = quantize(place, tmp_path / "q", model=tmp_path / "net.onnx")
    assert_fault(result, "RandomNormalLike", "'last'", "no lowering")
    assert not (tmp_path / "q").exists()


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
        ({"input": np.array([None])}, ["plain arrays", "Python objects"]),
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
        result = run(command, place / "q" / "model.onnx", "--data", tmp_path / "data.npz", "--quiet")
    assert_fault(result, *words)


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04half an archive"])
def test_data_that_is_no_archive(place, tmp_path, content):
    path = tmp_path / "data.npz"
    if content is not None:
        path.write_bytes(content)
    assert_fault(quantize(place, tmp_path / "q", data=path), "data.npz", ".npz")


def data_free(place, tmp_path, *options, model="bn.onnx"):
    return run("quantize", tmp_path / model, "--calibration", "none", "--out", tmp_path / "q", "--quiet", *options)


def test_quantizing_without_data_writes_all_files_and_says_that_nothing_was_measured(place, tmp_path):
    onnx.save(network(), tmp_path / "bn.onnx")
    result = data_free(place, tmp_path)
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "q").iterdir()} == FILES
    assert "nothing was measured" in result.stdout
    assert "After each stage" not in result.stdout
    found = json.loads((tmp_path / "q" / "report.json").read_text())
    assert found["settings"]["correct"] == "analytic"
    assert (found["source"]["num_samples"], found["stages"]) == (0, [])
    assert [record for record in found["records"] if record["transform"] == "correct_biases" and record["done"]]
    worth = run(
        "evaluate", tmp_path / "q" / "model.onnx", "--data", place / "data.npz", "--reference", tmp_path / "bn.onnx"
    )
    sqnr = float(worth.stdout.split("SQNR")[1].split()[-1])
    assert sqnr > 10, worth.stdout  # dB; random inputs of other statistics than those that the batch norm states


def test_without_data_and_batch_norms_the_error_names_tensors_and_the_way_out(place, tmp_path):
    model = network()
    norm = model.graph.node[1]
    model.graph.node[2].input[0] = "conv1"
    model.graph.node.remove(norm)
    onnx.save(model, tmp_path / "bn.onnx")
    assert_fault(data_free(place, tmp_path), "the graph input 'input'", "has no batch norms", "--calibration DATA.npz")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--correct", "empirical"), ("--correct empirical with --calibration none", "--correct analytic")),
        (("--scaling", "learned"), ("--scaling learned with --calibration none", "--scaling noise")),
        (("--rounding", "solved"), ("--rounding solved with --calibration none", "--rounding nearest")),
    ],
)
def test_what_needs_samples_is_refused_without_them_before_any_work(place, tmp_path, options, words):
    result = data_free(place, tmp_path, *options, model="absent.onnx")
    assert result.exit_code == 2
    assert [word for word in words if word not in result.stderr] == [], result.stderr
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(("option", "value"), [("scaling", "ranges"), ("bounds", "leave")])
def test_scaling_and_bounds_reach_the_settings(place, tmp_path, option, value):
    onnx.save(network(), tmp_path / "bn.onnx")
    assert data_free(place, tmp_path, f"--{option}", value).exit_code == 0
    assert json.loads((tmp_path / "q" / "report.json").read_text())["settings"][option] == value


@pytest.mark.parametrize(("option", "value"), [("--scaling", "noise"), ("--bounds", "leave")])
def test_scaling_without_equalization_is_refused_where_it_is_asked_for(place, tmp_path, option, value):
    arguments = ["quantize", place / "net.onnx", "--calibration", place / "data.npz", "--out", tmp_path / "q"]
    result = run(*arguments, "--no-equalize", option, value)
    assert result.exit_code == 2
    assert f"{option} {value} with --no-equalize" in result.stderr
    assert not (tmp_path / "q").exists()


def test_absorption_without_equalization_is_refused_where_it_is_asked_for(place, tmp_path):
    arguments = ["quantize", place / "net.onnx", "--calibration", place / "data.npz", "--out", tmp_path / "q"]
    result = run(*arguments, "--no-equalize", "--absorb", "exact")
    assert result.exit_code == 2
    assert "absorption is a part of equalization" in result.stderr
    assert not (tmp_path / "q").exists()
    assert run(*arguments, "--no-equalize").exit_code == 0
    assert run(*arguments, "--no-equalize", "--absorb", "off").exit_code == 0
    assert run("quantize", "--help").stdout.count("part of") == 2  # said at both options


def test_excluded_tensors_stay_in_float(place, tmp_path):
    arguments = ["quantize", place / "net.onnx", "--calibration", place / "data.npz", "--out", tmp_path / "q"]
    result = run(*arguments, "--exclude", "w2", "--exclude", "pool*")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "q" / "report.json").read_text())
    assert found["settings"]["exclude"] == ["w2", "pool*"]
    assert "w1" in found["encodings"]
    assert not {"w2", "pooled"} & set(found["encodings"])
    result = run(*arguments, "--exclude", "w3")
    assert result.exit_code == 2
    assert "'w3' matches none" in result.stderr


def test_the_table_says_what_it_is_and_where_to_go_on(place, quantized):
    assert "in ONNX Runtime, on the calibration samples" in quantized.stdout
    assert f"ptqjax evaluate {place / 'q' / 'model.onnx'} --data" in quantized.stdout


def test_the_table_begins_with_float_without_labels_too(place, tmp_path):
    np.savez(tmp_path / "data.npz", input=np.load(place / "data.npz")["input"])
    result = quantize(place, tmp_path / "q", data=tmp_path / "data.npz")
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert ["float", "exact", "100.0", "exact"] in rows
    assert "top-1" not in result.stdout


@pytest.mark.parametrize("command", ["quantize", "evaluate"])
def test_labels_that_are_no_class_indices(place, tmp_path, command):
    arrays = dict(np.load(place / "data.npz"))
    for labels, words in (
        (arrays["labels"][:, None], "reshape(-1)"),
        (np.eye(5)[arrays["labels"]], "argmax(1)"),
        (arrays["labels"].astype(str), "whole numbers"),
        (arrays["labels"] + 5, "0 to 4"),
    ):
        np.savez(tmp_path / "data.npz", input=arrays["input"], labels=labels)
        data = ["--calibration" if command == "quantize" else "--data", tmp_path / "data.npz"]
        more = ["--out", tmp_path / "q"] if command == "quantize" else []
        assert_fault(run(command, place / "net.onnx", *data, *more, "--quiet"), "data.npz': 'labels'", words)


def test_a_reference_that_does_not_fit_is_named(place, tmp_path):
    other = network()
    other.graph.input[0].name = other.graph.node[0].input[0] = "image"
    onnx.save(other, tmp_path / "other.onnx")
    data = ["--data", place / "data.npz"]
    result = run("evaluate", place / "net.onnx", *data, "--reference", tmp_path / "other.onnx", "--quiet")
    assert_fault(result, "the reference '", "other.onnx'", "'image'")


@pytest.mark.parametrize("fault", [RuntimeError("nobody\nforesaw this"), OSError(28, "No space left"), KeyError()])
def test_what_nobody_foresaw_is_one_line(place, tmp_path, monkeypatch, fault):
    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(ptqjax, "quantize", fail)
    result = quantize(place, tmp_path / "q")
    assert_fault(result, f"internal error: {type(fault).__name__}", "please report it", "PTQJAX_DEBUG=1")
    assert "--out" not in result.stderr
    assert not (tmp_path / "q").exists()
    monkeypatch.setenv("PTQJAX_DEBUG", "1")
    result = quantize(place, tmp_path / "q")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_an_output_place_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_fault(quantize(place, tmp_path / "file"), "--out", "file")
    assert_fault(quantize(place, tmp_path / "file" / "below"), "--out")
    assert (tmp_path / "file").read_text() == "in the way"


FAST = ("--quiet", "--scaling", "off", "--correct", "none", "--report")


def quantize_fast(place: Path, out: Path, details: str = "short") -> click.testing.Result:
    return run("quantize", place / "net.onnx", "--calibration", place / "data.npz", "--out", out, *FAST, details)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_leaves_nothing_new_and_nothing_damaged(place, tmp_path, monkeypatch, fault):
    for name in FILES:
        (tmp_path / name).write_text("earlier")

    def interrupt(*_, **__):
        raise fault

    monkeypatch.setattr(ptqjax, "export", interrupt)
    assert quantize_fast(place, tmp_path).exit_code != 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(FILES, "earlier")


@pytest.mark.parametrize(
    "expected",
    [
        (KeyboardInterrupt, 130, "Interrupted: "),
        (MemoryError, 1, "internal error: MemoryError"),
        (ptqjax.DataError("no such"), 1, "Error: no such; "),
    ],
)
def test_a_report_that_fails_leaves_the_model_and_no_report_of_an_earlier_one(place, tmp_path, monkeypatch, expected):
    fault, code, words = expected
    for name in FILES:
        (tmp_path / name).write_text("earlier")

    def interrupt(_):
        raise fault

    monkeypatch.setattr(report, "to_json", interrupt)
    result = quantize_fast(place, tmp_path)
    assert result.exit_code == code
    assert [word for word in (words, "model.onnx' is whole", "report is missing") if word not in result.stderr] == []
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.encodings"}
    onnx.checker.check_model(tmp_path / "model.onnx")
    assert json.loads((tmp_path / "model.encodings").read_text())


def test_what_the_time_went_into_is_told_and_in_the_report(place, quantized):
    assert quantized.stderr.startswith(f"reading {place / 'net.onnx'} and {place / 'data.npz'}\n")
    seconds = json.loads((place / "q" / "report.json").read_text())["seconds"]
    stages = [each["stage"] for each in seconds]
    assert stages == ["start", "read", "fold", "equalize", "calibrate", "correct", "export", "report"]
    assert all(0 <= each["compiling_seconds"] <= each["seconds"] + 0.001 for each in seconds)
    assert sum(each["num_compiled"] + each["num_found"] for each in seconds) > 10
    assert "Where the time went" in (place / "q" / "report.html").read_text()
    assert " s of it tracing and compiling " in quantized.stdout.splitlines()[-1]


def test_two_runs_differ_in_nothing_but_the_time(place, tmp_path):
    found = []
    for name in "ab":
        said = quantize_fast(place, tmp_path / name).stderr
        assert all(line.startswith("Warning: the file is ") for line in said.splitlines())
        facts = json.loads((tmp_path / name / "report.json").read_text())
        timeless = {key: facts["execution"][key] for key in ("layers", "kernels", "num_bytes", "float_num_bytes")}
        found.append({key: value for key, value in facts.items() if key != "seconds"} | {"execution": timeless})
    assert found[0] == found[1]
    assert len({(tmp_path / name / "model.onnx").read_bytes() for name in "ab"}) == 1


@pytest.mark.parametrize("given", [None, "0"])
def test_the_command_line_shows_no_alarms_of_xla_unless_asked(monkeypatch, given):
    name = "TF_CPP_MIN_LOG_LEVEL"
    monkeypatch.setenv(name, "to be restored")
    monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv(name, given)
    seen = []
    monkeypatch.setattr(cli, "commands", lambda: seen.append(os.environ[name]))
    cli.main()
    assert seen == [given or "3"]


def test_without_a_report_nothing_is_measured_and_an_earlier_one_gets_another_name(place, tmp_path, monkeypatch):
    monkeypatch.setattr(ptqjax, "explain", None)  # not reached
    (tmp_path / "report.html").write_text("earlier")
    (tmp_path / "mine").write_text("mine")
    result = quantize_fast(place, tmp_path, "none")
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {
        *("model.onnx", "model.encodings", "earlier-report.html", "mine")
    }
    assert (tmp_path / "earlier-report.html").read_text() == "earlier"
    assert "no report" in result.stdout
    assert "earlier-report.html now" in result.stdout
    assert "After each stage" not in result.stdout


def test_a_report_is_not_put_beside_the_model_of_another_run(place, tmp_path, monkeypatch):
    explain = ptqjax.explain

    def explained(*arguments, **settings):
        other = tmp_path / "other"
        other.write_text("another run's")
        other.replace(tmp_path / "model.onnx")
        return explain(*arguments, **settings | {"file": None})

    monkeypatch.setattr(ptqjax, "explain", explained)
    assert_fault(quantize_fast(place, tmp_path), "another has replaced it", "a DIR of its own")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.encodings"}


def test_a_folder_in_the_way_of_a_file_stops_the_run_before_it_begins(place, tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_text("earlier")
    (tmp_path / "report.html").mkdir()
    monkeypatch.setattr(ptqjax, "quantize", None)  # not reached
    assert_fault(quantize(place, tmp_path), "report.html' is a folder", "move it")
    assert (tmp_path / "model.onnx").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "report.html"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no-such-option"], "No such option"),
        (["--weights", "int1"], "int8"),
        (["--granularity", "blocks"], "block:N"),
        (["--ranges", "snqr"], "sqnr"),
        (["--target", "ort-gpu"], "ort-cpu"),
        (["--effort", "throrough"], "near names: thorough"),
        (["--device", "tpu"], "cuda"),
        (["--seed", "x"], "--seed"),
    ],
)
def test_usage_is_exit_code_two_and_names_what_is_allowed(place, tmp_path, options, words):
    result = run("quantize", place / "net.onnx", "--calibration", place / "data.npz", "--out", tmp_path, *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "words"), [("evaluate", "this onnxruntime has no CUDA"), ("validate", "JAX sees no NVIDIA GPU")]
)
def test_a_gpu_that_is_not_there_is_said_so_by_what_would_compute(place, quantized, monkeypatch, command, words):
    monkeypatch.setattr(jax, "devices", no_gpu)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    result = run(command, place / "q" / "model.onnx", "--data", place / "data.npz", "--device", "cuda")
    assert result.exit_code == 2
    assert words in result.stderr
    assert "ptqjax[cuda12]" in result.stderr


def no_gpu(platform=None):
    raise RuntimeError(platform)


def test_validation_on_a_gpu_asks_the_runtime_too(place, quantized, monkeypatch):
    monkeypatch.setattr(cli, "use_device", lambda device: device)  # JAX has one
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    result = run("validate", place / "q" / "model.onnx", "--data", place / "data.npz", "--device", "cuda")
    assert result.exit_code == 2
    assert "this onnxruntime has no CUDA" in result.stderr


@pytest.mark.parametrize("command", ["", "quantize", "evaluate", "inspect", "validate"])
def test_help_teaches_by_example(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"ptqjax {command or 'quantize'} " in result.stdout.partition("Usage:")[2].partition("\n")[2]


def test_help_does_not_wait_for_jax():
    code = (
        "import sys; from ptqjax.commands.cli import commands; commands(['--help'], standalone_mode=False);"
        "print(sorted({'jax', 'onnx', 'onnxruntime', 'click'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert found.splitlines()[-1] == "['click']"


WRONG = """
import sys, click.testing
from ptqjax.commands.cli import commands
folder = sys.argv[1]
model, data, out = f"{folder}/net.onnx", f"{folder}/data.npz", f"{folder}/new"
quantize = ["quantize", model, "--calibration", data, "--out", out]
recipe = f"{folder}/recipe.toml"
for arguments in (
    ["quantize", "absent.onnx", "--calibration", data, "--out", out],
    ["quantize", folder, "--calibration", data, "--out", out],
    ["quantize", model, "--calibration", "absent.npz", "--out", out],
    ["quantize", model, "--calibration", data, "--out", f"{model}/below"],
    [*quantize, "--encodings", "absent.encodings"],
    [*quantize, "--config", "absent.toml"],
    [*quantize, "--target", "nowhere"],
    *([*quantize, f"--{option}", "nonsense"] for option in (
        "weights", "activations", "granularity", "ranges", "absorb", "scaling", "bounds", "correct", "effort",
        "rounding", "device", "report", "seed")),
    ["evaluate", "absent.onnx", "--data", data],
    ["evaluate", model, "--data", "absent.npz"],
    ["evaluate", model, "--data", data, "--reference", "absent.onnx"],
    ["validate", folder, "--data", data],
    ["validate", model, "--data", "absent.npz"],
    ["inspect", "absent.onnx"],
    ["inspect", model, "--target", "nowhere"],
    ["run", "absent.toml"],
    ["run", recipe],
    ["replay", folder],
):
    found = click.testing.CliRunner().invoke(commands, arguments)
    slow = {"jax", "onnx", "onnxruntime", "scipy"} & set(sys.modules)
    assert found.exit_code in (1, 2) and not slow, (arguments, found.output, slow)
    print(found.output.splitlines()[-1])
"""


def test_what_is_wrong_with_names_and_options_is_told_without_waiting_for_jax(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"a file")
    (tmp_path / "data.npz").write_bytes(b"a file")
    (tmp_path / "recipe.toml").write_text('model = "absent.onnx"\n[data]\ncalibration = "data.npz"\n')
    found = subprocess.run(
        [sys.executable, "-c", WRONG, tmp_path], check=False, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"net.onnx", "data.npz", "recipe.toml"}
    lines = found.stdout.splitlines()
    assert [line for line in lines if not line.startswith("Error: ") or "internal" in line] == []
    assert lines[0] == (
        "Error: 'absent.onnx' cannot be opened: No such file or directory; expected the path of an ONNX file"
    )


def test_all_that_quantize_needs_is_imported_without_what_it_may_not_need():
    """Measured: 1.6 times the processor time of `import jax`; with Flax, optax and scipy it was 2.7 times."""
    code = (
        "import sys, ptqjax, ptqjax.data, ptqjax.report.tables;"
        "[getattr(ptqjax, name) for name in ('read', 'quantize', 'export', 'explain')];"
        "print(sorted({'jax', 'flax', 'optax', 'absl', 'scipy', 'matplotlib', 'torch', 'PIL'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert found == "['jax']\n"


def test_errors_of_the_package_are_one_family():
    assert issubclass(ptqjax.DataError, ptqjax.PtqjaxError)
