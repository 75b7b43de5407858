"""The bars on real networks: the exported file in ONNX Runtime, on pictures that took no part in any choice."""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import ptqjax
from ptqjax.agreement import run, session

EXAMPLES = Path(__file__).parents[1] / "examples"
BATCH = 31  # divides the 372 pictures to evaluate on

V1, V2 = "mobilenet_v1_0.25_224", "mobilenet_v2_1.0_224"
QUICK = {"granularity": "tensor", "scaling": "noise"}  # the default goes on to learn, for minutes


class Bar(NamedTuple):
    """What is asked for. Top-1 may lie `lost` and two standard errors of the paired difference below float."""

    network: str
    settings: dict
    has_data: bool
    agreement: float
    decibels: float
    lost: float = 0.0


BARS = [
    Bar(V2, {}, has_data=True, agreement=0.97, decibels=18.5),
    # asked for of the default, which learns: 17.5 dB; found 17.2 without learning and 19.2 with it
    Bar(V2, QUICK, has_data=True, agreement=0.96, decibels=16.5),
    Bar(V2, {"granularity": "tensor"}, has_data=False, agreement=0.955, decibels=16.0),
    Bar(V1, {}, has_data=True, agreement=0.90, decibels=21.0),
    Bar(V1, QUICK, has_data=True, agreement=0.87, decibels=19.0),
    Bar(V1, {"granularity": "tensor"}, has_data=False, agreement=0.85, decibels=16.5),
]


def _case(bar):
    """The larger network compiles for minutes, and so does what is chosen on data."""
    return pytest.param(bar, marks=[pytest.mark.slow] if bar.network == V2 or bar.has_data else [])


class Pictures(NamedTuple):
    calibration: list
    evaluation: list
    labels: np.ndarray


@pytest.fixture(scope="module")
def pictures(shared):
    sys.path.insert(0, str(EXAMPLES))
    try:
        import imagenet_folder as folder  # noqa: PLC0415  (found only with the path above)
    finally:
        sys.path.remove(str(EXAMPLES))
    calibration, evaluation = folder.calibration_and_evaluation(shared / "data" / "imagenet", num_calibration=128)
    preprocessing = folder.PREPROCESSINGS["tf"]
    return Pictures(
        calibration=list(folder.batches(calibration, preprocessing, size=32)),
        evaluation=list(folder.batches(evaluation, preprocessing, size=BATCH)),
        labels=folder.labels(evaluation),
    )


def logits(path, batches):
    runtime = session(path)
    return np.concatenate([run(runtime, batch)["output"] for batch in batches])


def assert_keeps(bar, exact, rounded, labels):
    assert np.mean(exact.argmax(1) == rounded.argmax(1)) >= bar.agreement
    assert 10 * np.log10(np.sum(exact**2) / np.sum((exact - rounded) ** 2)) >= bar.decibels
    right, kept = exact.argmax(1) == labels, rounded.argmax(1) == labels
    lost = right.astype(float) - kept
    assert lost.mean() <= bar.lost + 2 * lost.std(ddof=1) / np.sqrt(len(lost))


@pytest.mark.parametrize("bar", [_case(bar) for bar in BARS])
def test_the_exported_file_keeps_the_accuracy_and_is_what_is_simulated(shared, pictures, tmp_path, bar):
    path = shared / "models" / f"{bar.network}.onnx"
    batches = pictures.calibration if bar.has_data else None
    result = ptqjax.quantize(ptqjax.read(path), batches, ptqjax.QuantizationConfig(**bar.settings))
    ptqjax.export(result.model, result.encodings, tmp_path, "model")
    exact, rounded = logits(path, pictures.evaluation), logits(tmp_path / "model.onnx", pictures.evaluation)
    assert_keeps(bar, exact, rounded, pictures.labels)
    few = [{"input": pictures.evaluation[0]["input"][:2]}]
    found = ptqjax.validate(tmp_path / "model.onnx", few)
    assert sum(group.integer for group in found.groups) >= 29
    assert found.largest <= 1
    assert found.equal >= 0.999


SMALL = [
    # found: 98.4 % and 24.3 dB with top-1 0.3 points lower; 89.9 % and 12.7 dB, 2.7 points
    Bar(
        "resnet20_cifar10", {"granularity": "tensor", "scaling": "noise"}, has_data=True, agreement=0.97, decibels=22.5
    ),
    Bar(
        "resnet20_cifar10",
        {"weights": "int4", "scaling": "noise"},
        has_data=True,
        agreement=0.87,
        decibels=11.5,
        lost=0.02,
    ),
]


@pytest.mark.parametrize("bar", SMALL, ids=["8 bits", "4 bits"])
def test_a_small_network_keeps_its_accuracy(shared, tmp_path, bar):
    """What runs always of the bars above: two batches of pictures to choose on, and a thousand to judge."""
    path = shared / "models" / f"{bar.network}.onnx"
    calibration, evaluation = (
        np.load(shared / "data/cifar10" / f"{part}.npz") for part in ("calibration", "evaluation")
    )
    batches = [{"input": part} for part in np.split(calibration["input"][:64], 2)]
    result = ptqjax.quantize(ptqjax.read(path), batches, ptqjax.QuantizationConfig(**bar.settings))
    ptqjax.export(result.model, result.encodings, tmp_path, "model")
    samples = [{"input": evaluation["input"]}]
    exact, rounded = (logits(file, samples) for file in (path, tmp_path / "model.onnx"))
    assert_keeps(bar, exact, rounded, evaluation["labels"])


@pytest.mark.parametrize("network", [pytest.param(V2, marks=pytest.mark.slow), V1])
def test_equalization_keeps_the_function_on_real_pictures(shared, pictures, network):
    model = ptqjax.read(shared / "models" / f"{network}.onnx")
    equalized, _ = ptqjax.equalize(model)
    few = {"input": pictures.evaluation[0]["input"][:8]}
    before = np.asarray(ptqjax.apply(model.graph, model.params, few)["output"])
    after = np.asarray(ptqjax.apply(equalized.graph, equalized.params, few)["output"])
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()  # asked for; found: 3e-6
