"""The search and the observers on one device and on four: the same bits."""

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ptqjax.kernels import search
from ptqjax.kernels.ranges import grid_kind, stack_kinds
from ptqjax.quantize.observers import DISTRIBUTION, MEAN_EXTREMES
from ptqjax.quantize.schemes import find_scheme

assert len(jax.devices()) == 4
mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)


def spread(tree, is_spread=lambda leaf: True):
    def put(leaf):
        parts = PartitionSpec("i") if is_spread(leaf) else PartitionSpec()
        return jax.device_put(jnp.asarray(leaf), NamedSharding(mesh, parts))

    return jax.tree.map(put, tree)


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# Weights: ranges of one row and of hundreds, which lie on several devices; errors are rounded in every sum.
matrices = [rng.normal(size=(8, 9)).astype(np.float32), rng.laplace(size=(2, 30_000)).astype(np.float32)]
rows = search.rows_of(matrices)
num_rows, num_ranges = len(rows.values), len(rows.lowest)
assert num_rows % 4 == 0
for dtype, symmetric, candidates in (("int8", True, search.TOGETHER), ("uint4", False, search.BOTH_ENDS)):
    kind = stack_kinds([grid_kind(dtype, symmetric=symmetric)] * num_ranges)
    alone = search.search_fractions(rows, kind, np.float32(3), candidates)
    with jax.set_mesh(mesh):
        rows_apart = spread(rows, lambda leaf: len(leaf) == num_rows)
        apart = search.search_fractions(rows_apart, kind, np.float32(3), candidates)
    equal(apart, alone)
    assert len(np.unique(np.asarray(alone))) > 2

# Activations: the samples of a batch lie on several devices.
batches = [[(rng.normal(size=(8, 40, 300)) * s).astype(np.float32), rng.laplace(size=(8, 70)).astype(np.float32)]
           for s in (1, 30)]
for observer in (DISTRIBUTION, MEAN_EXTREMES):
    update = jax.jit(observer.update, static_argnums=2)
    alone, apart = observer.init(2), observer.init(2)
    for batch in batches:
        alone, apart = update(alone, batch, 8), update(apart, spread(batch), 8)
    equal(apart, alone)
    for name in ("sqnr", "entropy", "percentile:99") if observer is DISTRIBUTION else ("moving-average",):
        kinds = stack_kinds([grid_kind("uint8"), grid_kind("int4", symmetric=True)])
        equal(find_scheme(name).finish(apart, kinds), find_scheme(name).finish(alone, kinds))
print("the same")
"""


def test_one_device_and_four_give_the_same_bits() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.strip() == "the same"
