"""Regions and boxes against ONNX Runtime."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.errors import DataDependentError, UnsupportedOperatorError
from ptqjax.ops.detection import max_roi_pool, non_max_suppression, roi_align
from tests.single_node import assert_as_in_onnxruntime

_SUMS = 1e-5


def _values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _regions(num, size, seed=0):
    """Inside, across the edge, outside, and the wrong way round."""
    corners = np.random.default_rng(seed).uniform(-0.4 * size, 1.4 * size, (num, 4))
    ordered = np.concatenate(
        [np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], 1
    )
    ordered[0] = corners[0]
    return ordered.astype(np.float32)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(
    ("opset", "more"),
    [(10, {}), (16, {}), (16, {"coordinate_transformation_mode": "output_half_pixel"})],
)
def test_aligned_regions_are_onnxruntimes(opset, more, mode, sampling_ratio):
    inputs = [_values(2, 3, 9, 11), _regions(12, 20), np.arange(12) % 2]
    settings = {"mode": mode, "sampling_ratio": sampling_ratio, "output_height": 3, "output_width": 2}
    settings |= {"spatial_scale": 0.5, **more}
    assert_as_in_onnxruntime("RoiAlign", inputs, atol=_SUMS, opset=opset, jit=sampling_ratio > 0, **settings)


def test_regions_must_be_known_where_they_decide_how_many_samples():
    x, rois, images = _values(1, 1, 5, 5), _regions(2, 5), np.zeros(2, np.int32)
    with pytest.raises(DataDependentError, match="sampling_ratio 0"):
        jax.jit(lambda found: roi_align(x, found, images))(rois)
    inside = jax.jit(lambda image: roi_align(image, rois, images))(x)
    np.testing.assert_allclose(inside, roi_align(x, rois, images), atol=1e-6)


def test_the_mean_over_a_region_of_a_constant_is_the_constant():
    y = roi_align(np.full((1, 2, 8, 8), 3, np.float32), np.array([[1, 1, 6, 7]], np.float32), np.zeros(1, np.int32))
    np.testing.assert_allclose(y, np.full((1, 2, 1, 1), 3), rtol=1e-6)


def test_roi_align_refuses_unknown_modes():
    with pytest.raises(UnsupportedOperatorError, match="'sum'"):
        roi_align(_values(1, 1, 5, 5), _regions(2, 5), np.zeros(2, np.int32), mode="sum")


def test_largest_of_regions_is_onnxruntimes():
    rois = np.concatenate([np.array([[0], [1], [0], [1], [1]]), np.abs(_regions(5, 12).round(1))], axis=1)
    rois[:, 1:] = np.concatenate([np.minimum(rois[:, 1:3], rois[:, 3:]), np.maximum(rois[:, 1:3], rois[:, 3:])], 1)
    inputs = [_values(2, 3, 9, 11), rois.astype(np.float32)]
    settings = {"pooled_shape": [3, 2], "spatial_scale": 0.7}
    assert_as_in_onnxruntime("MaxRoiPool", inputs, atol=0, opset=7, jit=True, **settings)


def test_a_region_outside_has_zeros():
    y = max_roi_pool(_values(1, 2, 4, 4), np.array([[0, 10, 10, 12, 12]], np.float32), pooled_shape=(2, 2))
    np.testing.assert_array_equal(y, np.zeros((1, 2, 2, 2)))


@pytest.mark.parametrize("center_point_box", [0, 1])
@pytest.mark.parametrize(("most", "overlap", "least"), [(3, 0.3, 0.2), (20, 0.5, -1.0), (0, 0.5, 0.0)])
@pytest.mark.parametrize("opset", [10, 11])
def test_kept_boxes_are_onnxruntimes(opset, most, overlap, least, center_point_box):
    boxes = np.abs(_values(2, 20, 4))
    scores = _values(2, 3, 20, seed=1).round(1)  # equal scores: the first box is better
    inputs = [boxes, scores, np.array([most]), np.array([overlap], np.float32), np.array([least], np.float32)]
    settings = {"center_point_box": center_point_box, "outputs": (np.int64,)}
    assert_as_in_onnxruntime("NonMaxSuppression", inputs, atol=0, opset=opset, **settings)


def test_without_limits_no_box_is_kept():
    assert_as_in_onnxruntime(
        "NonMaxSuppression", [np.abs(_values(1, 5, 4)), _values(1, 2, 5)], atol=0, opset=11, outputs=(np.int64,)
    )


def test_kept_boxes_cannot_be_counted_under_jit():
    with pytest.raises(DataDependentError, match="NonMaxSuppression"):
        jax.jit(non_max_suppression)(jnp.ones((1, 2, 4)), jnp.ones((1, 1, 2)))
