"""Laws of learned scales: the float function stays at every step, and samples held back are no worse off."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.config import QuantizationConfig
from ptqjax.errors import ConfigError, DataError
from ptqjax.fit import learned_scales
from ptqjax.fit.learned_scales import Learning, learn_scales
from ptqjax.ir import Model, Report, text
from ptqjax.transforms.shifts import find_shiftable
from tests.models import Chain, assert_same_function

COARSE = QuantizationConfig(weights="int4", granularity="tensor")  # noise is large, so that scales matter
SHORT = Learning(num_steps=20, batch_size=8, rate=0.05)
KEPT = 1e-5  # of the output, in float32: a few layers of some thirty products, each rounded once


def samples(count: int, seed: int = 0, *, channels: int = 3, size: int = 6) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(count, channels, size, size)).astype(np.float32)}


def three_layers() -> Model:
    """Two sets; between the last two layers nothing lies, so that channels may be shifted there."""
    chain = Chain(3, dtype=np.float32, size=6).conv(6, pad=1, bias=True).add("Relu")
    return chain.conv(5, kernel=1, bias=True).conv(4, kernel=1, bias=True).build()


def bounded() -> Model:
    """The block of a MobileNet, its batch norms folded: two sets behind a Clip each."""
    chain = Chain(3, dtype=np.float32, size=6).conv(6, pad=1, bias=True).clip(0.0, 2.0)
    return chain.depthwise(pad=1, bias=True).clip(0.0, 2.0).conv(4, kernel=1, bias=True).build()


def learn(model: Model, learning: Learning = SHORT) -> tuple[Model, Report]:
    return learn_scales(model, [samples(16), samples(8, seed=1)], COARSE, learning)


def figure(found: Mapping[str, float]) -> float:
    return next(value for name, value in found.items() if "held back" in name)


def task_of(model: Model, learning: Learning, monkeypatch: pytest.MonkeyPatch) -> learned_scales._Task:
    """What `learn_scales` makes before the descent, which is cut out."""
    tasks = []

    def seen(task, used, held):
        tasks.append(task)
        return learned_scales._start(task), (1.0, 1.0)

    monkeypatch.setattr(learned_scales, "_descended", seen)
    learn(model, learning)
    return tasks[0]


@pytest.fixture(scope="module")
def chain_and_learned() -> tuple[Model, Model, Report]:
    model = three_layers()
    return model, *learn(model)


def test_the_function_is_kept_and_samples_held_back_gain(chain_and_learned: tuple[Model, Model, Report]) -> None:
    model, learned, (record,) = chain_and_learned
    assert_same_function(learned, model, KEPT)
    assert record.done
    assert figure(record.after) > figure(record.before) + 0.1  # dB
    assert record.after["largest |log scale|"] > 0.05


def test_bounds_become_one_per_channel_and_the_callers_model_stays() -> None:
    model = bounded()
    before, values = text(model), {name: value.copy() for name, value in model.params.items()}
    learned, (record,) = learn(model)
    assert [found.op_type for found in learned.graph.nodes] == ["Conv", "Relu", "Min", "Conv", "Relu", "Min", "Conv"]
    assert_same_function(learned, model, KEPT)
    assert record.done
    assert figure(record.after) > figure(record.before) + 0.1  # dB
    assert record.after["largest |log scale|"] > 0.05
    assert text(model) == before
    for name, value in values.items():
        np.testing.assert_array_equal(model.params[name], value, err_msg=name)
    assert {value.dtype for value in learned.params.values()} == {np.dtype(np.float32)}


def test_the_same_seed_gives_the_same_bits(chain_and_learned: tuple[Model, Model, Report]) -> None:
    model, first, first_report = chain_and_learned
    second, report = learn(model)
    assert first.graph == second.graph
    assert first_report == report
    for name, value in first.params.items():
        np.testing.assert_array_equal(second.params[name], value)


def test_divergence_of_probabilities_is_a_loss() -> None:
    chain = Chain(3, dtype=np.float32, size=6).conv(6, pad=1, bias=True).add("Relu").conv(4, kernel=1)
    model = chain.add("GlobalAveragePool").add("Flatten").build()
    learned, (record,) = learn(model, replace(SHORT, loss="kl"))
    assert_same_function(learned, model, KEPT)
    assert "divergence on samples held back" in record.before
    assert 0 <= figure(record.after) <= figure(record.before)
    assert record.done == (figure(record.after) < figure(record.before))


def test_no_step_that_is_worse_on_samples_held_back_is_kept() -> None:
    model = three_layers()
    learned, (record,) = learn(model, replace(SHORT, num_steps=10, rate=30.0))  # steps of e^30
    assert not record.done
    assert record.what == "left as they were"
    assert figure(record.after) == figure(record.before)
    for name, value in model.params.items():
        np.testing.assert_array_equal(learned.params[name], value)


def test_where_nothing_is_tied_nothing_is_learned() -> None:
    model = Chain(3, dtype=np.float32, size=6).conv(4, pad=1).add("Sigmoid").conv(2).build()
    learned, (record,) = learn(model)
    assert learned.graph == model.graph
    for name, value in model.params.items():
        np.testing.assert_array_equal(learned.params[name], value)
    assert (record.done, record.what, record.reason) == (False, "left alone", "nothing is tied")


@pytest.mark.parametrize("batches", [None, [], [samples(1)]])
def test_one_sample_is_too_few(batches) -> None:
    with pytest.raises(DataError):
        learn_scales(three_layers(), batches, COARSE, SHORT)


@pytest.mark.parametrize(("settings", "message"), [({"loss": "mse"}, "sqnr, kl"), ({"held_back": 1.0}, "below 1")])
def test_settings_that_are_not_allowed_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Learning(**settings)


@pytest.mark.parametrize("make", [three_layers, bounded])
@pytest.mark.parametrize("shifts", [True, False])
def test_any_variables_keep_the_function(make, shifts: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    model = make()
    task = task_of(model, replace(SHORT, shifts=shifts), monkeypatch)
    start = learned_scales._start(task)
    assert [*start.shifts] == ([find_shiftable(model)[0].producer.output] if shifts and make is three_layers else [])
    random = np.random.default_rng(0)
    anywhere = jax.tree.map(lambda value: random.normal(size=value.shape).astype(np.float32), start)
    applied = learned_scales._applied(task, anywhere)
    assert_same_function(applied, model, KEPT)
    weight = model.graph.nodes[0].inputs[1]
    assert not np.allclose(applied.params[weight], model.params[weight], rtol=0.1)
    # Under differentiation the same arithmetic runs on traced arrays.
    traced = jax.jit(lambda found: learned_scales._applied(task, found).params)(jax.tree.map(jnp.asarray, anywhere))
    for name, value in applied.params.items():
        np.testing.assert_allclose(traced[name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max(), err_msg=name)


def test_channels_on_the_last_axis_are_learned_too():
    random = np.random.default_rng(0)
    chain = Chain(6, rank=0, dtype=np.float32)
    chain.input_shape = (2, 5, 6)
    model = chain.matmul(9, bias=True).add("Relu").matmul(4, bias=True).build()
    batches = [{"x": random.normal(size=(24, 5, 6)).astype(np.float32)}]
    learned, report = learn_scales(model, batches, COARSE, SHORT)
    assert len(report[0].where) == 1
    assert_same_function(learned, model, KEPT)
