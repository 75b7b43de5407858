"""Upsample and the Resize of opset 10 in files of opset 13: the same function, which the version converter's is not."""

import re

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from ptqjax.agreement.runtime import session
from ptqjax.commands.cli import commands
from ptqjax.config import QuantizationConfig
from ptqjax.encodings.encoding import make_encoding
from ptqjax.errors import ConfigError, ModelError
from ptqjax.exportable import check_exportable
from ptqjax.exporting import check_opset, quantized_model
from ptqjax.ir import Model
from ptqjax.onnx_io import read, to_proto
from ptqjax.onnx_io.opset import CONVERTED, blocking_node, with_opset
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


def test_what_bars_the_way_is_found_before_any_work(tmp_path) -> None:
    """By the model and the settings alone, with export's own words."""
    model = read(network("Upsample", "nearest", 9, (1, 1, 0.5, 0.5)))
    config = QuantizationConfig(ranges="min-max", granularity="tensor")
    for fitting in (
        read(network("Upsample", "linear", 9, (1, 1, 2, 2))),
        read(network("Resize", "linear", 10, SCALES["twice"])),
    ):
        check_exportable(fitting, config)
    with pytest.raises(ModelError, match="export the model anew with opset 13") as found:
        check_exportable(model, config)
    encodings = calibrate(model, [X], config)
    in_the_end = str(found.value).replace("'y'", "'y_float'")  # the graph's output is rounded by then
    with pytest.raises(ModelError, match=re.escape(in_the_end)):
        quantized_model(model, encodings)
    (tmp_path / "m.onnx").write_bytes(network("Upsample", "nearest", 9, (1, 1, 0.5, 0.5)))
    np.savez(tmp_path / "d.npz", x=np.full((1, 3, 7, 5), np.nan, np.float32))  # would be the next to be complained of
    job = ["quantize", str(tmp_path / "m.onnx"), "--calibration", str(tmp_path / "d.npz"), "--out", str(tmp_path / "q")]
    told = CliRunner().invoke(commands, job)
    assert told.exit_code != 0
    assert "export the model anew" in f"{told.output}{told.exception}"


def along(axis: int, *, operator: str = "Softmax", opset: int = 11) -> bytes:
    nodes = [helper.make_node("Conv", ["x", "W", "b"], ["c"]), helper.make_node(operator, ["c"], ["y"], axis=axis)]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in CONV.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=6).SerializeToString()


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax"])
def test_the_converter_is_advised_where_it_keeps_the_function(operator) -> None:
    """What it makes of the others was compared as well: Hardmax and Resize come out changed."""
    assert operator in CONVERTED
    file = along(1, operator=operator, opset=9)
    one = np.ones((4, 3, 3, 3), np.float32)
    blocks = {"W": make_encoding(one, np.zeros_like(one), dtype="int8", axis=1, block_size=1)}
    with pytest.raises(ConfigError, match=r"'W' needs opset 21.*convert_version\(model, 21\)"):
        check_opset(read(file), blocks)
    converted = onnx.version_converter.convert_version(onnx.load_from_string(file), 21).SerializeToString()
    np.testing.assert_array_equal(computed(converted), computed(file))
    check_opset(read(converted), blocks)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_softmax_behind_a_computed_shape_is_known_to_be_along_the_last_axis(axis) -> None:
    """Exports of opset 9 compute shapes node by node; as many sizes as there are make as many axes."""
    nodes = [
        helper.make_node("Conv", ["x", "W", "b"], ["c"]),
        helper.make_node("Shape", ["c"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n"], ["n1"], axes=[0]),
        helper.make_node("Concat", ["n1", "minus", "two"], ["sizes"], axis=0),
        helper.make_node("Reshape", ["c", "sizes"], ["r"]),
        helper.make_node("Softmax", ["r"], ["y"], axis=axis),
    ]
    numbers = {"zero": np.asarray(0), "minus": np.asarray([-1]), "two": np.asarray([2])}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (CONV | numbers).items()],
    )  # fmt: skip
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=5).SerializeToString()
    model = read(file)
    if axis == 1:
        assert blocking_node(model, 13) is not None
        return
    np.testing.assert_array_equal(computed(with_opset(model, 13)), computed(file))
