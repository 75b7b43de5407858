"""What test runs hand on: whole programs alone, within bounds, to any number of processes."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests import programs


def write(folder, name, text="program", age=0):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    os.utime(folder / name, (time.time() - age,) * 2)


def test_what_one_process_compiles_the_next_one_finds(tmp_path):
    with programs.own_folder(tmp_path / "kept") as own:
        write(own, "a-cache")
    with programs.own_folder(tmp_path / "kept") as own:
        assert (own / "a-cache").read_text() == "program"
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["a-cache"], "no folder is left behind"


def test_processes_at_the_same_time_find_each_others(tmp_path):
    with programs.own_folder(tmp_path) as one, programs.own_folder(tmp_path) as other:
        write(one, "a-cache")
        write(other, "b-cache")
        write(other, "a-cache")
        for own in (one, other, one):
            programs.exchange(own, tmp_path)
        assert programs.entries(one) == programs.entries(other) == {"a-cache", "b-cache"}


def test_of_too_many_the_least_recently_read_go(tmp_path):
    for age in range(5):
        write(tmp_path, f"{age}-cache", "four", age=age)
    programs.remove_oldest(tmp_path, most=12)
    assert programs.entries(tmp_path) == {"0-cache", "1-cache", "2-cache"}


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name, age in (("own-old", 2 * 24 * 3600), ("own-new", 0)):
        write(tmp_path / name, "a-cache")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    programs.remove_oldest(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["own-new"]


SUITE = """
import jax, numpy as np

def test_a_program():
    jax.block_until_ready(jax.jit(lambda x: np.float32(3) * x)(np.float32(2)))
"""
ROOT = Path(__file__).parents[1]


def outcome(folder):
    """The last line of a run that keeps its programs in `folder / "kept"`."""
    (folder / "test_suite.py").write_text(SUITE)
    settings = ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "tests.conftest", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *settings, folder / "test_suite.py"],
        cwd=ROOT,
        env=os.environ | {"PTQJAX_PROGRAMS": str(folder / "kept")},
        capture_output=True,
        text=True,
        check=False,
    )
    return re.sub(r" in .*", "", run.stdout.strip().splitlines()[-1].strip("= "))


def test_a_damaged_program_fails_no_test_and_is_replaced(tmp_path):
    assert outcome(tmp_path) == "1 passed"
    (entry,) = (tmp_path / "kept").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    assert outcome(tmp_path) == "1 passed, 1 warning"
    assert outcome(tmp_path) == "1 passed"
    assert list((tmp_path / "kept").iterdir()) == [entry]
    assert len(entry.read_bytes()) > 0.9 * len(whole)
