"""Files that others made compute here what they compute in ONNX Runtime."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from ptqjax.onnx_io import read
from tests.real_files import FILES, batches_of, compare, largest_difference, random_inputs

_TOLERANCE = 1e-4  # float32 sums in another order: a few units in the last place (1e-7) per layer; this is a wide bar


@pytest.mark.parametrize("name", FILES)
def test_a_file_computes_what_onnx_runtime_computes_also_when_written_again(shared, name):
    path = shared / "models" / f"{name}.onnx"
    graph = read(path).graph
    found = compare(path.read_bytes(), random_inputs(graph, FILES[name]), batches_of(graph))
    assert max(found.differences.values()) < _TOLERANCE
    assert found.rewritten < _TOLERANCE


def test_every_real_file_is_compared(shared):
    folder = shared / "models"
    assert {f"{path.relative_to(folder).with_suffix('')}" for path in folder.rglob("*.onnx")} == set(FILES)


def test_the_comparison_sees_a_difference_in_every_output():
    expected = {"large": np.array([1e3, 1.0]), "small": np.array([0.0, 1e-3])}
    found = expected | {"small": np.array([1e-6, 1e-3])}
    assert largest_difference(found, expected) == pytest.approx(1e-3)
    with pytest.raises(AssertionError):
        largest_difference({"large": expected["large"]}, expected)
    with pytest.raises(AssertionError):
        largest_difference(found | {"small": found["small"].astype(np.float32)}, expected)


def test_the_comparison_runs_both_ways_at_every_batch():
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in "xy")
    proto = helper.make_model(
        helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "g", [x], [y]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    graph = read(proto).graph
    found = compare(proto.SerializeToString(), random_inputs(graph), batches_of(graph))
    assert (found.num_nodes, found.opset, list(found.differences)) == (1, 17, [1, 5])
    assert max(found.differences.values()) < 1e-6
    assert found.rewritten < 1e-6
