"""Operators of ai.onnx.ml on tensors: features, thresholds, scales, labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.kernels.pooling import root
from ptqjax.ops.interpolation import check_choice
from ptqjax.ops.registry import lowers

_ML = "ai.onnx.ml"


@lowers("ArrayFeatureExtractor", since=1, domain=_ML)
def array_feature_extractor(x: Any, indices: Any, /) -> Any:
    """Returns the elements of the last axis of `x` at the `indices`; a vector gives a row."""
    rows = jnp.asarray(x)[None] if x.ndim == 1 else jnp.asarray(x)
    return jnp.take(rows, indices.reshape(-1), axis=-1, mode="clip")


@lowers("Binarizer", since=1, domain=_ML)
def binarizer(x: Any, /, *, threshold: float = 0.0) -> Any:
    """Returns 1 where `x` is above the threshold, else 0."""
    return (jnp.asarray(x) > jnp.asarray(threshold, x.dtype)).astype(x.dtype)


@lowers("Scaler", since=1, domain=_ML)
def scaler(x: Any, /, *, offset: Sequence[float] = (0.0,), scale: Sequence[float] = (1.0,)) -> Any:
    """Returns (x - offset) * scale in float32, one of each, or one per element of the last axis."""
    shape = (*(1,) * (x.ndim - 1), -1)
    shift, factor = (np.asarray(value, np.float32).reshape(shape) for value in (offset, scale))
    return (jnp.asarray(x, np.float32) - shift) * factor


@lowers("Normalizer", since=1, domain=_ML)
def normalizer(x: Any, /, *, norm: str = "MAX") -> Any:
    """Returns the rows of `x` over their largest element, or their sum or root of squares of absolute values, float32.

    A row whose norm is 0 stays as it is.
    """
    check_choice(norm, ("MAX", "L1", "L2"), "norm")
    rows = jnp.asarray(x, np.float32)
    if norm == "MAX":
        size = jnp.max(rows, axis=-1, keepdims=True)
    else:
        p = int(norm[1])
        size = root(jnp.sum(jnp.abs(rows) ** p, axis=-1, keepdims=True), p)
    return rows / jnp.where(size == 0, 1, size)


@lowers("LabelEncoder", since=2, domain=_ML)
def label_encoder(
    x: Any,
    /,
    *,
    default_float: float = -0.0,
    default_int64: int = -1,
    default_string: str = "_Unused",
    default_tensor: Any = None,
    keys_floats: Sequence[float] = (),
    keys_int64s: Sequence[int] = (),
    keys_strings: Sequence[str] = (),
    keys_tensor: Any = None,
    values_floats: Sequence[float] = (),
    values_int64s: Sequence[int] = (),
    values_strings: Sequence[str] = (),
    values_tensor: Any = None,
) -> Any:
    """Returns the value of each element's key, the default where it has none.

    Raises:
        UnsupportedOperatorError: Keys or values are strings.
    """
    if keys_strings or values_strings or (keys_tensor is not None and keys_tensor.dtype.kind in "OUS"):
        raise UnsupportedOperatorError(f"labels that are strings (default '{default_string}') have no lowering")
    keys = next(value for value in (keys_tensor, keys_int64s, keys_floats) if value is not None and len(value))
    keys = np.asarray(keys, x.dtype)
    if values_tensor is not None:
        values, default = (
            values_tensor,
            values_tensor.dtype.type(-1 if default_tensor is None else default_tensor.item()),
        )
    elif values_int64s:
        values, default = np.asarray(values_int64s, np.int64), np.int64(default_int64)
    else:
        values, default = np.asarray(values_floats, np.float32), np.float32(default_float)
    order = np.argsort(keys, kind="stable")  # NaN, which is a key like any other, comes last
    places = jnp.clip(jnp.searchsorted(keys[order], jnp.asarray(x)), 0, len(keys) - 1)
    found = jnp.asarray(keys[order])[places]
    same = (found == x) | ((found != found) & (x != x))  # noqa: PLR0124 (NaN)
    return jnp.where(same, jnp.asarray(values[order])[places], jnp.asarray(default))
