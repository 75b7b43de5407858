"""Resize and Upsample: old versions and combinations of modes, against ONNX Runtime; layouts, jit, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.errors import DataDependentError, UnsupportedOperatorError
from ptqjax.ops import find_lowering
from ptqjax.ops.layout import to_channels_last, to_onnx
from ptqjax.ops.resize import resize
from tests.single_node import assert_as_in_onnxruntime

_POSITIONS = 2e-5  # ONNX Runtime computes positions in float32
_UP, _DOWN, _BOTH = (2.0, 3.0), (0.5, 0.6), (1.7, 0.45)


def _image(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def _scales(*last):
    return np.array([1, 1, *last], np.float32)


@pytest.mark.parametrize(("opset", "scales"), [(11, _BOTH), (13, _UP), (19, _DOWN)])
@pytest.mark.parametrize("transformation", ["half_pixel", "asymmetric", "pytorch_half_pixel"])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_interpolation_is_onnxruntimes(mode, transformation, scales, opset):
    inputs = [_image(2, 3, 7, 9), np.zeros(0, np.float32), _scales(*scales)]
    settings = {"mode": mode, "coordinate_transformation_mode": transformation}
    assert_as_in_onnxruntime("Resize", inputs, atol=_POSITIONS, opset=opset, **settings)


@pytest.mark.parametrize("sizes", [(14, 4), (5, 12), (1, 27)])
@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("transformation", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
def test_nearest_is_onnxruntimes(transformation, rounding, sizes):
    inputs = [_image(1, 2, 7, 9), None, None, np.array([1, 2, *sizes])]
    settings = {"mode": "nearest", "coordinate_transformation_mode": transformation, "nearest_mode": rounding}
    assert_as_in_onnxruntime("Resize", inputs, atol=0, opset=19, **settings)


@pytest.mark.parametrize("factor", [4 / 3, 5 / 3, 7 / 3, 1 / 3, 1.1, 0.7])
def test_a_scale_that_is_a_rounded_fraction_means_the_fraction(factor):
    inputs = [_image(1, 1, 12, 30), None, _scales(factor, factor)]
    settings = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    assert_as_in_onnxruntime("Resize", inputs, atol=0, opset=13, **settings)


@pytest.mark.parametrize("exclude_outside", [0, 1])
@pytest.mark.parametrize("scales", [_DOWN, (0.13, 0.21), _BOTH])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_antialias_is_onnxruntimes(mode, scales, exclude_outside):
    inputs = [_image(1, 2, 24, 31), None, _scales(*scales)]
    settings = {"mode": mode, "antialias": 1, "exclude_outside": exclude_outside, "cubic_coeff_a": -0.5}
    assert_as_in_onnxruntime("Resize", inputs, atol=_POSITIONS, opset=18, **settings)


def test_exclude_outside_renormalizes_cubic_weights():
    settings = {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.6}
    inputs = [_image(1, 2, 6, 5), None, _scales(*_BOTH)]
    assert_as_in_onnxruntime("Resize", inputs, atol=_POSITIONS, opset=13, **settings)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_crop_and_resize_extrapolates(mode):
    roi = np.array([0, 0, -0.2, 0.3, 1, 1, 0.7, 1.4], np.float32)
    settings = {"mode": mode, "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0}
    inputs = [_image(1, 2, 6, 5), roi, None, np.array([1, 2, 5, 7])]
    assert_as_in_onnxruntime("Resize", inputs, atol=_POSITIONS, opset=13, **settings)


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_aspect_ratio_is_kept(mode, policy):
    inputs = [_image(1, 2, 6, 5), None, None, np.array([9, 11])]
    settings = {"mode": mode, "keep_aspect_ratio_policy": policy, "axes": [2, 3]}
    assert_as_in_onnxruntime("Resize", inputs, atol=_POSITIONS, opset=19, **settings)


def test_axes_may_count_from_the_end():
    inputs = [_image(1, 2, 6, 5), None, None, np.array([9, 11])]
    assert_as_in_onnxruntime("Resize", inputs, atol=_POSITIONS, opset=19, mode="linear", axes=[-1, -2])


@pytest.mark.parametrize("scales", [_UP, _DOWN, _BOTH])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_version_10_is_onnxruntimes(mode, scales):
    inputs = [_image(1, 2, 6, 9), _scales(*scales)]
    assert_as_in_onnxruntime("Resize", inputs, atol=_POSITIONS, opset=10, mode=mode)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_upsample_is_onnxruntimes(mode):
    x, scales = _image(1, 2, 6, 5), _scales(2.0, 2.5)
    assert_as_in_onnxruntime("Upsample", [x, scales], atol=_POSITIONS, opset=9, mode=mode)
    assert_as_in_onnxruntime("Upsample", [x], atol=_POSITIONS, opset=7, mode=mode, scales=scales.tolist())


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.float16, np.bool_])
def test_nearest_moves_elements_of_any_type(dtype):
    x = (8 * _image(1, 2, 3, 4)).astype(dtype)
    y = np.asarray(resize(x, None, _scales(2, 2), None, mode="nearest"))
    np.testing.assert_array_equal(y, x.repeat(2, axis=2).repeat(2, axis=3))
    assert y.dtype == dtype


def test_interpolated_integers_are_rounded_and_saturated():
    x = np.array([[[0, 1, 255, 255]]], np.uint8)
    settings = {"mode": "cubic", "coordinate_transformation_mode": "asymmetric"}
    y = np.asarray(resize(x, None, np.array([1, 1, 2], np.float32), None, **settings))
    exact = resize(x.astype(np.float32), None, np.array([1, 1, 2], np.float32), None, **settings)
    np.testing.assert_array_equal(y, np.clip(np.round(exact), 0, 255))
    assert y.dtype == np.uint8
    assert np.max(exact) > 255


@pytest.mark.parametrize("axes", [None, (2, 1), (-1, 0)])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_channels_last_is_the_same(mode, axes):
    lowering = find_lowering("Resize", opset=19)
    x = jnp.asarray(_image(2, 3, 5, 6))
    scales = np.array([1, 2, 0.5, 3] if axes is None else [2, 0.5], np.float32)
    settings = {"mode": mode, "antialias": int(mode != "nearest"), "axes": axes}
    expected = lowering.function(x, None, scales, None, **settings)
    found = to_onnx(lowering.channels_last.function(to_channels_last(x), None, scales, None, **settings))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # the order of axes is another


@pytest.mark.parametrize(("op_type", "opset"), [("Resize", 10), ("Upsample", 9)])
def test_channels_last_is_the_same_in_old_versions(op_type, opset):
    lowering = find_lowering(op_type, opset=opset)
    x, scales = jnp.asarray(_image(2, 3, 5, 6)), np.array([1, 2, 1.5, 3], np.float32)
    found = to_onnx(lowering.channels_last.function(to_channels_last(x), scales, mode="linear"))
    np.testing.assert_allclose(found, lowering.function(x, scales, mode="linear"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize_is_linear_in_the_image(mode):
    """So its derivative in any direction is its value there."""
    x, direction = jnp.asarray(_image(1, 2, 5, 6)), jnp.asarray(_image(1, 2, 5, 6, seed=1))
    function = jax.jit(lambda image: resize(image, None, _scales(*_BOTH), None, mode=mode, antialias=mode != "nearest"))
    _, derivative = jax.jvp(function, (x,), (direction,))
    np.testing.assert_allclose(derivative, function(direction), rtol=0, atol=1e-6)


def test_scales_that_depend_on_data_are_refused_under_jit():
    with pytest.raises(DataDependentError, match="the scales of Resize"):
        jax.jit(lambda x, scales: resize(x, None, scales, None))(_image(1, 1, 2, 2), _scales(2, 2))


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "area"},
        {"nearest_mode": "simple"},
        {"coordinate_transformation_mode": "half"},
        {"keep_aspect_ratio_policy": "larger"},
    ],
)
def test_unknown_modes_are_refused(settings):
    with pytest.raises(UnsupportedOperatorError, match=next(iter(settings.values()))):
        resize(_image(1, 1, 2, 2), None, _scales(2, 2), None, **settings)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_an_axis_may_vanish(mode):
    inputs = [_image(1, 2, 2, 5), None, np.array([1, 1, 0.3, 2], np.float32)]
    assert_as_in_onnxruntime("Resize", inputs, atol=0, opset=13, mode=mode)


def test_what_is_made_of_elements_outside_alone_is_zero():
    x, roi = np.ones((4,), np.float32), np.array([2, 3], np.float32)
    settings = {"mode": "cubic", "exclude_outside": 1, "coordinate_transformation_mode": "tf_crop_and_resize"}
    found = resize(x, roi, None, np.array([3]), extrapolation_value=7.0, **settings)
    np.testing.assert_array_equal(found, [7, 7, 7])


def test_neither_scales_nor_sizes_is_refused():
    with pytest.raises(UnsupportedOperatorError, match="exactly one of the inputs"):
        resize(_image(1, 1, 2, 2), None, np.zeros(0, np.float32), None)
