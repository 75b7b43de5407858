"""Many variants by few programs: one trace a structure, values as one by one, the same function after alignment."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import ptqjax
from ptqjax.encodings.alignment import aligned
from ptqjax.encodings.biases import bias_encoding, bias_sites
from ptqjax.errors import ConfigError, DataError, ModelError
from ptqjax.experiments import engine
from ptqjax.experiments.engine import Variant, evaluate_variants, switched
from ptqjax.experiments.metrics import Metric
from ptqjax.ir import Model
from ptqjax.ranges.calibrate import calibrate_each

from .models import Chain, build, node

RNG = np.random.default_rng(0)
BATCHES = [{"x": RNG.normal(size=(n, 3, 6, 6)).astype(np.float32)} for n in (4, 4, 3)]
LABELS = RNG.integers(0, 16, 11)
Config = ptqjax.QuantizationConfig

PLAIN = [
    Config(weights="int2", activations="uint4"),
    Config(weights="int3", activations="uint16", granularity="tensor"),
    Config(weights="int4", ranges="min-max"),
    Config(weights="int5", activations="int8", granularity="tensor", ranges="mse"),
    Config(weights="int6", activations="uint6", ranges="percentile:99"),
    Config(weights="int8"),
    Config(weights="uint8", activations="uint10", granularity="tensor"),
    Config(weights="int12", activations="uint12"),
    Config(weights="int16", activations="uint16"),
    Config(weights="int8", power_of_two=True),
    Config(weights="int8", exclude=("x",)),
    Config(weights="int4", rules=(ptqjax.Rule(operators=("Relu",), enabled=False),)),
    Config(weights="int8", rules=(ptqjax.Rule(of="weights", enabled=False),)),
    Config(weights="int8", activations="uint4", biases="float", granularity="tensor"),
]
"""Widths from 2 to 16, ranges, granularity, exclude and rules, float biases: all that is a value of one program."""


def network() -> Model:
    """Conv, Relu, depthwise Conv, Relu, Conv with biases: [n, 3, 6, 6] -> [n, 4, 2, 2]."""
    chain = Chain(3, dtype=np.float32, size=6, seed=3)
    return chain.conv(6, bias=True).add("Relu").depthwise(bias=True).add("Relu").conv(4, kernel=1, bias=True).build()


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def variants(model):
    found = calibrate_each(model, BATCHES, PLAIN)
    return [Variant(name=f"v{i}", encodings=encodings) for i, (encodings, _) in enumerate(found)]


def one_by_one(model, variant, batches=BATCHES, labels=LABELS):
    """The metrics as `evaluate` has them, of the simulation of one variant."""
    run = ptqjax.simulate(model, variant.encodings)
    found = ptqjax.evaluate(
        lambda x: run(model.params, variant.encodings, x),
        batches,
        labels=labels,
        reference=lambda x: ptqjax.apply(model.graph, model.params, x),
        metrics=("agreement",),
    )
    return {"sqnr_db": found.sqnr, "agreement": found.agreement, "top1": found.top1}


def traces(monkeypatch):
    """A list that gets an entry whenever the float program is traced."""
    module = sys.modules["ptqjax.simulation"]
    found, original = [], module.interpret_by_samples

    def counted(*arguments, **settings):
        found.append(1)
        return original(*arguments, **settings)

    monkeypatch.setattr(module, "interpret_by_samples", counted)
    jax.clear_caches()
    return found


def test_one_trace_a_shape_serves_all_widths_ranges_granularities_and_switches(model, variants, monkeypatch):
    counted = traces(monkeypatch)
    found = evaluate_variants(model, variants, BATCHES)
    assert found.num_programs == 1
    assert set(found.programs) == {0}
    assert len(counted) == 2  # batches of 4 and of 3 samples
    again = [replace(variant, encodings=switched(variant.encodings, lambda name: "w" in name)) for variant in variants]
    evaluate_variants(model, again, BATCHES)
    assert len(counted) == 2


def test_a_graph_whose_shapes_depend_on_data_is_looped_over(monkeypatch):
    nodes = [node("Relu", ["x"], "r"), node("NonZero", ["r"], "where"), node("Mul", ["r", "r"], "y")]
    model = build(nodes, {}, input_shape=("n", 3), outputs=["y", "where"])
    monkeypatch.setattr(engine, "_MANY", 0)
    monkeypatch.setattr(engine, "_WORTH_COMPILING", 0)
    monkeypatch.setattr(engine, "_SHORT", 1e9)
    batch = {"x": np.float32([[1, -2, 3]])}
    rounding = Config(ranges="min-max", target="generic-per-channel")  # without a single product
    each = [ptqjax.calibrate(model, [batch], replace(rounding, activations=of)) for of in ("uint8", "uint4")]
    variants = [Variant(name=name, encodings=encodings) for name, encodings in zip("ab", each, strict=True)]
    found = evaluate_variants(model, variants, [batch] * 3, metrics=("agreement",))
    assert [each["agreement"] for each in found.values] == [1.0, 1.0]
    assert [(plan.way, [*plan.seconds]) for plan in found.batching] == [("loop", ["loop"])]  # vmap was tried


def test_a_first_output_without_samples_is_named():
    model = build([node("ReduceSum", ["x"], "total", keepdims=0)], {}, input_shape=("n", 3), outputs=["total"])
    batch = {"x": np.ones((2, 3), np.float32)}
    variant = Variant(name="v", encodings={})
    with pytest.raises(ModelError, match="output 'total' is a single number; expected samples"):
        evaluate_variants(model, [variant], [batch])
    with pytest.raises(ModelError, match="output 'total' is a single number; expected samples"):
        ptqjax.evaluate(lambda x: ptqjax.apply(model.graph, model.params, x), [batch], labels=np.zeros(2, int))


@pytest.mark.parametrize("batching", ["auto", "loop", "vmap", "shard"])
def test_values_are_those_of_evaluate_to_the_bit(model, variants, batching):
    found = evaluate_variants(
        model, variants, BATCHES, metrics=("sqnr_db", "agreement", "top1"), labels=LABELS, batching=batching
    )
    assert found.num_samples == 11
    for position in (0, 1, 10, 13):
        assert found.values[position] == one_by_one(model, variants[position]), PLAIN[position]
    assert len({values["sqnr_db"] for values in found.values}) == len(variants)


def test_aligned_encodings_are_the_same_function_to_the_bit(model, variants):
    alike = aligned(model, [variant.encodings for variant in variants]).encodings
    for variant, encodings in zip(variants, alike, strict=True):
        runs = [ptqjax.simulate(model, each)(model.params, each, BATCHES[0]) for each in (variant.encodings, encodings)]
        np.testing.assert_array_equal(*(np.asarray(next(iter(run.values()))) for run in runs))


def test_aligned_biases_have_the_scale_of_their_input_and_weight(model, variants):
    """The int32 biases beside a variant with float ones get entries of their own: s_x s_w, for each channel."""
    last = variants[5].encodings
    (alike, _) = aligned(model, [last, variants[13].encodings]).encodings
    for site in bias_sites(model):
        expected = bias_encoding(last, site)
        np.testing.assert_array_equal(alike[site.bias].scale, expected.scale)
        assert alike[site.bias].enabled


def test_alignment_is_idempotent(model, variants):
    once = aligned(model, [variant.encodings for variant in variants])
    twice = aligned(model, once.encodings)
    assert once.structures == twice.structures
    jax.tree.map(np.testing.assert_array_equal, once.encodings, twice.encodings)


def test_without_adding_other_tensors_are_other_structures(model, variants):
    encodings = [variants[position].encodings for position in (4, 3, 10)]
    found = aligned(model, encodings, adds=False)
    assert found.structures == (0, 0, 1)
    assert [each.keys() for each in found.encodings] == [each.keys() for each in encodings]


@pytest.mark.parametrize("config", [Config(granularity="block:2"), Config(weights="float8_e4m3fn")])
def test_blocks_and_float_formats_are_programs_of_their_own(model, variants, config):
    other = Variant(name="other", encodings=ptqjax.calibrate(model, BATCHES, config))
    found = evaluate_variants(model, [variants[5], other, variants[1]], BATCHES[:1])
    assert found.programs == (0, 1, 0)
    assert found.values[1] == {
        name: value for name, value in one_by_one(model, other, BATCHES[:1], None).items() if name != "top1"
    }


def test_switching_all_off_leaves_the_float_model(model, variants):
    off = Variant(name="off", encodings=switched(variants[0].encodings, lambda _: False))
    assert evaluate_variants(model, [off], BATCHES[:1]).values[0] == {"sqnr_db": np.inf, "agreement": 1.0}


def test_switching_on_enables_nothing_that_was_off(model, variants):
    found = switched(variants[13].encodings, lambda _: True)
    assert not any(found[site.bias].enabled for site in bias_sites(model))
    assert jax.tree.structure(found) == jax.tree.structure(variants[13].encodings)


def test_a_variant_has_its_own_parameters_and_graph(model, variants):
    own = Model(graph=model.graph, params={name: value * np.float32(1.1) for name, value in model.params.items()})
    variant = Variant(name="own", encodings=variants[5].encodings, params=own.params)
    found = evaluate_variants(model, [variants[5], variant], BATCHES, reference=own)
    assert found.num_programs == 1
    expected = one_by_one(own, variant)
    assert found.values[1] == {name: expected[name] for name in ("sqnr_db", "agreement")}
    assert found.values[0] != found.values[1]
    other = Chain(3, dtype=np.float32, size=6, seed=5).conv(4, kernel=3, bias=True).conv(4, kernel=3).build()
    with pytest.raises(DataError, match=r"the reference and 'o'.*different outputs"):
        evaluate_variants(model, [Variant(name="o", encodings={}, params=other.params, graph=other.graph)], BATCHES)


def test_the_first_output_is_the_graph_s_wherever_its_name_sorts():
    """Of the outputs "late" and "early", "late" is the first, which classes are read from."""
    rng = np.random.default_rng(3)
    weights = {name: rng.normal(size=(4, 4)).astype(np.float32) for name in ("v", "w")}
    nodes = [node("MatMul", ("x", "w"), "late"), node("MatMul", ("late", "v"), "early")]
    model = build(nodes, weights, input_shape=("N", 4), outputs=("late", "early"))
    batches = [{"x": rng.normal(size=(64, 4)).astype(np.float32)}]
    labels = np.argmax(batches[0]["x"] @ weights["w"], 1)
    variant = Variant(name="v", encodings=ptqjax.calibrate(model, batches, Config(weights="int4", activations="uint4")))
    run = ptqjax.simulate(model, variant.encodings)
    outputs = run(model.params, variant.encodings, batches[0])
    assert list(outputs) == ["late", "early"]
    right = {name: float(np.mean(np.argmax(value, 1) == labels)) for name, value in outputs.items()}
    assert right["late"] != right["early"]
    found = evaluate_variants(
        model, [variant], batches, metrics=("sqnr_db", "agreement", "top1"), labels=labels
    ).values[0]
    assert found == one_by_one(model, variant, batches, labels)
    assert found["top1"] == right["late"]


def test_metrics_of_ones_own_are_fed_batch_by_batch(model, variants):
    def update(state, seen):
        (found,), (wanted,) = seen.found.values(), seen.wanted.values()
        return max(state, float(np.abs(found - wanted).max()))

    worst = Metric(name="worst", init=lambda: 0.0, update=update, finish=lambda state: state, higher_is_better=False)
    found = evaluate_variants(model, variants[:1], BATCHES, metrics=(worst, "sqnr_db"))
    each = [evaluate_variants(model, variants[:1], [batch], metrics=(worst,)).values[0]["worst"] for batch in BATCHES]
    assert found.values[0]["worst"] == max(each) > 0


def test_errors_name_the_variant_and_the_remedy(model, variants):
    with pytest.raises(ConfigError, match="'odd': there is an encoding for 'no such'"):
        evaluate_variants(model, [Variant(name="odd", encodings={"no such": variants[0].encodings["x"]})], BATCHES)
    huge = Variant(name="huge", encodings={}, params={k: v * np.float32(1e30) for k, v in model.params.items()})
    with pytest.raises(ModelError, match="'huge', batch 0: output"):
        evaluate_variants(model, [huge], BATCHES)
    with pytest.raises(ConfigError, match="'top1' is of labels"):
        evaluate_variants(model, variants, BATCHES, metrics=("top1",))
    with pytest.raises(ConfigError, match=r"'sqnr' is unknown.*sqnr_db"):
        evaluate_variants(model, variants, BATCHES, metrics=("sqnr",))
    with pytest.raises(ConfigError, match="variants is empty"):
        evaluate_variants(model, [], BATCHES)
    with pytest.raises(ConfigError, match="batching='map'"):
        evaluate_variants(model, variants, BATCHES, batching="map")
    with pytest.raises(DataError, match="8 samples and 11 labels"):
        evaluate_variants(model, variants[:1], BATCHES[:2], metrics=("top1",), labels=LABELS)
    with pytest.raises(DataError, match="6 labels, and at least 8 samples"):
        evaluate_variants(model, variants[:1], BATCHES, metrics=("top1",), labels=LABELS[:6])
    with pytest.raises(DataError, match="0 samples"):
        evaluate_variants(model, variants[:1], [])


def test_what_is_not_worth_measuring_is_not_measured(model, variants):
    """Fewer steps than `_MANY`: the loop, at once."""
    (batching,) = evaluate_variants(model, variants, BATCHES).batching
    assert (batching.way, dict(batching.seconds)) == ("loop", {})


def test_the_faster_way_is_taken_by_measurement(model, variants, monkeypatch):
    monkeypatch.setattr(engine, "_MANY", 2)
    monkeypatch.setattr(engine, "_COMPILING", 0.0)
    monkeypatch.setattr(engine, "_WORTH_COMPILING", 0.0)
    monkeypatch.setattr(engine, "_SHORT", 1e3)
    (batching,) = evaluate_variants(model, variants, BATCHES).batching
    assert batching.seconds.keys() == {"loop", "vmap"}
    faster = batching.seconds["vmap"] < engine._CLEARLY * batching.seconds["loop"]
    assert batching.way == ("vmap" if faster else "loop")


FOUR = """
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
from tests.test_engine import BATCHES, PLAIN, network
from ptqjax.experiments.engine import Variant, evaluate_variants
from ptqjax.ranges.calibrate import calibrate_each
assert jax.local_device_count() == 4
model = network()
found = [e for e, _ in calibrate_each(model, BATCHES, PLAIN[:6])]
variants = [Variant(name=str(i), encodings=e) for i, e in enumerate(found)]
one, other = (evaluate_variants(model, variants, BATCHES[:2], batching=way) for way in ("loop", "shard"))
print(one.values == other.values, other.batching[0].way)
"""


def test_variants_over_four_devices_give_the_same_values():
    """Six variants on four devices: the last step has two to spare."""
    found = subprocess.run(
        [sys.executable, "-c", FOUR],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parents[1],
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PATH": "", "PYTHONPATH": "."},
    )
    assert found.stdout == "True shard\n", found.stderr
