"""Cast and CastLike."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptqjax.kernels.conversion import convert
from ptqjax.ops.element_types import STRING, element_type
from ptqjax.ops.registry import known, lowers, lowers_channels_last


@lowers("Cast", since=6, elementwise=True)
def cast(x: Any, /, *, to: int, saturate: int = 1, round_mode: str = "up") -> Any:
    """Returns `x` as ONNX's element type number `to`; see `convert`. Strings can only be known ones."""
    if to == STRING:
        return known(x, "the input of Cast to strings").astype(np.str_).astype(object)
    return _cast(x, element_type(to), saturate, round_mode)


@lowers("CastLike", since=15)
def cast_like(x: Any, target: Any, /, *, saturate: int = 1, round_mode: str = "up") -> Any:
    """Returns `x` as the element type of `target`; see `cast`."""
    if target.dtype == object:
        return cast(x, to=STRING)
    return _cast(x, np.dtype(target.dtype), saturate, round_mode)


lowers_channels_last("CastLike", since=15)(cast_like)


def _cast(x: Any, dtype: np.dtype, saturate: int, round_mode: str) -> Any:
    if x.dtype == object:
        x = _parsed(known(x, "the strings of Cast"), dtype)
    return convert(x, dtype, saturate=bool(saturate), round_mode=round_mode)


def _parsed(texts: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind not in "iu":
        return texts.astype(np.float64)  # "INF", "-inf" and "NaN" too
    return np.array([_integer(text) for text in texts.ravel()], dtype).reshape(texts.shape)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return int(float(text))
