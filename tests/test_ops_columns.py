"""Col2Im against ONNX Runtime, and as the transpose of cutting an image into blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.ops.columns import col2im
from tests.single_node import assert_as_in_onnxruntime


def _values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("sizes", "block", "window", "num_blocks"),
    [
        ((7, 8), (3, 2), {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}, 28),
        ((4, 3, 5), (2, 1, 3), {"strides": [1, 2, 2]}, 12),
        ((9,), (4,), {"strides": [3]}, 2),
    ],
)
def test_blocks_are_put_back_as_in_onnxruntime(sizes, block, window, num_blocks):
    x = _values(2, 3 * int(np.prod(block)), num_blocks)
    assert_as_in_onnxruntime("Col2Im", [x, np.array(sizes), np.array(block)], atol=1e-5, opset=18, **window)


def test_it_is_the_transpose_of_cutting_blocks():
    """So its derivative cuts an image into blocks, as XLA does it."""
    image, columns = jnp.asarray(_values(2, 3, 7, 8)), jnp.asarray(_values(2, 18, 28, seed=1))
    window = {"pads": (1, 0, 2, 1), "strides": (2, 1), "dilations": (1, 2)}
    _, transposed = jax.vjp(lambda x: col2im(x, np.array([7, 8]), np.array([3, 2]), **window), columns)
    blocks = jax.lax.conv_general_dilated_patches(image, (3, 2), (2, 1), ((1, 2), (0, 1)), rhs_dilation=(1, 2))
    np.testing.assert_allclose(jax.jit(transposed)(image)[0], blocks.reshape(2, 18, 28), atol=1e-6)
