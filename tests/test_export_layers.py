"""One layer at a time, on every kind of grid: the file loads in ONNX Runtime and equals the simulation."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import onnx
import pytest

from ptqjax import apply, export, read, simulate
from ptqjax.agreement import run, session
from ptqjax.encodings.encoding import Encoding, fake_quantize, make_encoding
from ptqjax.encodings.low_power import low_power_encoding, low_power_scales
from ptqjax.errors import ConfigError
from ptqjax.ir import Graph, Model, Node, TensorSpec, verify
from ptqjax.kernels.grid import FLOAT_FORMATS
from ptqjax.kernels.ranges import grid_kind, grid_of_range, scale_of_float_range
from tests.models import node


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


def wide(trans_b):
    w = normal(*((24, 64) if trans_b else (64, 24)), seed=1)
    return Layer([node("Gemm", ["x", "w"], "y", transB=trans_b)], {"w": w}, (4, 64), 1 - trans_b, trans_b)


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
GROUPS = {"all": LAYERS, "two": {name: LAYERS[name] for name in ("Conv, groups", "MatMul + Add")}, "wide": WIDE}
"""The layers that stand in one model, side by side: one program, and one file, for all of them."""


def named(layer, tensor):
    """The name of a layer's tensor in a model of many layers."""
    return f"{layer}: {tensor}"


def renamed(layer, found):
    names = {"inputs": found.inputs, "outputs": found.outputs}
    return replace(found, **{key: tuple(named(layer, tensor) for tensor in values) for key, values in names.items()})


@cache
def side_by_side(group):
    """The layers of a group as one model, the inputs, and the values of all x, w and y."""
    layers = GROUPS[group]
    params = {named(name, key): value for name, layer in layers.items() for key, value in layer.params.items()}
    inputs = {named(name, "x"): normal(*layer.input_shape, seed=3) for name, layer in layers.items()}
    graph = Graph(
        name=group,
        inputs=tuple(TensorSpec(name=name, dtype=x.dtype, shape=x.shape) for name, x in inputs.items()),
        outputs=tuple(TensorSpec(name=named(name, "y"), dtype=np.dtype(np.float32), shape=None) for name in layers),
        nodes=tuple(renamed(name, found) for name, layer in layers.items() for found in layer.nodes),
        parameters=tuple(sorted(params)),
        opsets=(("", 10),),
    )
    outputs = {name: np.asarray(y) for name, y in apply(graph, params, inputs).items()}
    specs = tuple(TensorSpec(name=name, dtype=y.dtype, shape=y.shape) for name, y in outputs.items())
    return verify(Model(graph=replace(graph, outputs=specs), params=params)), inputs, params | inputs | outputs


def encodings_of(group, case, *, block=4):
    """The grids of all x, w and y."""
    grids = {"x": case.activation, "w": case.weight, "y": case.activation}
    _, _, values = side_by_side(group)
    return {
        named(name, tensor): encode(
            values[named(name, tensor)], grid, axis=layer.axis, summed=layer.summed, block=block
        )
        for name, layer in GROUPS[group].items()
        for tensor, grid in grids.items()
    }


class Exported(NamedTuple):
    """A model of many layers as a file, and what the file and its simulations compute."""

    file: Path
    model: Model
    encodings: dict[str, Encoding]
    y: dict[str, np.ndarray]
    """By ONNX Runtime."""
    rounded: dict[str, np.ndarray]
    """Those `y` whose tensor has a grid, rounded to it."""
    simulated: dict[str, dict[str, np.ndarray]]
    """By arithmetic: float and integer."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns a function that exports a group of layers on the grids of a case, once."""

    @cache
    def export_once(group, case, *, weights="integer", block=4, activations=True):
        model, inputs, _ = side_by_side(group)
        encodings = encodings_of(group, case, block=block)
        if not activations:
            encodings = {name: encoding for name, encoding in encodings.items() if name in model.params}
        folder = tmp_path_factory.mktemp("layers")
        export(model, encodings, folder, "layers", weights=weights)
        file = folder / "layers.onnx"
        onnx.checker.check_model(onnx.load(file), full_check=True)
        batch = {name: 1.2 * x for name, x in inputs.items()}  # reaches beyond the grids
        y = run(session(file), batch)
        simulated = {
            arithmetic: simulate(model, encodings, arithmetic=arithmetic)(model.params, encodings, batch)
            for arithmetic in ("float", "integer")
        }
        on_grids = {name: encodings[name] for name in y if name in encodings}
        rounded = jax.jit(lambda y: {name: fake_quantize(y[name], grid) for name, grid in on_grids.items()})(y)
        return Exported(file, model, encodings, y, rounded, simulated)

    return export_once


FRACTION_BITS = {"float8_e4m3fn": 3, "float8_e5m2": 2, "float16": 10, "bfloat16": 7}


def in_steps(difference, y, encoding):
    """Returns the difference in steps of the grid; those of floats grow with the number."""
    if encoding.float_format is None:
        return difference / encoding.scale
    return difference / np.maximum(np.abs(y) * 2.0 ** -FRACTION_BITS[encoding.float_format], 1e-3)


def assert_equals_the_simulation(found, name):
    """One step is a sum that falls the other way, in float32 or in another order; few do."""
    y = found.y[named(name, "y")]
    for arithmetic, simulated in found.simulated.items():
        difference = np.asarray(simulated[named(name, "y")]) - y
        steps = np.abs(in_steps(difference, y, found.encodings[named(name, "y")]))
        assert steps.max() <= 1.01, arithmetic
        assert np.mean(steps < 0.5) >= 0.97, arithmetic


def runs(group, cases):
    return [pytest.param(group, name, case, id=f"{name}: {case}") for name in GROUPS[group] for case in cases]


@pytest.mark.parametrize(
    ("group", "name", "case"),
    runs("all", EVERYWHERE) + runs("two", [name for name in CASES if name not in EVERYWHERE]),
)
def test_the_file_equals_the_simulation(exported, group, name, case):
    found = exported(group, CASES[case])
    assert {entry.domain: entry.version for entry in onnx.load(found.file).opset_import} == {"": CASES[case].opset}
    np.testing.assert_array_equal(found.rounded[named(name, "y")], found.y[named(name, "y")])
    assert_equals_the_simulation(found, name)


IN_FLOAT = runs("all", ["bytes per tensor", "bytes per channel"]) + runs(
    "two", ["weights with zero points", "weights of 6 bits", "weights of 2 bits", "blocks of 4 bits", "e4m3", "float16"]
)


@pytest.mark.parametrize(("group", "name", "case"), IN_FLOAT)
def test_weights_as_rounded_floats_equal_the_simulation(exported, group, name, case):
    """Parameters in float alone, on their grids; both operators behind weights, none behind biases."""
    found = exported(group, CASES[case], weights="float")
    written, w, b = read(found.file), named(name, "w"), named(name, "b")
    if case != "float16":  # which reading folds
        expected = fake_quantize(found.model.params[w], found.encodings[w])
        np.testing.assert_array_equal(written.params[f"{w}_rounded"], expected)
        kinds = [written.graph.producers[name].op_type for name in (f"{w}_quantized", w)]
        assert kinds == ["QuantizeLinear", "DequantizeLinear"]
    assert b not in found.model.params or written.params[b].dtype == np.float32
    assert_equals_the_simulation(found, name)


def test_how_weights_are_written_is_one_of_two(tmp_path):
    model, _, _ = side_by_side("two")
    with pytest.raises(ConfigError, match="weights='int8' is unknown; expected one of integer, float"):
        export(model, encodings_of("two", CASES["bytes per tensor"]), tmp_path, "layers", weights="int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("per", ["channel", "block", "low-power block"])
@pytest.mark.parametrize("dtype", ["int4", "int8", "uint4"])
@pytest.mark.parametrize("activation", [UINT8, UINT16, None], ids=["uint8", "uint16", "float"])
def test_wide_products_in_few_bits_equal_the_simulation(exported, name, per, dtype, activation):
    """Blocks of 16 and more are what ONNX Runtime has MatMulNBits for, which rounds activations to 8 bits."""
    case = Case(Grid(dtype, dtype[0] == "i", per), activation or UINT16)
    found = exported("wide", case, block=16, activations=activation is not None)
    y, grid = found.y[named(name, "y")], encodings_of("wide", case, block=16)[named(name, "y")]
    for simulated in found.simulated.values():
        assert np.abs(in_steps(np.asarray(simulated[named(name, "y")]) - y, y, grid)).max() <= 1.01
