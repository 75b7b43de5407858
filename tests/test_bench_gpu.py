"""The bench for accelerators runs anywhere at tiny sizes."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_gpu.py"


def test_the_smoke_run_prints_every_table():
    command = [sys.executable, str(SCRIPT), "--smoke", "--network", "mobilenet_v2"]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": ""}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    for title in ("float images/s", "largest difference", "encoding search", "calibration", "Peak device memory"):
        assert title in printed.stdout
    (difference,) = (line for line in printed.stdout.splitlines() if line.count("|") == 3 and "mobilenet_v2" in line)
    assert float(difference.split("|")[2]) < 1e-4  # float32 sums in another order
