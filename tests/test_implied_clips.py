"""What is dropped before a quantizer changes none of its integers; what would, stays."""

import numpy as np
import pytest

from ptqjax import export, onnx_io, quantize, validate
from ptqjax.agreement import run, session
from ptqjax.config import QuantizationConfig
from ptqjax.lowering import apply
from ptqjax.qdq.fuse_quantized import fuse_quantized
from ptqjax.qdq.implied_clips import drop_implied_clips
from ptqjax.qdq.insert import insert_qdq
from ptqjax.qdq.integer_bounds import bound_integers
from ptqjax.ranges.calibrate import calibrate
from tests.models import build, mobile_block, node


def before_quantizer(op_type, bounds, scale, zero_point, dtype, *, shape=("N", 3, 4)):
    """A clip of the input, and a grid behind it."""
    params = {f"bound{i}": np.asarray(bound, np.float32) for i, bound in enumerate(bounds) if bound is not None}
    names = [f"bound{i}" if bound is not None else "" for i, bound in enumerate(bounds)]
    params |= {"scale": np.float32(scale).reshape(()), "zero": np.asarray(zero_point, dtype)}
    nodes = [
        node(op_type, ["x", *names], "clipped"),
        node("QuantizeLinear", ["clipped", "scale", "zero"], "codes"),
        node("DequantizeLinear", ["codes", "scale", "zero"], "y"),
    ]
    return build(nodes, params, input_shape=shape, outputs=["y"], opset=21)


EXTREMES = np.concatenate(
    [
        np.array([np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0], np.float32),
        np.linspace(-8, 8, 4000, dtype=np.float32),
    ]
).reshape(1, 3, -1)[..., :1336]


IMPLIED = [
    ("Relu", (), 6 / 255, 0, "uint8"),
    ("Relu", (), 6 / 255, -128, "int8"),
    ("Relu", (), 6 / 65535, 0, "uint16"),
    ("Clip", (0.0, 6.0), 6 / 255, 0, "uint8"),
    ("Clip", (0.0, 6.0), 4 / 255, 0, "uint8"),
    ("Clip", (-1.0, None), 2 / 255, 100, "uint8"),
    ("Clip", (None, 6.0), 6 / 127, 0, "int8"),
    ("Clip", (None, None), 1.0, 3, "uint8"),
    ("Min", (6.0,), 6 / 255, 0, "uint8"),
    ("Max", (0.0,), 6 / 255, 0, "uint8"),
]
NOT_IMPLIED = [
    ("Relu", (), 6 / 255, 1, "uint8"),
    ("Relu", (), 6 / 255, 0, "int8"),
    ("Clip", (0.0, 6.0), 6.1 / 255, 0, "uint8"),
    ("Clip", (0.5, 6.0), 6 / 255, 0, "uint8"),
    ("Min", (6.0,), 6.1 / 255, 0, "uint8"),
    ("Max", (0.1,), 6 / 255, 0, "uint8"),
]


@pytest.mark.parametrize("place", IMPLIED, ids=repr)
def test_a_clip_that_the_grid_implies_is_dropped_and_every_integer_stays(place):
    size = EXTREMES.shape[-1]
    model = before_quantizer(*place, shape=("N", 3, size))
    after, (record,) = drop_implied_clips(model)
    assert record.done
    assert [each.op_type for each in after.graph.nodes] == ["QuantizeLinear", "DequantizeLinear"]
    batch = {"x": EXTREMES}
    before, found = (apply(each.graph, each.params, batch)["y"] for each in (model, after))
    np.testing.assert_array_equal(found, before)
    runtime = [run(session(onnx_io.to_proto(each).SerializeToString()), batch)["y"] for each in (model, after)]
    np.testing.assert_array_equal(*runtime)


@pytest.mark.parametrize("place", NOT_IMPLIED, ids=repr)
def test_a_clip_that_changes_an_integer_stays_with_the_reason(place):
    model = before_quantizer(*place)
    after, (record,) = drop_implied_clips(model)
    assert after.graph == model.graph
    assert "bound" in record.reason


def test_a_clip_with_a_second_reader_is_no_place():
    nodes = [
        node("Relu", ["x"], "r"),
        node("QuantizeLinear", ["r", "scale", "zero"], "codes"),
        node("DequantizeLinear", ["codes", "scale", "zero"], "d"),
        node("Add", ["d", "r"], "y"),
    ]
    params = {"scale": np.float32(0.1).reshape(()), "zero": np.uint8(0).reshape(())}
    model = build(nodes, params, input_shape=("N", 3), outputs=["y"])
    assert drop_implied_clips(model) == (model, ())


def test_a_clip_between_two_grids_keeps_them_apart():
    nodes = [
        node("QuantizeLinear", ["x", "s1", "zero"], "q"),
        node("DequantizeLinear", ["q", "s1", "zero"], "d"),
        node("Relu", ["d"], "r"),
        node("QuantizeLinear", ["r", "s2", "zero"], "codes"),
        node("DequantizeLinear", ["codes", "s2", "zero"], "y"),
    ]
    params = {"s1": np.float32(0.1).reshape(()), "s2": np.float32(0.07).reshape(()), "zero": np.uint8(0).reshape(())}
    after, (record,) = drop_implied_clips(build(nodes, params, input_shape=("N", 3), outputs=["y"]))
    assert "two grids" in record.reason
    assert any(each.op_type == "Relu" for each in after.graph.nodes)


def test_a_bound_that_broadcasts_stays():
    model = before_quantizer("Min", ([[6.0, 7.0]],), 6 / 255, 0, "uint8", shape=("N", 1))
    after, (record,) = drop_implied_clips(model)
    assert after.graph == model.graph
    assert "broadcast" in record.reason


def convolution(bounds):
    """Conv, Relu and bounds per channel, as scaling leaves a ReLU6."""
    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(4, 3, 3, 3)).astype(np.float32), "b": np.zeros(4, np.float32)}
    params["bounds"] = np.asarray(bounds, np.float32).reshape(1, 4, 1, 1)
    nodes = [node("Conv", ["x", "w", "b"], "c"), node("Relu", ["c"], "r"), node("Min", ["r", "bounds"], "y")]
    return build(nodes, params, input_shape=("N", 3, 8, 8), outputs=["y"])


@pytest.mark.parametrize(("bounds", "left"), [([50, 60, 70, 80], 0), ([1, 60, 70, 80], 1)])
def test_bounds_at_the_top_of_the_shared_range_are_dropped_as_integers(bounds, left):
    model = convolution(bounds)
    batch = {"x": np.random.default_rng(1).normal(size=(4, 3, 8, 8)).astype(np.float32)}
    encodings = calibrate(model, [batch], QuantizationConfig(granularity="tensor", ranges="min-max"))
    bounded = bound_integers(insert_qdq(model, encodings))[0]
    after, _ = drop_implied_clips(bounded)
    operators = [each.op_type for each in after.graph.nodes]
    assert (operators.count("Min"), operators.count("Relu")) == (left, 0)
    fused = [each.op_type for each in fuse_quantized(after)[0].graph.nodes]
    assert "QLinearConv" in fused
    runtime = [run(session(onnx_io.to_proto(each).SerializeToString()), batch)["y"] for each in (bounded, after)]
    np.testing.assert_array_equal(*runtime)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_what_is_exported_without_clips_still_equals_the_integer_program(tmp_path, granularity):
    model = mobile_block(dtype=np.float32, channels=8)
    batch = {"x": np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32) * 3}
    result = quantize(model, [batch], QuantizationConfig(granularity=granularity))
    export(result.model, result.encodings, tmp_path, "model")
    found = validate(tmp_path, [batch])
    assert found.largest == 0
    assert found.integer.equal == 1
    assert sum(group.operator == "QLinearConv" for group in found.groups) == 3


def test_a_second_run_drops_nothing():
    model = before_quantizer("Clip", (0.0, 6.0), 6 / 255, 0, "uint8")
    after, _ = drop_implied_clips(model)
    assert drop_implied_clips(after) == (after, ())
