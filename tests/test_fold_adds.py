"""Laws of constants behind layers: they become part of weight and bias, the function stays, others are left."""

from dataclasses import replace

import numpy as np
import pytest

from ptqjax.ir import Model, rebuild
from ptqjax.transforms import fold_batch_norms
from ptqjax.transforms.fold_adds import fold_constant_steps, fold_gemm_factors
from tests.models import assert_same_function, build, node

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def behind(layer, constant: np.ndarray, *, first: bool = False, extra=(), shape=("N", 4, 6, 6)) -> Model:
    """Returns a model of the layer and an Add of the constant."""
    inputs = ["c", "h"] if first else ["h", "c"]
    params = {"w": normal(6, 4, 3, 3), "t": normal(4, 6, 3, 3), "g": normal(4, 6), "b": normal(6), "c": constant}
    used = {name for each in (layer, *extra) for name in each.inputs} | {"c"}
    nodes = [layer, node("Add", inputs, "y"), *extra]
    outputs = [extra[-1].output if extra else "y"]
    kept = {name: value for name, value in params.items() if name in used}
    return build(nodes, kept, input_shape=shape, outputs=outputs)


CONV = node("Conv", ["x", "w"], "h", pads=(1, 1, 1, 1))
ALIKE = [normal(6, 1, 1), normal(1, 6, 1, 1), normal(1, 1, 1), normal(1), np.asarray(0.5, np.float32)]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("constant", ALIKE, ids=lambda value: str(np.shape(value)))
def test_a_constant_behind_a_convolution_becomes_its_bias(constant, *, first: bool) -> None:
    model = behind(CONV, constant, first=first)
    folded, report = fold_constant_steps(model)
    assert [found.op_type for found in folded.graph.nodes] == ["Conv"]
    assert [record.where for record in report] == [("y", "w")]
    assert_same_function(folded, model, 1e-6)
    assert fold_constant_steps(folded)[1] == (), "a second run has nothing to do"


@pytest.mark.parametrize(
    ("layer", "constant", "shape"),
    [
        (node("Conv", ["x", "w", "b"], "h"), normal(6, 1, 1), ("N", 4, 6, 6)),
        (node("ConvTranspose", ["x", "t", "b"], "h"), normal(6, 1, 1), ("N", 4, 6, 6)),
        (node("Gemm", ["x", "g", "b"], "h", alpha=0.5, beta=2.0), normal(6), ("N", 4)),
        (node("Gemm", ["x", "g"], "h"), normal(1, 6), ("N", 4)),
    ],
    ids=lambda value: getattr(value, "op_type", ""),
)
def test_a_layer_adds_it_to_the_bias_that_it_has(layer, constant, shape) -> None:
    model = behind(layer, constant, shape=shape)
    folded, report = fold_constant_steps(model)
    assert [found.op_type for found in folded.graph.nodes] == [layer.op_type]
    assert len(report) == 1
    assert_same_function(folded, model, 1e-6)


@pytest.mark.parametrize("constant", [normal(6, 1, 1) * 10, np.asarray(0.1, np.float32)], ids=["channels", "number"])
@pytest.mark.parametrize("step", ["Mul", "Div", "Sub"])
@pytest.mark.parametrize("layer", [CONV, node("ConvTranspose", ["x", "t", "b"], "h"), node("Gemm", ["x", "g"], "h")])
def test_a_layer_takes_in_what_multiplies_or_lessens_it(layer, step, constant) -> None:
    is_matrix = layer.op_type == "Gemm"
    model = behind(
        layer, constant.reshape(-1) if is_matrix else constant, shape=("N", 4) if is_matrix else ("N", 4, 6, 6)
    )
    nodes = [replace(each, op_type=step) if each.op_type == "Add" else each for each in model.graph.nodes]
    model = rebuild(model, nodes=nodes)
    folded, report = fold_constant_steps(model)
    assert [found.op_type for found in folded.graph.nodes] == [layer.op_type]
    assert len(report) == 1
    assert_same_function(folded, model, 1e-6)


@pytest.mark.parametrize(
    "constant", [normal(6), np.asarray(0.1, np.float32), normal(1, 6)], ids=["vector", "number", "matrix"]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_of_matrices_takes_in_a_vector_that_multiplies_it(constant, *, has_bias: bool) -> None:
    product = [node("MatMul", ["x", "g"], "p" if has_bias else "h")]
    product += [node("Add", ["p", "b"], "h")] if has_bias else []
    params = {"g": normal(4, 6), "c": constant} | ({"b": normal(6)} if has_bias else {})
    model = build([*product, node("Mul", ["h", "c"], "y")], params, input_shape=("N", 3, 4), outputs=["y"])
    folded, report = fold_constant_steps(model)
    assert len(report) == (constant.ndim < 2), "a matrix may raise the rank"
    assert len(folded.graph.nodes) == len(model.graph.nodes) - len(report)
    assert_same_function(folded, model, 1e-6)


def test_what_is_divided_or_taken_off_by_a_layer_is_left() -> None:
    for step in ("Sub", "Div"):
        model = behind(CONV, normal(6, 1, 1), first=True)
        model = rebuild(model, nodes=[CONV, node(step, ["c", "h"], "y")])
        assert fold_constant_steps(model)[0] is model


def test_a_shared_weight_is_added_to_and_not_multiplied() -> None:
    other = node("Conv", ["x", "w"], "z")
    for step, is_left in (("Mul", True), ("Add", False)):
        params = {"w": normal(6, 4, 3, 3), "c": normal(6, 1, 1)}
        nodes = [CONV, node(step, ["h", "c"], "y"), other]
        model = build(nodes, params, input_shape=("N", 4, 6, 6), outputs=["y", "z"])
        folded, _ = fold_constant_steps(model)
        assert (folded is model) == is_left
        assert_same_function(folded, model, 1e-6)


@pytest.mark.parametrize("shape", [(6,), (), (3, 1), (3, 6)], ids=str)
@pytest.mark.parametrize("beta", [0.3, 0.0])
def test_alpha_and_beta_become_part_of_the_parameters(shape, beta) -> None:
    gemm = node("Gemm", ["x", "g", "c"], "y", alpha=0.7, beta=beta)
    params = {"g": normal(4, 6), "c": np.asarray(normal(*shape), np.float32)}
    model = build([gemm], params, input_shape=(3, 4), outputs=["y"])
    folded, report = fold_gemm_factors(model)
    (found,) = folded.graph.nodes
    assert (found.attribute("alpha", 1.0), found.attribute("beta", 1.0), len(found.inputs)) == (1, 1, 3 if beta else 2)
    assert len(report) == 1
    assert_same_function(folded, model, 1e-6)
    assert fold_gemm_factors(folded) == (folded, ())


def test_a_gemm_of_shared_or_computed_parameters_keeps_their_factors() -> None:
    nodes = [node("Gemm", ["x", "g", "x"], "y", alpha=0.5, beta=2.0), node("Gemm", ["x", "g"], "z")]
    model = build(nodes, {"g": normal(4, 4)}, input_shape=(3, 4), outputs=["y", "z"])
    assert fold_gemm_factors(model) == (model, ())


@pytest.mark.parametrize(
    ("constant", "extra"),
    [
        (normal(6, 6, 6), ()),  # a number for each position
        (normal(6), ()),  # one for each column
        (normal(1, 1, 6, 1, 1), ()),  # it raises the rank
        (np.full((6, 1, 1), 3e38, np.float32), ()),
        (normal(6, 1, 1), (node("Mul", ["y", "h"], "z"),)),  # the unshifted result is read as well
    ],
    ids=["positions", "columns", "rank", "overflow", "read elsewhere"],
)
def test_what_is_no_bias_is_left(constant, extra) -> None:
    layer = CONV if np.max(np.abs(constant)) < 1e38 else node("Conv", ["x", "w", "b"], "h", pads=(1, 1, 1, 1))
    model = behind(layer, constant, extra=extra)
    if np.max(np.abs(constant)) > 1e38:
        model = model.replace(params=model.params | {"b": np.full(6, 3e38, np.float32)})
    folded, report = fold_constant_steps(model)
    assert folded is model
    assert report == ()


def test_a_chain_of_adds_and_the_batch_norm_behind_it_fold() -> None:
    norm = node("BatchNormalization", ["z", "s", "o", "m", "v"], "n")
    nodes = [CONV, node("Add", ["h", "c"], "y"), node("Add", ["c", "y"], "z"), norm]
    params = {"w": normal(6, 4, 3, 3), "c": normal(6, 1, 1), "s": normal(6), "o": normal(6), "m": normal(6)}
    model = build(nodes, params | {"v": np.abs(normal(6)) + 0.5}, input_shape=("N", 4, 6, 6), outputs=["n"])
    folded, report = fold_batch_norms(model)
    assert [found.op_type for found in folded.graph.nodes] == ["Conv"]
    assert [record.transform for record in report] == ["fold_biases", "fold_biases", "fold_batch_norms"]
    assert_same_function(folded, model, 1e-5)
