"""Stored stages: there whole or not at all, whenever a run is killed, whoever else works in the same folder."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ptqjax.errors import DataError, OutputError
from ptqjax.recipes.store import MANIFEST, digest_of, look, put, remove_abandoned, write_file


def write(folder: Path) -> None:
    (folder / "a.txt").write_text("content of a")
    (folder / "b.bin").write_bytes(bytes(range(256)))


def hidden(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".half")]


def test_what_was_put_is_found_with_its_hashes(tmp_path):
    files = put(tmp_path, "fold", "key", write)
    assert sorted(files) == ["a.txt", "b.bin"]
    assert look(tmp_path / "fold", "key").files == files
    assert hidden(tmp_path) == []


def test_nothing_is_found_where_nothing_is(tmp_path):
    found = look(tmp_path / "fold", "key")
    assert (found.files, found.note) == (None, "")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = {
    "a flipped bit": (lambda folder: flip(folder / "b.bin"), "'b.bin' is damaged"),
    "a cut file": (lambda folder: (folder / "a.txt").write_text("content"), "'a.txt' is damaged"),
    "a missing file": (lambda folder: (folder / "a.txt").unlink(), "'a.txt' is missing"),
    "a folder in place of a file": (lambda folder: in_its_place(folder / "a.txt"), "a.txt' cannot be read"),
    "a surplus file": (lambda folder: (folder / "c.txt").touch(), "'c.txt' is not of it"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "missing or damaged"),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text('{"stage": "fo'), "missing or damaged"),
    "a manifest of other data": (lambda folder: (folder / MANIFEST).write_text("[]"), "missing or damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_repaired(tmp_path, damage):
    files = put(tmp_path, "fold", "key", write)
    do, note = DAMAGE[damage]
    do(tmp_path / "fold")
    found = look(tmp_path / "fold", "key")
    assert found.files is None
    assert note in found.note
    assert put(tmp_path, "fold", "key", write) == files
    assert look(tmp_path / "fold", "key").files == files
    assert hidden(tmp_path) == []


def test_what_was_made_from_something_else_is_not_taken(tmp_path):
    put(tmp_path, "fold", "key", write)
    assert look(tmp_path / "fold", "another").files is None
    put(tmp_path, "fold", "another", lambda folder: (folder / "only.txt").touch())
    assert list(look(tmp_path / "fold", "another").files) == ["only.txt"]


def test_what_another_run_put_there_first_stays(tmp_path):
    first = put(tmp_path, "fold", "key", write)
    assert put(tmp_path, "fold", "key", lambda folder: (folder / "late.txt").touch()) == first


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def fails(folder: Path) -> None:
        write(folder)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - its own
        put(tmp_path, "fold", "key", fails)
    assert list(tmp_path.iterdir()) == []


def test_runs_at_once_do_not_harm_each_other(tmp_path):
    put(tmp_path, "fold", "older", write)  # all have to take its place
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: put(tmp_path, "fold", "key", write), range(24)))
    assert all(files == found[0] for files in found)
    assert look(tmp_path / "fold", "key").files == found[0]
    assert hidden(tmp_path) == []


KILLED = """
import sys, time
from pathlib import Path
from ptqjax.recipes.store import put
def write(folder):
    for i in range(8):
        (folder / f"{i}.bin").write_bytes(bytes(200_000))
while True:
    for i in range(5):
        put(Path(sys.argv[1]), f"s{i}", f"key {time.time()}", write)
"""


def test_a_run_killed_at_any_moment_leaves_whole_stages_or_none(tmp_path):
    pause = np.random.default_rng(0)
    whole = 0
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
        while not (tmp_path / "s4").is_dir():
            time.sleep(0.01)
        time.sleep(pause.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for folder in [tmp_path / f"s{i}" for i in range(5)]:
            found = look(folder, None)
            assert found.files is not None or not folder.exists(), found.note
            whole += found.files is not None
    assert whole > 40  # of 60: a stage is missing only between two renames


def test_what_a_killed_run_left_a_day_ago_is_removed(tmp_path):
    import os  # noqa: PLC0415

    for name, age in ((".half-fold-old", 100_000), (".half-fold-new", 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_abandoned(tmp_path)
    assert hidden(tmp_path) == [".half-fold-new"]


def test_a_file_is_replaced_whole(tmp_path):
    write_file(tmp_path / "run.json", "one")
    write_file(tmp_path / "run.json", "two")
    assert (tmp_path / "run.json").read_text() == "two"
    assert hidden(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    with pytest.raises(OutputError, match="missing"):
        put(tmp_path / "missing", "fold", "key", write)


def test_a_file_elsewhere_that_cannot_be_read_is_named_instead(tmp_path, monkeypatch):
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"'[^']*net\.onnx' cannot be read: No such file.*'root' needs it"):
        put(Path("root"), "fold", "key", lambda _: (tmp_path / "net.onnx").read_bytes())
    assert hidden(tmp_path / "root") == []
    with pytest.raises(OutputError, match="'root' cannot be written: No such file"):
        put(Path("root"), "fold", "key", lambda half: (half / "folder" / "a").write_text(""))


def test_the_hash_of_data_does_not_depend_on_the_order_of_keys():
    assert digest_of({"a": 1, "b": [2, None]}) == digest_of(json.loads('{"b": [2, null], "a": 1}'))
    assert digest_of({"a": 1}) != digest_of({"a": 2})
