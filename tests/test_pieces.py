"""Functions spelled in pieces, as exporters spell them: rounded in front and behind, and nowhere in between."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptqjax import apply, calibrate, simulate
from ptqjax.agreement import run, session
from ptqjax.config import QuantizationConfig
from ptqjax.exporting import quantized_model
from ptqjax.ir import Model
from ptqjax.onnx_io import read
from ptqjax.placement.pieces import find_pieces
from ptqjax.placement.place import place
from ptqjax.qdq.fuse_quantized import fuse_quantized

RNG = np.random.default_rng(0)
WIDTH = 16
LAST = {"axes": [-1]}
MEAN = [("ReduceMean", "h", "mu", LAST), ("Sub", "h mu", "d")]
VARIANCE = [("Pow", "d two", "s"), ("ReduceMean", "s", "v", LAST), ("Add", "v eps", "e")]
TO_FLOAT = {"to": TensorProto.FLOAT}
AFFINE = [("Mul", "n g", "ng"), ("Add", "b ng", "y")]
SQUARE = [("Mul", "h h", "s"), ("ReduceMean", "s", "v", LAST), ("Add", "eps v", "e")]
CUBE = [("Mul", "h h", "s"), ("Mul", "s h", "c"), ("Mul", "c k3", "p"), ("Add", "h p", "a")]
TANH = [("Mul", "a kt", "t"), ("Tanh", "t", "u"), ("Add", "u one", "w")]

SPELLINGS = {
    "layer norm of torch": [*MEAN, *VARIANCE, ("Sqrt", "e", "r"), ("Div", "d r", "n"), *AFFINE],
    "layer norm of torch, axes as input": [
        ("ReduceMean", "h axes", "mu"), ("Sub", "h mu", "d"), ("Mul", "d d", "s"), ("ReduceMean", "s axes", "v"),
        ("Add", "v eps", "e"), ("Sqrt", "e", "r"), ("Div", "d r", "n"), *AFFINE,
    ],
    "layer norm by reciprocal": [
        *MEAN, *VARIANCE, ("Sqrt", "e", "r"), ("Reciprocal", "r", "i"), ("Mul", "i d", "n"), *AFFINE,
    ],
    "layer norm by a power": [*MEAN, *VARIANCE, ("Pow", "e minus", "i"), ("Mul", "d i", "n"), ("Mul", "n g", "y")],
    "layer norm of two means": [
        *SQUARE, ("ReduceMean", "h", "mu", LAST), ("Mul", "mu mu", "mm"), ("Sub", "e mm", "x2"), ("Sqrt", "x2", "r"),
        ("Sub", "h mu", "d"), ("Div", "d r", "y"),
    ],
    "layer norm of tensorflow": [
        *MEAN, *VARIANCE, ("Sqrt", "e", "r"), ("Reciprocal", "r", "i"), ("Mul", "i g", "ig"), ("Mul", "h ig", "hg"),
        ("Mul", "mu ig", "mg"), ("Sub", "b mg", "bm"), ("Add", "hg bm", "y"),
    ],
    "layer norm with axes dropped and put back": [
        ("ReduceMean", "h", "m0", {**LAST, "keepdims": 0}), ("Unsqueeze", "m0 axes", "mu"), ("Sub", "h mu", "d"),
        *VARIANCE, ("Sqrt", "e", "r"), ("Div", "d r", "n"), *AFFINE,
    ],
    "layer norm between casts": [
        ("Cast", "h", "f", TO_FLOAT), ("ReduceMean", "f", "mu", LAST), ("Sub", "f mu", "d"), *VARIANCE,
        ("Sqrt", "e", "r"), ("Div", "d r", "n"), ("Cast", "n", "m", TO_FLOAT), ("Mul", "m g", "ng"),
        ("Add", "ng b", "y"),
    ],
    "root mean square": [*SQUARE, ("Sqrt", "e", "r"), ("Div", "h r", "n"), ("Mul", "g n", "y")],
    "root mean square by reciprocal": [*SQUARE, ("Sqrt", "e", "r"), ("Div", "one r", "i"), ("Mul", "h i", "y")],
    "gelu": [
        ("Div", "h k", "d"), ("Erf", "d", "e"), ("Add", "e one", "a"), ("Mul", "h a", "m"), ("Mul", "m half", "y"),
    ],
    "gelu, halved first": [
        ("Mul", "h half", "m"), ("Mul", "h k", "d"), ("Erf", "d", "e"), ("Add", "one e", "a"), ("Mul", "m a", "y"),
    ],
    "gelu by tanh": [*CUBE, *TANH, ("Mul", "h half", "z"), ("Mul", "z w", "y")],
    "gelu by tanh of a power": [
        ("Pow", "h three", "c"), ("Mul", "c k3", "p"), ("Add", "h p", "a"), *TANH, ("Mul", "h w", "z"),
        ("Mul", "z half", "y"),
    ],
    "L2 norm of torch": [
        ("ReduceL2", "h", "l", LAST), ("Clip", "l eps", "c"), ("Shape", "h", "size"), ("Expand", "c size", "r"),
        ("Div", "h r", "y"),
    ],
    "L2 norm of torch, unoptimized": [
        ("ReduceL2", "h", "l", LAST), ("CastLike", "eps l", "q"), ("Clip", "l q", "c"), ("Shape", "h", "size"),
        ("Expand", "c size", "r"), ("Div", "h r", "y"),
    ],
    "L2 norm of tensorflow": [
        ("Mul", "h h", "s"), ("ReduceSum", "s axes", "l"), ("Max", "l eps", "m"), ("Sqrt", "m", "r"),
        ("Reciprocal", "r", "i"), ("Mul", "h i", "y"),
    ],
    "L2 norm by a sum": [
        ("Pow", "h two", "s"), ("ReduceSum", "s axes", "l"), ("Sqrt", "l", "r"), ("Max", "r eps", "m"),
        ("Div", "h m", "y"),
    ],
    "hard swish": [("Add", "h three", "a"), ("Clip", "a zero six", "c"), ("Mul", "h c", "m"), ("Div", "m six", "y")],
    "hard swish by hard sigmoid": [("HardSigmoid", "h", "s", {"alpha": 1 / 6}), ("Mul", "s h", "y")],
    "swish": [("Sigmoid", "h", "s"), ("Mul", "h s", "y")],
    "swish with a factor": [("Mul", "h k", "t"), ("Sigmoid", "t", "s"), ("Mul", "h s", "y")],
    "mish": [("Softplus", "h", "s"), ("Tanh", "s", "t"), ("Mul", "h t", "y")],
    "mish by logarithm": [
        ("Exp", "h", "s"), ("Add", "s one", "p"), ("Log", "p", "l"), ("Tanh", "l", "t"), ("Mul", "h t", "y"),
    ],
    "softmax": [
        ("ReduceMax", "h", "m", LAST), ("Sub", "h m", "d"), ("Exp", "d", "x1"), ("ReduceSum", "x1 axes", "l"),
        ("Div", "x1 l", "y"),
    ],
}  # fmt: skip
OF_INTEGER_PIECES = ("swish", "swish with a factor")
"""What ort-cpu rounds at each piece behind a convolution, since it has integer kernels for all of them."""
NUMBERS = {
    "one": 1, "two": 2, "three": 3, "six": 6, "half": 0.5, "zero": 0, "minus": -0.5, "eps": 0.1, "k": 1.4, "k3": 0.0447,
    "kt": 0.798,
}  # fmt: skip
PARAMS = {name: np.float32(value) for name, value in NUMBERS.items()} | {
    "g": RNG.uniform(0.5, 1.5, WIDTH).astype(np.float32),
    "b": RNG.normal(size=WIDTH).astype(np.float32),
    "axes": np.asarray([-1]),
    "K": RNG.normal(size=(3, 1, 3)).astype(np.float32),
    "W": RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32),
}


def named(prefix: str, nodes: list[tuple]) -> list[onnx.NodeProto]:
    """The nodes of a spelling between layers of its own; computed tensors have names with the prefix.

    Both layers are integer kernels, which round their inputs; the one in front, a convolution of each token, has to
    round its result as well.
    """
    written = {"h", *(out for _, _, outs, *_ in nodes for out in outs.split())}
    name = {each: f"{prefix}.{each}" for each in written}
    made = [helper.make_node("Conv", ["x", "K"], [name["h"]], group=3, pads=[1, 1])]
    for op, ins, outs, *rest in nodes:
        inputs = [str(name.get(each, each)) for each in ins.split()]
        outputs = [name[each] for each in outs.split()]
        made.append(helper.make_node(op, inputs, outputs, **(rest[0] if rest else {})))
    return [*made, helper.make_node("MatMul", [name["y"], "W"], [f"{prefix}.behind"])]


def built(nodes: list[onnx.NodeProto], outputs: list[str], opset: int = 17) -> Model:
    read_names = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, WIDTH])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in PARAMS.items() if k in read_names],
    )
    return read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def spelled(name: str) -> Model:
    nodes = SPELLINGS[name]
    return built(named("t", nodes), ["t.y", "t.behind"], 18 if "axes as input" in name else 17)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelled_function_is_rounded_in_front_and_behind_alone(name):
    model = spelled(name)
    assert [(each.entry, each.result) for each in find_pieces(model)] == [("t.h", "t.y")]
    targets = ["generic-per-tensor"] if name in OF_INTEGER_PIECES else ["ort-cpu", "generic-per-tensor"]
    for target in targets:  # of integer kernels, and of roundings everywhere
        placement = place(model, QuantizationConfig.for_target(target))
        own = {site.tensor for site in placement.sites if site.kind == "activation"}
        assert own - {"t.q"} == {"x", "t.h", "t.y", "t.behind"}  # q is a constant
        floats = {"g", "b", *NUMBERS}
        assert not floats & {site.tensor for site in placement.sites}


def test_what_a_file_computes_is_the_function_of_what_is_rounded_rounded():
    """All spellings in one file: y = Q(f(Q(h))), with f in float32, to one step where sums of floats differ."""
    names = [name for name in SPELLINGS if "axes as input" not in name and "unoptimized" not in name]
    nodes = [node for i, name in enumerate(names) for node in named(f"t{i}", SPELLINGS[name])]
    model = built(nodes, [f"t{i}.{each}" for i in range(len(names)) for each in ("y", "behind")])
    batch = {"x": RNG.normal(size=(4, 3, WIDTH)).astype(np.float32)}
    encodings = calibrate(model, [batch], QuantizationConfig(ranges="min-max"))
    found = run(session(quantized_model(model, encodings)), batch)
    expected = simulate(model, encodings, arithmetic="integer")(model.params, encodings, batch)
    exact = apply(model.graph, model.params, batch)
    inside = {f"t{i}.{each}" for i, name in enumerate(names) if name in OF_INTEGER_PIECES for each in ("s", "t")}
    assert {name for name in encodings if name.startswith("t")} - inside == {
        f"t{i}.{each}" for i in range(len(names)) for each in ("h", "y", "behind")
    }
    for i, name in enumerate(names):
        step = float(encodings[f"t{i}.y"].scale)
        np.testing.assert_allclose(found[f"t{i}.y"], expected[f"t{i}.y"], atol=1.01 * step, err_msg=name)
        # within a few steps of the float model: the rounding of h goes through f, whose slope is about 1
        np.testing.assert_allclose(found[f"t{i}.y"], exact[f"t{i}.y"], atol=8 * step, err_msg=name)


@pytest.mark.parametrize("name", [name for name in SPELLINGS if name.startswith("layer norm of torch")])
def test_a_spelled_normalization_is_as_good_as_the_operator(name):
    """Tokens of which one is 20 times as large, so that a grid of variances would lose the others."""
    fused = built(named("t", [("LayerNormalization", "h g b", "y", {"epsilon": 0.1})]), ["t.y", "t.behind"])
    batch = {"x": (RNG.normal(size=(8, 3, WIDTH)) * np.asarray([1, 1, 20])[:, None]).astype(np.float32)}
    outputs = []
    for model in (fused, spelled(name)):
        encodings = calibrate(model, [batch])
        outputs.append(run(session(quantized_model(model, encodings)), batch)["t.y"])
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1.01 * float(encodings["t.y"].scale))


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        pytest.param([("Sigmoid", "h", "s"), ("Mul", "h s", "y")], ["t.y", "t.s"], id="what is inside is an output"),
        pytest.param([("Sigmoid", "h", "s"), ("Mul", "x s", "y")], ["t.y"], id="of two tensors"),
        pytest.param([("Relu", "h", "r"), ("Add", "h r", "y")], ["t.y"], id="a sum"),
        pytest.param([("Mul", "h h", "y")], ["t.y"], id="one operator"),
        pytest.param([("MatMul", "h W", "s"), ("Mul", "h s", "y")], ["t.y"], id="a layer in between"),
        pytest.param(
            [("Sigmoid", "h", "s"), ("Mul", "h s", "m"), ("MatMul", "s W", "z"), ("Add", "m z", "y")],
            ["t.y"],
            id="what is inside is read elsewhere",
        ),
    ],
)
def test_what_is_no_function_of_one_tensor_is_left(nodes, outputs):
    assert find_pieces(built(named("t", nodes), outputs)) == ()


def test_a_residual_around_a_function_keeps_its_tensor():
    nodes = [*SPELLINGS["layer norm of torch"], ("MatMul", "y W", "z"), ("Add", "h z", "o")]
    (found,) = find_pieces(built(named("t", nodes), ["t.o"]))
    assert (found.entry, found.result, found.name) == ("t.h", "t.y", "normalization")
    assert set(found.inside) == {f"t.{name}" for name in ("mu", "d", "s", "v", "e", "r", "n", "ng")}


def test_functions_of_one_tensor_beside_each_other_are_each_one():
    nodes = [
        ("Sigmoid", "h", "s"),
        ("Mul", "h s", "y"),
        ("Softplus", "h", "p"),
        ("Tanh", "p", "t"),
        ("Mul", "h t", "z"),
    ]
    found = find_pieces(built(named("t", nodes), ["t.y", "t.z"]))
    assert {(each.name, each.result) for each in found} == {("Swish", "t.y"), ("Mish", "t.z")}


def test_what_has_integer_kernels_is_integers_behind_a_convolution_and_float_behind_a_product_of_matrices():
    """QLinearConv gives integers; what MatMul gives may stay in float, and then nothing inside is worth rounding."""
    config = QuantizationConfig()
    behind_conv = place(spelled("swish"), config)
    assert behind_conv.site("t.s") is not None
    nodes = [helper.make_node("MatMul", ["x", "W"], ["h"]), helper.make_node("Sigmoid", ["h"], ["s"])]
    nodes += [helper.make_node("Mul", ["h", "s"], ["y"]), helper.make_node("MatMul", ["y", "W"], ["z"])]
    behind_matmul = place(built(nodes, ["z"]), config)
    assert {site.tensor for site in behind_matmul.sites if site.kind == "activation"} == {"x", "y", "z"}


def test_a_swish_between_convolutions_runs_in_integers(tmp_path):
    batch = {"x": RNG.normal(size=(64, 3, WIDTH)).astype(np.float32)}
    nodes = [*named("t", SPELLINGS["swish"])[:-1], helper.make_node("Conv", ["t.y", "K"], ["z"], group=3, pads=[1, 1])]
    model = built(nodes, ["z"])
    encodings = calibrate(model, [batch])
    file = quantized_model(model, encodings)
    found = run(session(file), batch)["z"]
    expected = simulate(model, encodings, arithmetic="integer")(model.params, encodings, batch)["z"]
    np.testing.assert_array_equal(found, expected)
    fused, _ = fuse_quantized(file)
    assert {node.op_type for node in fused.graph.nodes} >= {"QLinearConv", "QLinearMul"}


def test_a_target_may_round_every_operator():
    placement = place(spelled("swish"), QuantizationConfig(target="aimet"))
    assert placement.site("t.s") is not None
