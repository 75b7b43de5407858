"""The wheel: it builds, passes its checker, has all that the package reads, and quantizes the digits by itself."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import ptqjax
from ptqjax.config import target_names

ROOT = Path(__file__).parents[1]
JOB = """
import sys, numpy as np, ptqjax
model = ptqjax.read(sys.argv[1])
samples = np.load(sys.argv[2])["input"][:8]
config = ptqjax.QuantizationConfig(scaling="off", correct="none", rounding="nearest", ranges="min-max")
result = ptqjax.quantize(model, [{"input": samples}], config)
ptqjax.export(result.model, result.encodings, sys.argv[3], "digits", target=config.target)
print(ptqjax.__file__)
"""


def run(*command, **settings):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, timeout=300)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_passes_its_checker(wheel):
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", wheel)


def test_the_wheel_has_all_that_the_package_reads(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = Path(ptqjax.__file__).parent
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith(".pyc")} <= set(names)
    assert {f"ptqjax/targets/{name}.toml" for name in target_names()} <= set(names)
    assert {"ptqjax/py.typed", "ptqjax/__init__.pyi", "ptqjax/files.pyi", "ptqjax/report/style.css"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith("ptqjax")]


def digits(python, out, **settings):
    example = ROOT / "examples"
    arguments = example / "digits.onnx", example / "digits_calibration.npz", out / "q"
    found = run(python, "-c", JOB, *arguments, cwd=out, **settings)
    assert (out / "q" / "digits.onnx").is_file()
    return Path(found.strip().splitlines()[-1])


def test_the_digits_job_runs_from_the_wheel(wheel, tmp_path):
    """In a folder of its own, beside the packages that are here."""
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel)
    settings = {"env": {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}}
    assert digits(sys.executable, tmp_path, **settings).is_relative_to(tmp_path / "site")


@pytest.mark.slow
def test_the_digits_job_runs_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[cpu]")
    assert digits(python, tmp_path).is_relative_to(tmp_path / "env")
    assert "quantize" in run(tmp_path / "env" / "bin" / "ptqjax", "--help")
