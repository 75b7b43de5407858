"""How a GPU computes each kind of layer: one table, with the reasons, and the rule that tells kinds apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from ptqjax.errors import ConfigError
from ptqjax.kernels.platforms import current

FEW_CHANNELS = 8
"""Channels of a group up to which a grouped convolution is one of small groups."""


class Way(NamedTuple):
    """What is taken for a kind of layer."""

    way: str
    """The one that is taken."""
    others: tuple[str, ...]
    """The ones that may be taken in its place, see `made_for`."""
    reason: str
    """Why."""


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "pointwise": Way(
            way="dot",
            others=("convolution",),
            reason="bias, bound and rounding are in the product's kernel; behind cuDNN's they read and write again",
        ),
        "dense": Way(
            way="convolution",
            others=("columns",),
            reason="cuDNN reads each element once, with padding, bias and Relu inside; columns write each nine times",
        ),
        "tiles": Way(
            way="columns",
            others=("convolution",),
            reason="windows side by side: their columns are the image in another order; then as pointwise",
        ),
        "depthwise": Way(
            way="taps",
            others=("convolution",),
            reason="one loop with padding, bias, bound and rounding inside; cuDNN's adds a kernel for what is not Relu",
        ),
        "small groups": Way(
            way="taps",
            others=("convolution",),
            reason="as depthwise, up to 8 channels a group; with more the loop reads its input too often",
        ),
        "groups": Way(
            way="convolution",
            others=(),
            reason="cuDNN's grouped convolution; a product for each group would cut and join the channels",
        ),
    }
)
"""The ways of convolutions of floats, chosen by the bytes and kernels of the programs that are compiled for an H200.

Where a device can be had, `scripts/bench_gpu.py` measures the others. Integers have one way, see `gpu_integer`."""


def kind_of_convolution(shape: Sequence[int], groups: int, *, has_tiles: bool = False) -> str:
    """Returns the kind of a convolution with kernels of this shape, [o, i, *kernel]: a key of `WAYS`.

    `has_tiles` tells whether its windows lie side by side, see `windows.are_tiles`.
    """
    outputs, inputs, *kernel = shape
    if groups == 1 and math.prod(kernel) == 1:
        return "pointwise"
    if groups == 1:
        return "tiles" if has_tiles else "dense"
    if inputs == 1 and outputs == groups:
        return "depthwise"
    return "small groups" if inputs == 1 or max(inputs, outputs // groups) <= FEW_CHANNELS else "groups"


def way_of(kind: str) -> str:
    """Returns the way that is taken for a kind of layer: the caller's, see `made_for`, or else the table's.

    Raises:
        ConfigError: The caller's is none of the kind's, or for a kind that is none.
    """
    chosen = dict(current().ways)
    for each, way in chosen.items():
        known = (WAYS[each].way, *WAYS[each].others) if each in WAYS else ()
        if way not in known:
            wanted = f"one of {known}" if known else f"a kind of layer, one of {sorted(WAYS)}"
            raise ConfigError(f"ways={{{each!r}: {way!r}}} is unknown; expected {wanted}")
    return chosen.get(kind, WAYS[kind].way)
