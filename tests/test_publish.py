"""Files that appear together or not at all, and hidden folders that nobody works in any more."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import ptqjax
from ptqjax import publish as room
from ptqjax.publish import publish, published, staging


@pytest.fixture(params=["links", "no links"])
def _file_system(request, monkeypatch):
    """One that has hard links, and one that has none."""

    def no_link(*_, **__):
        raise OSError(95, "Operation not supported")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", no_link)


@pytest.mark.usefixtures("_file_system")
@pytest.mark.parametrize("earlier", [{}, {"a": "old a", "b": "old b"}, {"b": "old b"}, {"a": "old a", "c": "else"}])
@pytest.mark.parametrize("before", [True, False], ids=["before the move", "after the move"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(5, "Input/output error")])
def test_a_fault_at_the_second_move_puts_everything_back(tmp_path, monkeypatch, earlier, before, fault):
    out, move, moved = tmp_path / "q", Path.replace, []
    if earlier:
        out.mkdir()
    for name, content in earlier.items():
        (out / name).write_text(content)

    def replace(self, target):
        moved.append(target)
        if len(moved) == 2 and before:
            raise fault
        move(self, target)
        if len(moved) == 2:
            raise fault

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else ptqjax.OutputError), fill(out):
        pass
    assert len(moved) == 2
    found = {path.name: path.read_text() for path in out.iterdir()} if out.exists() else {}
    assert found == earlier
    assert out.exists() == bool(earlier)


@contextmanager
def fill(out):
    with published(out, ["a", "b"]) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(f"new {name}")
        yield


def test_published_files_replace_earlier_ones_and_leave_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old a")
    with fill(tmp_path):
        pass
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new a", "b": "new b"}


def test_an_error_of_the_body_is_not_blamed_on_the_output_place(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"), published(tmp_path / "p" / "q", []):
        (tmp_path / "absent").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_file_system")
@pytest.mark.parametrize("fault", [None, KeyboardInterrupt, OSError(5, "Input/output error")])
def test_what_is_stale_goes_with_the_move_or_stays(tmp_path, monkeypatch, fault):
    (tmp_path / "a").write_text("old a")
    (tmp_path / "stale").write_text("of the old a")

    def fail(*_):
        raise fault

    with staging(tmp_path, []) as folder:
        (folder / "a").write_text("new a")
        if fault is None:
            publish(folder, tmp_path, stale=["stale", "absent"])
        else:
            monkeypatch.setattr(Path, "replace", fail)
            with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else ptqjax.OutputError):
                publish(folder, tmp_path, stale=["stale", "absent"])
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == ({"a": "new a"} if fault is None else {"a": "old a", "stale": "of the old a"})


def test_one_folder_publishes_several_times(tmp_path):
    with staging(tmp_path / "q", ["a", "b"]) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(name)
            publish(folder, tmp_path / "q")
            assert (tmp_path / "q" / name).read_text() == name
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == ["a", "b"]


WORK = """
import sys, time
from pathlib import Path
from ptqjax.publish import staging
with staging(Path(sys.argv[1]), []) as folder:
    (folder / "half").write_text("written")
    print(folder.name, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_works_in_stays(tmp_path):
    (tmp_path / "mine").write_text("kept")
    process = subprocess.Popen([sys.executable, "-c", WORK, tmp_path], stdout=subprocess.PIPE, text=True)
    with process:
        name = process.stdout.readline().strip()
        with staging(tmp_path, []) as own:
            assert (tmp_path / name / "half").read_text() == "written"
            process.kill()
            process.wait()
            with staging(tmp_path, []):
                assert own.is_dir()
                assert not (tmp_path / name).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("locks", [True, False])
def test_hidden_folders_without_a_lock_go_after_a_day(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(room, "fcntl", None)
    for name, age in (("old", 2), ("new", 0)):
        folder = tmp_path / f".ptqjax-{name}"
        folder.mkdir()
        (folder / "half").write_text("written")
        time = folder.stat().st_mtime - age * 86400
        os.utime(folder, (time, time))
    with staging(tmp_path, []):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".ptqjax-new"]
