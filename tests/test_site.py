"""The documentation site: every page builds, every link leads somewhere, every public function is in the reference."""

import subprocess
import sys
from pathlib import Path

import ptqjax

ROOT = Path(__file__).parents[1]


def test_the_site_builds_and_refers_to_every_public_function(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "build_docs.py", "--out", tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = "".join(path.read_text() for path in (tmp_path / "site").glob("api-*/index.html"))
    own = [name for name in ptqjax.__all__ if getattr(getattr(ptqjax, name), "__module__", "").startswith("ptqjax.")]
    assert [name for name in own if f".{name}" not in pages] == []
