"""Metrics are what their names say, on files and functions alike, whatever the batches."""

import numpy as np
import pytest

from ptqjax import apply, evaluate, onnx_io
from ptqjax.errors import DataError
from ptqjax.evaluate import agreement, predicted, sqnr, top1
from tests.models import build, node

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(20, 6)).astype(np.float32)
W = RANDOM.normal(size=(6, 4)).astype(np.float32)
LABELS = (X @ W).argmax(-1)


def linear(weight):
    return build([node("MatMul", ["x", "w"], "y")], {"w": weight}, input_shape=("n", 6), outputs=["y"])


def function(weight):
    model = linear(weight)
    return lambda batch: apply(model.graph, model.params, batch)


def batches(size):
    return [{"x": X[start : start + size]} for start in range(0, len(X), size)]


def test_metrics_of_arrays():
    logits = np.array([[0.0, 2, 1], [3, 1, 0], [0, 0, 1]])
    assert list(predicted(logits)) == [1, 0, 2]
    assert top1(logits, np.array([1, 0, 0])) == pytest.approx(2 / 3)
    assert agreement(logits, -logits) == 0
    assert sqnr(logits, logits * 0.9) == pytest.approx(20)
    assert sqnr(logits, logits) == float("inf")


@pytest.mark.parametrize("size", [1, 7, 20])
def test_batches_do_not_matter(size):
    whole = evaluate(function(0.9 * W), batches(20), labels=LABELS, reference=function(W))
    found = evaluate(function(0.9 * W), batches(size), labels=LABELS, reference=function(W))
    assert (found.num_samples, found.top1, found.agreement) == (20, 1.0, 1.0)
    assert found.sqnr == pytest.approx(whole.sqnr)
    assert found.sqnr == pytest.approx(20, abs=1e-3)


def test_a_file_and_a_function_give_the_same(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_io.to_proto(linear(-W)).SerializeToString())
    found = evaluate(path, batches(6), labels=LABELS, reference=function(W))
    assert found.top1 == top1(-X @ W, LABELS)
    assert found.agreement == agreement(-X @ W, X @ W)
    assert found.sqnr == pytest.approx(-6.0206, abs=1e-3)  # the error is twice the signal
    assert found.as_dict()["num_samples"] == 20


def test_figures_that_need_more_are_absent():
    found = evaluate(function(W), batches(20))
    assert (found.top1, found.agreement, found.sqnr) == (None, None, None)


@pytest.mark.parametrize(("data", "labels"), [([], None), (batches(20), LABELS[:5]), (batches(10), np.arange(25))])
def test_counts_that_do_not_fit_are_errors(data, labels):
    with pytest.raises(DataError, match="expected at least one sample, and a label for each"):
        evaluate(function(W), data, labels=labels)
