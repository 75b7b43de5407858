"""Sums of two products in 16 bits: what saturates is computed as the runtime does, and weights are chosen not to."""

import importlib
import json
from dataclasses import replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import click.testing
import jax.numpy as jnp
import numpy as np
import pytest

import ptqjax
from ptqjax import QuantizationConfig, apply, calibrate, export, onnx_io, read
from ptqjax.agreement import may_saturate, run, saturates_here, session
from ptqjax.commands.cli import commands
from ptqjax.encodings.encoding import dequantize, fake_quantize, quantize
from ptqjax.fit import correct_biases
from ptqjax.kernels.pair_sums import WEIGHT_OF_MOVES, fitted, paired, saturates, saturating_product, without_saturation
from ptqjax.qdq.fuse_quantized import fuse_quantized
from ptqjax.qdq.insert import insert_qdq
from ptqjax.ranges.pairs import fit_pairs, pairs_for, saturating_layers
from ptqjax.transforms.saturation import saturating_weights, without_vnni
from tests.models import build, node

RANDOM = np.random.default_rng(0)
MIN_MAX = QuantizationConfig(ranges="min-max", equalize=False, correct="none")


def alike(*shape):
    """Weights of one size and either sign, as after equalization: half of their pairs saturate."""
    random = np.random.default_rng(3)
    return (random.choice([-1, 1], shape) * random.uniform(0.7, 1, shape)).astype(np.float32)


def network(*, granularity="channel", **changed):
    """Layers with every order of terms, and two that share a weight; with its grids and a batch."""
    nodes = [
        node("Conv", ["x", "strided"], "a", strides=(2, 1), pads=(1, 0, 0, 1)),
        node("Relu", ["a"], "b"),
        node("Conv", ["b", "grouped"], "c", group=2),
        node("Relu", ["c"], "d"),
        node("Conv", ["d", "shared"], "e"),
        node("Conv", ["e", "shared"], "f"),
        node("Conv", ["f", "depthwise"], "g", group=4),
        node("GlobalAveragePool", ["g"], "h"),
        node("Flatten", ["h"], "i"),
        node("Gemm", ["i", "turned", "bias"], "j", transB=1),
        node("MatMul", ["j", "matrix"], "y"),
    ]
    params = {
        "strided": alike(6, 3, 2, 3),
        "grouped": alike(4, 3, 1, 1),
        "shared": alike(4, 4, 1, 1),
        "depthwise": alike(4, 1, 1, 1),
        "turned": alike(7, 4),
        "bias": alike(7),
        "matrix": alike(7, 2),
    }
    model = build(nodes, params, input_shape=("N", 3, 8, 8), outputs=["y"])
    batch = {"x": RANDOM.uniform(0, 1, (4, 3, 8, 8)).astype(np.float32)}
    config = replace(MIN_MAX, granularity=granularity, **changed)
    return model, calibrate(model, [batch], config), batch, config


def test_a_product_saturates_pair_by_pair():
    x, w = RANDOM.integers(0, 256, (3, 2, 7)), RANDOM.integers(-128, 128, (7, 4))
    expected = np.zeros((3, 2, 4), np.int64)
    for at in product(range(3), range(2), range(4)):
        terms = [int(a) * int(b) for a, b in zip(x[at[:2]], w[:, at[2]], strict=True)] + [0]
        expected[at] = sum(min(max(terms[i] + terms[i + 1], -32768), 32767) for i in range(0, 8, 2))
    assert np.any(expected != x @ w)
    found = saturating_product(jnp.asarray(x, np.int32), jnp.asarray(w, np.int32))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_plain_session_computes_what_is_emulated_or_exact_sums(granularity):
    """Which of the two depends on the processor; where pairs do not saturate, all three are one."""
    model, encodings, batch, _ = network(granularity=granularity)
    quantized = insert_qdq(model, encodings)
    fused = fuse_quantized(quantized)[0]
    emulated = without_vnni(fused)
    assert [n.output for n in emulated.graph.nodes if n.domain == "ptqjax.saturating"] == [
        each.output for each in saturating_weights(fused)
    ]
    (saturated,), (exact,) = (apply(each.graph, each.params, batch).values() for each in (emulated, fused))
    assert np.any(np.asarray(saturated) != np.asarray(exact))
    (plain,) = run(session(quantized, exact=False), batch).values()
    assert np.array_equal(plain, saturated if saturates_here() else exact)
    assert np.array_equal(run(session(quantized), batch)["y"], exact)


def test_an_operator_on_uint8_alone_is_emulated_by_its_terms():
    """QGemm, which a MatMul with a bias or a Gemm becomes, against sums by hand; zero points count exactly."""
    w = np.array([[127, -128], [127, -128], [5, 100]], np.int8)
    x = np.array([[255, 255, 255], [3, 2, 1]], np.uint8)
    params = {"w": w, "s": np.ones((), np.float32), "zx": np.uint8(7), "zw": np.int8(2)}
    gemm = replace(node("QGemm", ["x", "s", "zx", "w", "s", "zw"], "y"), domain="com.microsoft")
    model = build([gemm], params, input_shape=(2, 3), outputs=["y"], dtype=np.uint8)
    emulated = without_vnni(model)
    pairs = np.array([[32767, -32768], [3 * 127 + 2 * 127, -5 * 128]]) + x[:, 2:].astype(int) * w[2]
    expected = pairs - 7 * w.astype(int).sum(0) - 2 * x.astype(int).sum(1, keepdims=True) + 3 * 7 * 2
    assert np.array_equal(apply(emulated.graph, emulated.params, {"x": x})["y"], expected)


def test_a_pair_moves_to_the_nearest_one_that_does_not_saturate():
    quotients = RANDOM.uniform(-140, 140, (200, 1, 2)).astype(np.float32)
    codes = np.clip(np.round(quotients), -128, 127)
    moved = without_saturation(codes, quotients)
    assert saturates(codes).any()
    assert not saturates(moved).any()
    assert np.array_equal(moved[~saturates(codes)], codes[~saturates(codes)])
    assert (np.abs(moved) <= np.abs(codes)).all()
    every = np.array([pair for pair in product(range(-128, 128), repeat=2) if abs(sum(pair)) <= 128])
    for found, wanted in zip(moved[:, 0], quotients[:, 0], strict=True):
        assert np.square(found - wanted).sum() <= np.square(every - wanted).sum(-1).min() * 1.0001


@pytest.mark.parametrize("shared", [False, True])
def test_scales_are_raised_where_that_is_better_than_to_move_weights(shared):
    terms = np.concatenate([alike(4, 9), RANDOM.normal(size=(3, 9)).astype(np.float32)])
    scale = np.abs(terms).max(1, keepdims=True) / 127
    scale = scale.max(keepdims=True) if shared else scale
    found = fitted(terms, scale, -128.0)
    assert found.factor.shape == scale.shape
    assert np.all((found.factor >= 1) & (found.factor <= 2))
    assert np.any(found.factor > 1)

    def error(factor):
        pairs, step = paired(terms), (scale * factor)[..., None]
        rounded = np.clip(np.round(pairs / step), -128, 127)
        count = np.where(saturates(rounded)[..., None], WEIGHT_OF_MOVES, 1)
        each = np.square(count * (without_saturation(rounded, pairs / step) * step - pairs)).sum((1, 2))
        return each.sum(keepdims=True) if shared else each

    assert np.allclose(found.error[:, 0], error(found.factor), rtol=1e-4)
    assert np.all(found.error[:, 0] <= 1.0001 * np.minimum(error(1), error(2)))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_no_pair_of_fitted_weights_saturates_and_a_plain_session_is_exact(granularity, tmp_path):
    model, encodings, batch, config = network(granularity=granularity)
    assert set(saturating_layers(model, encodings, config)) == {"strided", "grouped", "shared", "turned", "matrix"}
    pairs = fit_pairs(model, encodings)
    changed = pairs.applied(model)
    assert saturating_layers(changed, pairs.encodings, config) == ()
    export(changed, pairs.encodings, tmp_path, "m")
    file = tmp_path / "m.onnx"
    assert may_saturate(file) == ()
    plain, exact = (run(session(file, exact=flag), batch)["y"] for flag in (False, True))
    simulated = ptqjax.simulate(changed, pairs.encodings, arithmetic="integer")
    assert np.array_equal(plain, exact)
    assert np.array_equal(plain, simulated(changed.params, pairs.encodings, batch)["y"])


def test_only_what_saturates_changes_and_each_change_is_told():
    model, encodings, _, _ = network()
    pairs = fit_pairs(model, encodings)
    assert {record.where[0] for record in pairs.report if record.done} == set(pairs.weights)
    assert "depthwise" not in pairs.weights
    for name, weight in pairs.weights.items():
        grid, old = pairs.encodings[name], np.asarray(model.params[name])
        assert np.all(grid.scale >= encodings[name].scale)
        moved = weight != old
        assert np.allclose(weight[moved], np.asarray(fake_quantize(weight, grid))[moved], rtol=1e-6)
        assert np.all(np.abs(quantize(weight, grid)) <= np.abs(quantize(old, grid)))
    again = fit_pairs(pairs.applied(model), pairs.encodings)
    assert again.weights == {}
    assert again.report == ()


def test_integers_with_a_zero_point_are_stored_as_uint8_on_the_same_grid():
    model, encodings, _, config = network()
    encodings["turned"] = encodings["turned"].replace(zero_point=np.full(7, 60, np.float32))
    pairs = fit_pairs(model, encodings)
    old, new = encodings["turned"], pairs.encodings["turned"]
    assert (new.dtype, "turned" in pairs.weights) == ("uint8", False)
    weight = np.asarray(model.params["turned"])
    assert np.array_equal(dequantize(quantize(weight, old), old), dequantize(quantize(weight, new), new))
    assert saturating_layers(pairs.applied(model), pairs.encodings, config) == ()


def test_given_encodings_stay_and_the_warning_names_them():
    model, encodings, _, config = network()
    pairs = fit_pairs(model, encodings, kept={"matrix"})
    assert pairs.encodings["matrix"] is encodings["matrix"]
    (left,) = [record for record in pairs.report if not record.done]
    assert left.where[0] == "matrix"
    assert saturating_layers(pairs.applied(model), pairs.encodings, config) == ("matrix",)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_grids_of_an_earlier_run_give_the_same_integers_again(granularity):
    model, encodings, _, _ = network(granularity=granularity)
    once = fit_pairs(model, encodings)
    again = fit_pairs(model, once.encodings, kept=set(once.encodings))
    assert again.encodings == once.encodings
    for name, grid in once.encodings.items():
        if name in model.params:
            one, two = (np.asarray(each.weights.get(name, model.params[name])) for each in (once, again))
            assert np.array_equal(quantize(one, grid), quantize(two, grid))


@pytest.mark.parametrize("changed", [{"target": "tensorrt", "activations": "int8"}, {"activations": "uint16"}])
def test_where_nothing_is_added_in_pairs_nothing_changes(changed):
    settings: dict[str, Any] = {"activations_symmetric": True} if "target" in changed else {}
    model, encodings, _, config = network(**changed, **settings)
    pairs = pairs_for(config, model, encodings)
    assert (pairs.weights, pairs.report) == ({}, ())
    assert saturating_layers(model, encodings, config) == ()


@pytest.mark.parametrize("correct", ["none", "empirical"])
def test_quantize_fits_weights_and_corrects_what_that_leaves(correct):
    model, _, batch, _ = network()
    config = replace(MIN_MAX, correct=correct)
    result = ptqjax.quantize(model, [batch], config)
    assert saturating_layers(result.model, result.encodings, config) == ()
    assert any(record.transform == "fit_pairs" for record in result.reports["correct"])
    assert result.stages[-1].model is result.model


@pytest.mark.parametrize("method", ["empirical", "analytic"])
def test_the_mean_error_of_moved_weights_is_corrected(method):
    """Against the weights that the float model has: a layer that lost a third of them, with inputs of mean 1."""
    nodes = [
        node("Conv", ["x", "eye"], "c"),
        node("BatchNormalization", ["c", "one", "one", "zero", "one"], "n", epsilon=0.0),
        node("Conv", ["n", "w", "b"], "y"),
    ]
    params = {"one": np.ones(2), "zero": np.zeros(2), "w": alike(3, 2, 1, 1), "b": np.zeros(3)}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    params["eye"] = np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1)
    model = build(nodes, params, input_shape=("N", 2, 4, 4), outputs=["y"])
    batch = {"x": RANDOM.normal(size=(64, 2, 4, 4)).astype(np.float32)}
    folded, _ = ptqjax.fold_batch_norms(model)
    encodings = calibrate(folded, [batch], replace(MIN_MAX, weights="int16"))
    moved = {"w": np.asarray(folded.params["w"]) * np.float32(0.7)}
    encodings = {name: grid for name, grid in encodings.items() if name == "w"}
    corrected, _ = correct_biases(folded, encodings, [batch], method=method, weights=moved)
    assert np.allclose(np.asarray(corrected.params["w"]), moved["w"])
    outputs = [np.asarray(apply(each.graph, each.params, batch)["y"]).mean((0, 2, 3)) for each in (folded, corrected)]
    assert np.allclose(*outputs, atol=0.05)
    assert not np.allclose(outputs[0], 0.7 * outputs[0], atol=0.1)  # what it would be


def test_the_probe_agrees_with_the_processor():
    file = Path("/proc/cpuinfo")
    flags = file.read_text(encoding="utf-8") if file.exists() else ""
    if "avx2" not in flags:
        pytest.skip("no AVX2: other kernels")
    assert saturates_here() == ("vnni" not in flags)


def test_a_file_that_is_no_quantized_model_may_not_saturate(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    assert may_saturate(tmp_path / "m.onnx") == ()
    model, encodings, _, _ = network()
    export(model, encodings, tmp_path, "q")
    found = {each.weight.removesuffix("_quantized") for each in may_saturate(tmp_path / "q.onnx")}
    assert found >= {"strided", "grouped", "shared", "turned", "matrix"}
    assert may_saturate(read(tmp_path / "q.onnx"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A file whose sums may saturate, of a target that lets them, and one of the default target; with what was said."""
    place = tmp_path_factory.mktemp("saturation")
    model, _, batch, _ = network()
    onnx_io.write(model, place / "m.onnx")
    np.savez(place / "data.npz", x=batch["x"])
    text = (resources.files("ptqjax.targets") / "ort-cpu.toml").read_text(encoding="utf-8")
    (place / "free.toml").write_text(text.replace("pairs_in_16_bits = true", ""), encoding="utf-8")
    options = ["--calibration", place / "data.npz", "--no-equalize", "--report", "short", "--no-cache"]
    said = {
        target: command("quantize", place / "m.onnx", *options, "--out", place / out, "--target", target)
        for out, target in (("free", place / "free.toml"), ("fitted", "ort-cpu"))
    }
    return place, dict(zip(("free", "fitted"), said.values(), strict=True))


def command(*arguments: object) -> click.testing.Result:
    found = click.testing.CliRunner().invoke(commands, [str(each) for each in arguments])
    assert found.exit_code == 0, found.output
    return found


@pytest.mark.parametrize(("out", "told"), [("free", True), ("fitted", False)])
def test_quantize_tells_in_a_line_and_in_the_report_where_sums_may_saturate(quantized, out, told):
    place, said = quantized
    assert len([line for line in said[out].output.splitlines() if "without VNNI" in line]) == told
    report = json.loads((place / out / "report.json").read_text(encoding="utf-8"))
    assert bool(report["saturating"]) == told
    assert bool([each for each in report["recommendations"] if each["reason"] == "saturating sums"]) == told
    rows = [stage["stage"] for stage in report["stages"]]
    assert ("plain session" in rows) == (told and saturates_here())


@pytest.mark.parametrize(("out", "told"), [("free", True), ("fitted", False)])
def test_evaluate_has_the_figure_of_the_plain_session_and_beside_it_that_of_exact_sums(
    quantized, out, told, monkeypatch
):
    """Where they may differ: so it does anywhere here, for the answer of the processor is put in its place."""
    place, _ = quantized
    monkeypatch.setattr(importlib.import_module("ptqjax.agreement"), "saturates_here", lambda: True)
    file, data = place / out / "model.onnx", place / "data.npz"
    found = command("evaluate", file, "--data", data, "--reference", place / "m.onnx")
    assert ("plain session" in found.stdout, "exact sums" in found.stdout) == (told, told)
    assert len([line for line in found.output.splitlines() if "without VNNI" in line]) == told
    plain, *exact = next(line.split()[2:] for line in found.stdout.splitlines() if line.startswith("SQNR"))
    of_file = ptqjax.evaluate(file, [dict(np.load(data))], reference=place / "m.onnx")
    assert plain == f"{of_file.sqnr:.2f}"
    assert (len(exact) == 1) == told
    assert not told or float(exact[0]) >= float(plain)
