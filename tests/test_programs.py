"""Compiled programs on disk: a second process compiles nothing, and no state of the folder ends a run."""

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import click.testing
import jax
import numpy as np
import onnx
import pytest
from jax.experimental.compilation_cache import compilation_cache
from onnx import TensorProto, helper, numpy_helper

import ptqjax
from ptqjax.commands import cache as cache_option
from ptqjax.commands import cli
from ptqjax.programs import keep_programs, remove_programs

OPTIONS = ("--scaling", "off", "--correct", "none", "--report", "none", "--quiet")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of one layer, and samples."""
    folder = tmp_path_factory.mktemp("programs")
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "net.onnx")
    np.savez(folder / "data.npz", x=np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32))
    return folder


@pytest.fixture(autouse=True)
def _jax_as_it_was() -> Iterator[None]:
    """Lets JAX keep programs where it did before."""
    names = (
        *("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"),
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def begin(place: Path, out: Path, cache: Path, code: str = "") -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"PTQJAX_CACHE_DIR": str(cache), "PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = ["quantize", place / "net.onnx", "--calibration", place / "data.npz", "--out", out, *OPTIONS]
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}\nfrom ptqjax.commands.cli import main; main()", *arguments],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> str:
    """What it wrote to stderr."""
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stderr


def entries(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.rglob("*-cache")}


COUNT = """
import atexit, jax
misses = []
jax.monitoring.register_event_listener(lambda event, **_: misses.append(event) if event.endswith("cache_misses") else 0)
atexit.register(lambda: print(len(misses), "compiled"))
"""
FULL = """
from jax._src.lru_cache import LRUCache
def put(self, key, value):
    (self.path / f"{key}-cache").write_bytes(value[:10])
    raise OSError(28, "No space left on device")
LRUCache.put = put
"""


def test_processes_share_a_folder_and_the_next_compiles_nothing(place, tmp_path):
    """Two at once, then one that finds all; one that finds all damaged; and a disk that is full."""
    cache = tmp_path / "cache"
    assert [ended(each) for each in [begin(place, tmp_path / name, cache) for name in "ab"]] == ["", ""]
    kept = entries(cache)
    assert len(kept) > 1

    third = begin(place, tmp_path / "c", cache, COUNT)
    stdout, stderr = third.communicate(timeout=300)
    assert (third.returncode, stderr, stdout.splitlines()[-1]) == (0, "", "0 compiled")
    assert entries(cache) == kept
    assert len({(tmp_path / name / "model.onnx").read_bytes() for name in "abc"}) == 1

    for path in cache.rglob("*-cache"):
        path.write_bytes(kept[path.name][: len(kept[path.name]) // 2])
    (line,) = ended(begin(place, tmp_path / "d", cache)).splitlines()
    assert line.startswith("Warning: a compiled program in '")
    assert "damaged" in line
    assert entries(cache).keys() == kept.keys()
    assert all(len(value) > len(kept[name]) * 0.9 for name, value in entries(cache).items())

    (line,) = ended(begin(place, tmp_path / "e", tmp_path / "full", FULL)).splitlines()
    assert "cannot be kept" in line
    assert "No space left on device" in line
    assert entries(tmp_path / "full") == {}


@pytest.mark.parametrize("command", ["quantize", "validate", "run"])
def test_a_folder_that_cannot_be_written_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, command):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PTQJAX_CACHE_DIR", str(tmp_path / "file"))
    before = jax.config.jax_compilation_cache_dir

    @cli.commands.command("probe")
    @cache_option.cache_option
    def probe(*, no_cache: bool) -> None:
        with cache_option.kept_programs(is_off=no_cache):
            click.echo("went on")

    try:
        result = click.testing.CliRunner().invoke(cli.commands, ["probe"])
        silent = click.testing.CliRunner().invoke(cli.commands, ["probe", "--no-cache"])
    finally:
        del cli.commands.commands["probe"]
    assert (result.exit_code, result.stdout) == (0, "went on\n")
    assert result.stderr.count("\n") == 1
    assert "Warning: compiled programs cannot be kept in '" in result.stderr
    assert "PTQJAX_CACHE_DIR" in result.stderr
    assert (silent.stdout, silent.stderr) == ("went on\n", "")
    assert jax.config.jax_compilation_cache_dir == before
    assert [each.name for each in cli.commands.commands[command].params if each.name == "no_cache"]


def test_other_warnings_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("PTQJAX_CACHE_DIR", str(tmp_path))
    with pytest.warns(UserWarning, match="something else"):
        warn_while_programs_are_kept()


def warn_while_programs_are_kept() -> None:
    with cache_option.kept_programs():
        warnings.warn("something else", stacklevel=1)


def test_the_folder_is_bounded_and_what_was_not_used_for_longest_goes(tmp_path):
    for age in range(5):
        path = tmp_path / f"program{age}-cache"
        path.write_bytes(b"x" * 1000)
        moment = time.time() - age * 1000
        os.utime(path, (moment, moment))
    keep_programs(tmp_path, limit=2500)
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == ["program0-cache", "program1-cache"]


def test_the_folder_is_the_platforms_unless_it_is_named(tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("PTQJAX_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # does not count
    assert keep_programs().parent == tmp_path / ".cache" / "ptqjax"
    assert keep_programs() == Path(jax.config.jax_compilation_cache_dir)  # as it is now
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert keep_programs().parent == tmp_path / "xdg" / "ptqjax"
    monkeypatch.setenv("PTQJAX_CACHE_DIR", str(tmp_path / "own"))
    assert keep_programs().parent == tmp_path / "own"
    assert keep_programs(tmp_path / "given").parent == tmp_path / "given"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("PTQJAX_CACHE_DIR")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_programs().parent == tmp_path / "Library" / "Caches" / "ptqjax"
    assert keep_programs(tmp_path / "given").stat().st_mode & 0o077 == 0


def test_the_library_keeps_nothing_unless_asked():
    code = "import jax, ptqjax; ptqjax.quantize; print(jax.config.jax_compilation_cache_dir)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert found.stdout == "None\n"


def test_programs_of_one_name_are_removed_and_no_others(tmp_path):
    for name in ("jit_f-0-cache", "jit_f-1-cache", "jit_f_g-0-cache", "jit_f-g-0-cache"):
        (tmp_path / name).write_bytes(b"")
    remove_programs(tmp_path, "jit_f")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jit_f-g-0-cache", "jit_f_g-0-cache"]


def test_a_folder_that_cannot_be_made_is_an_error_of_the_library(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ptqjax.OutputError, match="PTQJAX_CACHE_DIR"):
        keep_programs(tmp_path / "file")
