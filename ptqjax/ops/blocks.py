"""Operators that move blocks of space into channels and back."""

from __future__ import annotations

from typing import Any

from ptqjax.ops.registry import lowers, lowers_channels_last

# The axes of [n, c, h, w] with c, or h and w, taken apart: the two of the block before (DCR) or behind (CRD) the depth.
_TO_SPACE = {"DCR": (0, 3, 4, 1, 5, 2), "CRD": (0, 1, 4, 2, 5, 3)}
_TO_DEPTH = {"DCR": (0, 3, 5, 1, 2, 4), "CRD": (0, 1, 3, 5, 2, 4)}


@lowers("DepthToSpace", since=1)
def depth_to_space_1(x: Any, /, *, blocksize: int) -> Any:
    """Returns [n, c, h, w] as [n, c / b^2, h b, w b], with b the size of a block.

    Channel (i b + j) c / b^2 + k becomes row i, column j of the blocks of channel k.
    """
    return depth_to_space(x, blocksize=blocksize)


@lowers("DepthToSpace", since=11)
def depth_to_space(x: Any, /, *, blocksize: int, mode: str = "DCR") -> Any:
    """Returns `depth_to_space_1`; in the mode "CRD" it is channel k b^2 + i b + j that becomes that."""
    n, c, h, w = x.shape
    b, depth = blocksize, c // blocksize**2
    apart = x.reshape((n, b, b, depth, h, w) if mode == "DCR" else (n, depth, b, b, h, w))
    return apart.transpose(_TO_SPACE[mode]).reshape(n, depth, h * b, w * b)


@lowers_channels_last("DepthToSpace", since=1)
@lowers_channels_last("DepthToSpace", since=11)
def depth_to_space_channels_last(x: Any, /, *, blocksize: int, mode: str = "DCR") -> Any:
    """Returns `depth_to_space` of a channels-last value."""
    n, h, w, c = x.shape
    b, depth = blocksize, c // blocksize**2
    if mode == "DCR":
        y = x.reshape(n, h, w, b, b, depth).transpose(0, 1, 3, 2, 4, 5)
    else:
        y = x.reshape(n, h, w, depth, b, b).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(n, h * b, w * b, depth)


@lowers("SpaceToDepth", since=1)
def space_to_depth_1(x: Any, /, *, blocksize: int) -> Any:
    """Returns [n, c, h, w] as [n, c b^2, h / b, w / b]: the inverse of `depth_to_space_1`."""
    return space_to_depth(x, blocksize=blocksize)


@lowers("SpaceToDepth", since=28)
def space_to_depth(x: Any, /, *, blocksize: int, mode: str = "DCR") -> Any:
    """Returns `space_to_depth_1`; in the mode "CRD" the inverse of `depth_to_space` in that mode."""
    n, c, h, w = x.shape
    b = blocksize
    apart = x.reshape(n, c, h // b, b, w // b, b)
    return apart.transpose(_TO_DEPTH[mode]).reshape(n, c * b**2, h // b, w // b)


@lowers_channels_last("SpaceToDepth", since=1)
@lowers_channels_last("SpaceToDepth", since=28)
def space_to_depth_channels_last(x: Any, /, *, blocksize: int, mode: str = "DCR") -> Any:
    """Returns `space_to_depth` of a channels-last value."""
    n, h, w, c = x.shape
    b = blocksize
    apart = x.reshape(n, h // b, b, w // b, b, c)
    order = (0, 1, 3, 2, 4, 5) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return apart.transpose(order).reshape(n, h // b, w // b, c * b**2)
