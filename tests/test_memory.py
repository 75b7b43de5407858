"""Large models are walked through tensor by tensor: files are those of protobuf, and what is read is given back."""

import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from onnx import TensorProto, helper

import ptqjax
from ptqjax.ir import Graph, Model, TensorSpec
from ptqjax.mapped import release
from ptqjax.onnx_io import streaming, to_proto
from ptqjax.placement.sites import WEIGHT, Site
from ptqjax.ranges import search
from ptqjax.ranges.schemes import find_scheme
from tests.models import node

ROOT = Path(__file__).parents[1]
RANDOM = np.random.default_rng(0)


def model_of(dtype):
    """A large tensor of an odd number of elements between small ones, in the order of names."""
    large = RANDOM.integers(0, 8, (23, 61)).astype(dtype)
    params = {"b_large": large, "a": np.ones(3, np.float32), "c": np.ones((), np.float32)}
    is_float = dtype is np.float32
    read = node("Add" if is_float else "DequantizeLinear", ["b_large", "c"], "y")
    float32 = np.dtype(np.float32)
    graph = Graph(
        name="test",
        inputs=(TensorSpec(name="x", dtype=float32, shape=(3,)),),
        outputs=tuple(TensorSpec(name=name, dtype=float32, shape=None) for name in ("y", "z")),
        nodes=(read, node("Mul", ["x", "a"], "z")),
        parameters=tuple(sorted(params)),
        opsets=(("", 21),),
        metadata=(("key", "value"),),
        ir_version=10,
    )
    return Model(graph=graph, params=params)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, ml_dtypes.int4, ml_dtypes.uint4])
def test_a_model_written_tensor_by_tensor_is_the_bytes_that_protobuf_writes(dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(streaming, "LARGE", 64)
    model = model_of(dtype)
    apart = streaming.taken_apart(model)
    assert set(apart.tensors) == {"b_large"}
    with (tmp_path / "whole").open("wb") as file:
        streaming.write_apart(apart, file)
    assert (tmp_path / "whole").read_bytes() == to_proto(model).SerializeToString()
    ptqjax.write(model, tmp_path / "model.onnx")
    found = onnx.load(tmp_path / "model.onnx")
    assert [len(info.type.tensor_type.shape.dim) for info in found.graph.output] == [2, 1]  # inferred
    assert len(found.graph.input) == 1
    (stored,) = (tensor for tensor in found.graph.initializer if tensor.name == "b_large")
    assert onnx.numpy_helper.to_array(stored).tobytes() == model.params["b_large"].tobytes()


def test_a_damaged_model_is_refused_though_its_tensors_are_not_looked_at(monkeypatch, tmp_path):
    monkeypatch.setattr(streaming, "LARGE", 64)
    model = model_of(np.float32)
    wrong = model.replace(params={**model.params, "c": np.zeros(5, np.float32)})  # does not broadcast to 23 x 61
    with pytest.raises(ptqjax.ModelError, match="not valid ONNX"):
        ptqjax.write(wrong, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def with_external_data(folder):
    """Writes a model whose weight lies in a file of its own; returns the weight."""
    value = RANDOM.normal(size=(64, 4096)).astype(np.float32)
    (folder / "model.data").write_bytes(value.tobytes())
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=value.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="model.data")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4096])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return value


def resident(name):
    """The kB of a mapped file that are in memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = [i for i, line in enumerate(lines) if line.endswith(name)]
    return sum(int(line.split()[1]) for i in at for line in lines[i : i + 6] if line.startswith("Rss:"))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_mapped_tensors_are_given_back_and_read_again(tmp_path):
    value = with_external_data(tmp_path)
    mapped = ptqjax.read(tmp_path / "model.onnx").params["w"]
    np.testing.assert_array_equal(mapped, value)
    held = resident("model.data")
    release(mapped[:, :2048])  # no whole rows: what lies between them goes as well
    release(mapped)
    assert resident("model.data") < held // 4
    np.testing.assert_array_equal(mapped, value)
    for other in (value, value[::2], np.float32(1), None):  # of no file: left alone
        release(other)


@pytest.mark.parametrize("ranges", ["min-max", "sqnr"])
def test_grids_do_not_depend_on_how_many_tensors_are_searched_together(ranges, monkeypatch):
    values = {f"w{i}": RANDOM.normal(size=(8, 5 + i)).astype(np.float32) for i in range(4)}
    sites = [
        Site(tensor=name, kind=WEIGHT, dtype="int8", symmetric=True, axis=0, root=name, reason="") for name in values
    ]
    whole = search.encode_constants(sites, values, find_scheme(ranges))
    monkeypatch.setattr(search, "_AT_A_TIME", 300)  # one or two of them
    for name, encoding in search.encode_constants(sites, values, find_scheme(ranges)).items():
        np.testing.assert_array_equal(encoding.scale, whole[name].scale)


def test_a_job_holds_little_besides_its_result():
    """What importing takes is most of it at this scale; the float model, which lies in a file, is never held."""
    command = [sys.executable, ROOT / "scripts" / "bench_memory.py", "--megabytes", "150", "--width", "512"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    peaks = {name: int(size) for name, size in re.findall(r"up to (\w+): (\d+) MB", done.stdout)}
    size = float(done.stdout.split("model ")[1].split()[0])
    assert size > 140
    assert peaks["export"] - peaks["import"] < 1.2 * size  # codes are a quarter; today 0.9, and 2.5 if all is copied
