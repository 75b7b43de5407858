"""ImageDecoder beyond ONNX's cases: what it refuses."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from ptqjax.errors import DataDependentError, DataError
from ptqjax.ops.images import image_decoder


def _encoded(kind):
    content = io.BytesIO()
    Image.new("RGB", (4, 3), (10, 20, 30)).save(content, kind)
    return np.frombuffer(content.getvalue(), np.uint8)


def test_channels_are_in_the_order_asked_for():
    encoded = _encoded("PNG")
    np.testing.assert_array_equal(image_decoder(encoded)[0, 0], [10, 20, 30])
    np.testing.assert_array_equal(image_decoder(encoded, pixel_format="BGR")[0, 0], [30, 20, 10])
    assert image_decoder(encoded, pixel_format="Grayscale").shape == (3, 4, 1)


@pytest.mark.parametrize("encoded", [_encoded("PNG")[:40], _encoded("GIF"), np.zeros(9, np.uint8)])
def test_what_is_no_picture_of_a_known_format_is_refused(encoded):
    with pytest.raises(DataError, match=f"{encoded.size} bytes"):
        image_decoder(encoded)


def test_a_pictures_size_is_not_known_under_jit():
    with pytest.raises(DataDependentError, match="ImageDecoder"):
        jax.jit(image_decoder)(_encoded("PNG"))
