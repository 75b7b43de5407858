"""Runs of recipes: the bytes of `ptqjax quantize`, the same again anywhere, whatever a run was stopped by."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click.testing
import numpy as np
import onnx
import onnxruntime
import pytest

import ptqjax
from ptqjax.cli import commands
from ptqjax.errors import ConfigError, DataError
from ptqjax.experiments.run import Run
from ptqjax.experiments.stages import STAGES
from tests.test_cli import network

PTQJAX = [sys.executable, "-c", "from ptqjax.cli import main; main()"]
RECIPE = """\
model = "net.onnx"
seed = 0
report = "short"
device = "cpu"
[data]
calibration = "data.npz"
evaluation = "data.npz"
batch = 32
[transforms]
scaling = "weights"
correct = "empirical"
[config]
ranges = "min-max"
"""
FLAGS = [
    "--ranges",
    "min-max",
    "--scaling",
    "weights",
    "--correct",
    "empirical",
    "--device",
    "cpu",
    "--report",
    "short",
]


def digests(folder: Path) -> dict[str, str]:
    """The hash of every file of the stages, by its path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in STAGES
        for path in sorted((folder / name).rglob("*"))
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, samples that it labels itself, and a recipe."""
    folder = tmp_path_factory.mktemp("recipe")
    onnx.save(network(), folder / "net.onnx")
    samples = np.random.default_rng(1).normal(size=(64, 3, 6, 6)).astype(np.float32)
    logits = onnxruntime.InferenceSession(folder / "net.onnx").run(None, {"input": samples})[0]
    np.savez(folder / "data.npz", input=samples, labels=logits.argmax(1))
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def done(place) -> Run:
    """One undisturbed run."""
    return ptqjax.run_recipe(place / "recipe.toml", place / "runs")


@pytest.fixture
def copied(done, tmp_path) -> Path:
    """A copy of that run's folder, to damage."""
    return Path(shutil.copytree(done.folder, tmp_path / "runs" / done.folder.name))


def again(place: Path, out: Path) -> Run:
    return ptqjax.run_recipe(place / "recipe.toml", out)


def new(run: Run) -> list[str]:
    return [stage.name for stage in run.stages if stage.is_new]


def changed(place: Path, tmp_path: Path, old: str, new: str) -> Path:
    """The recipe with one text in place of another, under paths that hold elsewhere."""
    assert old in RECIPE
    text = RECIPE.replace(old, new, 1)
    for name in ("net.onnx", "data.npz"):
        text = text.replace(f'"{name}"', f'"{place / name}"')
    path = tmp_path / "changed.toml"
    path.write_text(text)
    return path


def test_a_run_has_every_stage_and_measures(done):
    assert new(done) == list(STAGES)
    assert {"export/model.onnx", "export/model.encodings", "evaluate/metrics.json"} <= digests(done.folder).keys()
    assert done.metrics["num_samples"] == 64
    assert 0.5 < done.metrics["top1"] <= 1
    assert done.metrics == json.loads((done.folder / "evaluate" / "metrics.json").read_text())


def test_the_exported_files_are_those_of_quantize_byte_for_byte(place, done, tmp_path):
    result = click.testing.CliRunner().invoke(
        commands,
        ["quantize", str(place / "net.onnx"), "--calibration", str(place / "data.npz"), "--out", str(tmp_path), *FLAGS],
    )
    assert result.exit_code == 0, result.output
    for name in ("model.onnx", "model.encodings"):
        assert (tmp_path / name).read_bytes() == (done.folder / "export" / name).read_bytes()


def test_what_is_there_is_not_computed_again(place, done, copied):
    run = again(place, copied.parent)
    assert new(run) == []
    assert run.folder == copied
    assert run.metrics == done.metrics


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_from_any_stage_to_the_same_bytes(place, done, copied, stage):
    later = list(STAGES)[list(STAGES).index(stage) :]
    for name in later:
        shutil.rmtree(copied / name)
    assert new(again(place, copied.parent)) == later
    assert digests(copied) == digests(done.folder)


@pytest.mark.parametrize("name", ["fold/float.onnx", "equalize/choice.json", "correct/encodings.safetensors"])
def test_a_damaged_file_is_found_said_and_computed_again(place, done, copied, name):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(bytes(content))
    run = again(place, copied.parent)
    stage, file = name.split("/")
    assert new(run) == [stage]  # the same bytes came out: what was made from them stands
    assert next(each.note for each in run.stages if each.is_new) == f"'{file}' is damaged"
    assert digests(copied) == digests(done.folder)


def test_the_address_is_of_contents_and_not_of_places(place, done, tmp_path):
    shutil.copy(place / "net.onnx", tmp_path / "other-name.onnx")
    np.savez_compressed(tmp_path / "data.npz", **np.load(place / "data.npz"))
    text = RECIPE.replace("net.onnx", "other-name.onnx") + "# another comment\n"
    (tmp_path / "recipe.toml").write_text(text)
    run = again(tmp_path, tmp_path / "runs")
    assert run.folder.name == done.folder.name
    assert digests(run.folder) == digests(done.folder)


@pytest.mark.parametrize(
    ("old", "new"), [("seed = 0", "seed = 1"), ("batch = 32", "batch = 16"), ('"weights"', '"off"')]
)
def test_another_setting_is_another_address(place, done, tmp_path, old, new):
    assert ptqjax.run_recipe(changed(place, tmp_path, old, new), tmp_path).folder.name != done.folder.name


def test_other_data_are_another_address(place, done, tmp_path):
    arrays = dict(np.load(place / "data.npz"))
    arrays["input"][0, 0, 0, 0] += 1
    np.savez(tmp_path / "data.npz", **arrays)
    shutil.copy(place / "net.onnx", tmp_path)
    shutil.copy(place / "recipe.toml", tmp_path)
    assert again(tmp_path, tmp_path).folder.name != done.folder.name


def test_a_replay_of_an_undisturbed_run_is_the_same(done):
    found = ptqjax.replay(done.folder)
    assert found.is_same
    assert [stage.name for stage in found.stages] == list(STAGES)
    assert found.reasons == ()


def test_a_replay_names_the_first_stage_that_differs_and_why(place, done, tmp_path):
    found = ptqjax.replay(done.folder, recipe=changed(place, tmp_path, "seed = 0", 'seed = 0\nmetrics = ["top1"]'))
    assert found.first is not None
    assert (found.first.name, found.first.differing) == ("evaluate", ("metrics.json",))
    assert [reason for reason in found.reasons if reason.startswith("settings.metrics: ")] == list(found.reasons)
    found = ptqjax.replay(done.folder, recipe=changed(place, tmp_path, '"weights"', '"off"'))
    assert found.first is not None
    assert found.first.name == "equalize"
    assert found.reasons == ("settings.config.scaling: weights then, off now",)


def test_a_replay_under_other_versions_says_which(done, copied):
    path = copied / "run.json"
    stored = json.loads(path.read_text())
    stored["identity"]["versions"]["jaxlib"] = "0.0.1"
    from ptqjax.experiments.store import digest_of  # noqa: PLC0415

    path.write_text(json.dumps(stored | {"address": digest_of(stored["identity"])}))
    (reason,) = ptqjax.replay(copied).reasons
    assert reason.startswith("versions.jaxlib: 0.0.1 then, ")


def test_a_replay_says_what_was_damaged(copied):
    (copied / "export" / "model.encodings").write_text("{}")
    found = ptqjax.replay(copied)
    assert found.first is not None
    assert (found.first.name, found.first.note) == ("export", "'model.encodings' is damaged")


def test_a_replay_looks_where_the_model_and_the_data_are_now(place, done, tmp_path):
    moved = tmp_path / "moved.onnx"
    shutil.copy(place / "net.onnx", moved)
    shutil.copy(place / "data.npz", tmp_path / "moved.npz")
    data = tmp_path / "moved.npz"
    assert ptqjax.replay(done.folder, model=moved, calibration=data, evaluation=data).is_same
    onnx.save(network(last="Sigmoid"), moved)
    with pytest.raises(DataError, match=r"model '.*moved\.onnx' is not what the run read.*--model"):
        ptqjax.replay(done.folder, model=moved)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read"), ("{", "is damaged"), ('{"address": "0"}', "is damaged")]
)
def test_a_replay_of_what_is_no_run_is_an_error(tmp_path, content, words):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(DataError, match=words):
        ptqjax.replay(tmp_path)


def test_a_device_that_is_not_there_is_an_error(place, tmp_path):
    with pytest.raises(ConfigError, match="device='cuda'"):
        ptqjax.run_recipe(changed(place, tmp_path, '"cpu"', '"cuda"'), tmp_path)


def started(place: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    """`ptqjax run` in a process of its own, in another folder."""
    out.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [*PTQJAX, "run", str(place / "recipe.toml"), "--out", str(out), "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=out,
        env={**os.environ, **environment},
    )


def ended(process: subprocess.Popen[str]) -> str:
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (0, "")
    return stdout


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def test_a_run_that_is_killed_interrupted_and_taken_up_by_two_gives_the_same_bytes(place, done, tmp_path):
    """Each in a process of its own, with another order of hashes, in another folder than the run that it equals."""
    folder = tmp_path / "runs" / done.folder.name
    killed = started(place, folder.parent, PYTHONHASHSEED="1")
    wait_for(folder / "fold", killed)
    killed.kill()
    killed.communicate()
    assert not (folder / "report").exists()

    interrupted = started(place, folder.parent, PYTHONHASHSEED="2")
    wait_for(folder / "equalize", interrupted)
    interrupted.send_signal(signal.SIGINT)
    _, stderr = interrupted.communicate(timeout=300)
    assert interrupted.returncode == 130
    assert stderr.startswith("Interrupted: finished stages are kept")
    assert f"ptqjax run {place / 'recipe.toml'} --out {folder.parent}" in stderr
    assert stderr.count("\n") == 1
    assert not (folder / "report").exists()

    two = [started(place, folder.parent, PYTHONHASHSEED=seed) for seed in ("3", "4")]
    for process in two:
        assert "fold       already there" in ended(process)
    assert digests(folder) == digests(done.folder)
    assert [path for path in folder.iterdir() if path.is_dir() and path.name not in STAGES] == leftovers(folder)


def leftovers(folder: Path) -> list[Path]:
    """What the killed process left: nothing but hidden folders that no run looks at."""
    return [path for path in folder.iterdir() if path.name.startswith(".half-")]


def test_the_commands_say_what_was_done_and_what_differs(place, done, copied, tmp_path):
    runner = click.testing.CliRunner()
    result = runner.invoke(commands, ["run", str(place / "recipe.toml"), "--out", str(copied.parent)])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("already there") == len(STAGES)
    assert "on 64 samples: top-1 " in result.stdout
    recipe = changed(place, tmp_path, '"weights"', '"off"')
    result = runner.invoke(commands, ["replay", str(copied), "--recipe", str(recipe), "--quiet"])
    assert result.exit_code == 1
    assert "first stage that differs: equalize" in result.stdout
    assert "fold       same" in result.stdout
    result = runner.invoke(commands, ["replay", str(copied), "--quiet"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "all files of the same bytes" in result.stdout


def test_a_wrong_recipe_is_one_line_and_a_usage_error(tmp_path):
    (tmp_path / "r.toml").write_text("modle = 1\n")
    result = click.testing.CliRunner().invoke(commands, ["run", str(tmp_path / "r.toml")])
    assert result.exit_code == 2
    assert "line 1: unknown key 'modle'; near names: model" in result.stderr
