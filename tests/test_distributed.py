"""A recipe on several processes: the bytes of one process, one line of error, and nothing left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import onnx
import pytest
from jax.sharding import AxisType

from ptqjax.data.parts import parts_of, parts_on_host, together
from ptqjax.errors import DataError
from ptqjax.onnx_io import to_proto
from ptqjax.recipes.run import run_recipe
from ptqjax.recipes.together import run_recipe_together, shard_batches
from tests.models import build, node

LAUNCHER = [sys.executable, str(Path(__file__).parents[1] / "scripts" / "launch_distributed.py")]
RECIPE = """\
model = "net.onnx"
device = "cpu"
report = "none"
[data]
calibration = "data.npz"
evaluation = "data.npz"
batch = 4
[transforms]
scaling = "weights"
correct = "empirical"
[config]
ranges = "sqnr"
weights = "int4"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Of a small network and 22 samples: five batches of four, one of two."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    nodes = [
        node("Conv", ["x", "w1", "b1"], "c1"),
        node("Relu", ["c1"], "r1"),
        node("GlobalAveragePool", ["r1"], "p"),
        node("Flatten", ["p"], "f"),
        node("Gemm", ["f", "w2", "b2"], "y"),
    ]
    params = {"w1": normal(6, 2, 3, 3), "b1": normal(6), "w2": normal(6, 5), "b2": normal(5)}
    onnx.save(to_proto(build(nodes, params, input_shape=("n", 2, 8, 8), outputs=["y"])), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=normal(22, 2, 8, 8))
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def launched(*arguments: object) -> subprocess.Popen[str]:
    # Several processes at once would read what another is writing.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [*LAUNCHER, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files of all stages but what depends on the clock or the place."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.glob("*/*"))
        if path.name != ".lock"
    }


def test_two_processes_of_two_devices_write_the_bytes_of_one(recipe: Path, tmp_path: Path) -> None:
    alone = run_recipe(recipe, tmp_path / "alone")
    running = launched(recipe, "--processes", 2, "--devices-per-process", 2, "--out", tmp_path / "together", "--quiet")
    out, error = running.communicate(timeout=300)
    assert running.returncode == 0, error
    (folder,) = (tmp_path / "together").iterdir()  # the folders of other processes are gone
    assert out.splitlines()[-1] == str(folder)
    assert folder.name == alone.folder.name  # as many devices as there may be, the results are the same
    found = bytes_of(folder)
    assert {"export/model.onnx", "export/model.encodings", "evaluate/metrics.json"} <= found.keys()
    assert found == bytes_of(alone.folder)


def test_an_error_is_one_line_and_exit_code_1(recipe: Path, tmp_path: Path) -> None:
    with np.load(tmp_path / "data.npz") as archive:
        bad = archive["x"].copy()
    bad[5, 0, 0, 0] = np.inf
    np.savez(tmp_path / "data.npz", x=bad)
    running = launched(recipe, "--processes", 2, "--out", tmp_path / "out", "--quiet")
    out, error = running.communicate(timeout=300)
    assert running.returncode == 1
    (line,) = [line for line in error.splitlines() if not line.startswith("[Gloo]")]
    assert line.startswith("error: ")
    assert "batch 0, samples 4 to 7: input 'x' holds inf" in line  # which the second process has
    assert "Traceback" not in out + error


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
@pytest.mark.parametrize("how", ["one is killed", "Ctrl-C"])
def test_where_one_process_ends_or_the_launcher_is_interrupted_all_end(recipe: Path, tmp_path: Path, how: str) -> None:
    running = launched(recipe, "--processes", 2, "--out", tmp_path / "out", "--quiet")
    children = children_of(running.pid, 2)
    if how == "Ctrl-C":
        os.kill(running.pid, signal.SIGINT)
    else:
        os.kill(children[1], signal.SIGKILL)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 1
    (line,) = error.splitlines()
    assert (
        line
        == {
            "one is killed": "error: process 1 ended with exit code -9",
            "Ctrl-C": "error: interrupted; the same command goes on where it was",
        }[how]
    )
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def children_of(process: int, count: int) -> list[int]:
    """The process's children, in the order they were started, once there are `count`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        if len(children) == count:
            return [int(child) for child in children]
        time.sleep(0.05)
    raise AssertionError("no children")


# On one process


def test_without_other_processes_a_run_is_one_of_its_own(recipe: Path, tmp_path: Path) -> None:
    together = run_recipe_together(recipe, tmp_path / "together")
    alone = run_recipe(recipe, tmp_path / "alone")
    assert together is not None
    assert bytes_of(together.folder) == bytes_of(alone.folder)
    again = run_recipe_together(recipe, tmp_path / "together")
    assert again is not None
    assert not any(stage.is_new for stage in again.stages)


def test_batches_that_differ_in_size_or_in_numbers_without_samples_are_not_joined() -> None:
    mesh = jax.make_mesh((1,), ("samples",), axis_types=(AxisType.Auto,))
    batches = [{"x": np.full((2, 3), i, np.float32), "s": np.float32(i)} for i in range(3)]
    found = list(shard_batches(batches, mesh))
    assert [float(batch["s"]) for batch in found] == [0, 1, 2]
    np.testing.assert_array_equal(
        np.concatenate([batch["x"] for batch in found]), np.repeat([0, 1, 2], 2)[:, None] * np.ones((1, 3))
    )


def test_a_batch_on_one_device_is_one_part() -> None:
    batch = {"x": np.ones((3, 2), np.float32), "s": np.float32(2)}
    parts = parts_of(batch, "batch 0")
    assert (parts.num_samples, parts.num_parts, parts.is_shared) == (3, 1, False)
    assert parts_on_host(batch, "batch 0") == [batch]


def test_alone_an_error_is_raised_as_it_is() -> None:
    def fail() -> None:
        raise DataError("nothing there")

    with pytest.raises(DataError, match="nothing there"):
        together(fail, is_shared=False)
