"""What kernels that add two products in 16 bits would get wrong is told from the weights."""

from itertools import product

import numpy as np
import pytest

from ptqjax.ir import Model
from ptqjax.transforms.saturation import (
    in_order_of_terms,
    in_order_of_weight,
    saturating_weights,
    warn_of_saturation,
)
from tests.models import build, node

RANDOM = np.random.default_rng(0)


def layer(op_type: str, weight: np.ndarray, **attributes) -> Model:
    """A model of one integer operator on uint8, whose other operands are placeholders."""
    domain = {"QGemm": "com.microsoft", "MatMulIntegerToFloat": "com.microsoft"}.get(op_type, "")
    operands = ["x", "s", "zx", "w", "s", "zw", *(("s", "zx") if op_type != "QGemm" else ("", "s", "zx"))]
    if op_type == "MatMulIntegerToFloat":
        operands = ["x", "w", "s", "s", "zx", "zw"]
    params = {
        "w": weight,
        "s": np.ones((), np.float32),
        "zx": np.full((), 3, np.uint8),
        "zw": np.zeros((), weight.dtype),
    }
    return build(
        [node(op_type, operands, "y", domain=domain, **attributes)],
        params,
        input_shape=("n", *[None] * (weight.ndim - 1)),
        outputs="y",
    )


def saturates(pair: np.ndarray) -> bool:
    """Whether 16 bits are too few for a pair of weights and some pair of inputs: all extreme ones are tried."""
    sums = [255 * (a * int(pair[0]) + b * int(pair[1])) for a, b in product((0, 1), repeat=2)]
    return max(sums) > 2**15 - 1 or min(sums) < -(2**15)


@pytest.mark.parametrize("op_type", ["QGemm", "QLinearMatMul", "MatMulIntegerToFloat"])
def test_pairs_that_exceed_16_bits_are_counted(op_type):
    weight = RANDOM.integers(-128, 128, (8, 5)).astype(np.int8)
    (found,) = saturating_weights(layer(op_type, weight))
    pairs = weight.T.reshape(5, 4, 2)
    assert (found.weight, found.operator, found.output) == ("w", op_type, "y")
    assert found.num_pairs == 20
    assert found.num_saturating == sum(saturates(pair) for row in pairs for pair in row) > 0
    assert found.fraction == found.num_saturating / 20


def test_the_terms_of_a_convolution_are_paired_channels_last():
    """Of four large weights, two are of one place and two of neighbouring channels: one pair."""
    weight = np.zeros((1, 4, 1, 2), np.int8)
    weight[0, 0, 0, :] = weight[0, 1, 0, 0] = weight[0, 3, 0, 1] = 100
    (found,) = saturating_weights(layer("QLinearConv", weight))
    assert (found.num_saturating, found.num_pairs) == (1, 4)


def test_the_terms_of_a_turned_gemm_lie_in_rows():
    weight = np.array([[100, 100, 0], [0, 0, 100]], np.int8)
    (found,) = saturating_weights(layer("QGemm", weight, transB=1))
    assert (found.num_saturating, found.num_pairs) == (1, 4)  # the third term has no partner


@pytest.mark.parametrize(
    ("pair", "is_named"),
    [((64, 64), False), ((64, 65), True), ((-64, -64), False), ((-64, -65), True), ((127, -128), False)],
)
def test_the_bound_is_that_of_16_bits(pair, is_named):
    weight = np.array(pair, np.int8).reshape(2, 1)
    assert bool(saturating_weights(layer("QLinearMatMul", weight))) == is_named == saturates(weight[:, 0])


@pytest.mark.parametrize(("group", "num_pairs"), [(1, 4 * 2), (2, 4 * 2), (4, 0)])
def test_kernels_with_one_input_channel_are_depthwise_only_with_one_output_channel_a_group(group, num_pairs):
    """The terms of the others are the taps of the kernel, two by two (measured on AVX2 and AVX-512)."""
    found = saturating_weights(layer("QLinearConv", np.full((4, 1, 1, 3), 127, np.int8), group=group))
    assert sum(each.num_pairs for each in found) == num_pairs
    assert sum(each.num_saturating for each in found) == num_pairs / 2


@pytest.mark.parametrize(
    ("op_type", "shape", "is_turned"),
    [("Conv", (4, 3, 2, 5), False), ("MatMul", (2, 3, 4), False), ("Gemm", (3, 4), False), ("Gemm", (3, 4), True)],
)
def test_the_order_of_terms_is_undone(op_type, shape, is_turned):
    weight = RANDOM.normal(size=shape)
    terms = in_order_of_terms(weight, op_type, is_turned=is_turned)
    assert np.array_equal(in_order_of_weight(terms, shape, op_type, is_turned=is_turned), weight)


def test_depthwise_kernels_and_unsigned_weights_do_not_saturate():
    depthwise = np.full((4, 1, 3, 3), 127, np.int8)
    assert not saturating_weights(layer("QLinearConv", depthwise, group=4))
    assert not saturating_weights(layer("QLinearMatMul", np.full((4, 4), 255, np.uint8)))


def test_the_warning_counts_all_and_names_the_first():
    (one,) = saturating_weights(layer("QLinearMatMul", np.full((4, 4), 127, np.int8)))
    (warning,) = warn_of_saturation([one] * 5)
    assert "may saturate at 5 weights (w: 100.0 % of its pairs" in warning
    assert "and 2 more" in warning
    assert "session.x64quantprecision=1" in warning
    assert warn_of_saturation([]) == []
