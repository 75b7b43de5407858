"""A file from a stranger is data: one clear error for each damage, and neither memory nor time without bound."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import pytest

from ptqjax import onnx_io
from ptqjax.errors import ModelError, OutputError

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
W = np.arange(12, dtype=np.float32).reshape(4, 3)


def info(name, kind=FLOAT, shape=("n", 3)):
    return oh.make_tensor_value_info(name, kind, shape)


def proto(nodes, tensors=(), *, opsets=(("", 17), ("own", 1)), **parts):
    graph = oh.make_graph(nodes, "g", [info("x")], [info("y", shape=None)], list(tensors))
    return oh.make_model(graph, opset_imports=[oh.make_opsetid(*opset) for opset in opsets], ir_version=8, **parts)


def add(tensor):
    return proto([oh.make_node("Add", ["x", tensor.name], ["y"])], [tensor])


def external(location, *, dims=(4, 3), **entries):
    tensor = onnx.TensorProto(name="w", data_type=FLOAT, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return add(tensor)


def saved(model, folder):
    folder.mkdir(exist_ok=True)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def refused(model, match):
    start = time.perf_counter()
    with pytest.raises(ModelError, match=match):
        onnx_io.read(model)
    assert time.perf_counter() - start < 5  # seconds


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (onnx.TensorProto(name="w", data_type=FLOAT, dims=[2**30, 2**20]), "holds 0 numbers"),
        (onnx.TensorProto(name="w", data_type=FLOAT, dims=[2**62, 2**62]), "no tensor is that large"),
        (onnx.TensorProto(name="w", data_type=FLOAT, dims=[-1, 3], raw_data=b""), "none of them negative"),
        (onnx.TensorProto(name="w", data_type=FLOAT, dims=[3], raw_data=bytes(11)), "holds 11 bytes.*ask for 12"),
        (onnx.TensorProto(name="w", data_type=FLOAT, dims=[1] * 65, raw_data=bytes(4)), "at most 64"),
        (onnx.TensorProto(name="w", data_type=FLOAT, dims=[3], float_data=[1, 2]), "holds 2 numbers"),
        (onnx.TensorProto(name="w", data_type=99, dims=[0]), "element type 99"),
        (onnx.TensorProto(name="w", data_type=0, dims=[0]), "element type 0"),
        (onnx.TensorProto(name="w", data_type=onnx.TensorProto.STRING, dims=[2], string_data=[b"a"]), "1 strings"),
        (onnx.TensorProto(name="w", data_type=onnx.TensorProto.UINT4, dims=[5], raw_data=bytes(2)), "2 bytes"),
    ],
)
def test_a_tensor_whose_contents_do_not_fit_its_shape_is_an_error(tensor, match):
    refused(add(tensor), f"'w'.*{match}")


def test_a_sparse_tensor_of_any_size_is_not_made_dense():
    values, indices = onh.from_array(np.ones(2, np.float32), "w"), onh.from_array(np.array([1, 5]))
    model = proto([oh.make_node("Add", ["x", "w"], ["y"])])
    model.graph.sparse_initializer.append(oh.make_sparse_tensor(values, indices, [2**20, 2**20]))
    refused(model, "far more than it stores")
    del model.graph.sparse_initializer[0].dims[:]
    model.graph.sparse_initializer[0].dims.extend([1, 3])
    refused(model, "outside of the tensor")
    model.graph.sparse_initializer[0].dims[:] = [2, 3]
    np.testing.assert_array_equal(onnx_io.read(model).params["w"], [[0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"location": "w.bin", "offset": 16}, "ends at byte 64, the file at byte 48"),
        ({"location": "w.bin", "length": 47}, "holds 47 bytes"),
        ({"location": "w.bin", "offset": -1}, "offset is '-1'"),
        ({"location": "w.bin", "offset": "9" * 5000}, "expected a number"),
        ({"location": "w.bin", "dims": (2**40, 3)}, "ends at byte"),
        ({"location": "."}, "no regular file"),
        ({"location": ""}, "outside"),
        ({"location": "pipe"}, "no regular file"),
        ({"location": "absent"}, "No such file"),
        ({"location": "../secret"}, "outside"),
        ({"location": "/etc/hostname"}, "outside"),
        ({"location": "link"}, "outside"),
        ({"location": "folder/link"}, "outside"),
        ({"location": "w\0bin"}, "no proper name|No such file"),
    ],
)
def test_external_data_is_bounded_to_the_files_beside_the_model(tmp_path, entries, match):
    path = saved(external(**entries), tmp_path / "here")
    (tmp_path / "secret").write_bytes(W.tobytes())
    (tmp_path / "here" / "w.bin").write_bytes(W.tobytes())
    (tmp_path / "here" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "here" / "folder").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "here" / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    refused(path, f"(?s)m.onnx.*'w'.*{match}")


def test_external_data_in_a_subfolder_and_in_a_store_of_links_is_read(tmp_path):
    path = saved(external("data/w.bin"), tmp_path / "here")
    (tmp_path / "here" / "data").mkdir()
    (tmp_path / "here" / "data" / "w.bin").write_bytes(W.tobytes())
    np.testing.assert_array_equal(onnx_io.read(path).params["w"], W)
    store, view = tmp_path / "store", tmp_path / "view"
    store.mkdir()
    view.mkdir()
    (store / "1").write_bytes(external("w.bin").SerializeToString())
    (store / "2").write_bytes(W.tobytes())
    (view / "m.onnx").symlink_to(store / "1")
    (view / "w.bin").symlink_to(store / "2")
    np.testing.assert_array_equal(onnx_io.read(view / "m.onnx").params["w"], W)


def test_many_tensors_that_grow_are_refused():
    values, indices = onh.from_array(np.ones(1, np.float32), "w"), onh.from_array(np.array([5]))
    model = proto([oh.make_node("Add", ["x", "w"], ["y"])])
    for index in range(64):
        values.name = f"w{index}"
        model.graph.sparse_initializer.append(oh.make_sparse_tensor(values, indices, [2**22]))
    refused(model, "far more than the file stores")


def test_a_tensor_of_a_function_is_copied_once_however_often_it_is_called():
    opsets = [oh.make_opsetid("", 17)]
    weight = oh.make_node("Constant", [], ["w"], value=onh.from_array(np.ones(2**20, np.float32)))
    body = [weight, oh.make_node("Add", ["a", "w"], ["b"])]
    function = oh.make_function("own", "F", ["a"], ["b"], body, opsets, [])
    calls = [oh.make_node("F", [f"t{i}"], [f"t{i + 1}"], domain="own") for i in range(1000)]
    calls += [oh.make_node("Identity", ["x"], ["t0"]), oh.make_node("Identity", ["t1000"], ["y"])]
    model = onnx_io.read(proto(calls, functions=[function]))
    assert len(model.params) == 1000
    first, *others = model.params.values()
    assert all(np.shares_memory(first, other) for other in others)


def field(number, content):
    """A field of bytes, in protobuf's encoding."""
    length = len(content)
    return bytes([number << 3 | 2, length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14]) + content


def nested(depth):
    """An If within an If, and so on; as bytes, for protobuf's own library cannot make deep ones."""
    node = oh.make_node("Identity", ["x"], ["y"]).SerializeToString()
    for _ in range(depth):
        graph = field(1, node) + field(12, info("y", shape=None).SerializeToString())
        attribute = field(1, b"then_branch") + field(6, graph) + bytes([0xA0, 1, onnx.AttributeProto.GRAPH])
        node = field(1, b"condition") + field(2, b"y") + field(4, b"If") + field(5, attribute)
    model = proto([])
    model.graph.input.append(oh.make_tensor_value_info("condition", onnx.TensorProto.BOOL, []))
    return model.SerializeToString() + field(7, field(1, node))


def test_nesting_is_bounded():
    (node,) = onnx_io.read(nested(20)).graph.nodes
    assert node.subgraphs
    refused(nested(30), "nested more than")
    refused(nested(400), "cannot be read as ONNX")


def calls(name, callee, times, opsets):
    nodes = [oh.make_node(callee, ["a"], [f"t{i}"], domain="own") for i in range(times)]
    nodes.append(oh.make_node("Sum", [f"t{i}" for i in range(times)], ["b"]))
    return oh.make_function("own", name, ["a"], ["b"], nodes, opsets, [])


def test_functions_that_expand_without_end_are_errors():
    opsets = [oh.make_opsetid("", 17), oh.make_opsetid("own", 1)]
    start = oh.make_function("own", "F0", ["a"], ["b"], [oh.make_node("Relu", ["a"], ["b"])], opsets, [])
    doubling = [start, *(calls(f"F{i + 1}", f"F{i}", 2, opsets) for i in range(40))]
    refused(proto([oh.make_node("F40", ["x"], ["y"], domain="own")], functions=doubling), "has .* nodes")
    single = [start, *(calls(f"F{i + 1}", f"F{i}", 1, opsets) for i in range(300))]
    refused(proto([oh.make_node("F300", ["x"], ["y"], domain="own")], functions=single), "through 64 others")
    loop = [calls("F1", "F2", 1, opsets), calls("F2", "F1", 1, opsets)]
    refused(proto([oh.make_node("F1", ["x"], ["y"], domain="own")], functions=loop), "calls itself")


@pytest.mark.parametrize("version", [-1, 2**31, 2**63 - 1])
def test_a_version_that_is_none_is_an_error(version):
    opsets = [oh.make_opsetid("", 17), onnx.OperatorSetIdProto(domain="own", version=version)]
    function = oh.make_function("own", "F", ["a"], ["b"], [oh.make_node("Relu", ["a"], ["b"])], opsets, [])
    refused(proto([oh.make_node("F", ["x"], ["y"], domain="own")], functions=[function]), "version")
    refused(proto([oh.make_node("Relu", ["x"], ["y"])], opsets=(("", 17), ("own", version))), "version")


def test_a_million_nodes_are_refused():
    model = proto([oh.make_node("Relu", ["x"], ["y"])])
    data = model.SerializeToString() + b"\x3a\x88\x89\x7a" + b"\x0a\x00" * 1_000_004  # graph { node {} ... }
    with pytest.raises(ModelError, match=r"1000005 nodes"):
        onnx_io.read(data)


@pytest.mark.parametrize("version", [0, 29, 1000])
def test_an_operator_set_that_is_not_known_is_an_error(version):
    model = proto([oh.make_node("Relu", ["x"], ["y"])], opsets=(("", version),))
    refused(model, f"operator set {version}.*can be read")


@pytest.mark.parametrize("version", range(7, 29))
def test_every_known_operator_set_is_read(version):
    assert onnx_io.read(proto([oh.make_node("Relu", ["x"], ["y"])], opsets=(("", version),))).graph.opset() == version


def damaged(change):
    model = proto([oh.make_node("Add", ["x", "w"], ["y"])], [onh.from_array(W, "w")])
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "'w' is produced 2 times"),
        (lambda m: m.graph.initializer.append(onh.from_array(W)), "no name"),
        (lambda m: m.graph.input.append(m.graph.input[0]), "'x' is produced 2 times"),
        (lambda m: m.graph.node.append(m.graph.node[0]), "'y' is produced 2 times"),
        (lambda m: m.graph.output.append(info("absent")), "'absent'"),
        (lambda m: m.graph.node[0].input.append("w"), "has 3 inputs; expected 2 to 2"),
        (lambda m: m.graph.node[0].output.append("z"), "has 2 outputs"),
        (lambda m: m.graph.node[0].attribute.add(name="a"), "attribute 'a' is of kind 0"),
        (lambda m: m.graph.node[0].attribute.add(name="a", type=2, ref_attr_name="b"), "is a reference"),
        (lambda m: m.graph.node[0].attribute.extend([oh.make_attribute("a", 1)] * 2), "an attribute twice"),
        (lambda m: m.opset_import.add(domain="ai.onnx", version=9), "with two versions"),
        (lambda m: m.opset_import.add(domain="other", version=-3), "version -3"),
        (lambda m: m.opset_import.remove(m.opset_import[0]), "whose version the file does not name"),
        (
            lambda m: m.graph.input[0].type.tensor_type.ClearField("elem_type") or m.graph.ClearField("output"),
            "outputs",
        ),
        (lambda m: m.graph.node.append(oh.make_node("Constant", [], ["c"])), "holds no value"),
        (lambda m: m.graph.node.append(oh.make_node("Constant", [], ["c"], value_ints="text")), "is damaged"),
    ],
)
def test_a_damaged_graph_is_one_clear_error(change, match, tmp_path):
    refused(saved(damaged(change), tmp_path), f"(?s)m.onnx.*{match}")


def test_a_name_that_is_no_text_is_an_error():
    data = proto([oh.make_node("Relu", ["x"], ["yyyy"])]).SerializeToString().replace(b"yyyy", b"\xff\xfe\xfd\xfc")
    refused(data, "no UTF-8 text")


def test_a_cycle_inside_a_subgraph_is_an_error():
    nodes = [oh.make_node("Add", ["x", "b"], ["a"]), oh.make_node("Relu", ["a"], ["b"])]
    body = oh.make_graph(nodes, "body", [], [info("b")])
    outer = oh.make_node("If", ["condition"], ["y"], then_branch=body, else_branch=body)
    refused(proto([outer], [onh.from_array(np.array([True]), "condition")]), "cyclic")


def test_a_model_past_2_gb_is_mapped(tmp_path):
    """Peak memory of a process that reads 3 GB of external data stays what it is without."""
    size = 3 * 2**30 // 4
    path = saved(external("w.bin", dims=(size // 3, 3)), tmp_path / "here")
    with (tmp_path / "here" / "w.bin").open("wb") as file:
        file.truncate(4 * size)  # takes no room on the disk
    program = """
import resource, sys
from ptqjax import onnx_io
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = onnx_io.read(sys.argv[1])
assert model.params["w"].nbytes == 3 * 2**30 and not model.params["w"].flags.writeable
assert model.params["w"][123456].tolist() == [0, 0, 0]
hash(model.graph)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program, path], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 50_000  # KiB


def test_a_model_of_one_file_is_copied_once(tmp_path):
    """Reading 64 MB of weights takes these 64 MB, besides the file's own pages, which are the system's to drop."""
    path = saved(proto([oh.make_node("Relu", ["x"], ["y"])]), tmp_path / "here")
    program = """
import resource, sys, numpy as np, onnx, onnx.numpy_helper as onh
from ptqjax import onnx_io
status = lambda: int([l for l in open("/proc/self/status") if l.startswith("RssAnon")][0].split()[1])
before = status()
model = onnx_io.read(sys.argv[1])
print(status() - before, model.params["w"].nbytes)
"""
    weights = np.ones((2**24 // 3, 3), np.float32)
    big = add(onh.from_array(weights, "w"))
    path.write_bytes(big.SerializeToString())
    done = subprocess.run([sys.executable, "-c", program, path], check=True, capture_output=True, text=True)
    taken, size = map(int, done.stdout.split())
    assert taken * 1024 < 1.2 * size


def test_a_model_past_2_gb_is_written_in_two_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["ptqjax.onnx_io.write"], "_LARGEST_PROTOBUF", 10_000)
    random = np.random.default_rng(0)
    values = {
        "w": random.normal(size=(40, 30)).astype(np.float32),
        "v": random.integers(-8, 8, (50, 60)).astype(np.int8),
    }
    tensors = [onh.from_array(value, name) for name, value in values.items()]
    tensors.append(onh.from_array(values["v"].astype(oh.tensor_dtype_to_np_dtype(onnx.TensorProto.INT4)), "narrow"))
    nodes = [oh.make_node("DequantizeLinear", [name, "s"], [f"{name}_d"]) for name in ("v", "narrow")]
    nodes.append(oh.make_node("Any", ["x", "w", "v_d", "narrow_d"], ["y"], domain="own"))
    given = proto(nodes, [*tensors, onh.from_array(np.float32(2), "s")], opsets=(("", 21), ("own", 1)))
    model = onnx_io.read(given)
    onnx_io.write(model, tmp_path / "big.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    again = onnx_io.read(tmp_path / "big.onnx")
    assert again.params.keys() == model.params.keys()
    for name, value in model.params.items():
        assert again.params[name].dtype == value.dtype
        np.testing.assert_array_equal(again.params[name], value)
    onnx_io.write(again, tmp_path / "big.onnx")  # over the file that it is mapped from
    np.testing.assert_array_equal(onnx_io.read(tmp_path / "big.onnx").params["w"], values["w"])
    np.testing.assert_array_equal(again.params["w"], values["w"])


@pytest.mark.parametrize("older", [b"an older model's tensors", None])
def test_a_model_that_cannot_have_its_place_leaves_the_tensors_beside_it(older, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["ptqjax.onnx_io.write"], "_LARGEST_PROTOBUF", 1)
    path, data = tmp_path / "big.onnx", tmp_path / "big.onnx.data"
    path.mkdir()
    if older is not None:
        data.write_bytes(older)
    weight = onh.from_array(np.ones((3, 500), np.float32), "w")
    model = onnx_io.read(proto([oh.make_node("Any", ["x", "w"], ["y"], domain="own")], [weight]))
    with pytest.raises(OutputError, match="cannot be written"):
        onnx_io.write(model, path)
    assert sorted(tmp_path.iterdir()) == ([path] if older is None else [path, data])
    assert older is None or data.read_bytes() == older


def test_a_short_run_of_the_fuzzer_finds_nothing():
    script = Path(__file__).parents[1] / "scripts" / "fuzz_read.py"
    command = [sys.executable, "-W", "ignore", script, "--minutes", "0.05", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "FOUND" in done.stdout) == (0, False), done.stdout + done.stderr
    assert "00 trials: {" in done.stdout
