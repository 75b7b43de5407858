"""The contract of channel routes: what a node does to values that are one number a channel is what the gather says."""

from dataclasses import replace

import numpy as np
import pytest

from ptqjax.ir import Constant, Graph, Model, Statistics, TensorSpec
from ptqjax.lowering import apply
from ptqjax.transforms.bounds import channel_bounds
from ptqjax.transforms.gains import channel_gains
from ptqjax.transforms.linear import linear_layers
from ptqjax.transforms.moments import distributions, normal
from ptqjax.transforms.places import kept_places
from ptqjax.transforms.routes import ROUTED, Facts, Lying, routes
from ptqjax.transforms.sizes import Size
from tests.models import node

F32 = np.dtype(np.float32)


def graph_of(op_type, shapes, outputs=1, *, ints=(), floats=(), opset=17, **attributes):
    """A model of one node: inputs x0, x1 of the shapes, then constants of integers, then parameters."""
    names = [f"x{i}" for i in range(len(shapes))]
    constants = {f"c{i}": Constant(np.array(value, np.int64)) for i, value in enumerate(ints) if value is not None}
    params = {f"p{i}": np.array(value, np.float32) for i, value in enumerate(floats)}
    others = [f"c{i}" if value is not None else "" for i, value in enumerate(ints)]
    results = tuple(f"y{i}" for i in range(outputs))
    graph = Graph(
        name="one",
        inputs=tuple(TensorSpec(name=name, dtype=F32, shape=shape) for name, shape in zip(names, shapes, strict=True)),
        outputs=tuple(TensorSpec(name=name, dtype=F32, shape=None) for name in results),
        nodes=(replace(node(op_type, (*names, *others, *params), "", **attributes), outputs=results),),
        constants=tuple(sorted(constants.items())),
        parameters=tuple(sorted(params)),
        opsets=(("", opset),),
    )
    return Model(graph=graph, params=params)


IMAGE, OTHER, MATRIX = (2, 3, 4, 5), (2, 2, 4, 5), (2, 12)
ON_1, LAST = Lying(1, 3), Lying(3, 5)
CASES = {
    "identity": (graph_of("Identity", [IMAGE]), [ON_1]),
    "dropout": (graph_of("Dropout", [IMAGE]), [ON_1]),
    "transpose": (graph_of("Transpose", [IMAGE], perm=(0, 2, 3, 1)), [ON_1]),
    "transpose, reversed": (graph_of("Transpose", [IMAGE]), [ON_1]),
    "flatten": (graph_of("Flatten", [IMAGE]), [ON_1]),
    "flatten, all but channels last": (graph_of("Flatten", [IMAGE], axis=3), [LAST]),
    "reshape to a matrix": (graph_of("Reshape", [IMAGE], ints=[(0, -1)]), [ON_1]),
    "reshape to one axis of places": (graph_of("Reshape", [IMAGE], ints=[(2, 3, 20)]), [ON_1]),
    "reshape back": (graph_of("Reshape", [MATRIX], ints=[(2, 3, 2, 2)]), [Lying(1, 3, Size(4))]),
    "gate of a matrix": (graph_of("Reshape", [(2, 12)], ints=[(-1, 12, 1, 1)]), [Lying(1, 12)]),
    "squeeze": (graph_of("Squeeze", [(2, 3, 1, 1)], ints=[(2, 3)]), [ON_1]),
    "squeeze in front": (graph_of("Squeeze", [(1, 2, 3)], ints=[(0,)]), [Lying(2, 3)]),
    "unsqueeze": (graph_of("Unsqueeze", [(2, 3)], ints=[(2, 3)]), [ON_1]),
    "unsqueeze in front": (graph_of("Unsqueeze", [(2, 3)], ints=[(0,)]), [ON_1]),
    "concat": (graph_of("Concat", [IMAGE, OTHER], axis=1), [ON_1, Lying(1, 2)]),
    "concat from behind": (graph_of("Concat", [IMAGE, IMAGE], axis=-1), [LAST, LAST]),
    "split": (graph_of("Split", [IMAGE], 2, ints=[(1, 2)], axis=1), [ON_1]),
    "split evenly": (graph_of("Split", [OTHER], 2, axis=1, opset=13), [Lying(1, 2)]),
    "split along another axis": (graph_of("Split", [IMAGE], 2, ints=[(1, 3)], axis=2), [ON_1]),
    "slice": (graph_of("Slice", [IMAGE], ints=[(2,), (-9,), (1,), (-1,)]), [ON_1]),
    "slice of places": (graph_of("Slice", [IMAGE], ints=[(1, 1), (3, 4), (2, -1)]), [ON_1]),
    "slice before the first": (graph_of("Slice", [IMAGE], ints=[(0,), (-9,), (1,), (1,)]), [ON_1]),
    "slice back from before the first": (graph_of("Slice", [IMAGE], ints=[(-8,), (-9,), (1,), (-1,)]), [ON_1]),
    "pad": (graph_of("Pad", [IMAGE], ints=[(0, 1, 0, 0, 0, 2, 0, 0)]), [ON_1]),
    "pad around": (graph_of("Pad", [IMAGE], ints=[(0, 0, 1, 1, 0, 0, 1, 1)]), [ON_1]),
    "pad by reflection": (graph_of("Pad", [IMAGE], ints=[(0, 0, 1, 1, 0, 0, 1, 1)], mode="reflect"), [ON_1]),
    "resize": (graph_of("Resize", [IMAGE], ints=[None], floats=[(1, 1, 2, 2)]), [ON_1]),
    "resize, cubic": (graph_of("Resize", [IMAGE], ints=[None], floats=[(1, 1, 2, 2)], mode="cubic"), [ON_1]),
    "upsample": (graph_of("Upsample", [IMAGE], floats=[(1, 1, 2, 2)], opset=9), [ON_1]),
}


def spread(numbers, lying, shape):
    """Values of this shape, all of a channel one number."""
    along = np.repeat(numbers, lying.repeats.number)
    return np.broadcast_to(along.reshape([-1 if axis == lying.axis else 1 for axis in range(len(shape))]), shape)


def found_for(model, known):
    first = model.graph.nodes[0]
    return routes(Facts(model), first, [*known, *[None] * 4][: len(first.inputs)])


@pytest.mark.parametrize("case", CASES)
def test_values_that_are_one_number_a_channel_arrive_where_the_route_says(case):
    model, known = CASES[case]
    random = np.random.default_rng(0)
    numbers = [random.uniform(1, 2, lying.count).astype(np.float32) for lying in known]
    inputs = {
        spec.name: spread(values, lying, spec.shape).copy()
        for spec, values, lying in zip(model.graph.inputs, numbers, known, strict=True)
    }
    found = found_for(model, known)
    assert isinstance(found, list), found
    outputs = apply(model.graph, model.params, inputs)
    for spec, route in zip(model.graph.outputs, found, strict=True):
        assert route is not None
        value = np.asarray(outputs[spec.name])
        expected = spread(route.gather(numbers, np), Lying(route.axis, len(route.index), route.repeats), value.shape)
        is_filled = (value == 0) & np.bool_(route.fills)
        rounding = 0 if route.stays_within else 3e-7  # of the weights of a cubic interpolation, which add up to 1
        np.testing.assert_allclose(np.where(is_filled, expected, value), expected, rtol=rounding)
        assert route.fills == bool(is_filled.any())


def test_every_operator_with_a_route_has_a_case():
    assert {model.graph.nodes[0].op_type for model, _ in CASES.values()} == ROUTED


APART = {
    "reshape of channels into two axes": (graph_of("Reshape", [(2, 12)], ints=[(2, 3, 4)]), [Lying(1, 12)]),
    "reshape that mixes": (graph_of("Reshape", [IMAGE], ints=[(2, 4, 3, 5)]), [ON_1]),
    "concat along another axis": (graph_of("Concat", [IMAGE, IMAGE], axis=2), [ON_1, ON_1]),
    "concat with unknown channels": (graph_of("Concat", [IMAGE, OTHER], axis=1), [ON_1, None]),
    "pad with ones": (graph_of("Pad", [IMAGE], ints=[(0, 1, 0, 0, 0, 0, 0, 0)], floats=[1.0]), [ON_1]),
    "pad that cuts": (graph_of("Pad", [IMAGE], ints=[(0, -1, 0, 0, 0, 0, 0, 0)]), [ON_1]),
    "resize of channels": (graph_of("Resize", [IMAGE], ints=[None], floats=[(1, 2, 1, 1)]), [ON_1]),
    "slice by computed ends": (graph_of("Slice", [IMAGE, (1,), (1,)]), [ON_1, None, None]),
}


@pytest.mark.parametrize("case", APART)
def test_where_channels_are_not_known_to_stay_apart_the_reason_is_said(case):
    model, known = APART[case]
    found = found_for(model, known)
    assert isinstance(found, str)
    assert found


def test_what_computes_has_no_route():
    assert found_for(graph_of("Softmax", [IMAGE]), [ON_1]) is None


def test_a_concat_keeps_what_is_provable_of_its_parts():
    """Two activations through a Concat: their bounds hold behind it, so that absorption and headroom know them."""
    nodes = (
        node("Conv", ("x", "w"), "a"), node("Relu", ("a",), "r"),
        node("Conv", ("x", "w"), "b"), node("Clip", ("b", "", "six"), "c"),
        node("Concat", ("r", "c"), "y", axis=1),
    )  # fmt: skip
    graph = Graph(
        name="two", inputs=(TensorSpec(name="x", dtype=F32, shape=IMAGE),),
        outputs=(TensorSpec(name="y", dtype=F32, shape=None),), nodes=nodes, constants=(),
        parameters=("six", "w"), opsets=(("", 17),),
    )  # fmt: skip
    model = Model(graph=graph, params={"w": np.ones((2, 3, 1, 1), np.float32), "six": np.float32(6)})
    low, high = channel_bounds(model, linear_layers(model))["y"]
    np.testing.assert_array_equal(low[:2], [0, 0])
    np.testing.assert_array_equal(high[2:], [6, 6])


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_what_bounds_and_moments_say_of_a_resize_holds(mode):
    """Between 0 and 6 in front of it; behind it too, unless cubic interpolation overshoots."""
    nodes = (
        node("Conv", ("x", "w"), "a"), node("Clip", ("a", "zero", "six"), "c"),
        node("Resize", ("c", "", "scales"), "y", mode=mode),
    )  # fmt: skip
    graph = Graph(
        name="resized", inputs=(TensorSpec(name="x", dtype=F32, shape=(1, 1, 8, 8)),),
        outputs=(TensorSpec(name="y", dtype=F32, shape=None),), nodes=nodes, constants=(),
        parameters=("scales", "six", "w", "zero"), opsets=(("", 17),),
    )  # fmt: skip
    numbers = {"six": np.float32(6), "zero": np.float32(0), "scales": np.array((1, 1, 2, 2), np.float32)}
    model = Model(graph=graph, params=numbers | {"w": np.ones((1, 1, 1, 1), np.float32)})
    model = model.replace(statistics={"a": Statistics(mean=np.array([3.0]), std=np.array([9.0]))})
    steps = np.random.default_rng(0).choice([0, 6], (1, 1, 8, 8)).astype(np.float32)
    (value,) = map(np.asarray, apply(graph, model.params, {"x": steps}).values())
    assert (value.min() < -0.1 and value.max() > 6.1) == (mode == "cubic")
    bounds, known = channel_bounds(model, linear_layers(model)), distributions(model)
    unknown = (np.array([-np.inf]), np.array([np.inf]))
    for low, high in (bounds.get("y", unknown), (known["y"].low, known["y"].high)):
        assert low <= value.min() + 1e-6
        assert value.max() - 1e-6 <= high
    assert ("y" in bounds) == (mode != "cubic")
    before, behind = known["c"].moments, known["y"].moments
    np.testing.assert_allclose((behind.mean, behind.std), (before.mean, before.std), rtol=1e-6)


def test_a_split_of_which_one_part_alone_is_used_sends_a_gain_back():
    """Cut at computed places, or where its first result has no reader: no route is known, and nothing fails."""
    params = {"x0": normal(np.zeros(3), np.ones(3)), "y1": normal(np.zeros(3), np.ones(3))}
    model = graph_of("Split", [IMAGE, (2,)], 2, axis=1)
    model = model.replace(graph=replace(model.graph, outputs=model.graph.outputs[1:]))
    assert channel_gains(model, params)["x0"].shape == (3,)


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ([(1,), (3,), (-2,)], [1, 2]),
        ([(3,), (-9,), (2,), (-1,)], [3, 2, 1, 0]),
        ([(0,), (-9,), (2,), (1,)], []),
        ([(1, 0), (3, 2), (-2, 1)], [1, 2]),
    ],
)
def test_places_that_a_slice_keeps_are_those_that_it_gives(cut, kept):
    model = graph_of("Slice", [IMAGE], ints=cut)
    places = np.broadcast_to(np.arange(4, dtype=np.float32).reshape(1, 1, 4, 1), IMAGE)
    (value,) = apply(model.graph, model.params, {"x0": places.copy()}).values()
    assert np.asarray(value)[0, 0, :, 0].tolist() == kept
    assert kept_places(Facts(model), model.graph.nodes[0], 2, 4).tolist() == kept


@pytest.mark.parametrize("opset", [6, 9, 12])
def test_a_clip_bounds_what_it_gives_in_every_operator_set(opset):
    bounds = {"low": np.float32(0), "high": np.float32(2)} if opset > 10 else {}
    clip = node("Clip", ("a", *bounds), "y", **({} if bounds else {"min": 0.0, "max": 2.0}))
    graph = Graph(
        name="clipped", inputs=(TensorSpec(name="x", dtype=F32, shape=IMAGE),),
        outputs=(TensorSpec(name="y", dtype=F32, shape=None),), nodes=(node("Conv", ("x", "w"), "a"), clip),
        constants=(), parameters=tuple(sorted(["w", *bounds])), opsets=(("", opset),),
    )  # fmt: skip
    model = Model(graph=graph, params=bounds | {"w": np.ones((2, 3, 1, 1), np.float32)})
    low, high = channel_bounds(model, linear_layers(model))["y"]
    np.testing.assert_array_equal([low, high], [[0, 0], [2, 2]])
