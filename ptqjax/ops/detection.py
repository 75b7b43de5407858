"""Operators of object detectors: pools over regions, and which of many overlapping boxes to keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.kernels.namespace import array_namespace
from ptqjax.kernels.regions import Spans, align_regions, max_of_regions
from ptqjax.ops.interpolation import check_choice, in_real_arithmetic
from ptqjax.ops.layout import to_channels_last, to_onnx
from ptqjax.ops.registry import known, lowers


@lowers("RoiAlign", since=16)
def roi_align(
    x: Any,
    rois: Any,
    batch_indices: Any,
    /,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Any:
    """Returns the means of interpolated samples in the bins of regions, [regions, c, output_height, output_width].

    `rois` [regions, 4] are x1, y1, x2, y2. With a `sampling_ratio` of 0 each region takes as many samples as it has
    elements, which must be known while tracing. "max" is the largest weighted neighbour, as in ONNX and its runtimes.

    Raises:
        DataDependentError: `sampling_ratio` is 0 and the regions depend on data under a transformation.
        UnsupportedOperatorError: A mode is unknown.
    """
    check_choice(mode, ("avg", "max"), "mode")
    transformations = ("half_pixel", "output_half_pixel")
    check_choice(coordinate_transformation_mode, transformations, "coordinate_transformation_mode")
    half_pixel = coordinate_transformation_mode == "half_pixel"
    bins = (output_height, output_width)
    if sampling_ratio == 0:
        rois = known(rois, "the rois of RoiAlign with sampling_ratio 0")
    corners = rois.astype(np.float64 if rois.dtype == np.float64 else np.float32) * spatial_scale - (
        0.5 if half_pixel else 0.0
    )
    starts, lengths = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not half_pixel:
        lengths = array_namespace(lengths).maximum(lengths, 1)
    spans, most = [], []
    for axis, num in ((1, bins[0]), (0, bins[1])):
        if sampling_ratio > 0:
            counts = np.full(len(rois), sampling_ratio, np.int32)
        else:
            counts = np.ceil(lengths[:, axis] / num).astype(np.int32)
        spans.append(Spans(*map(jnp.asarray, (starts[:, axis], lengths[:, axis], counts))))
        most.append(max(1, int(counts.max(initial=1))))
    y = align_regions(
        in_real_arithmetic(to_channels_last(jnp.asarray(x))),
        jnp.asarray(batch_indices),
        *spans,
        bins=bins,
        most_samples=(most[0], most[1]),
        largest=mode == "max",
    )
    return to_onnx(y).astype(x.dtype)


# Before opset 16 the coordinates' meaning was fixed.
lowers("RoiAlign", since=10)(partial(roi_align, coordinate_transformation_mode="output_half_pixel"))


@lowers("MaxRoiPool", since=1)
def max_roi_pool(x: Any, rois: Any, /, *, pooled_shape: Sequence[int], spatial_scale: float = 1.0) -> Any:
    """Returns the largest elements in the bins of regions, [regions, c, *pooled_shape].

    `rois` [regions, 5] are the image's number and x1, y1, x2, y2, rounded to elements (halves away from zero).
    """
    scaled = in_real_arithmetic(rois[:, 1:]) * spatial_scale
    corners = (jnp.sign(scaled) * jnp.floor(jnp.abs(scaled) + 0.5)).astype(jnp.int32)
    images = jnp.asarray(rois[:, 0]).astype(jnp.int32)
    return max_of_regions(jnp.asarray(x), images, corners, (pooled_shape[0], pooled_shape[1]))


@lowers("NonMaxSuppression", since=10)
def non_max_suppression(
    boxes: Any,
    scores: Any,
    max_output_boxes_per_class: Any = None,
    iou_threshold: Any = None,
    score_threshold: Any = None,
    /,
    *,
    center_point_box: int = 0,
) -> np.ndarray:
    """Returns which boxes are kept, rows of (image, class, box): per image and class the best first.

    A box is dropped whose overlap with a better kept one, intersection over union, is above the threshold. `boxes`
    [n, boxes, 4] are two opposite corners y, x, y, x, or with `center_point_box` x, y, width, height.

    Raises:
        DataDependentError: An input depends on data under a transformation: the number of rows does.
    """
    boxes, scores = (known(value, "an input of NonMaxSuppression") for value in (boxes, scores))
    most = _limit(max_output_boxes_per_class, 0.0)
    overlap, least = _limit(iou_threshold, 0.0), _limit(score_threshold, -np.inf)
    extents = _extents(boxes, center_point_box=bool(center_point_box))
    rows = [
        (image, kind, box)
        for image, per_class in enumerate(scores)
        for kind, of_class in enumerate(per_class)
        for box in _kept(extents[image], of_class, most=int(most), overlap=overlap, least=least)
    ]
    return np.array(rows, np.int64).reshape(-1, 3)


def _limit(value: Any, default: float) -> float:
    if value is None or value.size == 0:
        return default
    return float(known(value, "a limit of NonMaxSuppression").item())


def _extents(boxes: np.ndarray, *, center_point_box: bool) -> np.ndarray:
    """Returns the smallest and the largest coordinates of each box, [n, boxes, 2, 2]."""
    if center_point_box:
        centres, halves = boxes[..., :2], boxes[..., 2:] / 2
        return np.stack([centres - halves, centres + halves], axis=-2)
    corners = boxes.reshape(*boxes.shape[:-1], 2, 2)
    return np.stack([corners.min(-2), corners.max(-2)], axis=-2)


def _kept(extents: np.ndarray, scores: np.ndarray, *, most: int, overlap: float, least: float) -> Iterator[int]:
    remaining = np.argsort(-scores, kind="stable")
    remaining = remaining[scores[remaining] > least]
    for _ in range(max(most, 0)):
        if not remaining.size:
            return
        best, remaining = remaining[0], remaining[1:]
        yield int(best)
        remaining = remaining[~_overlaps(extents[best], extents[remaining], above=overlap)]


def _overlaps(box: np.ndarray, others: np.ndarray, *, above: float) -> np.ndarray:
    """Returns which boxes share more than `above` of the union with `box`; a box without area with none."""
    sides = np.minimum(box[1], others[:, 1]) - np.maximum(box[0], others[:, 0])
    shared = np.where((sides > 0).all(-1), sides.prod(-1), 0)
    area, areas = (box[1] - box[0]).prod(-1), (others[:, 1] - others[:, 0]).prod(-1)
    union = area + areas - shared
    real = (shared > 0) & (area > 0) & (areas > 0) & (union > 0)
    return real & (shared / np.where(real, union, 1) > np.asarray(above, box.dtype))
