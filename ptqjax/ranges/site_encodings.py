"""Encodings of sites from what is known of their ranges: integers, floating-point formats, low-power blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ptqjax.encodings.encoding import Encoding, make_encoding
from ptqjax.encodings.low_power import low_power_encoding, low_power_scales
from ptqjax.kernels.float_formats import float_format
from ptqjax.kernels.grid import FLOAT_FORMATS
from ptqjax.kernels.ranges import grid_of_range, scale_of_float_range, stack_kinds
from ptqjax.placement.place import Site, kind_of
from ptqjax.ranges.aimet_schemes import fixed_grid, symmetry_in_use


class Ranged(NamedTuple):
    """The encoding of an activation, and the ends of all values that it is from."""

    encoding: Encoding
    lowest: Any
    highest: Any

    @property
    def is_nothing(self) -> bool:
        """Whether every value is zero, so that the scale follows from none."""
        return bool(self.lowest == 0 and self.highest == 0)


def is_float(site: Site) -> bool:
    """Tells whether the codes of a site are floating-point numbers: then its extremes decide, whatever the scheme."""
    return site.dtype in FLOAT_FORMATS


def needs_range(site: Site) -> bool:
    """Tells whether the encoding depends on data: all but casts to formats of 16 bits do, and grids of run time."""
    if site.is_dynamic:
        return False
    return not is_float(site) or float_format(site.dtype).has_scale


def grid_of_site(site: Site, lowest: Any, highest: Any) -> tuple[Any, Any]:
    """Returns scale and zero point of the site's grid that spans [lowest, highest]."""
    if is_float(site):
        scale = scale_of_float_range(lowest, highest, site.dtype, power_of_two=site.power_of_two)
        return scale, np.zeros_like(scale)
    return grid_of_range(lowest, highest, kind_of(site))


def encoding_of_range(site: Site, lowest: Any, highest: Any) -> Encoding:
    """Returns the encoding of a site with one scale, whose range is known."""
    return encoding_of_grid(site, *grid_of_site(site, lowest, highest))


def fixed_encoding(site: Site, *, compatibility: str | None) -> Encoding:
    """Returns the encoding of a site whose range is known beforehand; `site.fixed_range` is not None."""
    low, high = site.fixed_range or (0.0, 0.0)
    if compatibility is None or is_float(site):
        return encoding_of_range(site, low, high)
    scale, zero_point = fixed_grid(np.asarray([low]), np.asarray([high]), stack_kinds([kind_of(site)]))
    return encoding_of_grid(site, scale[0], zero_point[0])


def as_aimet_has_it(site: Site, ranges: str, *, is_all_zero: bool) -> Site:
    """Returns the site with the symmetry that its grid has where AIMET's scheme chooses it."""
    return replace(site, symmetric=symmetry_in_use(ranges, site.symmetric, is_all_zero=is_all_zero))


def cast_encoding(site: Site) -> Encoding:
    """Returns the encoding of a site that is cast to a format of 16 bits: scale 1."""
    return encoding_of_range(site, np.float32(0), np.float32(0))


def encoding_of_grid(site: Site, scale: Any, zero_point: Any) -> Encoding:
    """Returns the encoding of a site; scales of low-power blocks become multiples of their channel's."""
    if site.scale_bits is not None and site.axis is not None and site.block_size is not None:
        return low_power_encoding(
            low_power_scales(scale, scale_bits=site.scale_bits, axis=site.axis),
            dtype=site.dtype,
            axis=site.axis,
            block_size=site.block_size,
            scale_bits=site.scale_bits,
            zero_point=zero_point,
        )
    return make_encoding(
        scale,
        zero_point,
        dtype=site.dtype,
        symmetric=site.symmetric,
        axis=site.axis,
        block_size=site.block_size,
    )
