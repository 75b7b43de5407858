"""Images read between their elements: against ONNX Runtime and by laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.ops import find_lowering
from ptqjax.ops.convolution import conv
from ptqjax.ops.layout import to_channels_last, to_onnx
from ptqjax.ops.sampling import affine_grid, deform_conv, grid_sample
from tests.single_node import assert_as_in_onnxruntime

_SUMS = 5e-5  # positions and sums in float32, in another order


def _values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("align_corners", [0, 1])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize(
    ("opset", "mode"), [(16, "nearest"), (16, "bilinear"), (16, "bicubic"), (20, "linear"), (20, "cubic")]
)
def test_grid_sample_is_onnxruntimes(opset, mode, padding_mode, align_corners):
    """Far outside too: the grid reaches to 3.6, many reflections away."""
    inputs = [_values(2, 3, 5, 7), 1.2 * _values(2, 4, 6, 2, seed=1)]
    settings = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    assert_as_in_onnxruntime("GridSample", inputs, atol=_SUMS, opset=opset, jit=opset == 20, **settings)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_grid_sample_of_volumes_is_onnxruntimes(mode, padding_mode):
    inputs = [_values(2, 2, 3, 4, 5), _values(2, 3, 2, 4, 3, seed=1)]
    assert_as_in_onnxruntime("GridSample", inputs, atol=_SUMS, opset=20, mode=mode, padding_mode=padding_mode)


@pytest.mark.parametrize("align_corners", [0, 1])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("sizes", [(4, 5), (3, 4, 2)])
def test_the_grid_of_an_image_onto_itself_changes_nothing(sizes, mode, align_corners):
    rank = len(sizes)
    x, identity = _values(1, 2, *sizes), np.eye(rank, rank + 1, dtype=np.float32)[None]
    grid = affine_grid(identity, np.array([1, 2, *sizes]), align_corners=align_corners)
    np.testing.assert_allclose(grid_sample(x, grid, mode=mode, align_corners=align_corners), x, atol=1e-5)


def test_affine_grid_is_onnxruntimes():
    for size in ([2, 3, 4, 5], [2, 3, 4, 2, 5]):
        inputs = [_values(2, len(size) - 2, len(size) - 1), np.array(size)]
        for align_corners in (0, 1):
            assert_as_in_onnxruntime("AffineGrid", inputs, atol=_SUMS, opset=20, align_corners=align_corners)


def test_grid_sample_with_channels_last_is_the_same():
    lowering = find_lowering("GridSample", opset=20)
    x, grid = jnp.asarray(_values(2, 3, 5, 7)), jnp.asarray(_values(2, 4, 6, 2, seed=1))
    found = to_onnx(lowering.channels_last.function(to_channels_last(x), grid, mode="cubic"))
    np.testing.assert_array_equal(found, lowering.function(x, grid, mode="cubic"))


def test_grid_sample_is_differentiable_in_both():
    x, grid = jnp.asarray(_values(1, 2, 5, 7)), jnp.asarray(0.5 * _values(1, 3, 4, 2, seed=1))
    direction, step = jnp.asarray(_values(1, 3, 4, 2, seed=2)), 1e-2
    function = jax.jit(lambda image, points: grid_sample(image, points, mode="cubic"))
    _, derivative = jax.jvp(lambda points: function(x, points), (grid,), (direction,))
    difference = (function(x, grid + step * direction) - function(x, grid - step * direction)) / (2 * step)
    np.testing.assert_allclose(derivative, difference, atol=0.1 * np.abs(difference).max())
    _, linear = jax.jvp(lambda image: function(image, grid), (x,), (x,))
    np.testing.assert_allclose(linear, function(x, grid), atol=1e-6)


@pytest.mark.parametrize("setting", [{"mode": "bilinear"}, {"padding_mode": "wrap"}])
def test_grid_sample_refuses_unknown_modes(setting):
    with pytest.raises(UnsupportedOperatorError, match=next(iter(setting.values()))):
        grid_sample(_values(1, 1, 2, 2), _values(1, 2, 2, 2), **setting)


_WINDOW = {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}


@pytest.mark.parametrize(("group", "offset_group"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_deformed_convolution_is_onnxruntimes(group, offset_group):
    x, w = _values(2, 4, 7, 8), _values(6, 4 // group, 3, 2, seed=1)
    offset = _values(2, offset_group * 12, 4, 7, seed=2)
    mask = np.abs(_values(2, offset_group * 6, 4, 7, seed=3))
    inputs = [x, w, offset, _values(6, seed=4), mask]
    settings = {"group": group, "offset_group": offset_group, **_WINDOW}
    assert_as_in_onnxruntime("DeformConv", inputs, atol=_SUMS, opset=19, jit=True, **settings)


@pytest.mark.parametrize("group", [1, 2])
def test_a_convolution_deformed_by_nothing_is_a_convolution(group):
    x, w = jnp.asarray(_values(2, 4, 7, 8)), jnp.asarray(_values(6, 4 // group, 3, 2, seed=1))
    expected = conv(x, w, group=group, **_WINDOW)
    offset = jnp.zeros((2, 12, *expected.shape[2:]))
    np.testing.assert_allclose(deform_conv(x, w, offset, group=group, **_WINDOW), expected, atol=1e-5)


def test_a_grid_of_no_samples_reads_nothing():
    lowering = find_lowering("GridSample", opset=20).function
    assert lowering(jnp.ones((0, 1, 3, 3)), jnp.ones((0, 2, 2, 2))).shape == (0, 1, 2, 2)
