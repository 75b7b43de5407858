"""ONNX's numbers for element types (`TensorProto.DataType`)."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ptqjax.errors import UnsupportedOperatorError

STRING = 8
"""The number of strings, which no array of numbers can hold."""

_DTYPES = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    4: np.uint16,
    5: np.int16,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
    12: np.uint32,
    13: np.uint64,
    14: np.complex64,
    15: np.complex128,
    16: ml_dtypes.bfloat16,
    17: ml_dtypes.float8_e4m3fn,
    18: ml_dtypes.float8_e4m3fnuz,
    19: ml_dtypes.float8_e5m2,
    20: ml_dtypes.float8_e5m2fnuz,
    21: ml_dtypes.uint4,
    22: ml_dtypes.int4,
    23: ml_dtypes.float4_e2m1fn,
    24: ml_dtypes.float8_e8m0fnu,
    25: ml_dtypes.uint2,
    26: ml_dtypes.int2,
    27: ml_dtypes.float6_e2m3fn,
    28: ml_dtypes.float6_e3m2fn,
}


def element_type(number: int) -> np.dtype:
    """Returns the NumPy type of ONNX's type `number`.

    Raises:
        UnsupportedOperatorError: It is not a type of numbers (or it is newer than this table).
    """
    if number not in _DTYPES:
        raise UnsupportedOperatorError(f"element type {number} (TensorProto.DataType) has no array type here")
    return np.dtype(_DTYPES[number])


def integer_range(dtype: np.dtype) -> tuple[int, int]:
    """Returns the smallest and the largest value of an integer type, 4-bit ones included."""
    info = ml_dtypes.iinfo(dtype)
    return int(info.min), int(info.max)
