"""Laws of the depthwise primitive: it is the sum of shifted products, differentiated and batched as that is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.kernels.convolution import convolve
from ptqjax.kernels.depthwise import convolve_depthwise

WINDOWS = [  # strides, padding, dilations, spatial sizes, kernel
    ((1, 1), ((1, 1), (1, 1)), (1, 1), (7, 6), (3, 3)),
    ((2, 2), ((0, 1), (0, 1)), (1, 1), (8, 8), (3, 3)),
    ((2, 1), ((2, 0), (-1, 1)), (2, 1), (9, 7), (3, 2)),
    ((2, 3), ((1, 1), (1, 1)), (1, 1), (7, 9), (3, 3)),  # the last places of the image are seen by no window
    ((3,), ((0, 0),), (1,), (11,), (3,)),
]


def arrays(spatial, kernel, seed=0):
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.normal(size=(2, *spatial, 4)), jnp.float32)
    return x, jnp.asarray(random.normal(size=(4, 1, *kernel)), jnp.float32)


def programs(strides, padding, dilations):
    """The primitive, and XLA's own convolution in ONNX's layout as the oracle; a nonlinearity behind both."""
    window = {"strides": strides, "padding": padding, "dilations": dilations}

    def ours(x, w):
        return jnp.sum(jnp.sin(convolve_depthwise(x, w, **window)))

    def oracle(x, w):
        return jnp.sum(jnp.sin(convolve(jnp.moveaxis(x, -1, 1), w, groups=4, **window)))

    return ours, oracle


def close(found, wanted):
    # float32 sums of at most 9 products, and of some hundred places in the gradient by the kernel
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), found, wanted)


@pytest.mark.parametrize(("strides", "padding", "dilations", "spatial", "kernel"), WINDOWS)
def test_values_gradients_and_their_derivatives_are_those_of_a_convolution(
    strides, padding, dilations, spatial, kernel
):
    point, direction = arrays(spatial, kernel), arrays(spatial, kernel, seed=1)
    for program in (lambda f: f, jax.value_and_grad, lambda f: jax.grad(f, (0, 1))):
        ours, oracle = map(program, programs(strides, padding, dilations))
        close(*(jax.jit(lambda p, d, f=f: jax.jvp(f, p, d))(point, direction) for f in (ours, oracle)))


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0), (1, 0)])
def test_batches_of_images_and_of_kernels_are_single_ones_side_by_side(mapped):
    ours, _ = programs((2, 2), ((1, 1), (1, 1)), (1, 1))
    x, w = arrays((6, 5), (3, 3))
    xs, ws = jnp.stack([x, 2 * x], axis=mapped[0] or 0), jnp.stack([w, w + 1])
    found = jax.jit(jax.vmap(ours, mapped))(x if mapped[0] is None else xs, w if mapped[1] is None else ws)
    single = [(x if mapped[0] is None else f * x, w if mapped[1] is None else w + i) for i, f in enumerate((1, 2))]
    close(found, jnp.stack([ours(*pair) for pair in single]))
