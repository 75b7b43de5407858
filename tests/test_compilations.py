"""How many programs are compiled: few, whatever the lengths of what comes, and none for a single operator."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.config import QuantizationConfig
from ptqjax.data.regroup import of_few_shapes
from ptqjax.ir import Graph, Model, TensorSpec, verify
from ptqjax.kernels.draws import Draw
from ptqjax.onnx_io import read
from ptqjax.pipeline import quantize
from ptqjax.ranges.observers import DISTRIBUTION, SAMPLES
from ptqjax.report.explanation import explain
from tests.models import mobile_block, node

PROGRAMS = {"measure", "look", "absorb", "run", "search_fractions", "_descended", "tensors", "interpret_whole"}
PROGRAMS |= {"_nothing"}  # by which the compiler is asked for its options
"""What `quantize` and `explain` compile: each a whole model, or a whole search."""

_heard: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _hears() -> None:
    def hear(event: str, _: float, **details: object) -> None:
        if event.endswith("backend_compile_duration"):
            _heard.append(str(details["fun_name"]).removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(hear)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The names of the programs that the test compiles, which has none to begin with."""
    jax.clear_caches()
    _heard.clear()
    yield _heard
    _heard.clear()


def text_model(vocabulary: int = 50, width: int = 16) -> Model:
    """An embedding and a layer, for token numbers [N, T]."""
    rng = np.random.default_rng(0)
    shapes = {"table": (vocabulary, width), "w": (width, width), "b": (width,), "scale": (width,), "shift": (width,)}
    graph = Graph(
        name="text",
        inputs=(TensorSpec(name="ids", dtype=np.dtype(np.int64), shape=("N", "T")),),
        outputs=(TensorSpec(name="y", dtype=np.dtype(np.float32), shape=None),),
        nodes=(
            node("Gather", ["table", "ids"], "e", axis=0),
            node("MatMul", ["e", "w"], "m"),
            node("Add", ["m", "b"], "a"),
            node("Relu", ["a"], "r"),
            node("LayerNormalization", ["r", "scale", "shift"], "y", axis=-1, epsilon=1e-5),
        ),
        parameters=tuple(sorted(shapes)),
        opsets=(("", 17),),
    )
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return verify(Model(graph=graph, params=params))


def texts(*lengths: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"ids": rng.integers(0, 50, size=(1, length))} for length in lengths]


def test_a_length_more_compiles_two_programs_more(compilations: list[str]) -> None:
    lengths = range(3, 27, 2)
    result = quantize(text_model(), texts(*lengths))
    assert set(compilations) <= PROGRAMS
    found = Counter(compilations)
    assert found["absorb"] == 1
    assert found["measure"] <= 4  # two shapes, with factors of readers' own and without those that cost a product
    assert found["look"] <= len(lengths) + 4
    assert found["run"] <= len(lengths) + 4
    assert "without 6 batches of other shapes than the 2" in result.reports["equalize"][0].reason  # of the first 8


def test_small_convolutions_compile_whole_programs_alone(compilations: list[str]) -> None:
    model = mobile_block(dtype=np.float32)
    shape = [4, *model.graph.inputs[0].shape[1:]]
    batches = [{"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)} for seed in range(3)]
    quantize(model, batches)
    assert set(compilations) <= PROGRAMS


@pytest.mark.slow
def test_a_real_network_with_its_report_takes_fifteen_programs_at_most(compilations: list[str], shared: Path) -> None:
    model = read(shared / "models" / "mobilenet_v2_1.0_224.onnx")
    name = model.graph.inputs[0].name
    rng = np.random.default_rng(0)
    batches = [{name: rng.normal(size=(2, 3, 224, 224)).astype(np.float32)} for _ in range(2)]
    config = QuantizationConfig(granularity="channel")
    explain(model, quantize(model, batches, config), batches, config)
    assert set(compilations) <= PROGRAMS
    assert len(compilations) <= 15


@pytest.mark.parametrize("num_samples", [1, 3])
def test_rows_filled_up_leave_the_state_as_it_were_to_the_bit(num_samples: int) -> None:
    rng = np.random.default_rng(0)
    values = [jnp.asarray(rng.normal(size=(num_samples, size)) * size, jnp.float32) for size in (5, 700)]
    looked = DISTRIBUTION.look(values, num_samples)
    assert {row.shape for row in looked.values} == {(SAMPLES,)}
    longest = int(max(looked.sizes))
    bare = looked.replace(values=[row[:longest] for row in looked.values])
    start = DISTRIBUTION.init(2)
    for filled, alone in zip(
        *(jax.tree.leaves(DISTRIBUTION.absorb(start, each)) for each in (looked, bare)), strict=True
    ):
        np.testing.assert_array_equal(filled, alone)
    assert int(np.sum(DISTRIBUTION.absorb(start, looked).histogram.counts)) == num_samples * 705


@pytest.mark.parametrize(("num_samples", "size"), [(1, 3), (1, 10**5), (3, 4096), (3, 2000), (8, 10**4), (7, 1)])
def test_rows_are_of_few_lengths_and_never_longer_than_what_is_sampled(num_samples: int, size: int) -> None:
    values = jax.ShapeDtypeStruct((num_samples, size), np.float32)
    (row,) = jax.eval_shape(lambda value: DISTRIBUTION.look([value], num_samples), values).values
    (length,) = row.shape
    assert min(size, SAMPLES) * num_samples <= length <= SAMPLES * num_samples
    assert length == SAMPLES * num_samples or length.bit_count() == 1


def test_of_few_shapes_those_that_hold_most_are_kept_in_order() -> None:
    batches = texts(9, 4, 5, 4, 12, 4, 5)  # 4 holds 12 numbers in three batches, as 12 does in one
    assert [batch["ids"].shape[1] for batch in of_few_shapes(batches, 2)] == [4, 4, 12, 4]
    assert [batch["ids"].shape[1] for batch in of_few_shapes(batches, 3)] == [4, 5, 4, 12, 4, 5]
    assert of_few_shapes(batches, 9) == batches


@pytest.mark.parametrize(("seed", "number"), [(0, 0), (7, 3), (2**32 - 1, 2)])
def test_a_draw_is_the_key_that_jax_makes(seed: int, number: int) -> None:
    expected = jax.random.fold_in(jax.random.key(seed), number)
    found = jax.jit(Draw.key)(Draw.of(seed, number))
    np.testing.assert_array_equal(jax.random.key_data(found), jax.random.key_data(expected))
