"""Headroom: ranges of activations wider than what calibration data reached, for data to come."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ptqjax.config import QuantizationConfig
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.ir import Model
from ptqjax.placement.place import ACTIVATION, Site, place_as_found
from ptqjax.ranges.observing import MANY
from ptqjax.ranges.site_encodings import needs_range
from ptqjax.transforms.bounds import Bounds, channel_bounds
from ptqjax.transforms.linear import linear_layers

_MOST = 2.0  # a bit of the grid


def headroom_of_few(num_values: int) -> float:
    """Returns how many times farther `MANY` values reach than `num_values` of them did; 1 from `MANY` on, 2 at most.

    The largest of n values whose tails fall exponentially, as activations' do (Banner et al. 2019, arXiv:1810.05723,
    section 3: Laplace), lies near b ln n; so the ratio is ln MANY / ln n: 1.2 for 1024 values, 1.6 for 180, 2 for 64.
    On calibration samples held back that gave 2 to 17 dB with 1 to 4 samples (three networks of `bench_runtime`), and
    with 16 from 1 dB to 5; Gaussian tails, with the root of this ratio, are up to 5 dB worse with 1 or 2 samples.
    """
    return min(math.log(MANY) / math.log(min(max(num_values, 2), MANY)), _MOST)


def widened(
    model: Model, encodings: Encodings, factor: float, config: QuantizationConfig, num_values: Mapping[str, int]
) -> Encodings:
    """Returns the encodings with the ranges of activations wider than the data's, but no wider than is provable.

    `factor` times as wide, and, unless `config.headroom` is 1, at least as wide as the number of values that a range is
    from asks for (`headroom_of_few`). Where operators bound a tensor (a Clip, bounds per channel), what lies beyond
    never occurs. The zero point stays, and a power of two goes to the nearest one. Tensors that share an encoding share
    the new one; ranges that are known beforehand stay, and so do casts
    to 16 bits, which have none.

    Args:
        model: The model that the encodings belong to.
        encodings: Concrete encodings, as `calibrate` returns them for `config`.
        factor: 1 or more.
        config: The settings that they were made with.
        num_values: How many values the range of each tensor is from, as `calibrate_and_measure` counts them.
    """
    plan = place_as_found(model, config, encodings)
    found = (site for site in plan.sites if site.kind == ACTIVATION and needs_range(site))
    sites = [site for site in found if site.fixed_range is None]
    roots = {site.root: site for site in sites if site.root in encodings and site.root not in model.params}
    factors = {root: max(factor, _least(num_values.get(root, MANY), config)) for root in roots}
    factors = {root: times for root, times in factors.items() if times > 1}
    if not factors:
        return encodings
    bounds = channel_bounds(model, linear_layers(model))
    wide = {root: _widened(encodings[root], times, bounds.get(root), roots[root]) for root, times in factors.items()}
    return encodings | {site.tensor: wide[site.root] for site in sites if site.root in wide}


def _least(num_values: int, config: QuantizationConfig) -> float:
    is_off = config.headroom == 1 or config.compatibility is not None
    return 1.0 if is_off else headroom_of_few(num_values)


def _widened(encoding: Encoding, factor: float, bounds: Bounds | None, site: Site) -> Encoding:
    scale, zero = np.float64(encoding.scale), np.float64(encoding.zero_point)
    below, above = (zero - np.float64(encoding.qmin)) * scale, (np.float64(encoding.qmax) - zero) * scale
    needed = factor
    if bounds is not None:
        reach = [(max(-float(bounds[0].min()), 0.0), below), (max(float(bounds[1].max()), 0.0), above)]
        needed = max((most / has for most, has in reach if has > 0), default=factor)
    wide = np.float32(scale * max(1.0, min(factor, needed)))
    return encoding.replace(scale=np.float32(2.0 ** np.round(np.log2(wide))) if site.power_of_two else wide)
