"""Laws of constant Adds behind layers: they become biases, the function stays, others are left."""

import numpy as np
import pytest

from ptqjax.ir import Model
from ptqjax.transforms import fold_batch_norms
from ptqjax.transforms.fold_adds import fold_constant_adds
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
    folded, report = fold_constant_adds(model)
    assert [found.op_type for found in folded.graph.nodes] == ["Conv"]
    assert [record.where for record in report] == [("y", "w")]
    assert_same_function(folded, model, 1e-6)
    assert fold_constant_adds(folded)[1] == (), "a second run has nothing to do"


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
    folded, report = fold_constant_adds(model)
    assert [found.op_type for found in folded.graph.nodes] == [layer.op_type]
    assert len(report) == 1
    assert_same_function(folded, model, 1e-6)


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
    folded, report = fold_constant_adds(model)
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
