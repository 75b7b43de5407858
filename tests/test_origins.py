"""What depends on sizes alone: one definition, by which nothing is rounded there and nothing else is left out."""

from typing import Any

import jax
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptqjax.config import QuantizationConfig, Rule
from ptqjax.errors import ConfigError
from ptqjax.ir import Model, Origin, origins_of
from ptqjax.lowering import apply, interpret
from ptqjax.onnx_io import read
from ptqjax.placement.place import place
from ptqjax.placement.tensors import floating_tensors
from ptqjax.ranges.calibrate import calibrate
from ptqjax.report.inspection import inspect
from ptqjax.simulation import simulate

RNG = np.random.default_rng(0)


def build(*nodes, shape=("N", "T", 4), extra=(), **initializers) -> Model:
    """Returns a model of (operator, inputs, outputs, attributes) with the input x and the output y."""
    made = [
        helper.make_node(op, ins.split(), outs.split(), **(rest[0] if rest else {})) for op, ins, outs, *rest in nodes
    ]
    graph = helper.make_graph(
        [*made, *extra],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in initializers.items()],
    )
    return read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


FLOAT, INT64 = {"to": TensorProto.FLOAT}, {"to": TensorProto.INT64}
ONE = numpy_helper.from_array(np.ones(1, np.float32))
LENGTH = [("Shape", "x", "sh"), ("Gather", "sh i1", "t")]
NUMBERS = {"i0": np.int64(0), "i1": np.int64(1), "axis": np.asarray([1])}
FREQUENCIES = RNG.uniform(0.1, 1, (1, 4)).astype(np.float32)


def branching() -> Model:
    """A size that a branch chooses: integers of a branch are known while tracing as well."""
    taken = [helper.make_node("Gather", ["sh", "i1"], ["taken"])]
    other = [helper.make_node("Gather", ["sh", "i0"], ["other"])]
    bodies: dict[str, Any] = {
        "then_branch": helper.make_graph(
            taken, "then", [], [helper.make_tensor_value_info("taken", TensorProto.INT64, [])]
        ),
        "else_branch": helper.make_graph(
            other, "else", [], [helper.make_tensor_value_info("other", TensorProto.INT64, [])]
        ),
    }
    extra = [
        helper.make_node("Greater", ["t", "i0"], ["long"]),
        helper.make_node("If", ["long"], ["chosen"], **bodies),
        helper.make_node("Cast", ["chosen"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["x", "f"], ["y"]),
    ]
    return build(*LENGTH, extra=extra, **NUMBERS)


def models() -> dict[str, Model]:
    positions = [("Range", "i0 t i1", "r"), ("Cast", "r", "f", FLOAT), ("Unsqueeze", "f axis", "u")]
    positions += [("Mul", "u freq", "angle"), ("Sin", "angle", "sine"), ("Add", "x sine", "y")]
    table = [("Unsqueeze", "t i0", "end"), ("Slice", "table zero end zero", "rows"), ("Add", "x rows", "y")]
    return {
        "scale": build(*LENGTH, ("Cast", "t", "f", FLOAT), ("Sqrt", "f", "root"), ("Div", "x root", "y"), **NUMBERS),
        "scale by a parameter": build(
            *LENGTH, ("Cast", "t", "f", FLOAT), ("Div", "one f", "k"), ("Mul", "x k", "y"), one=np.float32(1), **NUMBERS
        ),
        "positions": build(*LENGTH, *positions, freq=FREQUENCIES, **NUMBERS),
        "rows of a table": build(
            *LENGTH, *table, table=RNG.normal(size=(9, 4)).astype(np.float32), zero=np.asarray([0]), **NUMBERS
        ),
        "mask": build(
            ("Shape", "x", "sh"), ("ConstantOfShape", "sh", "ones", {"value": ONE}), ("Trilu", "ones", "f"),
            ("Mul", "x f", "y"),
        ),
        "sum by length": build(
            *LENGTH, ("Cast", "t", "f", FLOAT), ("ReduceSum", "x axis", "sum"), ("Div", "sum f", "y"), **NUMBERS
        ),
        "a branch": branching(),
    }  # fmt: skip


MODELS = models()


def met(model: Model, length: int) -> set[str]:
    """Returns the tensors whose values the hook meets while a batch of this length is traced."""
    seen: set[str] = set()

    def intercept(name, value, channel_axis):
        del channel_axis
        seen.add(name)
        return value, None

    x = jax.ShapeDtypeStruct((2, length, 4), np.float32)
    jax.eval_shape(lambda params, x: interpret(model.graph, params, {"x": x}, intercept=intercept)[0], model.params, x)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_what_is_rounded_meets_data_and_what_meets_no_data_is_not_rounded(name) -> None:
    model = MODELS[name]
    origins, placement = origins_of(model.graph), place(model)
    activations = set(floating_tensors(model)) - set(model.params)
    assert {origins[site.tensor] for site in placement.sites} <= {Origin.DATA, Origin.PARAMETER}
    assert {tensor for tensor in activations if origins[tensor] == Origin.DATA} <= met(model, 3)
    of_sizes = {tensor for tensor in activations if origins[tensor] == Origin.SIZE}
    assert of_sizes == {entry.tensor for entry in placement.skipped if "sizes alone" in entry.reason}
    assert of_sizes  # each model has one


@pytest.mark.parametrize("name", MODELS)
def test_sizes_that_were_not_calibrated_are_computed_exactly(name) -> None:
    """At twice the length, where grids of what depends on it would be too short: rounding of 16 bits is left."""
    model, x = MODELS[name], RNG.uniform(-1, 1, (4, 8, 4)).astype(np.float32)
    wide = np.full((2, 1, 4), 4, np.float32) * np.asarray(
        [[[1]], [[-1]]], np.float32
    )  # all results reach farther than those of x
    config = QuantizationConfig(activations="uint16", ranges="min-max")
    encodings = calibrate(model, [{"x": x[:, :4]}, {"x": wide}], config)
    expected = apply(model.graph, model.params, {"x": x})["y"]
    found = simulate(model, encodings)(model.params, encodings, {"x": x})["y"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_inspection_says_that_sizes_stay_in_float() -> None:
    inspection = inspect(MODELS["scale"])
    assert not inspection.obstacle
    assert inspection.placement is not None
    reasons = {entry.tensor: entry.reason for entry in inspection.placement.skipped}
    assert reasons["f"] == reasons["root"] == "depends on sizes alone, on no element of an input"


def test_a_rule_cannot_ask_for_a_grid_of_sizes() -> None:
    config = QuantizationConfig(rules=(Rule(tensors=("root",), dtype="uint16"),))
    with pytest.raises(ConfigError, match="'root' stays in float: depends on sizes alone"):
        place(MODELS["scale"], config)
