"""Bounds on integers give the integers of bounds on real numbers, in ONNX Runtime and here."""

from dataclasses import replace

import numpy as np
import pytest

from ptqjax import onnx_io
from ptqjax.agreement import run, session, validate
from ptqjax.config import QuantizationConfig
from ptqjax.lowering import apply
from ptqjax.qdq.insert import insert_qdq
from ptqjax.qdq.integer_bounds import bound_integers
from ptqjax.ranges.calibrate import calibrate
from ptqjax.transforms import equalize
from tests.models import mobile_block


def quantized(activations="uint8"):
    model, _ = equalize(mobile_block(dtype=np.float32, channels=8))
    x = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32) * 3
    batch = {model.graph.inputs[0].name: x}
    config = QuantizationConfig(granularity="tensor", activations=activations, ranges="min-max")
    return insert_qdq(model, calibrate(model, [batch], config)), batch


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_the_same_integers_in_the_runtime_and_here(activations):
    model, batch = quantized(activations)
    bounded, report = bound_integers(model)
    done = [record for record in report if record.done]
    assert len(done) == sum(node.op_type == "Min" for node in model.graph.nodes) > 0
    runtime, bounded_runtime = (
        run(session(onnx_io.to_proto(each).SerializeToString()), batch) for each in (model, bounded)
    )
    ours, bounded_ours = (apply(each.graph, each.params, batch) for each in (model, bounded))
    for name, value in runtime.items():
        np.testing.assert_array_equal(bounded_runtime[name], value)
        np.testing.assert_array_equal(bounded_ours[name], ours[name])


def test_what_is_validated_still_equals_the_runtime():
    model, batch = quantized()
    bounded, _ = bound_integers(model)
    found = validate(bounded, [batch])
    assert found.largest == 0
    assert found.integer.equal == 1
    assert sum(group.operator == "QLinearConv" for group in found.groups) == 3
    assert not [warning for warning in found.warnings if "VNNI" not in warning]


def test_a_bound_between_grids_that_differ_stays_on_real_numbers():
    model, _ = quantized()
    node = next(node for node in model.graph.nodes if node.op_type == "Min")
    scale = model.graph.readers[node.output][0].inputs[1]
    other = model.replace(params={**model.params, scale: model.params[scale] * np.float32(1.5)})
    _, report = bound_integers(other)
    assert {record.reason for record in report if not record.done} == {"the grids before and after differ"}


def test_an_opset_without_integer_bounds_is_left_alone():
    model, _ = quantized()
    old = model.replace(graph=replace(model.graph, opsets=(("", 11),)))
    after, report = bound_integers(old)
    assert after.graph == old.graph
    assert all("opset 12" in record.reason for record in report)


def test_a_second_run_finds_nothing():
    bounded, _ = bound_integers(quantized()[0])
    again, report = bound_integers(bounded)
    assert (again.graph, report) == (bounded.graph, ())
