"""The bench of encodings, on a few samples of a small network: every part prints its table."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("bench_encodings")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A convolution of the bench's pictures, and a mean."""
    w = np.random.default_rng(0).normal(size=(4, 3, 7, 7)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[8, 8]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["y"]),
    ]
    ends = (("x", ["n", 3, 224, 224]), ("y", ["n", 4, 1, 1]))
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in ends)
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(w, "w")])
    path = tmp_path / "model.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_every_part_prints_its_figures(bench, network: Path, tmp_path: Path) -> None:
    samples = bench.pictures(3, tmp_path)
    aimet = bench.Aimet(None, network, samples)
    assert aimet.ask("all") is None
    assert "- ptqjax: 0." in "\n".join(bench.weights_part(network, aimet, rounds=1))
    table = "\n".join(bench.schemes_part(network, samples, rounds=1))
    assert all(f"| {scheme} | " in table for scheme in bench.SCHEMES)


def test_a_child_measures_time_and_memory_of_both_calibrators(bench, network: Path, tmp_path: Path) -> None:
    samples = bench.pictures(2, tmp_path)
    lines = bench.calibration_part(network, samples, bench.Aimet(None, network, samples), rounds=1, with_ort=True)
    rows = [line for line in lines if line.startswith(("| ptqjax", "| ONNX Runtime"))]
    assert len(rows) == 2
    assert all(float(row.split("|")[4]) > 50 for row in rows)  # MB: no Python with libraries takes less


def test_a_child_that_fails_says_why(bench, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such-file"):
        bench.in_child("ours", tmp_path / "no-such-file.onnx", tmp_path / "none.npy", "sqnr", 1)
