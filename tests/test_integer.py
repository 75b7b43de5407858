"""The integer program computes what ONNX Runtime's integer kernels compute, from the runtime's own integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.agreement import validate
from ptqjax.config import QuantizationConfig, Rule
from ptqjax.kernels import integer
from ptqjax.kernels.quotient import quotient
from ptqjax.qdq.fuse_quantized import fuse_quantized
from ptqjax.qdq.insert import insert_qdq
from ptqjax.ranges.calibrate import calibrate
from tests.models import build, node

RANDOM = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return (scale * RANDOM.normal(size=shape)).astype(np.float32)


def zoo():
    """One model with every operator that becomes an integer one, and those that must not disturb it."""
    params = {
        "dense.w": normal(24, 16, 3, 3, scale=0.1),
        "dense.b": normal(24),
        "depthwise.w": normal(24, 1, 3, 3, scale=0.3),
        "grouped.w": normal(12, 6, 3, 2, scale=0.2),
        "grouped.b": normal(12),
        "wide.w": normal(8, 64, 5, 5, scale=0.05),  # 1600 terms a sum: more than float32 holds at once
        "spread.w": normal(64, 24, 1, 1, scale=0.2),
        "multiplier.w": normal(48, 1, 3, 3, scale=0.3),
        "project.w": normal(24, 24, 1, 1, scale=0.2),
        "vector": normal(1, 24, 1, 1),
        "gemm.w": normal(10, 24, scale=0.3),
        "gemm.b": normal(10),
        "scaled.w": normal(24, 10, scale=0.3),
        "linear.w": normal(24, 10, scale=0.3),
    }
    nodes = [
        node("Conv", ["x", "dense.w", "dense.b"], "dense", pads=(1, 0, 2, 1), strides=(2, 1)),
        node("Relu", ["dense"], "dense.relu"),
        node("Conv", ["dense.relu", "depthwise.w"], "depthwise", group=24, pads=(1, 1, 1, 1)),
        node("Conv", ["dense.relu", "grouped.w", "grouped.b"], "grouped", group=4, dilations=(2, 1)),
        node("Conv", ["dense.relu", "multiplier.w"], "multiplier", group=24, auto_pad="SAME_UPPER", strides=(2, 2)),
        node("Conv", ["dense.relu", "project.w"], "project"),
        node("Conv", ["dense.relu", "spread.w"], "spread"),
        node("Conv", ["spread", "wide.w"], "wide", pads=(2, 2, 2, 2)),
        node("Add", ["depthwise", "project"], "sum"),
        node("Add", ["sum", "vector"], "shifted"),
        node("Mul", ["depthwise", "project"], "product"),
        node("Concat", ["sum", "product"], "joined", axis=1),
        node("MaxPool", ["joined"], "largest", kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),
        node("AveragePool", ["sum"], "halved", kernel_shape=(2, 2), strides=(2, 2)),
        node("AveragePool", ["sum"], "smooth", kernel_shape=(3, 3), pads=(1, 1, 1, 1), count_include_pad=1),
        node("AveragePool", ["sum"], "smoother", kernel_shape=(3, 3), pads=(1, 1, 1, 1)),
        node("LeakyRelu", ["sum"], "leaky", alpha=0.1),
        node("Sigmoid", ["sum"], "sigmoid"),
        node("GlobalAveragePool", ["sum"], "mean"),
        node("Flatten", ["mean"], "flat"),
        node("Gemm", ["flat", "gemm.w", "gemm.b"], "gemm", transB=1),
        node("Gemm", ["flat", "scaled.w"], "scaled", alpha=0.7),
        node("MatMul", ["flat", "linear.w"], "linear"),
        node("Softmax", ["gemm"], "softmax", axis=-1),
        node("Transpose", ["gemm"], "turned", perm=(1, 0)),
        node("MatMul", ["linear", "turned"], "attention"),
    ]
    read = {name for each in nodes for name in each.inputs}
    outputs = [each.output for each in nodes if each.output not in read]
    return build(nodes, params, input_shape=("n", 16, 17, 15), outputs=outputs)


OPERATORS = {
    "dense.relu": "QLinearConv",
    "depthwise": "QLinearConv",
    "grouped": "QLinearConv",
    "multiplier": "QLinearConv",
    "project": "QLinearConv",
    "wide": "QLinearConv",
    "sum": "QLinearAdd",
    "shifted": "QLinearAdd",
    "product": "QLinearMul",
    "joined": "Concat",
    "largest": "MaxPool",
    "halved": "QLinearAveragePool",
    "smooth": "QLinearAveragePool",
    "smoother": "QLinearAveragePool",
    "leaky": "LeakyRelu",
    "sigmoid": "Sigmoid",
    "mean": "QLinearGlobalAveragePool",
    "flat": "Flatten",
    "gemm": "QGemm",
    "scaled": "QGemm",
    "linear": "QLinearMatMul",
    "softmax": "QLinearSoftmax",
    "attention": "QLinearMatMul",
}


@pytest.fixture(scope="module", params=["channel", "tensor"])
def validation(request):
    """What `validate` finds on the zoo, by name of the float tensor."""
    model = zoo()
    batch = {"x": np.random.default_rng(1).normal(size=(4, 16, 17, 15)).astype(np.float32)}
    rounded = Rule(operators=("Softmax",), enabled=True)  # left in float else: it is faster so
    config = QuantizationConfig(granularity=request.param, ranges="min-max", rules=(rounded,))
    return validate(insert_qdq(model, calibrate(model, [batch], config)), [batch])


@pytest.mark.parametrize("tensor", sorted(OPERATORS))
def test_each_operator_equals_onnx_runtime_on_its_own_integers(validation, tensor):
    group = next(group for group in validation.groups if group.tensor == f"{tensor}_quantized")
    assert group.operator == OPERATORS[tensor]
    assert group.integer == group.operator.startswith("Q")
    assert group.num_elements > 0
    assert group.largest <= 1
    assert group.equal >= 0.999  # the bar; found: all equal on x86 with FMA


def test_the_integer_program_equals_onnx_runtime_end_to_end(validation):
    assert validation.integer.equal >= 0.999
    assert validation.integer.sqnr >= validation.float.sqnr


def test_onnx_runtime_fuses_what_is_foreseen(validation):
    assert not [warning for warning in validation.warnings if "ONNX Runtime has" in warning or "exposing" in warning]


@pytest.mark.parametrize(("op_type", "bounds"), [("Relu", ()), ("Clip", ("low", "high"))])
@pytest.mark.parametrize("implied", [True, False])
def test_an_activation_is_dropped_only_where_the_range_implies_it(op_type, bounds, implied):
    params = {"w": normal(4, 3, 3, 3), "low": np.zeros((), np.float32), "high": np.full((), 1.5, np.float32)}
    used = {name: value for name, value in params.items() if name == "w" or name in bounds}
    model = build(
        [node("Conv", ["x", "w"], "c"), node(op_type, ["c", *bounds], "y")],
        used,
        input_shape=("n", 3, 6, 6),
        outputs="y",
    )
    batch = {"x": normal(8, 3, 6, 6)}
    encodings = calibrate(model, [batch], QuantizationConfig(ranges="min-max"))
    if not implied:
        encodings["y"] = encodings["y"].replace(zero_point=np.float32(100))
    fused, report = fuse_quantized(insert_qdq(model, encodings))
    assert ("QLinearConv" in {each.op_type for each in fused.graph.nodes}) == implied
    assert [record.done for record in report] == [implied]
    assert implied or "does not imply" in report[0].reason
    assert validate(insert_qdq(model, encodings), [batch]).largest <= 1


def as_foreseen(model, batch, **settings):
    """What `validate` finds, with nothing fused otherwise than foreseen, and all equal to a step."""
    encodings = calibrate(model, [batch], QuantizationConfig(ranges="min-max", **settings))
    found = validate(insert_qdq(model, encodings), [batch])
    assert not [warning for warning in found.warnings if "VNNI" not in warning]
    assert found.largest <= 1
    assert found.equal >= 0.999
    return [group.operator for group in found.groups if group.operator.startswith("Q")]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("shared", ["w", "b", "wb"])
def test_layers_that_share_a_weight_or_bias_have_their_own_integers(shared, granularity):
    """ONNX Runtime refuses integer layers on one weight with the entry that makes sessions exact."""
    params = {"w": normal(4, 4, 3, 3), "w2": normal(4, 4, 3, 3), "b": normal(4), "b2": normal(4)}
    weight, bias = ("w" if "w" in shared else "w2"), ("b" if "b" in shared else "b2")
    nodes = [node("Conv", ["x", "w", "b"], "c"), node("Conv", ["c", weight, bias], "y")]
    used = {name: params[name] for name in {"w", "b", weight, bias}}
    model = build(nodes, used, input_shape=("n", 4, 8, 8), outputs=["y"])
    batch = {"x": normal(4, 4, 8, 8)}
    assert as_foreseen(model, batch, granularity=granularity) == ["QLinearConv", "QLinearConv"]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (1,)])
@pytest.mark.parametrize("order", [("m", "b"), ("b", "m")])
@pytest.mark.parametrize("relu", [False, True])
def test_a_product_of_matrices_and_its_bias_are_one_operator(shape, order, relu, granularity):
    nodes = [node("MatMul", ["x", "w"], "m"), node("Add", order, "y")]
    nodes = [nodes[0], node("Add", order, "a"), node("Relu", ["a"], "y")] if relu else nodes
    model = build(nodes, {"w": normal(6, 5), "b": normal(*shape)}, input_shape=("n", 6), outputs=["y"])
    found = as_foreseen(model, {"x": normal(8, 6)}, granularity=granularity)
    assert found == ([] if shape == (1,) else ["QGemm"])  # a MatMulIntegerToFloat, which adds nothing


def test_a_product_of_more_axes_stays_apart_from_its_bias():
    nodes = [node("MatMul", ["x", "w"], "m"), node("Add", ["m", "b"], "y")]
    model = build(nodes, {"w": normal(6, 5), "b": normal(5)}, input_shape=("n", 3, 6), outputs=["y"])
    assert as_foreseen(model, {"x": normal(8, 3, 6)}) == []


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("op_type", "fused"), [("Gemm", "QGemm"), ("MatMul", "MatMulIntegerToFloat")])
def test_a_product_that_stays_in_float_is_summed_in_integers(op_type, fused, granularity):
    """The runtime scales an exact sum, which float32 arithmetic would have rounded term by term."""
    weights = ["w", "b"] if op_type == "Gemm" else ["w"]
    params = {"w": normal(700, 5), "b": normal(5)}
    model = build(
        [node(op_type, ["x", *weights], "m"), node("Elu", ["m"], "y")],
        {name: params[name] for name in weights},
        input_shape=("n", 700),
        outputs=["y"],
    )
    batch = {"x": normal(64, 700)}
    config = QuantizationConfig(ranges="min-max", granularity=granularity, exclude=("m", "y"))
    quantized = insert_qdq(model, calibrate(model, [batch], config))
    integers, report = fuse_quantized(quantized)
    assert fused in {each.op_type for each in integers.graph.nodes}
    assert [record.done for record in report] == [True]
    found = validate(quantized, [batch])
    assert not [warning for warning in found.warnings if "VNNI" not in warning]
    assert found.integer.equal > found.float.equal


@pytest.mark.parametrize("shape", [(5,), (1,)])
def test_a_gemm_with_one_number_as_bias_is_as_foreseen(shape):
    nodes = [node("Gemm", ["x", "w", "b"], "y")]
    model = build(nodes, {"w": normal(6, 5), "b": normal(*shape)}, input_shape=("n", 6), outputs=["y"])
    assert as_foreseen(model, {"x": normal(8, 6)}) == (["QGemm"] if shape == (5,) else [])


def test_the_head_of_a_transformer_is_as_foreseen():
    """Reduced over its tokens, the input of the last product is a matrix."""
    nodes = [
        node("LayerNormalization", ["x", "s", "o"], "l", axis=-1),
        node("ReduceMean", ["l"], "r", axes=(1,), keepdims=0),
        node("MatMul", ["r", "w"], "m"),
        node("Add", ["m", "b"], "y"),
    ]
    params = {"s": normal(6), "o": normal(6), "w": normal(6, 5), "b": normal(5)}
    model = build(nodes, params, input_shape=("n", 7, 6), outputs=["y"])
    assert as_foreseen(model, {"x": normal(8, 7, 6)}) == ["QGemm"]


def test_a_sum_with_many_terms_is_exact():
    """The worst case that 8 bits allow, beyond what float32 adds exactly."""
    for num_terms in (9, 400, 2000, 20000):
        x = np.full((1, num_terms), 255, np.uint8)
        w = np.concatenate([np.full((num_terms, 1), -128), RANDOM.integers(-128, 128, (num_terms, 3))], 1).astype(
            np.int8
        )
        total = integer.sum_of_products(
            jnp.matmul,
            integer.centred(jnp.asarray(x), None),
            integer.centred(jnp.asarray(w), None),
            num_terms=num_terms,
            largest_x=255,
            largest_w=128,
        )
        np.testing.assert_array_equal(total, x.astype(np.int64) @ w.astype(np.int64))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_zero_point_in_the_weight_is_subtracted(dtype):
    x, w = RANDOM.integers(0, 256, (5, 700)).astype(np.uint8), RANDOM.integers(-100, 100, (700, 6)).astype(dtype)
    zero = np.asarray(17, dtype)
    total = integer.sum_of_products(
        jnp.matmul,
        integer.centred(jnp.asarray(x), jnp.full((1, 1), 3, jnp.uint8)),
        integer.centred(jnp.asarray(w), jnp.full((1, 1), zero)),
        num_terms=700,
        largest_x=integer.largest_difference(x.dtype),
        largest_w=integer.largest_difference(w.dtype),
    )
    np.testing.assert_array_equal(total, (x.astype(np.int64) - 3) @ (w.astype(np.int64) - 17))


def test_requantizing_rounds_half_to_even_and_saturates():
    total = jnp.asarray([-1000, -3, -1, 0, 1, 3, 5, 1000], jnp.int32)
    y = integer.requantize(total, jnp.full((1,), 0.5, jnp.float32), jnp.full((1,), 10, jnp.uint8))
    np.testing.assert_array_equal(y, np.array([0, 8, 10, 10, 10, 12, 12, 255], np.uint8))
    assert y.dtype == np.uint8


def test_a_quotient_is_that_of_ieee():
    x, divisor = normal(10_000, scale=100), np.float32(0.3)
    np.testing.assert_array_equal(jax.jit(quotient)(x, divisor), x / divisor)
    assert np.any(np.asarray(jax.jit(jnp.divide)(x, divisor)) != x / divisor), "XLA divides now: `quotient` can go"


def test_fusing_needs_a_reader_that_quantizes():
    """A result that is also read in float stays in float, with the reason in the report."""
    model = build(
        [node("Conv", ["x", "w"], "c"), node("Sigmoid", ["c"], "y")],
        {"w": normal(4, 3, 1, 1)},
        input_shape=("n", 3, 6, 6),
        outputs=["c", "y"],
    )
    encodings = calibrate(model, [{"x": normal(2, 3, 6, 6)}], QuantizationConfig(exclude=("c",)))
    _, report = fuse_quantized(insert_qdq(model, encodings))
    assert [(record.done, record.where) for record in report] == [(False, ("c",))]


def test_zero_points_of_zeros_are_left_out():
    """That halves the bound on the sums; the model has no parameter more for it."""
    model = build([node("MatMul", ["x", "w"], "y")], {"w": normal(6, 4)}, input_shape=("n", 6), outputs=["y"])
    quantized = insert_qdq(model, calibrate(model, [{"x": normal(2, 6)}]))
    fused, _ = fuse_quantized(quantized)
    (product,) = (each for each in fused.graph.nodes if each.op_type == "QLinearMatMul")
    assert not product.inputs[5]
    assert set(fused.params) < set(quantized.params)


@pytest.mark.parametrize("seed", range(5))
def test_rounded_once_is_a_fused_multiply_add(seed):
    random = np.random.default_rng(seed)
    x = np.exp(random.normal(size=100_000) * 3).astype(np.float32)
    q = random.integers(-255, 256, x.size).astype(np.float32)
    c = (random.normal(size=x.size) * 300).astype(np.float32)
    exact = (x.astype(np.longdouble) * q + c).astype(np.float32)  # 64 bits of mantissa: the product is exact
    rounded_once = jax.jit(integer._rounded_once)
    np.testing.assert_array_equal(np.asarray(rounded_once(x, q, c)), exact)
