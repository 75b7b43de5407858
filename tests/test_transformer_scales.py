"""Laws of scales and shifts in transformers: they keep the function, are free where they can be, and noise is less."""

from dataclasses import replace

import numpy as np
import pytest

from ptqjax.agreement import validate
from ptqjax.config import QuantizationConfig, Rule
from ptqjax.exporting import export
from ptqjax.fit.behaviour import observe_behaviour
from ptqjax.fit.forking import forked
from ptqjax.fit.ways import Ways
from ptqjax.ir import Model
from ptqjax.lowering import apply
from ptqjax.pipeline import quantize
from ptqjax.simulation import simulate
from ptqjax.transforms.centring import centre_channels, shifted
from ptqjax.transforms.forks import find_forks, with_forks
from ptqjax.transforms.rescale import rescale
from ptqjax.transforms.ties import find_ties
from tests.models import assert_same_function
from tests.transformers import decoder, encoder, samples, speech_encoder

_DEFAULTS = QuantizationConfig()
EXACT, SINGLE = 1e-12, 2e-5  # of the largest output: some twenty layers of some thirty products each


def random_scales(num_scales: int, seed: int = 0) -> np.ndarray:
    scales = np.random.default_rng(seed).normal(size=num_scales)
    scales[0] = 0.0
    return scales


def noise(model: Model, result, batch) -> float:
    """Noise over signal of the outputs, in dB below it."""
    wanted = apply(model.graph, model.params, batch)
    found = simulate(result.model, result.encodings)(result.model.params, result.encodings, batch)
    ratios = [np.sum((found[k] - wanted[k]) ** 2) / np.sum(wanted[k] ** 2) for k in wanted]
    return float(-10 * np.log10(np.mean(ratios)))


@pytest.mark.parametrize("norm", ["operator", "pieces"])
def test_scales_and_shifts_keep_the_function_of_a_transformer(norm):
    plain = encoder(dtype=np.float64, norm=norm)
    model = with_forks(plain, find_forks(plain, find_ties(plain)))
    assert_same_function(model, plain, EXACT)
    ties = find_ties(model)
    assert (
        len(ties.factors) == 9
    )  # a normalization in front; two, a GELU and what attention mixes in each of two blocks
    scaled = rescale(model, ties, random_scales(ties.num_scales))
    assert_same_function(scaled, plain, EXACT)
    behaviour = observe_behaviour(_single(scaled), [samples(_single(scaled), 8)])
    moved, after, report = centre_channels(scaled, find_ties(scaled), behaviour)
    assert_same_function(moved, plain, 1e-7)  # the middles were measured in single precision
    assert len(report) == (4 if norm == "operator" else 0)
    for record in report:
        np.testing.assert_allclose(after[record.where[0]].low, -after[record.where[0]].high, atol=1e-5)


def _single(model: Model) -> Model:
    graph = replace(
        model.graph, **{side: tuple(replace(spec, dtype=np.dtype(np.float32)) for spec in getattr(model.graph, side))
                        for side in ("inputs", "outputs")}
    )  # fmt: skip
    return model.replace(graph=graph, params={name: value.astype(np.float32) for name, value in model.params.items()})


def test_layers_read_apart_what_others_read_unrounded():
    """Where it pays: what a residual sum reads as well, and what a GELU makes; not what rules or kernels decide."""
    model = encoder(depth=1)
    found = forked(model, _DEFAULTS)
    made = {fork.tensor: fork for fork in found.forks}
    norms = [node.output for node in model.graph.nodes if node.op_type == "LayerNormalization"]
    gelu = next(fork for fork in found.forks if fork.merged is not None)
    assert set(made) == {*norms[:2], gelu.tensor}
    assert set(made).isdisjoint(found.rounded)
    assert {fork.result for fork in found.forks} <= found.rounded
    by_rule = replace(_DEFAULTS, rules=(Rule(tensors=(norms[0],), dtype="uint16"),))
    assert norms[0] not in {fork.tensor for fork in forked(model, by_rule).forks}
    assert norms[0] not in {fork.tensor for fork in forked(model, replace(_DEFAULTS, exclude=(norms[0],))).forks}
    assert len(forked(model, _DEFAULTS, at_any_cost=False).forks) == len(found.forks)  # all of them cost little


def test_a_shift_that_no_bias_can_take_is_left():
    """Of a normalization in front of a sum, and of one whose result is multiplied by itself."""
    model = encoder(depth=1)
    ties = find_ties(model)
    movable = shifted(model, ties, {})
    assert_same_function(movable, model, 0.0)
    assert not centre_channels(model, ties, observe_behaviour(model, [samples(model, 4)]))[2]


@pytest.mark.parametrize(("make", "gain"), [(encoder, 1.0), (speech_encoder, 0.0), (decoder, 0.5)])
def test_scales_of_a_transformer_keep_its_function_and_lessen_its_noise(make, gain):
    """Of stand-ins with channels twelve times as large as others, on samples that took no part.

    Their weights are random, so that large channels count for much: of trained ones they do not, and more is gained.
    """
    model = make()
    used, fresh = samples(model, 64, 0), samples(model, 32, 1)  # scales are found on half of 64
    ways = Ways(model, [used])
    scaled, report = ways.of_least_noise(_DEFAULTS, 32)
    wanted, found = (apply(each.graph, each.params, fresh) for each in (model, scaled))
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=SINGLE * np.abs(value).max())
    whole = next(record for record in report if record.after and "predicted SQNR, dB" in record.after)
    assert whole.after["predicted SQNR, dB"] > whole.before["predicted SQNR, dB"] + 2
    plain, better = (
        quantize(model, [used], replace(_DEFAULTS, scaling=way, correct="none")) for way in ("off", "noise")
    )
    assert noise(model, better, fresh) > noise(model, plain, fresh) + gain


def test_the_file_of_a_transformer_computes_what_is_simulated(tmp_path):
    """Integer by integer, layers with normalizations of their own and all; float sums may differ in their last bits."""
    model = encoder(depth=1)
    used, fresh = (samples(model, 16, seed) for seed in (0, 1))
    result = quantize(model, [used], replace(_DEFAULTS, scaling="noise", correct="none"))
    export(result.model, result.encodings, tmp_path, "model")
    found = validate(tmp_path, [fresh], in_float=False)
    assert found.largest <= 1
    assert found.equal >= 0.999  # LayerNormalization's order of sums is the runtime's own
    assert found.integer.agreement == 1
