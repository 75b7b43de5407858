"""Exported real models compute in ONNX Runtime what is simulated: each tensor alone, and from the inputs to the end.

The bars are those of `scripts/bench_validation.py`, which measures all models. Found (x86 with fused multiply-add):
every integer equal but for one behind a LayerNormalization, and what follows it.
"""

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"

CASES = [
    ("mlperf_resnet8_cifar10", "tensor", 14),
    ("mlperf_resnet8_cifar10", "channel", 14),
    pytest.param("resnet20_cifar10", "tensor", 30, marks=pytest.mark.slow),
    ("resnet20_cifar10", "channel", 30),
    pytest.param("mlperf_vww_mobilenet_v1_0.25_96", "tensor", 29, marks=pytest.mark.slow),
    pytest.param("mlperf_vww_mobilenet_v1_0.25_96", "channel", 29, marks=pytest.mark.slow),
    pytest.param("mobilenet_v1_0.25_224", "tensor", 29, marks=pytest.mark.slow),
    pytest.param("squeezenet_v1.1", "channel", 27, marks=pytest.mark.slow),
    pytest.param("tiny_vit_cifar10", "channel", 23, marks=pytest.mark.slow),
    ("mlperf_ad01_autoencoder", "tensor", 10),
    ("other/mnist_cntk", "channel", 3),
    ("other/superresolution_core_op18", "tensor", 4),
    pytest.param("other/silero_vad_16k_op15", "channel", 6, marks=pytest.mark.slow),
]
"""Model, granularity, and how many of its tensors the runtime computes in integers."""


@pytest.fixture(scope="module")
def bench(shared):
    """The script, as a module; `shared` holds its models."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("bench_validation")
    finally:
        sys.path.remove(str(SCRIPTS))


def settings(granularity, **more):
    return {"granularity": granularity, "scaling": "weights", "ranges": "min-max", "correct": "none", **more}


@pytest.mark.parametrize(("name", "granularity", "num_integer"), CASES)
def test_a_real_model_is_what_is_simulated(bench, name, granularity, num_integer):
    num_samples = 8 if "vit" in name else 2  # one of 16,384 rounds otherwise behind a LayerNormalization in float
    finding = bench.validated(name, settings(granularity), num_samples)
    assert bench.missed(finding) == []
    assert sum(group.integer for group in finding.found.groups) == num_integer
    assert finding.found.unverified == ()
    assert not [warning for warning in finding.found.warnings if "VNNI" not in warning]


def test_with_weights_of_seven_bits_nothing_saturates(bench):
    finding = bench.validated("mlperf_resnet8_cifar10", settings("channel", weights="int7", target="ort-cpu-avx2"), 2)
    assert finding.found.saturating == ()
    assert finding.found.warnings == ()
    assert bench.missed(finding) == []
