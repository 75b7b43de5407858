"""Ids outside of a table are an error, as they are in ONNX Runtime; empty constants are no data."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptqjax.config import QuantizationConfig
from ptqjax.errors import DataError
from ptqjax.ir import Model
from ptqjax.onnx_io import read
from ptqjax.placement.place import place
from ptqjax.ranges.calibrate import calibrate

EVERYWHERE = QuantizationConfig.for_target("generic-per-tensor")  # rounds what no integer kernel reads as well
TABLE = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def model(*nodes: tuple[str, str, str], dtype: int = TensorProto.INT64, shape=("N", "T"), **initializers) -> Model:
    graph = helper.make_graph(
        [helper.make_node(op, ins.split(), outs.split()) for op, ins, outs in nodes],
        "g",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()],
    )
    return read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


LOOK_UP = [("Gather", "E x", "e"), ("Sigmoid", "e", "y")]
MOVED = [("Unsqueeze", "x axis", "u"), ("Gather", "E u", "e"), ("Sigmoid", "e", "y")]


@pytest.mark.parametrize("wrong", [5, 40, -6])
def test_an_id_outside_a_table_names_input_id_and_table(wrong) -> None:
    for network in (model(*LOOK_UP, E=TABLE), model(*MOVED, E=TABLE, axis=np.asarray([1]))):
        fine, bad = np.asarray([[0, 4, -5]]), np.asarray([[0, wrong, 1]])
        config = QuantizationConfig(exclude=("y",))
        calibrate(network, [{"x": fine}], config)
        calibrate(network, [{"x": fine}])
        message = rf"batch 1: input 'x' holds the id {wrong}; Gather .* looks it up in 'E', which has 5 rows"
        with pytest.raises(DataError, match=message):
            calibrate(network, [{"x": fine}, {"x": bad}], QuantizationConfig(rules=()))


def test_an_empty_constant_has_no_grid() -> None:
    nodes = [helper.make_node("Concat", ["x", "none"], ["c"], axis=1), helper.make_node("Neg", ["c"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros((1, 0), np.float32), "none")],
    )  # fmt: skip
    network = read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    for config in (QuantizationConfig(), EVERYWHERE):
        assert {entry.tensor: entry.reason for entry in place(network, config).skipped}["none"] == "has no values"
    assert "c" in calibrate(network, [{"x": TABLE[:1, :3]}], EVERYWHERE)


@pytest.mark.parametrize("ranges", ["min-max", "sqnr", "moving-average"])
def test_a_past_of_no_length_changes_no_range(ranges) -> None:
    nodes = [helper.make_node("Concat", ["x", "past"], ["c"], axis=1), helper.make_node("Neg", ["c"], ["y"])]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", None, 4]) for name in ("x", "past")]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    network = read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    x, past = TABLE[None, :3], TABLE[None, 3:]
    config = QuantizationConfig.for_target("generic-per-tensor", ranges=ranges)
    whole = calibrate(network, [{"x": x, "past": past}], config)
    both = calibrate(network, [{"x": x, "past": past[:, :0]}, {"x": x, "past": past}], config)
    assert float(both["past"].scale) == float(whole["past"].scale)
    with pytest.raises(DataError, match="has no elements"):
        calibrate(network, [{"x": x[:0], "past": past[:0]}], config)
