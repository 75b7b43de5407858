"""What one process compiled, the next one finds in JAX's cache on disk."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import numpy as np
import ptqjax
from tests.models import mobile_block

model = mobile_block(dtype=np.float32)
inputs = {"x": np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)}
ptqjax.apply(model.graph, model.params, inputs)
encodings = ptqjax.calibrate(model, [inputs], ptqjax.QuantizationConfig(ranges="min-max"))
for arithmetic in ("float", "integer"):
    ptqjax.simulate(model, encodings, arithmetic=arithmetic)(model.params, encodings, inputs)
"""


def _entries_after_a_run(folder, seed):
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "PYTHONHASHSEED": seed,  # names must not come in the order of their hashes
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {path.name for path in folder.iterdir() if path.name.endswith("-cache")}


def test_a_second_process_compiles_nothing(tmp_path):
    first = _entries_after_a_run(tmp_path, "1")
    assert len(first) > 3, "the forward pass, the calibration and both simulations"
    assert _entries_after_a_run(tmp_path, "2") == first
