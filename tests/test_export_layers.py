"""One layer at a time, on every kind of grid: the file loads in ONNX Runtime and equals the simulation."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import onnx
import pytest

from ptqjax import apply, export, read, simulate
from ptqjax.errors import ConfigError
from ptqjax.ir import Node, TensorSpec
from ptqjax.kernels.grid import FLOAT_FORMATS
from ptqjax.kernels.ranges import grid_kind, grid_of_range, scale_of_float_range
from ptqjax.quantize import make_encoding
from ptqjax.quantize.encodings import fake_quantize
from ptqjax.quantize.low_power import low_power_encoding, low_power_scales
from ptqjax.validate import run, session
from tests.models import build, node


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Layer(NamedTuple):
    """A layer with the tensors x, w (perhaps v behind a Transpose), b and y."""

    nodes: list[Node]
    params: dict[str, np.ndarray]
    input_shape: tuple[int, ...]
    axis: int
    """The output channels of `w`."""
    summed: int
    """The axis of `w` that is summed over."""


def conv(*, group=1, rank=2):
    shape = (6, 8 // group, *(3,) * rank)
    nodes = [node("Conv", ["x", "w", "b"], "y", group=group, pads=(1,) * 2 * rank)]
    return Layer(nodes, {"w": normal(*shape, seed=1), "b": normal(6, seed=2)}, (2, 8, *(7,) * rank), 0, 1)


def conv_transpose(group):
    nodes = [node("ConvTranspose", ["x", "w", "b"], "y", group=group, strides=(2, 2))]
    return Layer(nodes, {"w": normal(8, 6 // group, 3, 3, seed=1), "b": normal(6, seed=2)}, (2, 8, 5, 5), 1, 0)


def gemm(trans_a, trans_b):
    nodes = [node("Gemm", ["x", "w", "b"], "y", transA=trans_a, transB=trans_b)]
    w = normal(*((6, 8) if trans_b else (8, 6)), seed=1)
    return Layer(nodes, {"w": w, "b": normal(6, seed=2)}, (8, 4) if trans_a else (4, 8), 1 - trans_b, trans_b)


def matmul(*shape):
    return Layer([node("MatMul", ["x", "w"], "y")], {"w": normal(8, 6, seed=1)}, shape, -1, -2)


def matmul_add():
    nodes = [node("MatMul", ["x", "w"], "m"), node("Add", ["m", "b"], "y")]
    return Layer(nodes, {"w": normal(8, 6, seed=1), "b": normal(6, seed=2)}, (4, 8), -1, -2)


def behind_a_transpose():
    nodes = [node("Transpose", ["w"], "t", perm=(1, 0)), node("MatMul", ["x", "t"], "y")]
    return Layer(nodes, {"w": normal(6, 8, seed=1)}, (4, 8), 0, 1)


LAYERS = {
    "Conv": conv(),
    "Conv, 1 axis": conv(rank=1),
    "Conv, groups": conv(group=2),
    "ConvTranspose": conv_transpose(1),
    "ConvTranspose, groups": conv_transpose(2),
    "Gemm": gemm(0, 0),
    "Gemm, transA": gemm(1, 0),
    "Gemm, transB": gemm(0, 1),
    "MatMul": matmul(4, 8),
    "MatMul, 3 axes": matmul(2, 4, 8),
    "MatMul + Add": matmul_add(),
    "MatMul, weight behind a Transpose": behind_a_transpose(),
}


class Grid(NamedTuple):
    """The grid of one tensor."""

    dtype: str = "int8"
    symmetric: bool | str = True
    per: str = "channel"  # or "tensor", "block", "low-power block"


class Case(NamedTuple):
    """The grids of a layer, and the opset that they need."""

    weight: Grid
    activation: Grid
    opset: int = 13


CHANNEL, TENSOR = Grid("int8", True, "channel"), Grid("int8", True, "tensor")
UINT8, INT8 = Grid("uint8", False, "tensor"), Grid("int8", False, "tensor")
UINT16 = Grid("uint16", False, "tensor")

CASES = {
    "bytes per tensor": Case(TENSOR, UINT8, 10),
    "bytes per channel": Case(CHANNEL, UINT8),
    "signed activations": Case(CHANNEL, INT8),
    "symmetric activations": Case(CHANNEL, Grid("int8", True, "tensor")),
    "strictly symmetric activations": Case(Grid("int8", "strict"), Grid("int8", "strict", "tensor")),
    "activations of 6 bits": Case(CHANNEL, Grid("int6", False, "tensor")),
    "activations of 7 bits": Case(CHANNEL, Grid("uint7", False, "tensor")),
    "unsigned weights": Case(Grid("uint8", False), UINT8),
    "unsigned symmetric weights": Case(Grid("uint8", True), UINT8),
    "weights with zero points": Case(Grid("int8", False), INT8),
    "weights of 6 bits": Case(Grid("int6"), UINT8),
    "weights of 4 bits": Case(Grid("int4"), UINT8, 21),
    "weights of 3 bits": Case(Grid("uint3", False), UINT8, 21),
    "weights of 2 bits": Case(Grid("int2"), UINT8, 21),
    "weights of 12 bits": Case(Grid("int12"), UINT8, 21),
    "weights of 16 bits": Case(Grid("int16"), UINT8, 21),
    "activations of 16 bits": Case(CHANNEL, UINT16, 21),
    "signed activations of 16 bits": Case(CHANNEL, Grid("int16", True, "tensor"), 21),
    "activations of 9 bits": Case(CHANNEL, Grid("int9", False, "tensor"), 21),
    "activations of 4 bits": Case(CHANNEL, Grid("uint4", False, "tensor")),
    "activations of 2 bits": Case(CHANNEL, Grid("int2", False, "tensor")),
    "weights and activations of 4 bits": Case(Grid("int4"), Grid("uint4", False, "tensor"), 21),
    "float16 weights, activations of 16 bits": Case(Grid("float16", per="tensor"), UINT16, 21),
    "bfloat16 weights, bytes": Case(Grid("bfloat16", per="tensor"), UINT8, 13),
    "blocks of 4 bits": Case(Grid("int4", True, "block"), UINT8, 21),
    "low-power blocks": Case(Grid("int4", True, "low-power block"), UINT16, 21),
    "e4m3": Case(Grid("float8_e4m3fn"), Grid("float8_e4m3fn", per="tensor"), 19),
    "e5m2": Case(Grid("float8_e5m2", per="tensor"), Grid("float8_e5m2", per="tensor"), 19),
    "e4m3 weights, bytes": Case(Grid("float8_e4m3fn"), UINT8, 19),
    "byte weights, e4m3": Case(CHANNEL, Grid("float8_e4m3fn", per="tensor"), 19),
    "e4m3 in blocks": Case(Grid("float8_e4m3fn", per="block"), UINT8, 21),
    "float16": Case(Grid("float16", per="tensor"), Grid("float16", per="tensor"), 10),
    "bfloat16": Case(Grid("bfloat16", per="tensor"), Grid("bfloat16", per="tensor"), 13),
    "float16 weights, bytes": Case(Grid("float16", per="tensor"), UINT8, 10),
    "byte weights, bfloat16": Case(CHANNEL, Grid("bfloat16", per="tensor"), 13),
}
EVERYWHERE = (
    "bytes per tensor",
    "bytes per channel",
    "weights with zero points",
    "activations of 16 bits",
    "weights of 4 bits",
    "float16 weights, bytes",
    "e4m3",
)


def reduced(value, axis, how):
    return how(value, axis=tuple(i for i in range(value.ndim) if i != axis % value.ndim))


def ranges_of_blocks(value, axis, size, how):
    axis %= value.ndim
    shape = (*value.shape[:axis], value.shape[axis] // size, size, *value.shape[axis + 1 :])
    return how(value.reshape(shape), axis=axis + 1)


def encode(value, grid, *, axis, summed, block):
    """The grid between the least and the greatest value."""
    settings = {}
    if grid.per == "tensor":
        low, high = value.min(), value.max()
    elif grid.per == "channel":
        low, high = (reduced(value, axis, how) for how in (np.min, np.max))
        settings = {"axis": axis}
    else:
        low, high = (ranges_of_blocks(value, summed, block, how) for how in (np.min, np.max))
        settings = {"axis": summed, "block_size": block}
    if grid.dtype in FLOAT_FORMATS:
        return make_encoding(scale_of_float_range(low, high, grid.dtype), np.float32(0), dtype=grid.dtype, **settings)
    scale, zero_point = grid_of_range(low, high, grid_kind(grid.dtype, symmetric=grid.symmetric))
    if grid.per == "low-power block":
        products = low_power_scales(scale, scale_bits=4, axis=summed)
        return low_power_encoding(products, dtype=grid.dtype, scale_bits=4, **settings)
    return make_encoding(scale, zero_point, dtype=grid.dtype, symmetric=grid.symmetric, **settings)


def encoded(layer, case, *, block=4):
    """The model with all its tensors on grids, and inputs that reach beyond them."""
    model = build(layer.nodes, layer.params, input_shape=layer.input_shape, outputs=["y"], opset=10)
    x = normal(*layer.input_shape, seed=3)
    y = np.asarray(apply(model.graph, model.params, {"x": x})["y"])
    outputs = (TensorSpec(name="y", dtype=np.dtype(np.float32), shape=y.shape),)
    model = model.replace(graph=replace(model.graph, outputs=outputs))
    values = {"x": x, "w": layer.params["w"], "y": y}
    grids = {"x": case.activation, "w": case.weight, "y": case.activation}
    encodings = {
        name: encode(values[name], grid, axis=layer.axis, summed=layer.summed, block=block)
        for name, grid in grids.items()
    }
    return model, encodings, {"x": 1.2 * x}


FRACTION_BITS = {"float8_e4m3fn": 3, "float8_e5m2": 2, "float16": 10, "bfloat16": 7}


def in_steps(difference, y, encoding):
    """Returns the difference in steps of the grid; those of floats grow with the number."""
    if encoding.float_format is None:
        return difference / encoding.scale
    return difference / np.maximum(np.abs(y) * 2.0 ** -FRACTION_BITS[encoding.float_format], 1e-3)


def assert_equals_the_simulation(model, encodings, batch, y):
    """One step is a sum that falls the other way, in float32 or in another order; few do."""
    for arithmetic in ("float", "integer"):
        (simulated,) = simulate(model, encodings, arithmetic=arithmetic)(model.params, encodings, batch).values()
        steps = np.abs(in_steps(np.asarray(simulated) - y, y, encodings["y"]))
        assert steps.max() <= 1.01, arithmetic
        assert np.mean(steps < 0.5) >= 0.97, arithmetic


def runs(names, cases):
    return [pytest.param(name, case, id=f"{name}: {case}") for name in names for case in cases]


ALL = runs(LAYERS, EVERYWHERE) + runs(
    ["Conv, groups", "MatMul + Add"], [name for name in CASES if name not in EVERYWHERE]
)


@pytest.mark.parametrize(("name", "case"), ALL)
def test_the_file_equals_the_simulation(tmp_path, name, case):
    model, encodings, batch = encoded(LAYERS[name], CASES[case])
    export(model, encodings, tmp_path, "layer")
    proto = onnx.load(tmp_path / "layer.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": CASES[case].opset}
    (y,) = run(session(tmp_path / "layer.onnx"), batch).values()
    np.testing.assert_array_equal(fake_quantize(y, encodings["y"]), y)
    assert_equals_the_simulation(model, encodings, batch, y)


IN_FLOAT = runs(LAYERS, ["bytes per tensor", "bytes per channel"]) + runs(
    ["Conv, groups", "MatMul + Add"],
    ["weights with zero points", "weights of 6 bits", "weights of 2 bits", "blocks of 4 bits", "e4m3", "float16"],
)


@pytest.mark.parametrize(("name", "case"), IN_FLOAT)
def test_weights_as_rounded_floats_equal_the_simulation(tmp_path, name, case):
    """Parameters in float alone, on their grids; both operators behind weights, none behind biases."""
    model, encodings, batch = encoded(LAYERS[name], CASES[case])
    export(model, encodings, tmp_path, "layer", weights="float")
    onnx.checker.check_model(onnx.load(tmp_path / "layer.onnx"), full_check=True)
    written = read(tmp_path / "layer.onnx")
    if case != "float16":  # which reading folds
        np.testing.assert_array_equal(written.params["w_rounded"], fake_quantize(model.params["w"], encodings["w"]))
        kinds = [written.graph.producers[name].op_type for name in ("w_quantized", "w")]
        assert kinds == ["QuantizeLinear", "DequantizeLinear"]
    assert "b" not in model.params or written.params["b"].dtype == np.float32
    (y,) = run(session(tmp_path / "layer.onnx"), batch).values()
    assert_equals_the_simulation(model, encodings, batch, y)


def test_how_weights_are_written_is_one_of_two(tmp_path):
    model, encodings, _ = encoded(LAYERS["Gemm"], CASES["bytes per tensor"])
    with pytest.raises(ConfigError, match="weights='int8' is unknown; expected one of integer, float"):
        export(model, encodings, tmp_path, "layer", weights="int8")
    assert not list(tmp_path.iterdir())


def wide(trans_b):
    w = normal(*((24, 64) if trans_b else (64, 24)), seed=1)
    return Layer([node("Gemm", ["x", "w"], "y", transB=trans_b)], {"w": w}, (4, 64), 1 - trans_b, trans_b)


WIDE = {
    "Gemm": wide(0),
    "Gemm, transB": wide(1),
    "MatMul": Layer([node("MatMul", ["x", "w"], "y")], {"w": normal(64, 24, seed=1)}, (4, 64), -1, -2),
    "MatMul, positive axes": Layer([node("MatMul", ["x", "w"], "y")], {"w": normal(64, 24, seed=1)}, (4, 64), 1, 0),
    "behind a Transpose": Layer(
        [node("Transpose", ["w"], "t", perm=(1, 0)), node("MatMul", ["x", "t"], "y")],
        {"w": normal(24, 64, seed=1)},
        (4, 64),
        0,
        1,
    ),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("per", ["channel", "block", "low-power block"])
@pytest.mark.parametrize("dtype", ["int4", "int8", "uint4"])
@pytest.mark.parametrize("activation", [UINT8, UINT16, None], ids=["uint8", "uint16", "float"])
def test_wide_products_in_few_bits_equal_the_simulation(tmp_path, name, per, dtype, activation):
    """Blocks of 16 and more are what ONNX Runtime has MatMulNBits for, which rounds activations to 8 bits."""
    weight = Grid(dtype, dtype[0] == "i", per)
    model, encodings, batch = encoded(WIDE[name], Case(weight, activation or UINT16), block=16)
    grid = encodings["y"]
    if activation is None:
        encodings = {"w": encodings["w"]}
    export(model, encodings, tmp_path, "layer")
    (y,) = run(session(tmp_path / "layer.onnx"), batch).values()
    for arithmetic in ("float", "integer"):
        (simulated,) = simulate(model, encodings, arithmetic=arithmetic)(model.params, encodings, batch).values()
        assert np.abs(in_steps(np.asarray(simulated) - y, y, grid)).max() <= 1.01
