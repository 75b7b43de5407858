"""Constants cast to another tensor's type, as torch's exporter leaves them where it does not optimize, are folded."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptqjax.onnx_io import read
from ptqjax.transforms import fold_batch_norms


def file(*nodes, dtype: Any = TensorProto.FLOAT, **initializers) -> bytes:
    made = [
        helper.make_node(op, ins.split(), outs.split(), **(rest[0] if rest else {})) for op, ins, outs, *rest in nodes
    ]
    graph = helper.make_graph(
        made, "g", [helper.make_tensor_value_info("x", dtype, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in initializers.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()


RNG = np.random.default_rng(0)
W = RNG.normal(size=(4, 3, 3, 3)).astype(np.float32)
NORM = {name: RNG.uniform(0.5, 2, 4).astype(np.float32) for name in ("gamma", "beta", "mean", "variance")}


def test_a_bias_expanded_from_a_constant_of_another_tensors_type_is_a_parameter() -> None:
    model = read(file(
        ("Shape", "W", "s", {"start": 0, "end": 1}), ("CastLike", "zero x", "z"), ("Expand", "z s", "b"),
        ("Conv", "x W b", "c"), ("BatchNormalization", "c gamma beta mean variance", "n"),
        ("CastLike", "low n", "lo"), ("CastLike", "high n", "hi"), ("Clip", "n lo hi", "y"),
        W=W, zero=np.float64(0.25), low=np.int64(0), high=np.int64(6), **NORM,
    ))  # fmt: skip
    assert [node.op_type for node in model.graph.nodes] == ["Conv", "BatchNormalization", "Clip"]
    np.testing.assert_array_equal(model.params["b"], np.full(4, 0.25, np.float32))
    assert model.params["hi"].dtype == np.float32
    folded, _ = fold_batch_norms(model)
    assert [node.op_type for node in folded.graph.nodes] == ["Conv", "Clip"]


@pytest.mark.parametrize(("dtype", "expected"), [(TensorProto.FLOAT16, np.float16), (TensorProto.DOUBLE, np.float64)])
def test_the_type_is_followed_through_operators(dtype, expected) -> None:
    model = read(
        file(("Relu", "x", "r"), ("CastLike", "one r", "o"), ("Add", "r o", "y"), dtype=dtype, one=np.int64(1))
    )
    assert [node.op_type for node in model.graph.nodes] == ["Relu", "Add"]
    assert model.params["o"].dtype == expected


def test_a_type_that_is_not_known_keeps_the_node() -> None:
    model = read(file(("Identity", "x", "r"), ("Unknown", "r", "u", {"domain": "d"}), ("CastLike", "one u", "o"),
                      ("Add", "r o", "y"), one=np.int64(1)))  # fmt: skip
    assert "CastLike" in [node.op_type for node in model.graph.nodes]
