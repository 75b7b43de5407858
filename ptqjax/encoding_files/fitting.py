"""Whether the fields of an encoding make a grid, and one that the tensor can have which it is for."""

from __future__ import annotations

import numpy as np

from ptqjax.encodings.encoding import Encoding
from ptqjax.errors import ConfigError
from ptqjax.kernels.float_formats import float_format
from ptqjax.placement.tensor_axes import TensorAxes


class UnfitError(Exception):
    """What is said of a tensor does not fit it, or no encoding of ours can be so."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"found {found}, expected {expected}")
        self.found = found
        self.expected = expected


def fitting(encoding: Encoding, axes: TensorAxes) -> Encoding:
    """Returns the encoding, whose leaves are concrete: it is a grid, and its scales fit the tensor.

    Raises:
        UnfitError: They do not, or it is none: a scale that is not finite or not more than 0, limits that are not two
            rising numbers, a zero point outside them, or a float format with a zero point or scale that it has not.
    """
    _check_grid(encoding)
    (_check_run_time if encoding.is_dynamic else _check_layout)(encoding, axes)
    return encoding


def check_fit(name: str, encoding: Encoding, axes: TensorAxes) -> None:
    """Checks that a concrete encoding can be written, which is that it would be read again.

    Raises:
        ConfigError: It is no grid, or does not fit the tensor (`fitting`).
    """
    try:
        fitting(encoding, axes)
    except UnfitError as error:
        raise ConfigError(f"the encoding of '{name}' cannot be written: {error}; calibrate the tensor again") from error


def _check_grid(encoding: Encoding) -> None:
    scale, zero_point = np.asarray(encoding.scale), np.asarray(encoding.zero_point)
    off = scale[~(np.isfinite(scale) & (scale > 0))]
    if off.size:
        raise UnfitError(f"the scale {float(off[0])} in float32", "scales that are finite and more than 0")
    if zero_point.shape != scale.shape:
        raise UnfitError(f"zero points of shape {zero_point.shape}", f"{scale.shape}, one for each scale")
    if np.ndim(encoding.qmin) or np.ndim(encoding.qmax) or not encoding.qmin < encoding.qmax:
        raise UnfitError(f"the limits {encoding.qmin} and {encoding.qmax}", "two numbers, the first one smaller")
    off = zero_point[~((encoding.qmin <= zero_point) & (zero_point <= encoding.qmax))]
    if off.size:
        limits = f"one from {float(encoding.qmin):g} to {float(encoding.qmax):g}"
        raise UnfitError(f"the zero point {float(off[0])}", limits)
    if encoding.float_format is not None and np.any(zero_point):
        raise UnfitError(f"zero points beside {encoding.float_format}", "none, as codes are floating-point numbers")
    if encoding.float_format is not None and not float_format(encoding.float_format).has_scale and np.any(scale != 1):
        raise UnfitError(f"the scale {float(scale.max())} beside {encoding.float_format}", "1, as it is a plain cast")


def _check_run_time(encoding: Encoding, axes: TensorAxes) -> None:
    if axes.shape is not None:
        raise UnfitError("a grid found at run time", "scales, as the tensor is a parameter")
    if np.size(encoding.scale) != 1:
        raise UnfitError(
            f"{np.size(encoding.scale)} scales beside a grid found at run time", "one, for which it stands"
        )


def _check_layout(encoding: Encoding, axes: TensorAxes) -> None:
    scale, axis, block_size = np.shape(encoding.scale), encoding.axis, encoding.block_size
    if encoding.scale_bits is not None and block_size is None:
        raise UnfitError("multiples of a channel's scale without a block_size", "one, as they are those of blocks")
    if axis is None:
        if block_size is not None or np.size(encoding.scale) != 1:
            raise UnfitError(f"{np.size(encoding.scale)} scales without an axis", "one scale")
    elif not axes.fits(axis):
        raise UnfitError(f"the axis {axis}", f"an axis of a tensor of shape {axes.shape}")
    elif block_size is None:
        if len(scale) != 1 or (axes.shape is not None and scale != (axes.shape[axis],)):
            expected = "one along the axis" if axes.shape is None else f"{(axes.shape[axis],)}"
            raise UnfitError(f"scales of shape {scale}", expected)
    elif axes.shape is None:
        raise UnfitError("scales by blocks", "one scale, for a tensor that is no parameter")
    else:
        _check_blocks(scale, axes.shape, axis, block_size)


def _check_blocks(scale: tuple[int, ...], shape: tuple[int, ...], axis: int, block_size: int) -> None:
    blocks = -(-shape[axis] // block_size)
    full = tuple(blocks if i == axis % len(shape) else size for i, size in enumerate(shape))
    fits = len(scale) == len(full) and scale[axis] == blocks
    if not fits or any(one not in (1, size) for one, size in zip(scale, full, strict=True)):
        raise UnfitError(f"scales of shape {scale}", f"{full}, or 1 on axes that share them")
