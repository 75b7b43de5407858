"""Weights that are stored in integers although nothing multiplies by them in integers: tables, and recurrent ones."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptqjax import apply, calibrate, export, simulate
from ptqjax.agreement import run, session
from ptqjax.config import QuantizationConfig, Rule
from ptqjax.encodings.encoding import fake_quantize
from ptqjax.exporting import quantized_model
from ptqjax.ir import Model
from ptqjax.onnx_io import read, to_proto
from ptqjax.placement.place import place
from ptqjax.qdq.insert import insert_qdq
from ptqjax.qdq.load_time import dequantize_at_load
from ptqjax.qdq.stored_once import store_once
from ptqjax.qdq.table_codes import gather_codes, gather_floats
from ptqjax.qdq.unquantize import unquantize

RNG = np.random.default_rng(0)
ROWS, WIDTH = 200, 16
TABLE = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)
TABLE *= np.geomspace(0.05, 2, ROWS, dtype=np.float32)[:, None]  # rows of unlike size
IDS = {"ids": RNG.integers(0, WIDTH, (4, 6))}  # every axis of the tables has as many places


def proto(nodes: list, arrays: dict, inputs: list, outputs: tuple = ("y",), opset: int = 17) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, ins, outs, **settings) for op, ins, outs, settings in nodes],
        "g",
        inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def of_table(kind: str, *, axis: int = 0, table: np.ndarray = TABLE, opset: int = 17) -> onnx.ModelProto:
    """Rows of a table, and where it is tied, a layer that multiplies by it transposed."""
    nodes = [("Gather", ["E", "ids"], ["e"], {"axis": axis}), ("Tanh", ["e"], ["t"], {})]
    nodes += {
        "rows": [("Neg", ["t"], ["y"], {})],
        "twice": [("Gather", ["E", "ids"], ["f"], {"axis": axis}), ("Add", ["t", "f"], ["y"], {})],
        "transposed": [("Transpose", ["E"], ["Et"], {"perm": [1, 0]}), ("MatMul", ["t", "Et"], ["y"], {})],
        "gemm": [("Reshape", ["t", "flat"], ["t2"], {}), ("Gemm", ["t2", "E"], ["y"], {"transB": 1})],
    }[kind]
    arrays = {"E": table} | ({"flat": np.asarray([-1, WIDTH])} if kind == "gemm" else {})
    return proto(nodes, arrays, [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", "T"])], opset=opset)


CASES = [
    pytest.param("rows", {}, {}, id="rows"),
    pytest.param("rows", {"axis": 1}, {}, id="columns"),
    pytest.param("rows", {"axis": 1, "table": TABLE.reshape(2, 20, 80)}, {}, id="axis 1 of three"),
    pytest.param("rows", {"table": TABLE.reshape(-1)}, {}, id="a vector"),
    pytest.param("rows", {"table": TABLE.reshape(-1, 2)}, {}, id="rows too short for scales"),
    pytest.param("rows", {}, {"granularity": "tensor"}, id="one scale"),
    pytest.param("rows", {}, {"weights": "uint8", "weights_symmetric": False}, id="zero points"),
    pytest.param("rows", {"opset": 12}, {}, id="axes as attributes"),
    pytest.param("twice", {}, {}, id="two readers"),
    pytest.param("transposed", {}, {}, id="transposed"),
    pytest.param("transposed", {}, {"granularity": "tensor"}, id="transposed, one scale"),
    pytest.param("transposed", {}, {"weights": "int4", "granularity": "block:8"}, id="transposed, blocks of 4 bits"),
    pytest.param("transposed", {}, {"weights": "int16", "activations": "uint16"}, id="transposed, 16 bits"),
    pytest.param("gemm", {}, {}, id="gemm"),
    pytest.param("gemm", {}, {"weights": "int4", "granularity": "block:8"}, id="gemm, blocks of 4 bits"),
]


@pytest.mark.parametrize(("kind", "net", "settings"), CASES)
def test_a_table_is_stored_once_in_integers_and_read_back(kind, net, settings):
    """The file equals the simulation to the bit, holds the table's numbers once, and gives the encodings again."""
    model = read(of_table(kind, **net))
    encodings = calibrate(model, [IDS], QuantizationConfig(**settings))
    written = quantized_model(model, encodings)
    large = [np.asarray(value) for value in written.params.values() if np.size(value) == TABLE.size]
    assert [value.dtype.name for value in large] == [settings.get("weights", "int8")]

    expected = simulate(model, encodings, arithmetic="integer")(model.params, encodings, IDS)["y"]
    y = run(session(written), IDS)["y"]
    np.testing.assert_array_equal(y, expected)

    again, found, _ = unquantize(read(to_proto(written)))
    assert {name: encoding.axis for name, encoding in found.items()} == {
        name: encoding.axis for name, encoding in encodings.items()
    }
    for name, encoding in found.items():
        np.testing.assert_array_equal(encoding.scale, encodings[name].scale)
    np.testing.assert_array_equal(run(session(quantized_model(again, found)), IDS)["y"], y)


def test_rows_of_a_rounded_table_are_rounded_rows():
    """Gather(Q(E)) = Q(Gather(E)), each row with the scale of its own."""
    model = read(of_table("rows"))
    encodings = {"E": calibrate(model, [IDS])["E"]}
    assert encodings["E"].axis == 0
    found = run(session(quantized_model(model, encodings)), IDS)["y"]
    rows = np.asarray(fake_quantize(TABLE, encodings["E"]))[IDS["ids"]]
    np.testing.assert_allclose(found, -np.tanh(rows), rtol=1e-6, atol=1e-7)
    error = np.abs(rows - TABLE[IDS["ids"]]).max(axis=-1)
    assert (error <= np.abs(TABLE[IDS["ids"]]).max(axis=-1) / 127).all()


def test_a_tied_table_makes_a_file_of_a_quarter(tmp_path):
    table = RNG.normal(size=(4000, 64)).astype(np.float32)
    source = of_table("transposed", table=table)
    source.graph.initializer.append(numpy_helper.from_array(table.T.copy(), "head"))  # as exporters store it
    source.graph.node[-1].input[1] = "head"
    model = read(source)
    encodings = calibrate(model, [IDS])
    export(model, encodings, tmp_path, "q")
    share = (tmp_path / "q.onnx").stat().st_size / (2 * table.nbytes)
    assert share < 0.14  # of two tables in float, one in 8 bits, with scale and zero point for each row


def test_codes_are_gathered_and_back_again():
    model = read(of_table("rows"))
    plain = insert_qdq(model, {"E": calibrate(model, [IDS])["E"]})
    written, (record,) = gather_codes(plain)
    assert record.done
    assert [node.op_type for node in written.graph.nodes if "E_quantized" in node.inputs] == ["Gather"]
    assert "DequantizeLinear" not in {node.op_type for node in written.graph.nodes}
    back = gather_floats(written)
    assert sorted(node.op_type for node in back.graph.nodes) == sorted(node.op_type for node in plain.graph.nodes)
    np.testing.assert_array_equal(
        apply(back.graph, back.params, IDS)["y"], apply(written.graph, written.params, IDS)["y"]
    )
    assert gather_codes(written)[1] == ()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"weights": "int4"}, "ONNX Runtime takes no rows of int4"),
        ({"granularity": "block:8"}, "the scales do not run along the rows"),
    ],
)
def test_what_cannot_be_gathered_as_codes_is_dequantized_first(settings, reason):
    model = read(of_table("rows"))
    plain = insert_qdq(model, {"E": calibrate(model, [IDS], QuantizationConfig(**settings))["E"]})
    written, (record,) = gather_codes(plain)
    assert (written, record.reason) == (plain, reason)


def operators_that_run(model: Model, file: Path) -> set[str]:
    session(model, optimized_model_filepath=str(file))
    return {node.op_type for node in onnx.load(file).graph.node}


def test_what_is_no_operand_in_integers_is_dequantized_when_the_file_is_loaded(tmp_path):
    """ONNX Runtime computes the float weight once: the graph that it runs has it, and not what makes it."""
    model, batch = recurrent("LSTM", 2), {"x": RNG.normal(size=(5, 2, 40)).astype(np.float32)}
    ends = {"QuantizeLinear", "DequantizeLinear"}  # of x and y, which no integer kernel reads or makes
    for target, others in (("ort-cpu", set()), ("generic-per-channel", ends)):
        plain = insert_qdq(model, calibrate(model, [batch], QuantizationConfig.for_target(target)))
        written, report = dequantize_at_load(plain)
        assert [record.done for record in report] == [True, True]
        assert operators_that_run(written, tmp_path / f"{target}.onnx") == {"LSTM", *others}
        found, expected = run(session(written), batch)["y"], run(session(plain), batch)["y"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=0 if others else 1e-6)  # sums of floats differ


def test_integers_of_strangers_stay_numbers():
    """A file that computes a float weight from integers is a float model, which can be quantized."""
    codes = RNG.integers(-9, 9, (WIDTH, WIDTH)).astype(np.int8)
    nodes = [
        ("Cast", ["codes"], ["steps"], {"to": TensorProto.FLOAT}),
        ("Mul", ["steps", "scale"], ["W"], {}),
        ("MatMul", ["x", "W"], ["y"], {}),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH])
    model = read(proto(nodes, {"codes": codes, "scale": np.float32(0.5)}, [x]))
    np.testing.assert_array_equal(model.params["W"], codes * np.float32(0.5))


def test_a_weight_that_is_no_table_is_stored_as_it_is():
    """Equal weights of two layers stay apart: ONNX Runtime refuses one that integer layers share."""
    weight = RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    nodes = [("MatMul", ["x", "V"], ["h"], {}), ("MatMul", ["h", "W"], ["y"], {})]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH])
    model = read(proto(nodes, {"V": weight, "W": weight.T.copy()}, [x]))
    quantized = insert_qdq(model, calibrate(model, [{"x": np.ones((2, WIDTH), np.float32)}]))
    assert store_once(quantized) == (quantized, ())


def test_few_numbers_and_excluded_tables_stay_in_float():
    model = read(of_table("rows", table=TABLE[:, :1].copy()))
    assert place(model).site("E") is None
    model = read(of_table("transposed"))
    sites = {site.tensor: site for site in place(model, QuantizationConfig(exclude=("E",))).sites}
    assert "E" not in sites
    assert sites["Et"].root == "Et"


def test_a_rule_for_the_head_alone_gives_it_a_grid_of_its_own():
    model = read(of_table("transposed"))
    tied = {site.tensor: (site.root, site.axis) for site in place(model).sites}
    assert (tied["E"], tied["Et"]) == (("E", 0), ("E", -1))
    config = QuantizationConfig(rules=(Rule(tensors=("Et",), dtype="int4"),))
    assert {site.root for site in place(model, config).sites if site.tensor == "Et"} == {"Et"}


def test_targets_that_say_nothing_keep_tables_in_float():
    assert place(read(of_table("rows")), QuantizationConfig.for_target("tensorrt")).site("E") is None


RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(op_type: str, directions: int, hidden: int = 24, inputs: int = 40) -> Model:
    rows = RECURRENT[op_type] * hidden
    arrays = {
        "W": RNG.normal(size=(directions, rows, inputs)).astype(np.float32) * 0.2,
        "R": RNG.normal(size=(directions, rows, hidden)).astype(np.float32) * 0.2,
        "B": RNG.normal(size=(directions, 2 * rows)).astype(np.float32) * 0.2,
    }
    settings = {"hidden_size": hidden, "direction": "bidirectional" if directions == 2 else "forward"}
    nodes = [(op_type, ["x", "W", "R", "B"], ["y"], settings)]
    return read(proto(nodes, arrays, [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 2, inputs])]))


@pytest.mark.parametrize(
    ("op_type", "directions", "granularity", "target"),
    [
        ("LSTM", 1, "channel", "ort-cpu"),
        ("LSTM", 2, "channel", "generic-per-channel"),
        ("GRU", 1, "tensor", "generic-per-tensor"),
        ("GRU", 2, "channel", "ort-cpu"),
        ("RNN", 1, "channel", "generic-per-channel"),
    ],
)
def test_recurrent_weights_are_stored_in_integers(op_type, directions, granularity, target):
    model = recurrent(op_type, directions)
    batch = {"x": RNG.normal(size=(5, 2, 40)).astype(np.float32)}
    config = QuantizationConfig.for_target(target, granularity=granularity, ranges="min-max")
    encodings = calibrate(model, [batch], config)
    assert encodings.keys() == ({"W", "R"} if target == "ort-cpu" else {"x", "W", "R", "y"})  # x and y have no kernel
    axis = 1 if granularity == "channel" else None
    assert (encodings["W"].axis, encodings["R"].axis) == (axis, axis)
    written = quantized_model(model, encodings)
    assert {np.dtype(written.params[f"{name}_quantized"].dtype) for name in "WR"} == {np.dtype(np.int8)}
    assert written.params["B"].dtype == np.float32

    back = read(to_proto(written))  # as DequantizeLinear, whatever the file has
    assert {node.op_type for node in back.graph.nodes if node.output in {"W", "R"}} == {"DequantizeLinear"}
    found = unquantize(back)[1]
    for name in "WR":
        assert found[name].axis == axis
        np.testing.assert_array_equal(found[name].scale, encodings[name].scale)

    y = run(session(written), batch)["y"]
    expected = simulate(model, encodings, arithmetic="integer")(model.params, encodings, batch)["y"]
    most = 1e-5 if target == "ort-cpu" else 1.01 * float(encodings["y"].scale)  # one step: sums of floats differ
    np.testing.assert_allclose(y, expected, atol=most)
    exact = np.asarray(apply(model.graph, model.params, batch)["y"])
    assert 10 * np.log10((exact**2).sum() / ((y - exact) ** 2).sum()) > 30
