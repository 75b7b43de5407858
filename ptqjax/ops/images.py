"""ImageDecoder: pictures in files' formats, decoded by Pillow (the extra "images")."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from ptqjax.errors import DataError, UnsupportedOperatorError
from ptqjax.ops.interpolation import check_choice
from ptqjax.ops.registry import known, lowers

# ONNX's list; Pillow knows more, among them formats that start other programs.
_FORMATS = ("BMP", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


@lowers("ImageDecoder", since=20)
def image_decoder(encoded: Any, /, *, pixel_format: str = "RGB") -> np.ndarray:
    """Returns the picture in the bytes `encoded`: uint8 [height, width, 3], or [height, width, 1] for "Grayscale".

    Raises:
        DataDependentError: The bytes depend on data under a transformation.
        DataError: The bytes are no picture in a format of ONNX's list.
        UnsupportedOperatorError: Pillow is missing, or `pixel_format` is unknown.
    """
    check_choice(pixel_format, ("RGB", "BGR", "Grayscale"), "pixel_format")
    content = io.BytesIO(known(encoded, "the input of ImageDecoder").tobytes())
    try:
        from PIL import Image  # noqa: PLC0415 (an extra, needed here alone)
    except ImportError as error:
        raise UnsupportedOperatorError("decoding pictures needs Pillow: pip install 'ptqjax[images]'") from error
    try:
        with Image.open(content, formats=_FORMATS) as picture:
            pixels = np.asarray(picture.convert("L" if pixel_format == "Grayscale" else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"the input of ImageDecoder ({encoded.size} bytes) is no picture that can be decoded: {error}; "
            f"expected one of the formats {', '.join(_FORMATS)}"
        ) from error
    if pixel_format == "Grayscale":
        return pixels[..., None]
    return pixels[..., ::-1] if pixel_format == "BGR" else pixels
