"""One device and four: the same bits, and errors that name the batch and the input."""

import os
import subprocess
import sys
from pathlib import Path

_SEARCH = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ptqjax.kernels import search
from ptqjax.kernels.ranges import grid_kind, stack_kinds
from ptqjax.ranges.observers import DISTRIBUTION, MEAN_EXTREMES
from ptqjax.ranges.schemes import find_scheme

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


_NETWORK = """
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ptqjax import QuantizationConfig, calibrate, correct_biases, evaluate, simulate, solve_rounding
from ptqjax.errors import ConfigError, DataError
from ptqjax.recipes.together import shard_batches
from ptqjax.experiments.engine import Variant, evaluate_variants
from tests.models import build, node

jax.config.update("jax_numpy_rank_promotion", "raise")
assert len(jax.devices()) == 4
rng, name = np.random.default_rng(0), "x"


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


model = build(
    [
        node("Conv", ["x", "w1", "b1"], "c1"),
        node("Relu", ["c1"], "r1"),
        node("Conv", ["r1", "w2"], "c2"),
        node("GlobalAveragePool", ["c2"], "p"),
        node("Flatten", ["p"], "f"),
        node("Gemm", ["f", "w3"], "y"),
    ],
    {"w1": normal(6, 2, 3, 3), "b1": normal(6), "w2": normal(5, 6, 3, 3), "w3": normal(5, 10)},
    input_shape=("n", 2, 8, 8),
    outputs=["y"],
)
x = normal(20, 2, 8, 8)
batches = [{name: x[at : at + 4]} for at in range(0, 20, 4)]
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def put(array, *axes):
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def correct(encodings, batches):
    corrected, report = correct_biases(model, encodings, batches)
    return dict(corrected.params), report


def solve(encodings, batches):
    solved, report = solve_rounding(model, encodings, batches)
    return dict(solved.params), report


by_hand = [{name: put(x[:16], ("a", "b"))}, {name: put(x[16:], None)}]
copies = [{name: put(x[at : at + 8], "b")} for at in (0, 8)] + [{name: put(x[16:], None)}]
spread = [by_hand, copies, shard_batches(batches, mesh), shard_batches(batches, mesh, axes=("a",))]
for ranges in ("moving-average", "sqnr"):
    config = QuantizationConfig(ranges=ranges, weights="int4")
    alone = calibrate(model, batches, config)
    for each in spread:
        equal(calibrate(model, each, config), alone)
corrected = correct(alone, batches)
assert np.any(corrected[0]["b1"] != model.params["b1"])
for each in spread:
    equal(correct(alone, each), corrected)

solved = solve(alone, batches)
assert np.any(solved[0]["w2"] != model.params["w2"])
for each in spread:
    equal(solve(alone, each), solved)

# What parts would be, if they were not batches of their own, is something else: the law above is not empty.
whole = correct(alone, [{name: x}])
assert any(not np.array_equal(whole[0][key], corrected[0][key]) for key in whole[0])

labels = np.arange(20) % 10
program = simulate(model, alone)
run, reference = (lambda x: program(model.params, encodings, x) for encodings in (alone, calibrate(model, batches)))
figures = evaluate(run, batches, labels=labels, reference=reference)
variant = Variant(name="v", encodings=alone)
values = evaluate_variants(model, [variant], batches).values
for each in spread:
    assert evaluate(run, each, labels=labels, reference=reference) == figures
    assert evaluate_variants(model, [variant], each).values == values

bad = x.copy()
bad[9, 0, 0, 0] = np.nan
for batch, message in [
    ({name: put(bad[:16], "a")}, "batch 0, samples 8 to 15: input '.*' holds nan at .1, 0, 0, 0."),
    ({name: put(x[:16].astype(np.float16), "a")}, "batch 0, samples 0 to 7: input '.*' has the type float16"),
    ({name: put(x[:16], None, None, "a")}, "batch 0: input '.*' of shape .* only its first axis, the samples, may be"),
    ({"y": put(x[:16], "a")}, "batch 0 has the input 'y', which the model has not"),
]:
    for use in (lambda batch: calibrate(model, [batch]), lambda batch: correct_biases(model, alone, [batch])):
        with pytest.raises(DataError, match=message):
            use(batch)
with pytest.raises(ConfigError, match="lies on 4 devices; .*'sqnr' with compatibility='aimet'"):
    calibrate(model, by_hand, QuantizationConfig(ranges="sqnr", compatibility="aimet"))
aimet = QuantizationConfig(ranges="min-max", compatibility="aimet")
equal(calibrate(model, by_hand, aimet), calibrate(model, batches, aimet))
with pytest.raises(ConfigError, match="the mesh has the axes a, b alone"):
    shard_batches(batches, mesh, axes=("c",))
print("the same")
"""

ROOT = Path(__file__).parents[1]


def on_four_devices(program: str) -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.strip() == "the same"


def test_search_and_observers_give_the_same_bits_on_one_device_and_on_four() -> None:
    on_four_devices(_SEARCH)


def test_a_spread_batch_gives_what_its_parts_give_one_after_the_other() -> None:
    on_four_devices(_NETWORK)
