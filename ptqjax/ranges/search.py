"""Encodings of data in hand: weights and other constants, or an array of the caller's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ptqjax.config.checks import check_dtype, check_symmetry
from ptqjax.encodings.encoding import Encoding
from ptqjax.errors import ConfigError, DataError
from ptqjax.kernels.ranges import Symmetry, stack_kinds
from ptqjax.mapped import release
from ptqjax.placement.place import WEIGHT, Site, kind_of
from ptqjax.placement.tensors import is_floating
from ptqjax.ranges.aimet_schemes import in_batches
from ptqjax.ranges.observers import RangeScheme
from ptqjax.ranges.schemes import find_scheme
from ptqjax.ranges.site_encodings import as_aimet_has_it, encoding_of_grid, grid_of_site, is_float

_BYTES_OF_A_VALUE = 4
_AT_A_TIME = 2**25  # bytes of tensors that are searched together; a larger one is alone


def choose_encoding(
    samples: Any,
    *,
    dtype: str = "int8",
    symmetric: Symmetry = False,
    ranges: str = "sqnr",
    axis: int | None = None,
    block_size: int | None = None,
    compatibility: str | None = None,
    power_of_two: bool = False,
    scale_bits: int | None = None,
) -> Encoding:
    """Returns the encoding of an array, or of a list of batches together.

    All-zero data gives scale 1; an all-zero channel or block beside others takes the largest scale among them, because
    a bias that is added to it has a multiple of that scale. Data below the normal float32 numbers give the smallest
    scale that is one; those near the largest are clipped where a code would be infinite.

    Args:
        samples: The data; a list or tuple of arrays is concatenated along the first axis.
        dtype: Type of the codes, as in "int8", "uint8", "int4", "float8_e4m3fn". A floating-point format takes its
            scale from the largest magnitude, whatever the scheme; those of 16 bits have the scale 1.
        symmetric: How 0 lies on the grid: False (anywhere), True (in the middle), "strict" (and the smallest integer of
            a signed type unused), "unsigned" (at the smallest integer where no value is negative), "strict unsigned".
        ranges: The scheme, as `QuantizationConfig.ranges` has it.
        axis: Axis that has a scale for each position, or for each block of positions; None: one scale.
        block_size: Number of positions along `axis` that share a scale.
        compatibility: "aimet" for the formulas of aimet-onnx 2.42: what it makes of the list batch by batch, of an
            array as one batch. None: our own, for which batches do not matter.
        power_of_two: Whether scales are powers of two.
        scale_bits: For low-power blocks (LPBQ): the scales of a channel's blocks are multiples of one, by integers of
            as many bits.

    Raises:
        DataError: The data are empty, not floating, or not finite.
        ConfigError: A setting is unknown, `axis` does not exist, or a block has no axis or no size.
    """
    check_dtype("dtype", dtype)
    check_symmetry("symmetric", symmetric)
    site = Site(
        tensor="samples",
        kind=WEIGHT,
        dtype=dtype,
        symmetric=symmetric,
        root="samples",
        reason="chosen by the caller",
        axis=axis,
        block_size=block_size,
        power_of_two=power_of_two,
        scale_bits=scale_bits,
    )
    scheme = find_scheme(ranges, compatibility)
    values = _joined(samples)
    _check_axis(site, values.ndim)
    if compatibility is not None and isinstance(samples, list | tuple) and not is_float(site):
        return _encode_batches(site, [_checked("samples", np.asarray(batch)) for batch in samples], ranges)
    return encode_constants([site], {"samples": values}, scheme, compatibility=compatibility)["samples"]


def encode_constants(
    sites: Sequence[Site], values: Mapping[str, Any], scheme: RangeScheme, *, compatibility: str | None = None
) -> dict[str, Encoding]:
    """Returns the encodings of constant tensors, each on the grid of its site; up to 32 MB in one program.

    Args:
        sites: The tensors.
        values: Them and others by name.
        scheme: What chooses ranges; without effect on floating-point formats.
        compatibility: Whose scheme it is, see `schemes.find_scheme`.

    Raises:
        DataError: A tensor is empty or holds NaN or infinity.
    """
    found: dict[str, Encoding] = {}
    for some in _within_memory(sites, values):
        found |= _encode_some(some, values, scheme, compatibility)
        for site in some:
            release(values[site.tensor])
    return {site.tensor: found[site.tensor] for site in sites}


def _within_memory(sites: Sequence[Site], values: Mapping[str, Any]) -> Iterator[list[Site]]:
    """Yields the sites in their order, as many at a time as may lie in memory once more."""
    some: list[Site] = []
    size = 0
    for site in sites:
        own = np.size(values[site.tensor]) * _BYTES_OF_A_VALUE
        if some and size + own > _AT_A_TIME:
            yield some
            some, size = [], 0
        some.append(site)
        size += own
    if some:
        yield some


def _encode_some(
    sites: Sequence[Site], values: Mapping[str, Any], scheme: RangeScheme, compatibility: str | None
) -> dict[str, Encoding]:
    arrays = {site.tensor: _checked(site.tensor, np.asarray(values[site.tensor])) for site in sites}
    encodings = {site.tensor: _encode_float(site, arrays[site.tensor]) for site in sites if is_float(site)}
    for is_symmetric in (True, False):  # their searches try different candidates
        alike = [site for site in sites if not is_float(site) and bool(site.symmetric) is is_symmetric]
        encodings |= _encode_alike(alike, arrays, scheme, compatibility) if alike else {}
    return encodings


def _encode_alike(
    sites: Sequence[Site], arrays: Mapping[str, np.ndarray], scheme: RangeScheme, compatibility: str | None
) -> dict[str, Encoding]:
    matrices = [_matrix(arrays[site.tensor], site) for site in sites]
    counts = [len(matrix) for matrix in matrices]
    spread = jax.tree.map(lambda limit: np.repeat(limit, counts), stack_kinds([kind_of(site) for site in sites]))
    scale, zero_point = scheme.in_hand(matrices, spread)
    ends = np.cumsum(counts)[:-1]
    parts = zip(sites, matrices, np.split(scale, ends), np.split(zero_point, ends), strict=True)
    found: dict[str, Encoding] = {}
    for site, matrix, part_scale, part_zero in parts:
        shape = arrays[site.tensor].shape
        if compatibility is None:
            found[site.tensor] = _encoding(site, shape, _without_zeros(part_scale, matrix), part_zero)
        else:
            as_theirs = as_aimet_has_it(site, scheme.name, is_all_zero=not matrix.any())
            found[site.tensor] = _encoding(as_theirs, shape, part_scale, part_zero)
    return found


def _encode_float(site: Site, array: np.ndarray) -> Encoding:
    matrix = _matrix(array, site)
    scale, zero_point = grid_of_site(site, matrix.min(axis=1), matrix.max(axis=1))
    return _encoding(site, array.shape, _without_zeros(scale, matrix), zero_point)


def _encode_batches(site: Site, batches: Sequence[np.ndarray], ranges: str) -> Encoding:
    """Returns the encoding of data whose division into batches matters."""
    matrices = [_matrix(batch, site) for batch in batches]
    if len({len(matrix) for matrix in matrices}) > 1:
        raise DataError(f"samples: the batches have different sizes along axis {site.axis}, which has the scales")
    grid = in_batches(ranges, [[matrix] for matrix in matrices], kind_of(site))
    is_all_zero = not any(matrix.any() for matrix in matrices)
    return _encoding(as_aimet_has_it(site, ranges, is_all_zero=is_all_zero), batches[0].shape, *grid)


def _without_zeros(scale: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Returns the scales with that of all-zero rows replaced by the largest of the others, if there are others."""
    is_zero = ~matrix.any(axis=1)
    return np.where(is_zero, scale[~is_zero].max(), scale) if is_zero.any() and not is_zero.all() else scale


def _encoding(site: Site, shape: tuple[int, ...], scale: np.ndarray, zero_point: np.ndarray) -> Encoding:
    shape_of_scale = _scale_shape(site, shape)
    return encoding_of_grid(site, scale.reshape(shape_of_scale), zero_point.reshape(shape_of_scale))


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
    if isinstance(samples, list | tuple) and not samples:
        raise DataError("samples: the list is empty; expected one batch at least")
    try:
        if isinstance(samples, list | tuple):
            return np.concatenate([np.asarray(batch) for batch in samples])
        return np.asarray(samples)
    except (TypeError, ValueError) as error:  # shapes, or types that have no common one
        raise DataError(f"samples: the batches do not fit together: {error}") from error


def _checked(name: str, array: np.ndarray) -> np.ndarray:
    if not is_floating(array.dtype):
        raise DataError(f"'{name}' has the type {array.dtype.name}; expected floating-point numbers")
    if array.size == 0:
        raise DataError(f"'{name}' has no values (shape {array.shape}); a range needs one at least")
    with np.errstate(over="ignore"):  # what float32 cannot hold is named below
        values = array.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise DataError(f"'{name}' holds {array[place]} at {place}; a range needs finite float32 numbers")
    return values


def _check_axis(site: Site, rank: int) -> None:
    if site.block_size is not None and (site.axis is None or site.block_size < 1):
        raise ConfigError(f"block_size={site.block_size}: expected 1 or more, and the axis that is cut into blocks")
    if site.axis is not None and not -rank <= site.axis < rank:
        raise ConfigError(f"axis={site.axis}: the data have {rank} axes")
    if site.scale_bits is None:
        return
    if site.block_size is None or not 1 <= site.scale_bits <= 16:  # noqa: PLR2004
        raise ConfigError(f"scale_bits={site.scale_bits}: expected 1 to 16, and a block_size")
    if site.power_of_two or is_float(site):
        raise ConfigError(f"scale_bits={site.scale_bits}: its scales are for integers, and no powers of two")
