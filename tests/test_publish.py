"""Files that appear together or not at all."""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest

import ptqjax
from ptqjax.publish import published


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
