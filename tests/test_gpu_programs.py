"""The programs for GPUs as XLA compiles them for an H200: counts of a few layers of each kind, without a GPU.

They need the plugin for CUDA. In an environment without it (it brings 6 GB), `PTQJAX_GPU_ENVIRONMENT` may name the
folder of one that has it, as `scripts/gpu_programs.py --environment` makes it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
FOLDER = os.environ.get("PTQJAX_GPU_ENVIRONMENT", "")
HAS_PLUGIN = bool(FOLDER) or importlib.util.find_spec("jax_cuda12_plugin") is not None


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """By call and program, what is counted of a network with a few layers of each kind, for 64 small pictures."""
    if not HAS_PLUGIN:
        pytest.skip(
            "no plugin for CUDA is installed (pip install 'jax[cuda12]'), and PTQJAX_GPU_ENVIRONMENT names none"
        )
    out = tmp_path_factory.mktemp("counts") / "counts.jsonl"
    command = [sys.executable, SCRIPTS / "gpu_programs.py", "--environment", FOLDER or sys.prefix, "--out", out]
    command += ["--network", "every_kind", "--batch", "64"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    return {(each["call"], each["program"]): each for each in records}


def test_every_program_compiles(counts):
    assert {call for call, program in counts if not program} >= {"float", "simulated", "integer", "calibration"}
    assert {key: each["error"] for key, each in counts.items() if each.get("error")} == {}


def test_roundings_of_activations_are_in_the_kernels_of_the_layers(counts):
    plain, rounded = counts["float", "interpret_by_samples"], counts["simulated", "float_program"]
    assert rounded["kernels"] <= plain["kernels"] + 4  # behind cuDNN's three convolutions, and before the first layer
    assert rounded["num_bytes"] <= 1.3 * plain["num_bytes"]


def test_integers_travel_as_bytes(counts):
    plain, integer = counts["float", "interpret_by_samples"], counts["integer", "integer_program"]
    assert integer["num_bytes"] <= 0.6 * plain["num_bytes"]


def test_the_tables_have_a_row_for_each_call(counts, tmp_path):
    path = tmp_path / "counts.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in counts.values()))
    command = [sys.executable, str(SCRIPTS / "gpu_programs.py"), "--table", str(path)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for call in {call for call, _ in counts}:
        assert f"| every_kind | 64 | {call} |" in table
