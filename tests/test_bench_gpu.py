"""The bench for accelerators runs anywhere at tiny sizes."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_gpu.py"


def run(*options):
    command = [sys.executable, str(SCRIPT), "--smoke", "--network", "every_kind", *map(str, options)]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "", "PYTHONPATH": str(SCRIPT.parents[1])}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    return printed.stdout


def test_the_smoke_run_prints_each_row_once_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "rows.jsonl"
    rows = {tuple(line.split(" | ")[:2]): line.split(" | ") for line in run("--out", out).splitlines() if " | " in line}
    known = out.read_text()
    assert len(known.splitlines()) == len(rows) - 1  # the table's head
    assert not [row for row in rows.values() if "fails" in row[-1]]
    value = {name: float(row[3]) for (name, _), row in rows.items() if name != "| what"}
    assert value["| largest difference from the CPU"] == 0  # this is the CPU
    assert value["| integers that differ from the CPU's"] == 0
    assert {"| float", "| simulated", "| integer", "| calibration", "| copy"} <= set(value)
    out.write_text(known + '{"what": "flo')  # cut off
    assert run("--out", out, "--seconds", -1).count(" | ") >= len(rows)
