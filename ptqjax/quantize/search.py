"""Encodings of data in hand: weights and other constants, or an array of the caller's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ptqjax.config import ACTIVATION_DTYPES, WEIGHT_DTYPES
from ptqjax.errors import ConfigError, DataError
from ptqjax.kernels.ranges import Symmetry, stack_kinds
from ptqjax.quantize.encodings import Encoding, make_encoding
from ptqjax.quantize.observers import RangeScheme, find_scheme
from ptqjax.quantize.placement import WEIGHT, Site, kind_of


def choose_encoding(
    samples: Any,
    *,
    dtype: str = "int8",
    symmetric: Symmetry | None = None,
    ranges: str = "sqnr",
    axis: int | None = None,
    block_size: int | None = None,
) -> Encoding:
    """Returns the encoding of an array, or of a list of batches together.

    All-zero data gives scale 1; an all-zero channel or block beside others takes the largest scale among them, because
    a bias that is added to it has a multiple of that scale.

    Args:
        samples: The data; a list or tuple of arrays is concatenated along the first axis.
        dtype: Integer type of the grid, as in "int8", "uint8", "int4".
        symmetric: Whether 0 lies in the middle of the grid; None: for signed types.
        ranges: The scheme, as `QuantizationConfig.ranges` has it.
        axis: Axis that has a scale for each position, or for each block of positions; None: one scale.
        block_size: Number of positions along `axis` that share a scale.

    Raises:
        DataError: The data are empty, not floating, or not finite.
        ConfigError: `dtype` or `ranges` is unknown, `axis` does not exist, or a block has no axis or no size.
    """
    site = Site(
        tensor="samples",
        kind=WEIGHT,
        dtype=_checked_dtype(dtype),
        symmetric=not dtype.startswith("u") if symmetric is None else symmetric,
        root="samples",
        reason="chosen by the caller",
        axis=axis,
        block_size=block_size,
    )
    values = _joined(samples)
    _check_axis(site, values.ndim)
    return encode_constants([site], {"samples": values}, find_scheme(ranges))["samples"]


def encode_constants(sites: Sequence[Site], values: Mapping[str, Any], scheme: RangeScheme) -> dict[str, Encoding]:
    """Returns the encodings of constant tensors, each on the grid of its site; all searched in one program.

    Raises:
        DataError: A tensor is empty or holds NaN or infinity.
    """
    arrays = {site.tensor: _checked(site.tensor, np.asarray(values[site.tensor])) for site in sites}
    encodings: dict[str, Encoding] = {}
    for is_symmetric in (True, False):  # their searches try different candidates
        alike = [site for site in sites if bool(site.symmetric) is is_symmetric]
        encodings |= _encode_alike(alike, arrays, scheme) if alike else {}
    return {site.tensor: encodings[site.tensor] for site in sites}


def _encode_alike(sites: Sequence[Site], arrays: Mapping[str, np.ndarray], scheme: RangeScheme) -> dict[str, Encoding]:
    matrices = [_matrix(arrays[site.tensor], site) for site in sites]
    counts = [len(matrix) for matrix in matrices]
    spread = jax.tree.map(lambda limit: np.repeat(limit, counts), stack_kinds([kind_of(site) for site in sites]))
    scale, zero_point = scheme.in_hand(matrices, spread)
    ends = np.cumsum(counts)[:-1]
    parts = zip(sites, matrices, np.split(scale, ends), np.split(zero_point, ends), strict=True)
    return {
        site.tensor: _encoding(site, arrays[site.tensor].shape, _without_zeros(part_scale, matrix), part_zero)
        for site, matrix, part_scale, part_zero in parts
    }


def _without_zeros(scale: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Returns the scales with that of all-zero rows replaced by the largest of the others, if there are others."""
    is_zero = ~matrix.any(axis=1)
    return np.where(is_zero, scale[~is_zero].max(), scale) if is_zero.any() and not is_zero.all() else scale


def _encoding(site: Site, shape: tuple[int, ...], scale: np.ndarray, zero_point: np.ndarray) -> Encoding:
    shape_of_scale = _scale_shape(site, shape)
    return make_encoding(
        scale.reshape(shape_of_scale),
        zero_point.reshape(shape_of_scale),
        dtype=site.dtype,
        symmetric=site.symmetric,
        axis=site.axis,
        block_size=site.block_size,
    )


def _scale_shape(site: Site, shape: tuple[int, ...]) -> tuple[int, ...]:
    if site.axis is None:
        return ()
    if site.block_size is None:
        return (shape[site.axis],)
    axis = site.axis % len(shape)
    return tuple(-(-size // site.block_size) if i == axis else size for i, size in enumerate(shape))


def _matrix(array: np.ndarray, site: Site) -> np.ndarray:
    """Returns the array with a row for each scale."""
    if site.axis is None:
        return array.reshape(1, -1)
    if site.block_size is None:
        return np.moveaxis(array, site.axis, 0).reshape(array.shape[site.axis], -1)
    axis = site.axis % array.ndim
    missing = -array.shape[axis] % site.block_size
    # Zeros fill the last block: they lie on every grid and in every range.
    filled = np.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])
    blocks = filled.reshape(*filled.shape[:axis], -1, site.block_size, *filled.shape[axis + 1 :])
    return np.moveaxis(blocks, axis + 1, -1).reshape(-1, site.block_size)


def _joined(samples: Any) -> np.ndarray:
    try:
        if isinstance(samples, list | tuple):
            return np.concatenate([np.asarray(batch) for batch in samples])
        return np.asarray(samples)
    except ValueError as error:
        raise DataError(f"samples: the batches do not fit together: {error}") from error


def _checked(name: str, array: np.ndarray) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating) and array.dtype.kind != "V":
        raise DataError(f"'{name}' has the type {array.dtype.name}; expected floating-point numbers")
    if array.size == 0:
        raise DataError(f"'{name}' has no values (shape {array.shape}); a range needs one at least")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise DataError(f"'{name}' holds {array[place]} at {place}; a range needs finite float32 numbers")
    return array


def _checked_dtype(dtype: str) -> str:
    known = dict.fromkeys((*WEIGHT_DTYPES, *ACTIVATION_DTYPES))
    if dtype not in known:
        raise ConfigError(f"dtype={dtype!r} is unknown; expected one of {', '.join(known)}")
    return dtype


def _check_axis(site: Site, rank: int) -> None:
    if site.block_size is not None and (site.axis is None or site.block_size < 1):
        raise ConfigError(f"block_size={site.block_size}: expected 1 or more, and the axis that is cut into blocks")
    if site.axis is not None and not -rank <= site.axis < rank:
        raise ConfigError(f"axis={site.axis}: the data have {rank} axes")
