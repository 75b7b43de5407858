"""Laws of the guard of biases: each bound holds afterwards, nothing is raised beyond need, and each raise is told."""

import numpy as np
import pytest

from ptqjax import QuantizationConfig, calibrate
from ptqjax.encodings.biases import LARGEST_CODE, bias_sites, guard_biases
from ptqjax.encodings.encoding import make_encoding
from tests.models import build, node

SMALLEST_MULTIPLIER = 2.0**-23.5


def encoding(scale, zero_point=0, *, dtype="int8", axis=None, **more):
    return make_encoding(np.asarray(scale, np.float32), np.float32(zero_point), dtype=dtype, axis=axis, **more)


def conv(bias, *, relu=False):
    """A convolution of 4 channels, with or without a bias and a Relu."""
    nodes = [node("Conv", ["x", "w", *(["b"] if bias is not None else [])], "c" if relu else "y")]
    nodes += [node("Relu", ["c"], "y")] if relu else []
    params = {"w": np.ones((4, 3, 1, 1), np.float32)} | (
        {"b": np.asarray(bias, np.float32)} if bias is not None else {}
    )
    return build(nodes, params, input_shape=("n", 3, 4, 4), outputs=["y"])


def bounds_of(model, encodings):
    """The largest |b| / s', the smallest s' / s_y and the largest |b - z_y s_y| / s', with s' = s_x s_w."""
    bias = model.params.get("b", np.zeros(1)).astype(np.float64)
    step = np.float64(encodings["x"].scale) * np.asarray(encodings["w"].scale, np.float64)
    y = encodings["y"]
    offset = (float(y.zero_point) - float(y.qmin)) * float(y.scale)
    return np.abs(bias / step).max(), (step / float(y.scale)).min(), np.abs((bias - offset) / step).max()


def fits(model, encodings, *, fixed_point):
    largest, multiplier, folded = bounds_of(model, encodings)
    first = largest <= LARGEST_CODE * (1 + 1e-6)
    if not fixed_point:
        return first
    return first and multiplier >= SMALLEST_MULTIPLIER * (1 - 1e-6) and folded <= LARGEST_CODE * (1 + 1e-6)


CASES = {
    "a bias": ([3.0, 1e3, 0, -5], {"x": encoding(1e-3), "w": encoding([1e-6, 1e-5, 1e-3, 1e-9], axis=0)}, 0.1, 3),
    "one scale": ([3.0, 1e3, 0, -5], {"x": encoding(1e-3), "w": encoding(1e-6)}, 0.1, 3),
    "a small multiplier": ([0, 0, 0, 0], {"x": encoding(1e-3), "w": encoding([1e-9, 1e-2, 1, 1e-3], axis=0)}, 2.0, 0),
    "a large zero point": ([-1, 0, 1, 0], {"x": encoding(1e-2), "w": encoding([1e-9, 1, 1, 1], axis=0)}, 0.02, 240),
    "no bias": (None, {"x": encoding(1e-3), "w": encoding([1e-9, 1e-2, 1, 1e-3], axis=0)}, 0.1, 100),
    "nothing": ([1, 2, 3, 4], {"x": encoding(1e-2), "w": encoding([1e-2] * 4, axis=0)}, 0.1, 3),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("fixed_point", [False, True])
def test_every_bound_holds_and_no_scale_is_raised_beyond_need(name, relu, fixed_point):
    bias, encodings, scale, zero_point = CASES[name]
    model, before = conv(bias, relu=relu), encodings | {"y": encoding(scale, zero_point, dtype="uint8")}
    after, report = guard_biases(model, before, fixed_point=fixed_point)
    assert fits(model, after, fixed_point=fixed_point)
    old, new = (np.asarray(each["w"].scale) for each in (before, after))
    assert np.all(new >= old)
    assert bool(report) == bool(np.any(new > old))
    for index in np.ndindex(new.shape):  # each raised scale is needed: a little less breaks a bound
        if new[index] > old[index]:
            less = new.copy()
            less[index] *= np.float32(1 - 1e-4)
            assert not fits(model, after | {"w": after["w"].replace(scale=less)}, fixed_point=fixed_point)
    assert all(record.done and record.where[0] == "w" for record in report)
    assert guard_biases(model, after, fixed_point=fixed_point) == (after, ())
    assert {name: each for name, each in after.items() if name != "w"} == {
        name: each for name, each in before.items() if name != "w"
    }


def test_each_bound_has_a_record_of_its_own():
    """Of which the first alone concerns ONNX Runtime."""
    reasons = set()
    for bias, encodings, scale, zero_point in CASES.values():
        grids = encodings | {"y": encoding(scale, zero_point, dtype="uint8")}
        model = conv(bias)
        plain = guard_biases(model, grids)[1]
        assert {record.reason for record in plain} <= {"|b| / (s_x s_w) would exceed 2^31 - 2^15"}
        reasons |= {record.reason for record in guard_biases(model, grids, fixed_point=True)[1]}
    assert reasons == {
        "|b| / (s_x s_w) would exceed 2^31 - 2^15",
        "s_x s_w / s_y would be below 2^-23.5",
        "|b - z_y s_y| / (s_x s_w) would exceed 2^31 - 2^15",
    }


@pytest.mark.parametrize(
    ("op_type", "shape", "attributes", "axis"),
    [
        ("Gemm", (3, 4), {}, 1),
        ("Gemm", (4, 3), {"transB": 1}, 0),
        ("MatMul", (3, 4), {}, -1),
        ("ConvTranspose", (3, 2, 1, 1), {"group": 1}, 1),
    ],
)
def test_every_layer_is_guarded_along_its_own_axis(op_type, shape, attributes, axis):
    inputs = ("n", 3, 2, 2) if op_type == "ConvTranspose" else ("n", 3)
    nodes, params = [node(op_type, ["x", "w"], "y", **attributes)], {"w": np.ones(shape, np.float32)}
    model = build(nodes, params, input_shape=inputs, outputs=["y"])
    count = shape[axis]
    before = {"x": encoding(1e-3), "w": encoding([1e-9] + [1.0] * (count - 1), axis=axis), "y": encoding(0.1)}
    after, report = guard_biases(model, before, fixed_point=True)
    assert {record.where for record in report} == {("w", "y")}
    assert fits(model, after, fixed_point=True)
    assert np.asarray(after["w"].scale)[1:].tolist() == [1.0] * (count - 1)
    assert guard_biases(model, before) == (before, ())


def test_blocks_floats_and_what_is_off_are_left_alone():
    model = conv([3.0, 1e3, 0, -5])
    assert len(bias_sites(model)) == 1
    x, w, y = encoding(1e-6), encoding([1e-9] * 4, axis=0), encoding(0.1)
    off = w.replace(enabled=np.asarray(False))
    blocks = encoding(np.full((4, 3, 1, 1), 1e-9), axis=1, block_size=1)
    eight = make_encoding(np.float32(1e-9), np.float32(0), dtype="float8_e4m3fn")
    for each in (off, blocks, eight):
        before = {"x": x, "w": each, "y": y}
        assert guard_biases(model, before, fixed_point=True) == (before, ())
    before = {"x": eight, "w": w, "y": y}
    assert guard_biases(model, before, fixed_point=True) == (before, ())


def test_a_bias_with_an_encoding_of_its_own_does_not_count():
    model = conv([3.0, 1e3, 0, -5])
    before = {"x": encoding(1e-6), "w": encoding([1e-6] * 4, axis=0), "y": encoding(0.1)}
    assert guard_biases(model, before)[1]
    before |= {"b": encoding(1e-3)}
    assert guard_biases(model, before) == (before, ())


def test_the_target_decides_whether_sums_are_in_fixed_point():
    """A channel whose weights are all but zero: where the multiplier is an integer, its scale is raised."""
    model = conv([0, 0, 0, 0])
    weight = np.ones((4, 3, 1, 1), np.float32)
    weight[0] *= 1e-9
    model = model.replace(params={**model.params, "w": weight})
    batch = {"x": np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)}

    def smallest(**settings):
        return calibrate(model, [batch], QuantizationConfig(ranges="min-max", **settings))["w"].scale.min()

    plain = smallest(target="ort-cpu")
    assert plain == pytest.approx(1e-9 / 127, rel=1e-3)
    assert smallest(target="qnn-htp") > 10 * plain
    assert smallest(target="ort-cpu", compatibility="aimet") > 10 * plain
