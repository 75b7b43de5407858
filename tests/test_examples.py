"""The digits example: its ONNX file is the network that was trained, and shows what equalization is for."""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import ptqjax

EXAMPLES = Path(__file__).parents[1] / "examples"


EPOCHS = 10  # of 40: compiled once for all tests


@pytest.fixture(scope="module")
def train_digits():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import train_digits  # noqa: PLC0415  (found only with the path above)
    finally:
        sys.path.remove(str(EXAMPLES))
    return train_digits


@pytest.fixture(scope="module")
def evaluation():
    return dict(np.load(EXAMPLES / "digits_evaluation.npz"))


def in_onnxruntime(file, x):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]


def top1(logits, labels):
    return 100 * np.mean(logits.argmax(1) == labels)


@pytest.fixture(scope="module")
def trained(train_digits):
    digits = train_digits.load()
    variables = train_digits.train(digits.train, digits.train_labels, epochs=EPOCHS)
    return digits, variables, train_digits.to_onnx(variables)


def test_training_learns(trained, train_digits):
    digits, variables, _ = trained
    logits = train_digits.predict(variables, digits.evaluation)
    assert top1(logits, digits.evaluation_labels) > 60  # a quarter of the epochs; chance is 10


def test_the_onnx_file_is_the_trained_network_in_every_runtime(trained, train_digits):
    digits, variables, proto = trained
    x = digits.evaluation[:64]
    model = ptqjax.read(proto)
    expected = train_digits.predict(variables, x)
    # float32 sums in another order: some 1e-6 of the largest logit
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(in_onnxruntime(proto.SerializeToString(), x), expected, atol=tolerance)
    np.testing.assert_allclose(
        ptqjax.apply(model.graph, model.params, {"input": x})["output"], expected, atol=tolerance
    )


def test_training_is_repeatable(trained, train_digits):
    digits, _, proto = trained
    again = train_digits.train(digits.train, digits.train_labels, epochs=EPOCHS)
    assert train_digits.to_onnx(again) == proto


def test_held_out_digits_are_not_trained_on(train_digits):
    digits = train_digits.load()
    # the arrays have one row per picture, so a shared row is a shared picture (scikit-learn's set has no duplicates)
    rows = {picture.tobytes() for picture in digits.train}
    assert not any(picture.tobytes() in rows for picture in digits.evaluation)


def test_shipped_files_are_small_and_belong_together(train_digits, evaluation):
    digits = train_digits.load()
    calibration = np.load(EXAMPLES / "digits_calibration.npz")
    np.testing.assert_array_equal(calibration["input"], digits.train[: len(calibration["input"])])
    np.testing.assert_array_equal(evaluation["input"], digits.evaluation)
    np.testing.assert_array_equal(evaluation["labels"], digits.evaluation_labels)
    assert (EXAMPLES / "digits.onnx").stat().st_size < 300_000
    assert {"BatchNormalization", "Clip"} <= {node.op_type for node in onnx.load(EXAMPLES / "digits.onnx").graph.node}


def test_equalization_recovers_what_one_scale_per_tensor_loses(evaluation, tmp_path):
    model = ptqjax.read(EXAMPLES / "digits.onnx")
    batches = [{"input": np.load(EXAMPLES / "digits_calibration.npz")["input"]}]

    def exported(**settings):
        result = ptqjax.quantize(model, batches, ptqjax.QuantizationConfig(granularity="tensor", **settings))
        ptqjax.export(result.model, result.encodings, tmp_path, "digits")
        return top1(in_onnxruntime(str(tmp_path / "digits.onnx"), evaluation["input"]), evaluation["labels"])

    before = top1(in_onnxruntime(str(EXAMPLES / "digits.onnx"), evaluation["input"]), evaluation["labels"])
    assert before > 97
    assert exported(equalize=False, correct="none", rounding="nearest") < before - 50
    # 597 digits: the standard error at 98 % is 0.6 points
    assert exported(scaling="noise", rounding="nearest") > before - 1.5
