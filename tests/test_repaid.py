"""Where ONNX Runtime has no integer kernel, nothing is rounded for its sake: graphs beside what is rounded in them."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptqjax.agreement import validate
from ptqjax.config import QuantizationConfig, Rule
from ptqjax.encodings.encoding import fake_quantize
from ptqjax.ir import Model
from ptqjax.onnx_io import read
from ptqjax.placement.place import place
from ptqjax.qdq.insert import insert_qdq
from ptqjax.ranges.calibrate import calibrate

RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.normal(size=(4, 4, 1, 1)).astype(np.float32),
    "v": RNG.normal(size=(4, 4, 1, 1)).astype(np.float32),
    "m": RNG.normal(size=(8, 8)).astype(np.float32),
    "n": RNG.normal(size=(8, 8)).astype(np.float32),
    "g": np.ones(8, np.float32),
    "h": np.zeros(8, np.float32),
    "slope": RNG.normal(size=(4, 1, 1)).astype(np.float32),
}


def build(text: str, **numbers: np.floating) -> Model:
    """Returns a model of lines `outputs = Operator inputs`, of an input x [n, 4, 8, 8], with an output y."""
    lines = [line.split() for line in text.strip().splitlines()]
    nodes = [helper.make_node(line[2], line[3:], [line[0]]) for line in lines]
    for node in nodes:
        node.attribute.extend([helper.make_attribute("axis", 1)] if node.op_type == "Concat" else [])
    read_names = {name for line in lines for name in line[3:]}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 4, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in {**WEIGHTS, **numbers}.items() if k in read_names],
    )
    return read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def rounded(model: Model, **settings) -> set[str]:
    """Returns the tensors that have a grid."""
    return {site.tensor for site in place(model, QuantizationConfig(**settings)).sites}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = Softmax x", ""),
        ("y = ConvTranspose x w", "x w y"),  # no layer has a kernel: what is asked for is done
        ("c = Conv x v\ny = ConvTranspose c w", "x v c"),
        ("t = ConvTranspose x w\np = PRelu t slope\ny = Conv p v", "p v y"),
        ("c = Conv x v\nt = ConvTranspose c w\nr = Relu t\ny = Sigmoid r", "x v c"),
        ("c = Conv x w\np = PRelu c slope\ny = Conv p v", "x w c p v y"),
        ("c = Conv x w\np = HardSigmoid c\nq = Mul c p\ny = Conv q v", "x w c q v y"),  # one function in pieces
        ("c = Conv x w\np = Sigmoid c\nq = Mul c p\nk = Concat q q\ny = MatMul k m", "x w c p q k m y"),
        ("c = Conv x w\np = Sigmoid c\nq = Mul c p\nd = Conv x v\ny = Add d q", "x w c p q v d y"),
        ("c = Conv x w\nr = Relu c\ny = LayerNormalization r g h", "x w r"),
        ("c = Conv x w\ny = Softmax c", "x w c"),
        ("a = MatMul x m\ns = Softmax a\ny = MatMul s n", "x m s n y"),
        ("a = MatMul x m\nt = Transpose a\ns = Softmax t\ny = MatMul s n", "x m s n y"),
        ("a = MatMul x m\nb = Add a x\nc = LayerNormalization b g h\nd = MatMul c n\ny = Add b d", "x m c n"),
        ("a = MatMul x m\nt = Transpose a\ny = MatMul t n", "x m a t n y"),
        ("s = Sqrt x\nt = Mul s g\nz = Add t h\ny = MatMul z n", "z n y"),
    ],
    ids=lambda value: "+".join(line.split()[2] for line in value.splitlines()) if "=" in str(value) else "",
)
def test_what_no_integer_kernel_needs_stays_in_float(text: str, expected: str) -> None:
    assert rounded(build(text)) == set(expected.split())


@pytest.mark.parametrize("operator", ["Add", "Mul"])
@pytest.mark.parametrize("number", [0.3, -7.0, 1e-3, 0.0])
def test_a_number_gets_a_grid_that_holds_it_where_the_kernel_lacks_nothing_else(operator: str, number: float) -> None:
    model = build(f"c = Conv x w\ny = {operator} c k", k=np.float32(number))
    sample = {"x": RNG.normal(size=(2, 4, 8, 8)).astype(np.float32)}
    encodings = calibrate(model, [sample], QuantizationConfig())
    assert float(fake_quantize(np.float32(number), encodings["k"])) == pytest.approx(number, rel=1e-6)
    found = validate(insert_qdq(model, encodings), [sample])
    assert [group.operator for group in found.groups if group.integer] == ["QLinearConv", f"QLinear{operator}"]
    assert found.largest <= 1


def test_numbers_elsewhere_stay_in_float() -> None:
    for text in ("c = Sqrt x\ny = Mul c k", "c = MatMul x m\nd = Mul c k\ny = Softmax d", "c = Conv x w\ny = Div c k"):
        assert "k" not in rounded(build(text, k=np.float32(2)))
        assert "k" not in rounded(build("c = Conv x w\ny = Mul c k", k=np.float32(2)), target="generic-per-channel")


def test_a_target_that_does_not_tell_its_kernels_rounds_everywhere() -> None:
    assert rounded(build("s = Sqrt x\ny = Softmax s"), target="generic-per-channel") == {"x", "s", "y"}


def test_what_reads_a_tensor_left_in_float_is_no_kernel() -> None:
    model = build("s = Sqrt x\na = MatMul s m\ny = Softmax a")
    assert rounded(model) == {"s", "m"}
    assert rounded(model, exclude=("m",)) == set()


def test_a_rule_that_asks_for_it_rounds_all_the_same() -> None:
    rule = Rule(tensors=("s",), enabled=True)
    assert "s" in rounded(build("s = Sqrt x\ny = Softmax s"), rules=(rule,))
    model = build("c = Conv x v\ny = ConvTranspose c w")
    assert rounded(model, rules=(Rule(tensors=("w",), enabled=True),)) == {"x", "v", "c", "w"}


def test_the_reason_names_the_target() -> None:
    placement = place(build("c = Conv x v\ny = ConvTranspose c w"))
    reasons = {entry.tensor: entry.reason for entry in placement.skipped}
    assert reasons == {
        "w": "weight of ConvTranspose, which target 'ort-cpu' has in float",
        "y": "nothing that target 'ort-cpu' has in integers needs it",
    }


def test_convolutions_before_any_activation_run_in_integers_as_simulated() -> None:
    kinds = ("LeakyRelu", "HardSwish", "Elu", "Selu", "PRelu")
    lines = ["c = Conv x w"]
    for kind in kinds:
        lines += [f"a{kind} = {kind} c {'slope' if kind == 'PRelu' else ''}", f"d{kind} = Conv a{kind} v"]
    lines.append(f"y = Concat {' '.join(f'd{kind}' for kind in kinds)}")
    model = build("\n".join(lines))
    sample = {"x": RNG.normal(size=(2, 4, 8, 8)).astype(np.float32)}
    found = validate(insert_qdq(model, calibrate(model, [sample])), [sample], in_float=False)
    convolutions = [group for group in found.groups if group.operator == "QLinearConv"]
    assert len(convolutions) == 1 + len(kinds)
    assert all(group.integer and group.largest == 0 for group in convolutions)
    assert found.largest <= 1  # exp is another one in each library
    assert found.unverified == ()
