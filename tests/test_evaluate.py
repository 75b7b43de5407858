"""Metrics are what their names say, on files and functions alike, whatever the batches."""

import numpy as np
import pytest

from ptqjax import apply, evaluate, onnx_io
from ptqjax.errors import DataError, ModelError
from ptqjax.evaluation import agreement, predicted, sqnr, top1
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


@pytest.mark.parametrize(("data", "labels"), [([], None), (batches(20), LABELS[:5]), (batches(10), np.zeros(25, int))])
def test_counts_that_do_not_fit_are_errors(data, labels):
    with pytest.raises(DataError, match="expected at least one sample, and a label for each"):
        evaluate(function(W), data, labels=labels)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (LABELS[:, None], r"shape \(20, 1\); expected one class index per sample.*reshape\(-1\)"),
        (np.eye(4)[LABELS], r"shape \(20, 4\).*argmax\(1\)"),
        (np.array(list("abcd"))[LABELS], "type <U1 and holds .*; expected whole numbers"),
        (LABELS + 0.5, "float64 .*; expected whole numbers"),
        (np.where(LABELS == 0, np.nan, LABELS), "expected whole numbers"),
        (LABELS == 0, "type bool"),
        (LABELS + 1, "expected 0 to 3: the model has 4 classes"),
        (LABELS - 1, "holds -1 for sample .*; expected 0 to 3"),
        (np.array(3), "single value"),
    ],
)
def test_labels_that_are_no_class_indices_are_errors(labels, words):
    with pytest.raises(DataError, match=words):
        evaluate(function(W), batches(20), labels=labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64, np.float32])
def test_labels_may_be_whole_numbers_of_any_type(dtype):
    assert evaluate(function(W), batches(7), labels=LABELS.astype(dtype)).top1 == 1.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["model", "reference"])
def test_an_output_that_is_not_finite_is_an_error(value, part):
    def broken(batch):
        y = batch["x"] @ W
        return {"y": np.where(batch["x"][:, :1] == X[9, 0], np.float32(value), y)}

    parts = {"model": function(W), "reference": function(W)} | {part: broken}
    with pytest.raises(ModelError, match=rf"the {part}: output 'y' of batch 1 holds {value} at \(2, 0\)"):
        evaluate(parts["model"], batches(7), reference=parts["reference"])


def test_an_empty_batch_is_an_error():
    with pytest.raises(DataError, match=r"batch 1: input 'x' has no samples \(shape \(0, 6\)\)"):
        evaluate(function(W), [{"x": X}, {"x": X[:0]}])


@pytest.mark.parametrize("other", [W[:5], W[:, :3]], ids=["inputs", "outputs"])
def test_a_reference_that_does_not_fit_is_named(tmp_path, other):
    model = build([node("MatMul", ["x", "w"], "y")], {"w": other}, input_shape=("n", other.shape[0]), outputs=["y"])
    path = tmp_path / "other.onnx"
    path.write_bytes(onnx_io.to_proto(model).SerializeToString())
    with pytest.raises(DataError, match=r"the reference '.*other\.onnx'"):
        evaluate(function(W), batches(7), reference=path)
    with pytest.raises(DataError, match=r"the model '.*other\.onnx'"):
        evaluate(path, batches(7), reference=function(W))
