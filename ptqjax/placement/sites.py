"""What becomes of each floating tensor of a graph: records of a plan, without the rules that make it."""

from __future__ import annotations

from dataclasses import dataclass

from ptqjax.config import FLOAT_DTYPES, QuantizationConfig
from ptqjax.encodings.biases import BiasSite
from ptqjax.kernels.ranges import GridKind, Symmetry, grid_kind
from ptqjax.placement.counting import Counting
from ptqjax.placement.rules import num_bits

_SEARCH, _RANGE = "sqnr", "min-max"
_WHOLE = 8  # bits from which the search is better

WEIGHT, ACTIVATION, CONSTANT = "weight", "activation", "constant"
"""Kinds of sites. WEIGHT: a parameter of a product. ACTIVATION: a tensor computed at run time. CONSTANT: any other
parameter, which has one scale as activations have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A tensor that is rounded to a grid."""

    tensor: str
    """The tensor's name."""
    kind: str
    """`WEIGHT`, `ACTIVATION` or `CONSTANT`."""
    dtype: str
    """Type of the codes: an integer type, or one of `kernels.grid.FLOAT_FORMATS`."""
    symmetric: Symmetry
    """How 0 lies on the grid."""
    root: str
    """The tensor whose range decides: itself, or the one whose encoding is shared."""
    reason: str
    """Why the tensor has this grid, for people."""
    axis: int | None = None
    """Axis along which scales run; None for one scale."""
    block_size: int | None = None
    """Number of neighbours along `axis` that share a scale; None where not by blocks."""
    fixed_range: tuple[float, float] | None = None
    """The range where it is known beforehand."""
    power_of_two: bool = False
    """Whether scales are powers of two."""
    scale_bits: int | None = None
    """For low-power blocks (LPBQ): bits of the integers that blocks' scales are multiples of the channel's by."""
    ranges: str = ""
    """The scheme that chooses the range, as `QuantizationConfig.ranges` has it; "": that of the configuration."""
    counted: Counting | None = None
    """Which values its own range is to hold, if it has one; None: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A floating tensor that stays as it is."""

    tensor: str
    """The tensor's name."""
    reason: str
    """Why it is not rounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The plan for one model under one configuration."""

    sites: tuple[Site, ...]
    """Tensors with an encoding: parameters by name, then graph inputs, then results in the order of the nodes."""
    biases: tuple[BiasSite, ...]
    """Biases that are int32 integers."""
    skipped: tuple[Skipped, ...]
    """Floating tensors that stay in float."""
    float_biases: tuple[str, ...] = ()
    """Biases among `skipped` that could be integers, and are to stay in float by configuration or target."""

    def site(self, tensor: str) -> Site | None:
        """Returns the site of `tensor`; None where it stays in float."""
        return next((site for site in self.sites if site.tensor == tensor), None)


def kind_of(site: Site) -> GridKind:
    """Returns what is known of a site's grid, which is of integers, before its range is."""
    return grid_kind(site.dtype, symmetric=site.symmetric, power_of_two=site.power_of_two)


def scheme_of(site: Site, config: QuantizationConfig) -> str:
    """Returns the name of the scheme that chooses a site's range.

    On a grid of few integers a weight's search for the least error cuts off more than roundings behind it can make up
    for (MobileNetV2, 4 bits a channel, biases corrected: 45 % against 66 %), so that the default there is the range.
    """
    scheme = site.ranges or config.ranges
    is_open = not site.ranges and scheme == _SEARCH and config.compatibility is None
    has_few = site.kind == WEIGHT and site.axis is not None and num_bits(site.dtype) < _WHOLE
    return _RANGE if is_open and has_few and site.dtype not in FLOAT_DTYPES else scheme
