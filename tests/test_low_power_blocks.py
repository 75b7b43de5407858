"""Laws of low-power blocks: products that come back to the bit, and golden values of AIMET's tests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqjax.encodings.encoding import make_encoding
from ptqjax.encodings.low_power import (
    LowPowerScales,
    channel_axis,
    compose,
    decompose,
    low_power_encoding,
    low_power_scales,
)
from ptqjax.errors import ConfigError

GOLDEN = np.array([[1.6, 1.1222, 1e-5], [16, 2.56, 4.9]], np.float32)


def encoding_of(scale, *, axis, scale_bits):
    return make_encoding(scale, np.float32(0), dtype="int4", axis=axis, block_size=2, scale_bits=scale_bits)


def test_golden_scales_of_aimet():
    found = low_power_scales(GOLDEN, scale_bits=4, axis=1)
    np.testing.assert_array_equal(found.per_block.ravel(), [16, 11, 1, 16, 3, 5])
    np.testing.assert_allclose(compose(found), [[1.6, 1.1, 0.1], [16, 3, 5]], rtol=1e-6)
    np.testing.assert_allclose(found.per_channel, [[0.1], [1]], rtol=1e-6)


def test_the_channel_is_the_other_axis_of_the_pair():
    assert [channel_axis(1, rank) for rank in (2, 3, 4, 5)] == [0, 0, 0, 0]  # Conv; Gemm with transB
    assert [channel_axis(0, rank) for rank in (2, 3, 4, 5)] == [1, 1, 1, 1]  # ConvTranspose; Gemm
    assert [channel_axis(-2, rank) for rank in (2, 3)] == [1, 2]  # MatMul
    assert [channel_axis(-1, rank) for rank in (2, 3)] == [0, 1]  # MatMul with the weight behind a Transpose


@given(
    data=st.data(),
    scale_bits=st.integers(1, 8),
    axis=st.sampled_from([0, 1, -1, -2]),
    magnitude=st.sampled_from([1e-37, 1e-3, 1.0, 1e35]),
)
@settings(max_examples=200, deadline=None)
def test_decomposing_and_composing_are_inverse(data, scale_bits, axis, magnitude):
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scale = np.float32(magnitude) * np.exp(random.normal(size=(3, 5), scale=2)).astype(np.float32)
    once = low_power_scales(scale, scale_bits=scale_bits, axis=axis)
    encoding = encoding_of(compose(once), axis=axis, scale_bits=scale_bits)
    found = decompose(encoding)
    np.testing.assert_array_equal(found.per_channel, once.per_channel)
    np.testing.assert_array_equal(found.per_block, once.per_block)
    again = low_power_encoding(found, dtype="int4", axis=axis, block_size=2, scale_bits=scale_bits)
    np.testing.assert_array_equal(again.scale, encoding.scale)
    assert again.scale_bits == scale_bits


def test_products_lie_half_a_channels_scale_from_what_was_wanted():
    scale = np.exp(np.random.default_rng(0).normal(size=(8, 6))).astype(np.float32)
    found = low_power_scales(scale, scale_bits=4, axis=1)
    free = found.per_block > 1  # below, 1 is the smallest integer
    distance = np.abs(compose(found) - scale) / found.per_channel
    assert np.all(distance[free] <= 0.5 + 1e-5)
    assert np.all(found.per_block.max(axis=1) == 16)


def test_a_scale_for_each_row_of_blocks_is_found():
    """A kernel's positions may each have a scale of their own, as ONNX's blocks do."""
    k = np.array([[[16, 3], [5, 16]], [[16, 16], [7, 1]]], np.float32).transpose(0, 2, 1)  # [O, blocks, positions]
    per_row = np.array([[[0.5, 0.3]], [[2.0, 1.7]]], np.float32)
    k[:, 0, :] = 16
    found = decompose(encoding_of(k * per_row, axis=1, scale_bits=4))
    np.testing.assert_array_equal(found.per_channel, per_row)
    np.testing.assert_array_equal(found.per_block, k)


def test_what_is_no_product_is_an_error():
    with pytest.raises(ConfigError, match="not integers from 1 to 16 times one scale per channel"):
        decompose(encoding_of(GOLDEN, axis=1, scale_bits=4))
    with pytest.raises(ConfigError, match="not of low-power blocks"):
        decompose(make_encoding(GOLDEN, np.float32(0), dtype="int4", axis=1, block_size=2))
    scales = LowPowerScales(np.ones((2, 1), np.float32), np.array([[0, 3], [1, 17]]))
    with pytest.raises(ConfigError, match=r"from 1 to 16.*found 0 to 17"):
        low_power_encoding(scales, dtype="int4", axis=1, block_size=2, scale_bits=4)
