"""Files that torch's exporters write of the networks that people use compute here what they compute elsewhere."""

import numpy as np
import onnx
import pytest

from ptqjax.onnx_io import read
from tests.real_files import compare, outputs_here

pytest.importorskip("torch", reason="torch, whose exporters make the files, is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx needs, is not installed")

from tests.exports.exporters import captured, computed_by_torch, traced
from tests.exports.networks import NETWORKS, TRAINED

_TOLERANCE = 1e-4  # float32 sums in another order: a few units in the last place (1e-7) per layer; this is a wide bar
_BATCHES = (1, 5)
_QUICK = {"ResNet-18", "DeepLabV3", "LSTM tagger", "BERT", "GPT"}
"""The others take half a minute each where they are captured; where they are traced, which is quicker, they stay."""
_TRACED = [(name, how) for name, network in NETWORKS.items() for how in network.traced]


def _captured(name):
    return pytest.param(name, marks=[] if name in _QUICK else [pytest.mark.slow])


def _assert_same_as_runtime(file, network):
    found = compare(file, network.inputs, _BATCHES)
    assert max(found.differences.values()) < _TOLERANCE
    assert found.rewritten < _TOLERANCE


@pytest.mark.parametrize("name", [_captured(name) for name in NETWORKS])
def test_a_captured_graph_computes_what_onnx_runtime_computes_optimized_or_not(name):
    for file in captured(NETWORKS[name]).values():
        _assert_same_as_runtime(file, NETWORKS[name])


@pytest.mark.parametrize(("name", "how"), _TRACED)
def test_a_traced_graph_computes_what_onnx_runtime_computes(name, how):
    _assert_same_as_runtime(traced(NETWORKS[name], how), NETWORKS[name])


@pytest.mark.parametrize("name", TRAINED)
def test_a_graph_traced_in_training_computes_what_torch_computes_in_training(name):
    network = NETWORKS[name]
    file = traced(network, "traced in training")
    norms = [node for node in onnx.load_from_string(file).graph.node if node.op_type == "BatchNormalization"]
    assert all(any(a.name == "training_mode" and a.i == 1 for a in norm.attribute) for norm in norms)
    model = read(file)
    for batch in _BATCHES:
        found = list(outputs_here(model, network.inputs(batch)).values())
        for value, expected in zip(found, computed_by_torch(network, batch, training=True), strict=True):
            np.testing.assert_allclose(value, expected, rtol=0, atol=_TOLERANCE * np.abs(expected).max())
