"""ONNX's own cases for the operators that are registered: the oracle of what each operator means."""

import re
import warnings

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ptqjax.lowering import apply
from ptqjax.onnx_io import read
from ptqjax.ops import registered

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ONNX's generators divide by zero on purpose
    from onnx.backend.test.loader import load_model_tests

    _ALL_CASES = load_model_tests(kind="node")

# What has no lowering on purpose, by what the case's name begins with (a regular expression) -> reason.
_NOT_YET = {
    r"test_batchnorm_\w+_training_mode": "statistics of the batch are training",
    r"test_training_dropout_(?!zero_ratio)|test_training_dropout$": "dropping is training",
    r"test_training_dropout_zero_ratio": "training mode is refused whatever its ratio",
    r"test_identity_(sequence|opt)": "only tensors are values here",
    r"test_maxpool_with_argmax": "the output Indices has no lowering",
    r"test_(cast|castlike)\w*_to_(FLOAT8|FLOAT4)": "floats below 16 bits have no lowering",
    r"test_(de)?quantizelinear_(e4m3fn|e5m2|float4e2m1)": "floats below 16 bits have no lowering",
}


def _operators(graph):
    return {(node.domain, node.op_type) for node in graph.node}


def _marked(case):
    reasons = [reason for pattern, reason in _NOT_YET.items() if re.match(pattern, case.name)]
    marks = [pytest.mark.xfail(reason=reasons[0], strict=True)] if reasons else []
    return pytest.param(case, id=case.name, marks=marks)


def _cases():
    known = {operator for operator in registered() if not operator[1].startswith("QLinear")}  # held to ONNX Runtime
    same_again = "test_castlike_"  # expanded, each is a case of Cast
    return [
        _marked(case)
        for case in _ALL_CASES
        if case.model and _operators(case.model.graph) <= known and not case.name.startswith(same_again)
    ]


def _as_array(value):
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _with_shape_inputs_as_initializers(model, feeds):
    """Returns the model whose vectors of 64-bit integers and flags are constants, as they are in real models."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    fixed = {name: value for name, value in feeds.items() if value.dtype in (np.int64, np.bool_) and value.ndim <= 1}
    if len(fixed) == len(feeds):
        return model, feeds
    kept = [value for value in model.graph.input if value.name not in fixed]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in fixed.items())
    return model, {name: value for name, value in feeds.items() if name not in fixed}


@pytest.mark.parametrize("case", _cases())
def test_operator_means_what_onnx_says(case):
    for raw_inputs, raw_outputs in case.data_sets:
        inputs, outputs = map(_as_array, raw_inputs), map(_as_array, raw_outputs)
        names = [value.name for value in case.model.graph.input]
        proto, feeds = _with_shape_inputs_as_initializers(case.model, dict(zip(names, inputs, strict=True)))
        model = read(proto)
        results = apply(model.graph, model.params, feeds)
        for spec, expected in zip(model.graph.outputs, outputs, strict=True):
            _assert_same(np.asarray(results[spec.name]), expected, case)


def _assert_same(result, expected, case):
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    if result.dtype.kind == "V":  # types that NumPy borrows (bfloat16, int4) and cannot subtract
        result, expected = result.astype(np.float32), expected.astype(np.float32)
    np.testing.assert_allclose(result, expected, rtol=case.rtol, atol=case.atol)
