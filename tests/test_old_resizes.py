"""Upsample and the Resize of opset 10 in files of opset 13: the same function, which the version converter's is not."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptqjax.agreement.runtime import session
from ptqjax.config import QuantizationConfig
from ptqjax.exporting import quantized_model
from ptqjax.ir import Model
from ptqjax.onnx_io import read, to_proto
from ptqjax.onnx_io.opset import blocking_node, with_opset
from ptqjax.ranges.calibrate import calibrate
from ptqjax.simulation import simulate

RNG = np.random.default_rng(0)
CONV = {"W": RNG.normal(0, 0.3, (4, 3, 3, 3)).astype(np.float32), "b": RNG.normal(size=4).astype(np.float32)}
X = {"x": RNG.normal(size=(2, 3, 7, 5)).astype(np.float32)}


def network(operator: str, mode: str, opset: int, scales: tuple[float, ...]) -> bytes:
    nodes = [helper.make_node("Conv", ["x", "W", "b"], ["c"])]
    initializers = dict(CONV)
    if opset == 7:
        nodes.append(helper.make_node(operator, ["c"], ["y"], mode=mode, scales=[float(scale) for scale in scales]))
    else:
        nodes.append(helper.make_node(operator, ["c", "s"], ["y"], mode=mode))
        initializers["s"] = np.asarray(scales, np.float32)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=5).SerializeToString()


def computed(file: bytes | Model) -> np.ndarray:
    source = file if isinstance(file, bytes) else to_proto(file).SerializeToString()
    return session(source).run(["y"], X)[0]


KINDS = [("Upsample", 7), ("Upsample", 9), ("Resize", 10)]
SCALES = {"twice": (1, 1, 2, 2), "uneven": (1, 1, 1.7, 3)}


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(("operator", "opset"), KINDS)
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_raising_keeps_what_onnx_runtime_computes(operator, opset, mode, scales) -> None:
    file = network(operator, mode, opset, scales)
    model = read(file)
    assert blocking_node(model, 13) is None
    raised = with_opset(model, 13)
    assert [node.op_type for node in raised.graph.nodes] == ["Conv", "Resize"]
    np.testing.assert_allclose(computed(raised), computed(file), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("operator", ["Upsample", "Resize"])
def test_shrinking_to_the_nearest_bars_the_way(operator) -> None:
    """There the older operator takes the place above, the newer one no rule that is the same."""
    model = read(network(operator, "nearest", 9 if operator == "Upsample" else 10, (1, 1, 0.5, 0.5)))
    node = blocking_node(model, 13)
    assert node is not None
    assert node.op_type == operator


@pytest.mark.parametrize("opset", [7, 9])
def test_the_integer_program_takes_the_opsets_that_export_takes(opset) -> None:
    model = read(network("Upsample", "nearest", opset, (1, 1, 2, 2)))
    encodings = calibrate(model, [X], QuantizationConfig(ranges="min-max"))
    simulated = simulate(model, encodings, arithmetic="integer")(model.params, encodings, X)["y"]
    np.testing.assert_array_equal(simulated, computed(quantized_model(model, encodings)))
