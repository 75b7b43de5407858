"""The examples of transformers work as they stand: an encoder in 8 bits, a language model with weights in int4."""

import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import ptqjax
from tests.decoders import VOCABULARY, decoder

SHARED = Path(os.environ.get("PTQJAX_SHARED", Path(__file__).parents[2] / "shared"))
EXAMPLES = Path(__file__).parents[1] / "examples"
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])


def encoder():
    """Two classes from the mean of what each token's embedding gives behind a LayerNormalization and a layer."""
    shapes = {"table": (20, 16), "w": (16, 32), "head": (32, 2)}
    params = {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    params |= {"gain": np.ones(16, np.float32), "shift": np.zeros(16, np.float32)}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("LayerNormalization", ["x", "gain", "shift"], ["n"], axis=-1),
        helper.make_node("MatMul", ["n", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["m"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["m", "head"], ["logits"]),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "t"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])
    tensors = [numpy_helper.from_array(value, name) for name, value in params.items()]
    graph = helper.make_graph(nodes, "encoder", [ids], [logits], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_the_encoder_in_eight_bits_names_the_classes_of_float(tmp_path):
    import encoder as example  # noqa: PLC0415 - found by the path above

    onnx.save(encoder(), tmp_path / "m.onnx")
    model = ptqjax.read(tmp_path / "m.onnx")
    for name, count in (("calibration", 32), ("test", 64)):
        ids = RANDOM.integers(0, 20, (count, 8))
        labels = np.asarray(ptqjax.apply(model.graph, model.params, {"input_ids": ids})["logits"]).argmax(-1)
        np.savez(tmp_path / f"{name}.npz", input_ids=ids, labels=labels)
    given = (tmp_path / each for each in ("m.onnx", "calibration.npz", "test.npz", "out"))
    found = example.main(*map(str, given))
    assert found.sqnr > 25
    assert found.top1 == found.agreement > 0.95


def test_the_language_model_in_int4_keeps_what_it_knows(tmp_path):
    import language_model as example  # noqa: PLC0415 - as above

    onnx.save(decoder(), tmp_path / "m.onnx")
    for name in ("calibration", "test"):
        ids = RANDOM.integers(0, VOCABULARY, (8, 7))
        labels = np.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
        np.savez(tmp_path / f"{name}.npz", input_ids=ids, labels=labels)
    given = tuple(str(tmp_path / each) for each in ("m.onnx", "calibration.npz", "test.npz", "out"))
    found = example.main(*given)
    assert found.figures["kl"] < 0.1
    assert found.outputs["logits"] > 10
    file = tmp_path / "out" / "language_model.onnx"
    assert "MatMulNBits" in {node.op_type for node in onnx.load(file).graph.node}
    batches, labels = example.feed(ptqjax.read(file), given[2])
    own, of_float = (example.feed(ptqjax.read(each), given[2])[0][-1] for each in (file, given[0]))
    assert any(not np.array_equal(own[name], of_float[name]) for name in own)  # its past is its own
    assert found.figures["perplexity"] == ptqjax.evaluate(file, batches, labels=labels).figures["perplexity"]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real models in {SHARED}")
def test_the_perplexity_of_a_real_language_model_is_the_known_one():
    data = np.load(SHARED / "data" / "stories" / "stories260k_evaluation.npz")
    ids, labels = data["input_ids"][:100], data["labels"][:100]
    file = SHARED / "models" / "stories260k.onnx"
    found = ptqjax.evaluate(file, [{"input_ids": ids[:50]}, {"input_ids": ids[50:]}], labels=labels)
    assert found.figures["perplexity"] == pytest.approx(4.32, abs=0.005)  # told with the file
