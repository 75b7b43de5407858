"""Which tensors are rounded: graphs beside their plans, and laws that hold for every real model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptqjax.config import QuantizationConfig, Rule
from ptqjax.encodings.biases import LARGEST_CODE, bias_encoding, bias_sites, guard_biases
from ptqjax.encodings.encoding import fake_quantize, make_encoding
from ptqjax.errors import ConfigError, ModelError
from ptqjax.ir import Graph, Model, Node, first_quantized_node
from ptqjax.onnx_io import read
from ptqjax.placement.place import ACTIVATION, CONSTANT, WEIGHT, Placement, place
from ptqjax.placement.tensors import floating_tensors

RNG = np.random.default_rng(0)


def build(*nodes: tuple, inputs=(("x", (1, 4, 6, 6)),), outputs=("y",), **initializers) -> Model:
    """Returns a model of (operator, inputs, output[s], attributes) and arrays."""
    made = [
        helper.make_node(op, ins.split(), outs.split(), **(rest[0] if rest else {})) for op, ins, outs, *rest in nodes
    ]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in initializers.items()],
    )
    return read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


EVERYWHERE = QuantizationConfig(target="generic-per-channel")
"""Of a target that rounds whatever arises."""


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def plan(placement: Placement) -> dict[str, str]:
    """Returns what happens to each tensor in a word: its own encoding, another's, int32, or float."""
    found = {site.tensor: "own" if site.root == site.tensor else f"as {site.root}" for site in placement.sites}
    found |= {site.bias: "int32" for site in placement.biases}
    return found | {entry.tensor: "float" for entry in placement.skipped}


CONV = {"w": floats(4, 4, 3, 3), "b": floats(4)}
SAME = {"pads": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([("Relu", "c", "y")], {"c": "float", "y": "own"}),
        ([("Clip", "c lo hi", "y")], {"c": "float", "y": "own", "lo": "float", "hi": "float"}),
        ([("LeakyRelu", "c", "y")], {"c": "own", "y": "own"}),
        ([("PRelu", "c slope", "y")], {"c": "own", "y": "float", "slope": "float"}),
        ([("Relu", "c", "r"), ("Min", "r bound", "y")], {"c": "float", "r": "as y", "y": "own", "bound": "float"}),
        ([("Max", "c bound", "m"), ("Min", "m bound", "y")], {"c": "as y", "m": "as y", "y": "own", "bound": "float"}),
        ([("Sigmoid", "c", "y")], {"c": "own", "y": "own"}),
        ([("Relu", "c", "r"), ("Add", "r c", "y")], {"c": "own", "r": "own", "y": "own"}),
        ([("Add", "c x", "a"), ("Relu", "a", "y")], {"c": "own", "a": "float", "y": "own"}),
        ([("MaxPool", "c", "y", {"kernel_shape": [2, 2]})], {"c": "own", "y": "as c"}),
        ([("GlobalAveragePool", "c", "p"), ("Flatten", "p", "y")], {"c": "own", "p": "own", "y": "as p"}),
        (
            [("Relu", "c", "r"), ("Concat", "r x", "y", {"axis": 1})],
            {"c": "float", "r": "as y", "x": "own", "y": "own"},
        ),
        ([("Concat", "c c", "y", {"axis": 1})], {"c": "own", "y": "own"}),
        ([("Softmax", "c", "s"), ("Concat", "s x", "y", {"axis": 1})], {"c": "own", "s": "float", "y": "float"}),
        (
            [("MaxPool", "c", "p", {"kernel_shape": [1, 1]}), ("Concat", "p x", "y", {"axis": 1})],
            {"c": "as y", "p": "as y", "y": "own"},
        ),
        ([("Mul", "c one", "y")], {"c": "own", "y": "own", "one": "own"}),
        ([("Mul", "c bound", "y")], {"c": "own", "y": "own", "bound": "own"}),
    ],
    ids=lambda value: "+".join(node[0] for node in value) if isinstance(value, list) else "",
)
def test_what_follows_a_convolution_decides_where_it_is_rounded(nodes, expected) -> None:
    model = build(
        ("Conv", "x w b", "c", SAME), *nodes, **CONV,
        lo=np.float32(0), hi=np.float32(6), one=np.float32(0.5), slope=floats(4, 1, 1), bound=np.abs(floats(4, 1, 1)),
    )  # fmt: skip
    found = plan(place(model))
    assert {"x": "own", "w": "own", "b": "int32"} | expected == found


def test_ways_to_pad() -> None:
    for value, mode, expected in ((0.0, "constant", "as x"), (1.0, "constant", "own"), (1.0, "reflect", "as x")):
        pads = np.asarray([0, 0, 1, 1, 0, 0, 1, 1])
        model = build(("Pad", "x p v", "y", {"mode": mode}), p=pads, v=np.float32(value))
        assert plan(place(model, EVERYWHERE))["y"] == expected


GELU = [("Div", "h two", "d"), ("Erf", "d", "e"), ("Add", "e one", "a")]


@pytest.mark.parametrize(
    ("tail", "inside"),
    [
        ([("Mul", "h a", "m"), ("Mul", "m half", "y")], "deam"),
        ([("Mul", "h half", "k"), ("Mul", "k a", "y")], "deak"),
        ([("Mul", "h a", "y")], "dea"),
    ],
)
def test_nothing_is_rounded_inside_a_decomposed_gelu(tail, inside: str) -> None:
    numbers = {"two": np.float32(2**0.5), "one": np.float32(1)}
    numbers |= {"half": np.float32(0.5)} if any("half" in node[1] for node in tail) else {}
    model = build(("Softplus", "x", "h"), *GELU, *tail, **numbers)
    expected = dict.fromkeys([*inside, *numbers], "float") | dict.fromkeys("xhy", "own")
    assert plan(place(model, EVERYWHERE)) == expected


MATRIX = (("x", (5, 8)),)


def test_a_bias_behind_a_product_is_part_of_it() -> None:
    nodes = [("MatMul", "x w", "m"), ("Add", "b m", "a"), ("Relu", "a", "y")]
    model = build(*nodes, inputs=MATRIX, w=floats(8, 3), b=floats(3))
    assert plan(place(model)) == {"x": "own", "w": "own", "b": "int32", "m": "float", "a": "float", "y": "own"}


def test_a_constant_that_is_no_vector_is_an_operand_and_no_bias() -> None:
    model = build(("MatMul", "x w", "m"), ("Add", "m p", "y"), inputs=MATRIX, w=floats(8, 3), p=floats(5, 3))
    placement = place(model, EVERYWHERE)
    assert plan(placement) == {"x": "own", "w": "own", "p": "own", "m": "own", "y": "own"}
    site = placement.site("p")
    assert site is not None
    assert (site.kind, site.dtype, site.axis) == (CONSTANT, "uint8", None)
    assert bias_sites(model) == ()


@pytest.mark.parametrize(
    ("node", "shape", "axis"),
    [
        (("Gemm", "x w", "y"), (8, 3), 1),
        (("Gemm", "x w", "y", {"transB": 1}), (3, 8), 0),
        (("MatMul", "x w", "y"), (8, 3), -1),
        (("MatMul", "w x", "y"), (3, 5), -2),
        (("Gemm", "w x", "y", {"transA": 1}), (5, 3), 1),
    ],
)
def test_scales_run_along_the_output_channels_of_a_matrix(node, shape, axis: int) -> None:
    site = place(build(node, inputs=MATRIX, w=floats(*shape))).site("w")
    assert site is not None
    assert (site.axis, site.kind, site.symmetric) == (axis, WEIGHT, True)


def test_scales_of_convolutions_and_blocks() -> None:
    def axes(granularity: str, op: str) -> tuple[int | None, int | None]:
        model = build((op, "x w", "y"), w=floats(4, 4, 3, 3))
        config = QuantizationConfig(granularity=granularity, rules=(Rule(tensors=("w",), enabled=True),))
        site = place(model, config).site("w")
        assert site is not None
        return site.axis, site.block_size

    assert axes("channel", "Conv") == (0, None)
    assert axes("channel", "ConvTranspose") == (1, None)
    assert axes("tensor", "Conv") == (None, None)
    assert axes("block:2", "Conv") == (1, 2)
    assert axes("block:2", "ConvTranspose") == (0, 2)


@pytest.mark.parametrize("granularity", ["channel", "block:2"])
def test_a_vector_has_one_scale(granularity: str) -> None:
    for node in (("MatMul", "x w", "y"), ("MatMul", "w x", "y")):
        size = 8 if node[1] == "x w" else 5
        site = place(build(node, inputs=MATRIX, w=floats(size)), QuantizationConfig(granularity=granularity)).site("w")
        assert site is not None
        assert (site.axis, site.block_size) == (None, None)
        assert "a vector" in site.reason


@pytest.mark.parametrize("size", [4, 32])
def test_blocks_that_the_summed_axis_does_not_fill_are_channels(size: int) -> None:
    depthwise = ("Conv", "x d", "h", {"group": 4, **SAME})
    model = build(depthwise, ("Conv", "h w b", "y"), d=floats(4, 1, 3, 3), **CONV)
    placement = place(model, QuantizationConfig(granularity=f"block:{size}"))
    for tensor in "dw":
        site = placement.site(tensor)
        assert site is not None
        assert (site.axis, site.block_size) == (0, None)
        assert f"do not fill blocks of {size}" in site.reason
    assert [site.bias for site in placement.biases] == ["b"]


def test_a_weight_that_two_products_read_along_different_axes_has_one_scale() -> None:
    nodes = [("Gemm", "x w", "g"), ("Gemm", "g w", "y", {"transB": 1})]
    site = place(build(*nodes, inputs=MATRIX, w=floats(8, 3))).site("w")
    assert site is not None
    assert site.axis is None
    assert "disagree" in site.reason


def test_types_are_those_of_the_configuration() -> None:
    model = build(("Conv", "x w b", "y"), **CONV)
    placement = place(model, QuantizationConfig(weights="uint8", activations="int16"))
    kinds = {site.tensor: (site.dtype, site.symmetric) for site in placement.sites}
    assert kinds == {"w": ("uint8", False), "x": ("int16", False), "y": ("int16", False)}


def test_a_known_range_is_fixed() -> None:
    site = place(build(("Softmax", "x", "y")), EVERYWHERE).site("y")
    assert site is not None
    assert site.fixed_range == (0, 1)


def test_integers_have_no_place() -> None:
    nodes = [
        ("Shape", "x", "s"),
        ("ArgMax", "x", "i"),
        ("Cast", "i", "f", {"to": TensorProto.FLOAT}),
        ("Neg", "f", "y"),
    ]
    model = build(*nodes, outputs=("y", "s"))
    assert floating_tensors(model) == ("x", "f", "y")


# Models that cannot be quantized


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_model_in_another_type_is_refused_by_name(dtype: type) -> None:
    model = build(("Cast", "x", "h", {"to": helper.np_dtype_to_tensor_dtype(np.dtype(dtype))}), ("Relu", "h", "y"))
    with pytest.raises(ModelError, match=f"tensor 'h' has the type {np.dtype(dtype).name}.*convert .* to float32"):
        place(model, EVERYWHERE)
    graph = model.graph
    other = replace(graph, inputs=tuple(replace(spec, dtype=np.dtype(dtype)) for spec in graph.inputs))
    with pytest.raises(ModelError, match=f"tensor 'x' has the type {np.dtype(dtype).name}"):
        place(model.replace(graph=other), EVERYWHERE)
    weight = build(("Conv", "x w", "y"), w=floats(4, 4, 3, 3))
    with pytest.raises(ModelError, match=f"tensor 'w' has the type {np.dtype(dtype).name}"):
        place(weight.replace(params={"w": weight.params["w"].astype(dtype)}))


def test_quantized_operators_are_found_wherever_they_are() -> None:
    def graph(*nodes: Node) -> Graph:
        return Graph(name="g", inputs=(), outputs=(), nodes=nodes)

    def node(op_type: str, domain: str = "", **attributes: Graph) -> Node:
        attributes_in_order = tuple(sorted(attributes.items()))
        return Node(op_type=op_type, inputs=(), outputs=(op_type,), domain=domain, attributes=attributes_in_order)

    for op_type in (
        "QGemm",
        "QLinearAdd",
        "MatMulNBits",
        "QAttention",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
    ):
        assert first_quantized_node(graph(node("Relu"), node(op_type, "com.microsoft"))) is not None
    assert first_quantized_node(graph(node("FusedConv", "com.microsoft"), node("QGemm", "mine"))) is None
    inner = graph(node("If", then_branch=graph(node("QuantizeLinear"))))
    found = first_quantized_node(graph(node("Loop", body=inner)))
    assert found is not None
    assert found.op_type == "QuantizeLinear"


def test_a_quantized_model_is_refused() -> None:
    model = build(("QuantizeLinear", "x s z", "q"), ("DequantizeLinear", "q s z", "y"), s=np.float32(1), z=np.uint8(0))
    with pytest.raises(ModelError, match="quantized already: it holds QuantizeLinear"):
        place(model)


# Exclusion


def test_excluded_tensors_and_what_depends_on_them_stay_in_float() -> None:
    nodes = [("Conv", "x w b", "c", SAME), ("MaxPool", "c", "p", {"kernel_shape": [2, 2]}), ("Neg", "p", "y")]
    model = build(*nodes, **CONV)
    excluded = plan(place(model, replace(EVERYWHERE, exclude=("c",))))
    assert excluded == {"x": "own", "w": "own", "b": "int32", "c": "float", "p": "float", "y": "own"}
    assert plan(place(model, QuantizationConfig(exclude=("w",))))["b"] == "float"
    assert set(plan(place(model, QuantizationConfig(exclude=("*",)))).values()) == {"float"}


def test_a_pattern_without_effect_is_an_error() -> None:
    model = build(("Conv", "x weight bias", "y"), weight=CONV["w"], bias=CONV["b"])
    with pytest.raises(ConfigError, match="'wieght' matches none of 4 tensors; near names: weight"):
        place(model, QuantizationConfig(exclude=("wieght",)))
    with pytest.raises(ConfigError, match="'bias' matches only biases"):
        place(model, QuantizationConfig(exclude=("bias",)))


# Biases


def encodings_of(model: Model, scale_x: float, scale_w: np.ndarray, axis: int | None) -> dict:
    weight = make_encoding(scale_w.astype(np.float32), np.zeros_like(scale_w), dtype="int8", axis=axis)
    return {"x": make_encoding(np.float32(scale_x), np.float32(3), dtype="uint8"), "w": weight}


def test_a_bias_has_the_product_of_the_scales() -> None:
    model = build(("Conv", "x w b", "y"), **CONV)
    (site,) = bias_sites(model)
    scale = np.asarray([0.1, 0.2, 0.3, 0.4], dtype=np.float32)
    encoding = bias_encoding(encodings_of(model, 0.5, scale, 0), site)
    assert encoding is not None
    assert (encoding.dtype, encoding.axis) == ("int32", 0)
    np.testing.assert_array_equal(encoding.scale, np.float32(0.5) * scale)
    error = np.abs(fake_quantize(CONV["b"], encoding) - CONV["b"])
    assert np.all(error <= encoding.scale * 0.5001)


def test_scales_of_a_grouped_transposed_convolution_repeat_along_the_bias() -> None:
    model = build(("ConvTranspose", "x w b", "y", {"group": 2}), w=floats(4, 3, 2, 2), b=floats(6))
    (site,) = bias_sites(model)
    scale = np.asarray([1, 2, 3], dtype=np.float32)
    encoding = bias_encoding(encodings_of(model, 1.0, scale, 1), site)
    assert encoding is not None
    np.testing.assert_array_equal(encoding.scale, [1, 2, 3, 1, 2, 3])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5, 1), (5, 3)])
@pytest.mark.parametrize("nodes", [[("Gemm", "x w b", "y")], [("MatMul", "x w", "m"), ("Add", "b m", "y")]])
def test_a_bias_that_is_not_one_number_per_channel_is_no_site(nodes: list, shape: tuple[int, ...]) -> None:
    model = build(*nodes, inputs=MATRIX, w=floats(8, 3), b=floats(*shape))
    assert bias_sites(model) == ()
    assert place(model).biases == ()


@pytest.mark.parametrize("attributes", [{"alpha": 2.0}, {"beta": 0.5}])
def test_a_scaled_bias_stays_in_float(attributes: dict) -> None:
    model = build(("Gemm", "x w b", "y", attributes), inputs=MATRIX, w=floats(8, 3), b=floats(3))
    assert plan(place(model))["b"] == "float"
    assert bias_sites(model) == ()


def test_a_shared_bias_stays_in_float() -> None:
    model = build(("Conv", "x w b", "c", SAME), ("Conv", "c w b", "y", SAME), **CONV)
    assert plan(place(model))["b"] == "float"


@pytest.mark.parametrize("axis", [None, 0])
def test_the_guard_raises_scales_until_the_bias_fits_and_no_further(axis: int | None) -> None:
    model = build(("Conv", "x w b", "y"), w=CONV["w"], b=np.asarray([1, 1e6, 0, -1e7], dtype=np.float32))
    before = encodings_of(model, 0.01, np.full(() if axis is None else (4,), 1e-3), axis)
    after, report = guard_biases(model, before)
    (site,) = bias_sites(model)
    encoding = bias_encoding(after, site)
    assert encoding is not None
    codes = np.abs(model.params["b"] / encoding.scale.astype(np.float64))
    assert codes.max() <= LARGEST_CODE
    assert codes.max() > LARGEST_CODE * 0.999
    if axis == 0:
        np.testing.assert_array_equal(after["w"].scale > before["w"].scale, [False, True, False, True])
    (record,) = report
    assert record.where == ("w", "b")
    assert guard_biases(model, after) == (after, ())


# Real models


def models(shared: Path) -> list[Path]:
    return sorted((shared / "models").glob("*.onnx"))


def test_every_floating_tensor_of_the_real_models_has_one_place(shared: Path) -> None:
    for path in models(shared):
        model = read(path)
        placement = place(model)
        found = [site.tensor for site in placement.sites] + [site.bias for site in placement.biases]
        found += [entry.tensor for entry in placement.skipped]
        assert sorted(found) == sorted(floating_tensors(model)), path.name
        roots = {site.tensor for site in placement.sites if site.root == site.tensor}
        assert {site.root for site in placement.sites} <= roots, path.name
        specs = (*model.graph.inputs, *model.graph.outputs)
        ends = {spec.name for spec in specs if np.issubdtype(spec.dtype, np.floating)}
        assert ends <= {site.tensor for site in placement.sites if site.kind == ACTIVATION}, path.name


@pytest.mark.parametrize(
    ("name", "weights", "observed", "biases"),
    [
        ("mobilenet_v2_1.0_224", 53, 65, 1),
        ("resnet20_cifar10", 20, 1 + 1 + 9 * 3 + 2, 1),
        ("squeezenet_v1.1", 26, 2 + 8 * 2 + 2, 26),
        ("tiny_vit_cifar10", 18, 2 + 4 * 6 + 2, 18),
    ],
)
def test_counts_of_the_real_models(shared: Path, name: str, weights: int, observed: int, biases: int) -> None:
    placement = place(read(shared / "models" / f"{name}.onnx"))
    kinds = [site.kind for site in placement.sites if site.root == site.tensor]
    assert (kinds.count(WEIGHT), kinds.count(ACTIVATION), len(placement.biases)) == (weights, observed, biases)


def test_reading_back_from_bytes_gives_the_same_plan(shared: Path) -> None:
    path = shared / "models" / "resnet20_cifar10.onnx"
    assert place(read(path)) == place(read(onnx.load(path)))
