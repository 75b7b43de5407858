"""Runs of recipes: the bytes of `ptqjax quantize`, the same again anywhere, whatever a run was stopped by."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import click.testing
import numpy as np
import onnxruntime
import pytest

import ptqjax
from ptqjax import onnx_io, report
from ptqjax.commands.cli import commands
from ptqjax.errors import ConfigError, DataError
from ptqjax.ir import Model
from ptqjax.progress import nothing
from ptqjax.recipes import run as runs
from ptqjax.recipes.recipe import read_recipe
from ptqjax.recipes.run import Run
from ptqjax.recipes.stages import STAGES
from ptqjax.recipes.store import digest_of
from tests.models import build, node

PTQJAX = """
import os, signal, sys, threading
from ptqjax.commands import cli, recipe as recipe_command
say = recipe_command._say_stage
def say_and_signal(stage):  # from within, soon: a test that waits for its turn on a busy machine may come too late
    say(stage)
    if stage.name == "fold" and name:
        threading.Timer(0.1, os.kill, (os.getpid(), getattr(signal, name))).start()
name = sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
recipe_command._say_stage = say_and_signal
cli.main()
"""
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
FLAGS = ["--ranges=min-max", "--scaling=weights", "--correct=empirical", "--device=cpu", "--report=short"]


def network(*, last: str = "Relu") -> Model:
    """Two dense layers, a batch norm between: few programs to compile; channels so uneven that scaling has work."""
    random = np.random.default_rng(0)
    size = 10.0 ** np.linspace(-2, 1, 8)
    params = {
        "w1": random.normal(size=(6, 8)),
        "gamma": size,
        "beta": size * random.normal(size=8),
        "mean": random.normal(size=8),
        "var": random.uniform(1, 3, size=8),
        "w2": random.normal(size=(8, 5)) / size[:, None],
        "b2": random.normal(size=5),
    }
    nodes = [
        node("Gemm", ("x", "w1"), "dense1"),
        node("BatchNormalization", ("dense1", "gamma", "beta", "mean", "var"), "norm1"),
        node(last, ("norm1",), "active"),
        node("Gemm", ("active", "w2", "b2"), "y"),
    ]
    arrays = {name: value.astype(np.float32) for name, value in params.items()}
    return build(nodes, arrays, input_shape=("N", 6), outputs=["y"])


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
    onnx_io.write(network(), folder / "net.onnx")
    samples = np.random.default_rng(1).normal(size=(64, 6)).astype(np.float32)
    logits = onnxruntime.InferenceSession(folder / "net.onnx").run(None, {"x": samples})[0]
    np.savez(folder / "data.npz", x=samples, labels=logits.argmax(1))
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def done(place) -> Run:
    """One undisturbed run."""
    return again(place, place / "runs")


@pytest.fixture
def copied(done, tmp_path) -> Path:
    """A copy of that run's folder, to damage."""
    return Path(shutil.copytree(done.folder, tmp_path / "runs" / done.folder.name))


@pytest.fixture
def begun(copied) -> Path:
    """A copy of what a run has that was stopped after its first stage."""
    for name in list(STAGES)[1:]:
        shutil.rmtree(copied / name)
    return copied


def again(place: Path, out: Path) -> Run:
    return ptqjax.run_recipe(place / "recipe.toml", out)


def address(recipe: Path) -> str:
    """The name of a run's folder, without the run."""
    task = runs.task_of(read_recipe(recipe), follow=nothing, place=lambda batches: batches)
    return digest_of(runs.identity_of(task))[:16]


def command(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(commands, [str(argument) for argument in arguments])


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


def test_the_exported_files_are_those_of_quantize_byte_for_byte(place, done, tmp_path, monkeypatch):
    nothing_found = {"stages": (), "measured_in": "", "measured_on": ""}
    monkeypatch.setattr(ptqjax, "explain", lambda *_, **__: nothing_found)  # most of the time, and no part in the files
    monkeypatch.setattr(report, "page", lambda _: "")
    result = command("quantize", place / "net.onnx", "--calibration", place / "data.npz", "--out", tmp_path, *FLAGS)
    assert result.exit_code == 0, result.output
    for name in ("model.onnx", "model.encodings"):
        assert (tmp_path / name).read_bytes() == (done.folder / "export" / name).read_bytes()


def test_what_is_there_is_not_computed_again(place, done, copied):
    run = again(place, copied.parent)
    assert new(run) == []
    assert run.folder == copied
    assert run.metrics == done.metrics


@pytest.mark.parametrize("stage", ["equalize", "correct", "report"])
def test_a_run_goes_on_from_a_stage_to_the_same_bytes(place, done, copied, stage):
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
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("net.onnx", "other-name.onnx") + "# another comment\n")
    assert address(tmp_path / "recipe.toml") == done.folder.name


@pytest.mark.parametrize(
    ("old", "new"), [("seed = 0", "seed = 1"), ("batch = 32", "batch = 16"), ('"weights"', '"off"')]
)
def test_another_setting_is_another_address(place, done, tmp_path, old, new):
    assert address(changed(place, tmp_path, "", "")) == done.folder.name
    assert address(changed(place, tmp_path, old, new)) != done.folder.name


def test_other_data_are_another_address(place, done, tmp_path):
    arrays = dict(np.load(place / "data.npz"))
    arrays["x"][0, 0] += 1
    np.savez(tmp_path / "data.npz", **arrays)
    for name in ("net.onnx", "recipe.toml"):
        shutil.copy(place / name, tmp_path)
    assert address(tmp_path / "recipe.toml") != done.folder.name


def test_two_runs_in_one_folder_at_once_give_the_same_bytes(place, done, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: again(place, tmp_path), range(2))
    assert first.folder == second.folder
    assert digests(first.folder) == digests(done.folder)
    assert list(first.folder.glob(".half-*")) == []


def test_a_run_without_data_measures_nothing_and_replays(place, tmp_path):
    recipe = changed(place, tmp_path, '"empirical"', '"analytic"').read_text()
    text = recipe.replace(f'calibration = "{place / "data.npz"}"', 'calibration = "none"')
    text = text.replace(f'evaluation = "{place / "data.npz"}"\n', "").replace('"short"', '"none"')
    (tmp_path / "none.toml").write_text(text)
    found = command("run", tmp_path / "none.toml", "--out", tmp_path / "runs", "--quiet")
    assert found.exit_code == 0, found.output
    assert "nothing was measured: the recipe has no evaluation data" in found.stdout
    assert (found.stderr, list((tmp_path / "runs").glob("*/report/*.html"))) == ("", [])
    (folder,) = (tmp_path / "runs").iterdir()
    assert ptqjax.replay(folder).is_same


def test_a_replay_of_an_undisturbed_run_is_the_same_wherever_its_files_are_now(place, done, tmp_path):
    places = {"model": "moved.onnx", "calibration": "c.npz", "evaluation": "e.npz"}
    for name, moved in places.items():
        shutil.copy(place / ("net.onnx" if name == "model" else "data.npz"), tmp_path / moved)
    found = ptqjax.replay(done.folder, **{name: tmp_path / moved for name, moved in places.items()})
    assert found.is_same
    assert [stage.name for stage in found.stages] == list(STAGES)
    assert (found.reasons, found.unfinished) == ((), ())


def test_a_replay_names_the_first_stage_that_differs_and_why(place, done, tmp_path):
    found = ptqjax.replay(done.folder, recipe=changed(place, tmp_path, "seed = 0", 'seed = 0\nmetrics = ["top1"]'))
    assert found.first is not None
    assert (found.first.name, found.first.differing) == ("evaluate", ("metrics.json",))
    assert [reason for reason in found.reasons if reason.startswith("settings.metrics: ")] == list(found.reasons)


def test_a_replay_under_other_versions_says_which(begun):
    path = begun / "run.json"
    stored = json.loads(path.read_text())
    stored["identity"]["versions"]["jaxlib"] = "0.0.1"
    path.write_text(json.dumps(stored | {"address": digest_of(stored["identity"])}))
    (reason,) = ptqjax.replay(begun).reasons
    assert reason.startswith("versions.jaxlib: 0.0.1 then, ")


def test_a_replay_compares_what_an_unfinished_run_has(begun):
    found = ptqjax.replay(begun)
    assert found.is_same
    assert ([stage.name for stage in found.stages], found.unfinished) == (["fold"], tuple(STAGES)[1:])
    said = command("replay", begun, "--quiet").stdout
    assert (
        "not compared, as the run did not come to them: equalize, calibrate, correct, export, evaluate, report" in said
    )


def test_a_replay_says_what_was_damaged(begun):
    (begun / "fold" / "records.json").write_text("{}")
    found = ptqjax.replay(begun)
    assert found.first is not None
    assert (found.first.name, found.first.note) == ("fold", "'records.json' is damaged")


def test_a_replay_says_which_stage_is_missing_before_others(copied):
    for name in ("fold", "calibrate", "correct", "export", "evaluate", "report"):
        shutil.rmtree(copied / name)
    found = ptqjax.replay(copied)
    assert found.first is not None
    assert (found.first.name, found.first.note) == ("fold", "they are missing")
    assert [stage.is_same for stage in found.stages] == [False, True]


def test_a_replay_on_another_model_is_refused(done, tmp_path):
    onnx_io.write(network(last="Sigmoid"), tmp_path / "other.onnx")
    with pytest.raises(DataError, match=r"model '.*other\.onnx' is not what the run read.*--model"):
        ptqjax.replay(done.folder, model=tmp_path / "other.onnx")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "is damaged"),
        ('{"address": "0"}', "is damaged"),
        (json.dumps({"address": digest_of({}), "identity": {}, "files": []}), "is damaged"),
        (json.dumps({"address": digest_of({}), "identity": {}, "files": {"model": "", "base": ""}}), "is damaged"),
    ],
)
def test_a_replay_of_what_is_no_run_is_an_error(tmp_path, content, words):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(DataError, match=words):
        ptqjax.replay(tmp_path)


def test_a_device_that_is_not_there_is_an_error(place, tmp_path):
    with pytest.raises(ConfigError, match="device='cuda'"):
        ptqjax.run_recipe(changed(place, tmp_path, '"cpu"', '"cuda"'), tmp_path)


def run_alone(place: Path, out: Path, seed: str, name: str = "") -> subprocess.CompletedProcess[str]:
    """`ptqjax run` in a process of its own, in another folder, which the signal `name` ends after its first stage."""
    out.mkdir(parents=True, exist_ok=True)
    arguments = ["run", str(place / "recipe.toml"), "--out", str(out), "--quiet"]
    return subprocess.run(
        [sys.executable, "-c", PTQJAX, name, *arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=600,
        cwd=out,
        env={**os.environ, "PYTHONHASHSEED": seed},
    )


def test_a_run_that_is_killed_and_interrupted_goes_on_to_the_same_bytes(place, done, tmp_path):
    """Each in a process of its own, with another order of hashes, in another folder than the run that it equals."""
    folder = tmp_path / "two words" / done.folder.name
    killed = run_alone(place, folder.parent, "1", "SIGKILL")
    assert (killed.returncode, (folder / "fold").is_dir(), (folder / "report").exists()) == (-9, True, False)

    interrupted = run_alone(place, folder.parent, "2", "SIGINT")
    assert interrupted.returncode == 130
    assert interrupted.stdout.startswith("fold       already there\n")
    assert interrupted.stderr.startswith("Interrupted: finished stages are kept")
    assert f"`ptqjax run {place / 'recipe.toml'} --out '{folder.parent}'` goes on" in interrupted.stderr
    assert interrupted.stderr.count("\n") == 1
    assert not (folder / "report").exists()

    finished = run_alone(place, folder.parent, "3")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "fold       already there" in finished.stdout
    assert digests(folder) == digests(done.folder)
    strangers = {path.name for path in folder.iterdir() if path.is_dir()} - set(STAGES)
    assert all(name.startswith(".half-") for name in strangers)  # of the killed process: no run looks at them


def test_an_interrupt_that_something_swallows_ends_the_run_after_the_stage(place, copied, monkeypatch):
    def swallowing(*_: object) -> None:
        with suppress(KeyboardInterrupt):  # as a bare `except:` does, or a callback of the garbage collector
            signal.raise_signal(signal.SIGINT)

    shutil.rmtree(copied / "export")
    monkeypatch.setattr(runs, "STAGES", {**STAGES, "export": swallowing})
    result = command("run", place / "recipe.toml", "--out", copied.parent, "--quiet")
    assert (result.exit_code, result.stderr.partition(":")[0]) == (130, "Interrupted")
    assert result.stdout.splitlines()[-1].startswith("export ")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_commands_say_what_was_done_and_what_differs(place, done, copied, tmp_path):
    result = command("run", place / "recipe.toml", "--out", copied.parent)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("already there") == len(STAGES)
    assert "on 64 samples: top-1 " in result.stdout
    result = command("replay", copied, "--recipe", changed(place, tmp_path, '"weights"', '"off"'), "--quiet")
    assert result.exit_code == 1
    assert "first stage that differs: equalize" in result.stdout
    assert "fold       same" in result.stdout
    assert "not as it was: settings.config.scaling: weights then, off now" in result.stdout
    result = command("replay", copied, "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "all files of the same bytes" in result.stdout
    assert "not compared" not in result.stdout


def test_a_wrong_recipe_is_one_line_and_a_usage_error(tmp_path):
    (tmp_path / "r.toml").write_text("modle = 1\n")
    result = command("run", tmp_path / "r.toml")
    assert result.exit_code == 2
    assert "line 1: unknown key 'modle'; near names: model" in result.stderr
