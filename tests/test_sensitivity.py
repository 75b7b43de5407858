"""Sensitivities: the estimate of one pass is what its formula says, and ranks as the exact numbers do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from ptqjax import QuantizationConfig, apply, calibrate, fold_batch_norms, read, sensitivity, simulate
from ptqjax.encodings.encoding import make_encoding
from ptqjax.errors import ConfigError, DataError, ModelError
from ptqjax.experiments import one_pass
from ptqjax.experiments.engine import switched
from ptqjax.experiments.sensitivities import METHODS, ranking
from ptqjax.experiments.tied_tensors import Group, groups_of
from ptqjax.ir import Graph, TensorSpec
from tests.models import build, node

EXAMPLES = Path(__file__).parents[1] / "examples"


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def coarse(scale, dtype="int4"):
    return make_encoding(np.float32(scale), np.float32(0), dtype=dtype)


def noises(found):
    return np.array([each.noise for each in found])


def losses(found):
    return np.array([each.loss for each in found])


def correlation(one, other):
    found: Any = spearmanr(one, other)
    return float(found.statistic)


def total(found):
    return {each.name: each.noise for each in found}


@pytest.fixture(scope="module")
def linear():
    """Products with what only moves values in between: of data on one grid, and of a weight. One output: a sign has
    nothing to average over."""
    nodes = [
        node("MatMul", ["x", "v"], "h"),
        node("Flatten", ["h"], "moved"),
        node("Transpose", ["w"], "turned", perm=(1, 0)),
        node("MatMul", ["moved", "turned"], "y"),
    ]
    params = {"v": normal(6, 8, seed=1), "w": normal(1, 8, seed=2)}
    encodings = {"x": coarse(0.5), "v": coarse(0.2), "w": coarse(0.3), "h": coarse(0.9), "moved": coarse(0.9)}
    model = build(nodes, params, input_shape=("N", 6), outputs=["y"])
    return model, encodings | {"y": coarse(1.1)}, [{"x": normal(4, 6, seed=3)}]


@pytest.fixture(scope="module")
def classes():
    """Two weights side by side, nothing behind them: what one gives does not change the other's rounding."""
    nodes = [node("MatMul", ["x", "v"], "a"), node("MatMul", ["x", "w"], "b"), node("Add", ["a", "b"], "y")]
    params = {"v": normal(6, 3, seed=1), "w": normal(6, 3, seed=2)}
    model = build(nodes, params, input_shape=("N", 6), outputs=["y"])
    return model, {"v": coarse(0.4), "w": coarse(0.3)}


def test_of_a_linear_network_with_one_output_one_pass_is_exact(linear):
    model, encodings, batches = linear
    batches = [*batches, {"x": normal(3, 6, seed=4)}]  # of another size
    found, exact = (sensitivity(model, batches, encodings, method=method) for method in ("one-pass", "on-only"))
    assert [each.tensors for each in found] == [("v",), ("w",), ("x",), ("h", "moved"), ("y",)]
    np.testing.assert_allclose(noises(found), noises(exact), rtol=1e-3)  # float32, of differences
    assert np.all(noises(exact) > 1e-4)


def test_noise_is_that_of_the_outputs_over_their_power(linear):
    model, encodings, batches = linear
    batches = [*batches, {"x": normal(3, 6, seed=4)}]
    found = total(sensitivity(model, batches, encodings, method="on-only"))
    y, rounded = [], []
    alone = switched(encodings, lambda name: name == "v")
    for batch in batches:
        y.append(apply(model.graph, model.params, batch)["y"])
        rounded.append(simulate(model, alone)(model.params, alone, batch)["y"])
    y, rounded = np.concatenate(y), np.concatenate(rounded)
    assert found["v"] == pytest.approx(np.sum((rounded - y) ** 2) / np.sum(y**2), rel=1e-5)


def test_signs_give_the_noise_in_the_mean(classes):
    model, encodings = classes
    batches = [{"x": np.repeat(normal(1, 6, seed=5), 4000, axis=0)}]  # as many draws
    found, exact = (  # labels: the program that the loss needs as well
        sensitivity(model, batches, encodings, method=method, labels="predicted") for method in ("one-pass", "on-only")
    )
    # A square of three signs varies by at most sqrt(4 / 3) of its mean: 4000 draws by 1.8 %.
    np.testing.assert_allclose(noises(found), noises(exact), rtol=0.08)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_count_alike_whatever_their_units(method):
    """Boxes in pixels beside scores: the noise is the mean over outputs, and no unit changes it."""
    nodes = [node("MatMul", ["x", "v"], "scores"), node("MatMul", ["x", "w"], "a"), node("Mul", ["a", "unit"], "boxes")]
    encodings, batches = {"v": coarse(0.4), "w": coarse(0.3)}, [{"x": normal(8, 6, seed=5)}]
    found = []
    for unit in (1, 512):
        params = {"v": normal(6, 3, seed=1), "w": normal(6, 3, seed=2), "unit": np.float32(unit)}
        model = build(nodes, params, input_shape=("N", 6), outputs=["scores", "boxes"])
        found.append(total(sensitivity(model, batches, encodings, method=method)))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert min(found[0].values()) > max(found[0].values()) / 10


@pytest.mark.parametrize("num_samples", [4, 8])  # 8: as many as there are rows
def test_where_samples_lie_along_another_axis_the_mean_is_the_same(linear, num_samples):
    model, encodings, _ = linear
    turned = build(
        [
            node("Transpose", ["x"], "columns", perm=(1, 0)),
            node("MatMul", ["v", "columns"], "h"),
            node("Transpose", ["h"], "rows", perm=(1, 0)),
            node("MatMul", ["rows", "w"], "y"),
        ],
        {"v": np.ascontiguousarray(model.params["v"].T), "w": np.ascontiguousarray(model.params["w"].T)},
        input_shape=("N", 6),
        outputs=["y"],
    )
    own = {"v": encodings["v"], "h": encodings["h"], "w": encodings["w"]}
    same = [{"x": normal(num_samples, 6, seed=3)}]
    exact = noises(sensitivity(turned, same, own, method="on-only"))
    mean = noises(sensitivity(turned, 400 * same, own))
    # The square of a sum of signs varies by at most sqrt(2) of its mean: 400 draws by 7 %; that of `w` not at all.
    np.testing.assert_allclose(mean, exact, rtol=0.25)
    np.testing.assert_allclose(mean[1], exact[1], rtol=1e-3)


def test_to_first_order_what_goes_is_more_by_the_noise_of_the_group_alone(classes):
    model, encodings = classes
    batches = [{"x": normal(5, 6, seed=6)}]
    found = {
        method: noises(sensitivity(model, batches, encodings, method=method, labels="predicted")) for method in METHODS
    }
    # |e|^2 - |e - v|^2 = 2 e v - |v|^2
    np.testing.assert_allclose(found["off-only"], found["one-pass-off"] - found["on-only"], rtol=1e-4)
    assert not np.allclose(found["off-only"], found["on-only"], rtol=0.1)


def test_the_loss_rises_by_first_and_second_order(classes):
    model, encodings = classes
    fine = {name: encoding.replace(scale=np.float32(0.15)) for name, encoding in encodings.items()}
    batches = [{"x": np.repeat(normal(1, 6, seed=5), 4000, axis=0)}]
    labels = np.full(4000, 2)
    found, exact = (
        losses(sensitivity(model, batches, fine, method=method, labels=labels)) for method in ("one-pass", "on-only")
    )
    np.testing.assert_allclose(found, exact, rtol=0.1)  # third order


def test_predicted_labels_are_those_of_the_float_model(classes):
    model, encodings = classes
    batches = [{"x": normal(5, 6, seed=6)}]
    labels = np.asarray(apply(model.graph, model.params, batches[0])["y"]).argmax(1)
    assert len(set(labels)) > 1
    for method in METHODS:
        found = [sensitivity(model, batches, encodings, method=method, labels=of) for of in (labels, "predicted")]
        np.testing.assert_allclose(losses(found[0]), losses(found[1]), rtol=1e-6)
        other = sensitivity(model, batches, encodings, method=method, labels=(labels + 1) % 3)
        assert not np.allclose(losses(found[0]), losses(other), rtol=0.1)


@pytest.mark.parametrize("method", ["one-pass", "on-only"])
def test_the_loss_is_that_of_the_graphs_first_output_whatever_its_name(classes, method):
    model, encodings = classes
    batches = [{"x": normal(5, 6, seed=6)}]
    square = node("Mul", ["y", "y"], "Squares")
    with_square = build([*model.graph.nodes, square], model.params, input_shape=("N", 6), outputs=["y", "Squares"])
    found, alone = (
        losses(sensitivity(each, batches, encodings, method=method, labels=np.full(5, 1)))
        for each in (with_square, model)
    )
    np.testing.assert_allclose(found, alone, rtol=1e-4)


def test_a_weight_that_a_branch_reads_is_followed_into_it():
    def branch(name):
        return Graph(
            name=name,
            inputs=(),
            outputs=(TensorSpec(name=name, dtype=np.dtype(np.float32), shape=None),),
            nodes=(node("MatMul", ["x", "w"], name),),
        )

    nodes = [
        node("ReduceSum", ["x"], "sum", keepdims=0),
        node("Greater", ["sum", "zero"], "is_positive"),
        node("If", ["is_positive"], "y", then_branch=branch("then"), else_branch=branch("else")),
    ]
    params = {"w": normal(6, 1, seed=2), "zero": np.float32(0)}
    model = build(nodes, params, input_shape=("N", 6), outputs=["y"])
    found, exact = (
        noises(sensitivity(model, [{"x": normal(4, 6, seed=3)}], {"w": coarse(0.3)}, method=method))
        for method in ("one-pass", "on-only")
    )
    np.testing.assert_allclose(found, exact, rtol=1e-3)
    assert np.all(exact > 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_enabled_brings_nothing(linear, method):
    model, encodings, batches = linear
    groups = groups_of(model, encodings)
    off = switched(encodings, lambda name: name not in {"v", "h", "moved"})
    found = total(sensitivity(model, batches, off, method=method, groups=groups))
    assert found["v"] == found["h"] == 0
    assert found["w"] != 0
    assert [each.name for each in sensitivity(model, batches, off, method=method)] == ["w", "x", "y"]


def test_one_pass_does_not_depend_on_what_else_is_rounded(linear):
    model, encodings, batches = linear
    groups = groups_of(model, encodings)[:1]
    off = switched(encodings, lambda name: name == "v")
    found = [sensitivity(model, batches, of, groups=groups) for of in (encodings, off)]
    assert found[0] == found[1]


def test_a_coarser_grid_brings_more(linear):
    model, encodings, batches = linear
    before = total(sensitivity(model, batches, encodings))
    for name, more in {"v": ("v",), "w": ("w",), "x": ("x",), "h": ("h", "moved")}.items():
        coarser = encodings | {tensor: coarse(4 * encodings[tensor].scale) for tensor in more}
        after = total(sensitivity(model, batches, coarser))
        assert after[name] > 1.5 * before[name]
        assert all(after[other] == pytest.approx(before[other], rel=1e-5) for other in before if other != name)


def test_widths_scales_and_switches_are_values_of_one_program(linear, monkeypatch):
    model, encodings, batches = linear
    groups = groups_of(model, encodings)
    sensitivity(model, batches, encodings, groups=groups)

    def traced(*_, **__):
        raise AssertionError("traced anew")

    monkeypatch.setattr(one_pass, "interpret", traced)
    other = {name: coarse(0.1, "int8") for name in encodings} | {"x": coarse(0.7).replace(enabled=np.asarray(False))}
    sensitivity(model, batches, other, groups=groups, seed=1)
    with pytest.raises(AssertionError, match="traced anew"):
        sensitivity(model, [{"x": normal(2, 6)}], other, groups=groups)


@pytest.fixture(scope="module")
def digits():
    model, _ = fold_batch_norms(read(EXAMPLES / "digits.onnx"))
    samples = np.load(EXAMPLES / "digits_calibration.npz")["input"]
    batches = [{"input": samples[:64]}]
    return model, batches, calibrate(model, batches)


def test_one_pass_ranks_the_digits_network_as_exact_numbers_do(digits):
    model, batches, encodings = digits
    found, exact = (
        sensitivity(model, batches, encodings, method=method, labels="predicted") for method in ("one-pass", "on-only")
    )
    assert correlation(noises(found), noises(exact)) >= 0.9
    assert correlation(losses(found), losses(exact)) >= 0.8
    assert ranking(found)[0].name == ranking(exact)[0].name
    error = 10 * np.log10(noises(found) / noises(exact))
    assert np.max(np.abs(error)) < 3  # dB; 64 samples


def test_one_pass_ranks_resnet20_as_exact_numbers_do(shared):
    model, _ = fold_batch_norms(read(shared / "models" / "resnet20_cifar10.onnx"))
    samples = np.load(shared / "data" / "cifar10" / "calibration.npz")["input"]
    batches = [{"input": samples[:16]}]
    encodings = calibrate(model, batches, QuantizationConfig(weights="int4"))
    found, exact = (sensitivity(model, batches, encodings, method=method) for method in ("one-pass", "on-only"))
    assert correlation(noises(found), noises(exact)) >= 0.8


def test_sqnr_is_the_noise_in_decibels(linear):
    model, encodings, batches = linear
    (found,) = sensitivity(model, batches, encodings, groups=groups_of(model, encodings)[:1])
    assert found.noise == pytest.approx(10 ** (-found.sqnr_db / 10))
    off = switched(encodings, lambda _: False)
    (none,) = sensitivity(model, batches, off, groups=groups_of(model, encodings)[:1])
    assert none.sqnr_db == float("inf")


def test_ranking_goes_from_the_largest_to_the_smallest(linear):
    model, encodings, batches = linear
    found = sensitivity(model, batches, encodings)
    ranked = ranking(found)
    assert set(ranked) == set(found)
    assert list(noises(ranked)) == sorted(noises(found), reverse=True)
    with pytest.raises(ConfigError, match="call sensitivity with labels"):
        ranking(found, by="loss")


@pytest.mark.parametrize("method", METHODS)
def test_labels_are_one_class_for_each_sample(classes, method):
    model, encodings = classes
    batches = [{"x": normal(5, 6)}]
    for labels in (np.zeros(4, int), np.zeros(6, int), np.full(5, 3)):
        with pytest.raises(DataError, match="labels"):
            sensitivity(model, batches, encodings, method=method, labels=labels)


def test_what_does_not_fit_is_an_error(linear):
    model, encodings, batches = linear
    with pytest.raises(ConfigError, match="method='exact'"):
        sensitivity(model, batches, encodings, method="exact")
    with pytest.raises(ConfigError, match="other"):
        sensitivity(model, batches, encodings | {"other": coarse(1)})
    with pytest.raises(ConfigError, match="group 'z': its tensor 'z' has no encoding"):
        sensitivity(model, batches, encodings, groups=[Group(name="z", kind="weight", tensors=("z",))])
    both = [Group(name="v", kind="weight", tensors=("v",)), Group(name="w", kind="weight", tensors=("w", "v"))]
    with pytest.raises(ConfigError, match=r"groups 0 and 1 \('v', 'w'\) both have the tensor 'v'"):
        sensitivity(model, batches, encodings, groups=both)
    with pytest.raises(ConfigError, match="labels='own'"):
        sensitivity(model, batches, encodings, labels="own")
    with pytest.raises(DataError, match="batches is empty"):
        sensitivity(model, [], encodings)
    with pytest.raises(ModelError, match="not 0 everywhere"):
        sensitivity(model, [{"x": np.zeros((4, 6), np.float32)}], encodings)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_needs_a_floating_output(method):
    nodes = [node("MatMul", ["x", "w"], "h"), node("ArgMax", ["h"], "y", axis=1)]
    model = build(nodes, {"w": normal(6, 3)}, input_shape=("N", 6), outputs=["y"])
    with pytest.raises(ModelError, match="floating"):
        sensitivity(model, [{"x": normal(2, 6)}], {"w": coarse(0.3)}, method=method)


def test_without_groups_there_is_nothing_to_tell(linear):
    model, _, batches = linear
    assert sensitivity(model, batches, {}) == ()
