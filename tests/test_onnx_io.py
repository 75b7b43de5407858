"""Reading and writing: one meaning whatever the spelling, exact round trips, one clear error for damage."""

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import onnxruntime as ort
import pytest

from ptqjax import onnx_io
from ptqjax.data.files import Batches, Samples
from ptqjax.errors import ModelError, OutputError
from ptqjax.ir import text

W = np.arange(1, 10, dtype=np.float32).reshape(3, 3)


def proto(nodes, initializers=(), *, inputs=("x",), outputs=("y",), opset=17, **kwargs):
    def info(name):
        return oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3])

    graph = oh.make_graph(nodes, "g", [info(i) for i in inputs], [info(o) for o in outputs], list(initializers))
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=8, **kwargs)


def gemm(**attributes):
    return oh.make_node("Gemm", ["x", "w"], ["y"], **attributes)


def test_write_inverts_read_on_every_real_model(shared, tmp_path):
    files = sorted((shared / "models").rglob("*.onnx"))
    assert files
    for file in files:
        model = onnx_io.read(file)
        onnx_io.write(model, tmp_path / file.name)
        again = onnx_io.read(tmp_path / file.name)
        if model.graph.ir_version >= 4:
            assert again.graph == model.graph, file.name
        assert text(again) == text(model), file.name
        assert all(np.array_equal(again.params[name], value) for name, value in model.params.items()), file.name
        assert ort.InferenceSession(tmp_path / file.name, providers=["CPUExecutionProvider"])


def test_an_initializer_a_constant_node_and_an_identity_of_either_read_the_same():
    initializer = proto([gemm()], [onh.from_array(W, "w")])
    constant = proto([oh.make_node("Constant", [], ["w"], value=onh.from_array(W)), gemm()])
    identity = proto([oh.make_node("Identity", ["v"], ["w"]), gemm()], [onh.from_array(W, "v")])
    also_input = proto([gemm()], [onh.from_array(W, "w")], inputs=("x", "w"))
    expected = text(onnx_io.read(initializer))
    assert text(onnx_io.read(constant)) == expected
    assert text(onnx_io.read(also_input)) == expected
    assert text(onnx_io.read(identity)) == expected.replace("w: ", "v: ").replace("w)", "v)")


def test_attribute_defaults_are_those_of_the_schema():
    assert onnx_io.read(proto([gemm()], [onh.from_array(W, "w")])).graph.nodes[0].attributes == (
        ("alpha", 1.0),
        ("beta", 1.0),
        ("transA", 0),
        ("transB", 0),
    )


def test_defaults_follow_the_opset():
    def axis(opset):
        return (
            onnx_io.read(proto([oh.make_node("Softmax", ["x"], ["y"])], opset=opset)).graph.nodes[0].attribute("axis")
        )

    assert (axis(12), axis(13)) == (1, -1)


def test_an_identity_that_names_a_graph_output_stays():
    model = onnx_io.read(proto([oh.make_node("Identity", ["x"], ["y"])]))
    assert [node.op_type for node in model.graph.nodes] == ["Identity"]


def test_nodes_out_of_order_are_sorted():
    late = oh.make_node("Relu", ["h"], ["y"])
    early = oh.make_node("Abs", ["x"], ["h"])
    assert [node.op_type for node in onnx_io.read(proto([late, early])).graph.nodes] == ["Abs", "Relu"]


def test_integers_are_constants_and_quantized_weights_are_parameters():
    nodes = [
        oh.make_node("DequantizeLinear", ["q", "s", "z"], ["w"]),
        gemm(),
    ]
    tensors = [onh.from_array(W.astype(np.int8), "q"), onh.from_array(np.float32(0.5), "s")]
    tensors += [onh.from_array(np.int8(0), "z")]
    model = onnx_io.read(proto(nodes, tensors))
    assert set(model.params) == {"q", "s", "z"}
    shape = proto([oh.make_node("Reshape", ["x", "s"], ["y"])], [onh.from_array(np.array([3, -1]), "s")])
    assert set(onnx_io.read(shape).graph.constant_values) == {"s"}


def test_reading_a_proto_leaves_it_as_it_was():
    given = proto([oh.make_node("Identity", ["v"], ["w"]), gemm()], [onh.from_array(W, "v")])
    before = given.SerializeToString(deterministic=True)
    onnx_io.read(given)
    assert given.SerializeToString(deterministic=True) == before


def test_metadata_and_opsets_survive():
    given = proto([gemm()], [onh.from_array(W, "w")])
    oh.set_model_props(given, {"author": "somebody"})
    again = onnx_io.to_proto(onnx_io.read(given))
    assert [(entry.key, entry.value) for entry in again.metadata_props] == [("author", "somebody")]
    assert [(entry.domain, entry.version) for entry in again.opset_import] == [("", 17)]


def test_external_data_is_read(tmp_path):
    path = tmp_path / "m.onnx"
    given = proto([gemm()], [onh.from_array(W, "w")])
    onnx.save_model(given, path, save_as_external_data=True, location="m.data", size_threshold=0)
    np.testing.assert_array_equal(onnx_io.read(path).params["w"], W)


@pytest.mark.parametrize("location", ["absent.data", "../outside.data", "/etc/hostname"])
def test_external_data_that_is_missing_or_elsewhere_is_an_error(tmp_path, location):
    (tmp_path / "outside.data").write_bytes(W.tobytes())
    folder = tmp_path / "folder"
    folder.mkdir()
    given = proto([gemm()], [onh.from_array(W, "w")])
    tensor = given.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (folder / "m.onnx").write_bytes(given.SerializeToString())
    with pytest.raises(ModelError, match=r"m\.onnx.*'w'.*external file"):
        onnx_io.read(folder / "m.onnx")
    with pytest.raises(ModelError, match="pass the model's path"):
        onnx_io.read(given.SerializeToString())


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n" + bytes(64), b"hello world, this is not a model"])
def test_a_file_that_is_not_onnx_is_an_error(tmp_path, data):
    path = tmp_path / "x.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"x\.onnx.*expected|x\.onnx.*another kind"):
        onnx_io.read(path)


def test_every_truncation_is_an_error(tmp_path):
    whole = proto([gemm()], [onh.from_array(W, "w")]).SerializeToString()
    for length in range(len(whole)):
        (tmp_path / "x.onnx").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"x\.onnx"):
            onnx_io.read(tmp_path / "x.onnx")


@pytest.mark.parametrize("name", ["absent.onnx", "."])
def test_a_path_that_is_no_file_is_an_error(tmp_path, name):
    with pytest.raises(ModelError, match="cannot be opened"):
        onnx_io.read(tmp_path / name)


def test_a_dangling_input_names_node_and_tensor():
    with pytest.raises(ModelError, match=r"Relu \(producing 'y'\) reads tensor 'nowhere'"):
        onnx_io.read(proto([oh.make_node("Relu", ["nowhere"], ["y"])]))


def test_a_cycle_is_an_error():
    with pytest.raises(ModelError, match="cyclic"):
        onnx_io.read(proto([oh.make_node("Add", ["x", "y"], ["h"]), oh.make_node("Relu", ["h"], ["y"])]))


def test_a_tensor_of_two_producers_is_an_error():
    nodes = [oh.make_node("Relu", ["x"], ["y"]), oh.make_node("Abs", ["x"], ["y"])]
    with pytest.raises(ModelError, match="'y' is produced 2 times"):
        onnx_io.read(proto(nodes))


def test_write_into_a_missing_folder_is_an_error_and_leaves_nothing(tmp_path):
    model = onnx_io.read(proto([gemm()], [onh.from_array(W, "w")]))
    with pytest.raises(OutputError, match="cannot be written"):
        onnx_io.write(model, tmp_path / "absent" / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_an_invalid_model_is_not_written(tmp_path):
    wrong = proto([oh.make_node("Gemm", ["x", "w"], ["y"])], [onh.from_array(W[0], "w")])
    with pytest.raises(ModelError, match="not valid ONNX"):
        onnx_io.write(onnx_io.read(wrong), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_that_can_be_none_is_unknown(size):
    file = proto([gemm()], [onh.from_array(W, "w")])
    for info in (file.graph.input[0], file.graph.output[0]):
        info.type.tensor_type.shape.dim[0].dim_value = size
    graph = onnx_io.read(file).graph
    assert (graph.inputs[0].shape, graph.outputs[0].shape) == ((None, 3), (None, 3))
    assert len(Batches(Samples(inputs={"x": np.zeros((7, 3), np.float32)}, labels=None), graph, size=4)) == 2
