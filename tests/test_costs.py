"""Groups of tied tensors, and what a model costs under some encodings."""

import math
from pathlib import Path

import numpy as np
import pytest

from ptqjax import QuantizationConfig, Rule, calibrate, export, fold_batch_norms, read
from ptqjax.encodings.encoding import make_encoding
from ptqjax.experiments.costs import cost_model
from ptqjax.experiments.tied_tensors import groups_of
from ptqjax.lowering import apply
from ptqjax.placement.place import place
from tests.models import Chain, build, node, random_input


def batch(model, size=3, seed=0):
    shape = (size, *model.graph.inputs[0].shape[1:])
    return {"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


def network():
    chain = Chain(4, dtype=np.float32)
    chain.conv(6, pad=1, bias=True, strides=(2, 2)).clip().conv(6, group=3, pad=1, bias=True).add("Relu")
    chain.add("MaxPool", kernel_shape=(2, 2), strides=(2, 2))
    chain.channels *= 4  # of 2 x 2 places
    return chain.add("Flatten").gemm(5).build()


def of(model, *, size=3, **settings):
    data = batch(model, size)
    settings = {"ranges": "min-max", **settings}
    return cost_model(model, data), calibrate(model, [data], QuantizationConfig(**settings))


def test_multiplications_are_those_of_one_sample_counted_by_hand():
    model = network()
    counted = {product.output: product.multiplications for product in cost_model(model, batch(model)).products}
    # 4 x 4 outputs of 6 channels over 4 channels of 3 x 3; 6 channels over 2 of 3 x 3; 24 inputs to 5 outputs.
    assert list(counted.values()) == [16 * 6 * 4 * 9, 16 * 6 * 2 * 9, 24 * 5]


@pytest.mark.parametrize(
    ("op_type", "left", "right", "expected", "attributes"),
    [
        ("MatMul", (2, 7, 5), (5, 3), 7 * 5 * 3, {}),
        ("Gemm", (2, 5), (5, 3), 5 * 3, {}),
        ("Gemm", (5, 2), (3, 5), 2 * 5 * 3 / 5, {"transA": 1, "transB": 1}),  # whose samples are not on axis 0
        ("ConvTranspose", (2, 4, 5, 5), (4, 3, 2, 2), 25 * 4 * 3 * 4, {"group": 2}),
    ],
)
def test_each_kind_of_product_counts_its_multiplications(op_type, left, right, expected, attributes):
    params = {"w": np.ones(right, np.float32)}
    model = build([node(op_type, ["x", "w"], "y", **attributes)], params, input_shape=left, outputs=["y"])
    (product,) = cost_model(model, {"x": np.ones(left, np.float32)}).products
    assert product.multiplications == expected


def test_products_of_two_activations_count_the_bits_of_both():
    nodes = [node("Transpose", ["x"], "t", perm=(0, 2, 1)), node("MatMul", ["x", "t"], "y")]
    model = build(nodes, {}, input_shape=("N", 3, 4), outputs=["y"])
    costs, encodings = of(model, activations="uint6")
    assert costs.costs(encodings).bit_operations == 3 * 4 * 3 * 6 * 6
    assert costs.weights == {}
    assert costs.costs(encodings).mean_weight_bits == 0


def test_bit_operations_are_multiplications_times_the_bits_of_both_operands():
    model = network()
    costs, encodings = of(model, weights="int6", activations="uint5")
    total = sum(product.multiplications for product in costs.products)
    assert costs.costs(encodings).bit_operations == total * 6 * 5
    assert costs.costs({}).bit_operations == total * 32 * 32


def test_what_is_not_enabled_counts_as_float():
    model = network()
    costs, encodings = of(model)
    weight = costs.products[0].operands[1]
    off = encodings | {weight: encodings[weight].replace(enabled=np.asarray(False))}
    without = {name: encoding for name, encoding in encodings.items() if name != weight}
    assert costs.costs(off) == costs.costs(without)
    assert costs.costs(off).bit_operations - costs.costs(encodings).bit_operations == 16 * 6 * 4 * 9 * 8 * (32 - 8)


def test_mean_widths_weigh_each_element_once():
    model = network()
    weights = [name for name in model.params if name.startswith("w")]
    rule = Rule(tensors=(weights[0],), of="weights", dtype="int4")
    costs, encodings = of(model, rules=(rule,))
    sizes = {name: np.size(model.params[name]) for name in weights}
    expected = 8 - 4 * sizes[weights[0]] / sum(sizes.values())
    assert costs.costs(encodings).mean_weight_bits == pytest.approx(expected, rel=1e-12)
    shapes = {name: encodings[name] for name in costs.activations if name in encodings}
    narrow = {name: encoding.replace(qmax=np.float32(15)) for name, encoding in shapes.items() if name == "x"}
    flowing = {name: costs.activations[name] for name in shapes}
    expected = 8 - 4 * flowing["x"] / sum(flowing.values())
    assert costs.costs(encodings | narrow).mean_activation_bits == pytest.approx(expected, rel=1e-12)


def test_sizes_of_activations_are_those_of_one_sample():
    model = network()
    names = tuple(name for each in model.graph.nodes for name in each.outputs)
    seen = build(model.graph.nodes, model.params, input_shape=("N", 4, 8, 8), outputs=names)
    values = apply(seen.graph, seen.params, batch(model, 5))
    found = cost_model(model, batch(model, 5)).activations
    assert {name: found[name] for name in names} == {name: math.prod(values[name].shape[1:]) for name in names}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_stored_bytes_differ_between_widths_as_the_files_do(tmp_path, granularity):
    """Nodes and names, which a file has besides, are the same for both but for one attribute's length."""
    model = fold_batch_norms(read(Path(__file__).parents[1] / "examples" / "digits.onnx"))[0]
    data = {"input": np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)}
    besides = {}
    for weights in ("int8", "int4", "int16"):
        config = QuantizationConfig(weights=weights, granularity=granularity, ranges="min-max")
        encodings = calibrate(model, [data], config)
        export(model, encodings, tmp_path, weights)
        size = (tmp_path / f"{weights}.onnx").stat().st_size
        besides[weights] = size - cost_model(model, data).costs(encodings).stored_bytes
    assert max(besides.values()) - min(besides.values()) < 64
    assert 0 < besides["int8"] < 12_000


def test_packed_bytes_of_six_bits_are_three_quarters_and_stored_ones_are_whole():
    model = network()
    size = sum(np.size(value) for name, value in model.params.items() if name.startswith("w"))
    costs, six = of(model, weights="int6", granularity="tensor")
    eight = of(model, weights="int8", granularity="tensor")[1]
    saved = costs.costs(eight).model_bytes - costs.costs(six).model_bytes
    assert saved == pytest.approx(size * 2 / 8, abs=6)  # zero points, and whole bytes for each tensor
    assert costs.costs(eight).stored_bytes == costs.costs(six).stored_bytes


def residual():
    """A trunk that is pooled, added to, joined with itself, and bounded per channel."""
    chain = Chain(3, dtype=np.float32)
    chain.conv(4, pad=1).add("Relu").add("MaxPool", kernel_shape=(2, 2))
    pooled = chain.tensor
    chain.conv(4, pad=1)
    chain.params["w3"] *= np.float32(0.1)  # what is joined is alike: unlike parts would keep grids of their own
    chain.add("Add", pooled).add("Concat", pooled, axis=1)
    bound = chain.param("bound", np.arange(1.0, 9.0).reshape(8, 1, 1))
    return chain.add("Relu").add("Min", bound).build()


@pytest.mark.parametrize("make", [network, residual])
def test_groups_of_a_configuration_are_those_of_its_encodings(make):
    model = make()
    config = QuantizationConfig()
    assert groups_of(model, config) == groups_of(model, calibrate(model, [random_input(model, 1)], config))


def test_groups_hold_each_rounded_tensor_once_and_what_is_tied_together():
    model = residual()
    groups = groups_of(model, QuantizationConfig())
    tensors = [name for group in groups for name in group.tensors]
    assert sorted(tensors) == sorted(site.tensor for site in place(model, QuantizationConfig()).sites)
    by_name = {group.name: group for group in groups}
    relu, pool = (next(each.output for each in model.graph.nodes if each.op_type == op) for op in ("Relu", "MaxPool"))
    assert pool in by_name[relu].tensors
    assert {group.kind for group in groups if group.name.startswith("w")} == {"weight"}
    assert by_name["x"].kind == "activation"


def test_equal_grids_on_both_sides_of_a_layer_are_not_one_group():
    nodes = [node("MatMul", ["x", "w"], "h"), node("Relu", ["h"], "y")]
    model = build(nodes, {"w": np.ones((2, 2), np.float32)}, input_shape=("N", 2), outputs=["y"])
    grid = make_encoding(np.float32(0.125), np.float32(0), dtype="int8")
    tensors = [group.tensors for group in groups_of(model, dict.fromkeys(("x", "w", "h", "y"), grid))]
    assert tensors == [("w",), ("x",), ("h", "y")]


def test_groups_of_encodings_leave_out_what_is_not_enabled():
    model = network()
    encodings = calibrate(model, [random_input(model, 1)], QuantizationConfig())
    off = encodings | {"x": encodings["x"].replace(enabled=np.asarray(False))}
    assert [group.name for group in groups_of(model, encodings) if group not in groups_of(model, off)] == ["x"]
