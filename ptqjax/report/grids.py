"""Which tensor would get which grid, and why: a plan of placement as rows of text."""

from __future__ import annotations

from collections.abc import Iterator

from ptqjax.config import QuantizationConfig, load_target
from ptqjax.encodings.biases import BiasSite
from ptqjax.placement.place import Placement, Site
from ptqjax.placement.sites import scheme_of

HEADINGS = ("tensor", "grid", "per", "range", "shares with", "why")
"""What `grid_rows` has in its columns."""

_ZERO = {
    False: "",
    True: " symmetric",
    "strict": " strict",
    "unsigned": " unsigned",
    "strict unsigned": " strict unsigned",
}


def target_line(config: QuantizationConfig) -> str:
    """Returns what the target is, and what of it is not as usual."""
    target = load_target(config.target)
    parts = [f"Target {target.name}: {target.description}"]
    if (biases := config.biases or target.biases) != "int32":
        parts.append(f"biases are {biases}")
    if target.exported_weights == "float":
        parts.append(f"weights are written as {target.exported_weights}")
    return "; ".join(parts)


def grid_rows(placement: Placement, config: QuantizationConfig) -> list[list[str]]:
    """Returns a row for each floating tensor: parameters, activations, biases, and what stays in float."""
    rows = [
        [site.tensor, _grid(site), _per(site), _range(site, config), _tie(site), site.reason]
        for site in placement.sites
    ]
    rows += [[site.bias, "int32", _per_of_bias(site, placement), "", "", _origin(site)] for site in placement.biases]
    return rows + [[entry.tensor, "float", "", "", "", entry.reason] for entry in placement.skipped]


def summary(placement: Placement) -> str:
    """Returns how many tensors have which type."""
    counts: dict[str, int] = {}
    for dtype in _types(placement):
        counts[dtype] = counts.get(dtype, 0) + 1
    return ", ".join(f"{count} {dtype}" for dtype, count in counts.items())


def _types(placement: Placement) -> Iterator[str]:
    yield from (site.dtype for site in placement.sites)
    yield from ("int32" for _ in placement.biases)
    yield from ("float" for _ in placement.skipped)


def _grid(site: Site) -> str:
    scales = ", powers of two" if site.power_of_two else ""
    zero = "" if site.dtype.startswith(("float", "bfloat")) else _ZERO[site.symmetric]
    return f"{site.dtype}{zero}{scales}"


def _per(site: Site) -> str:
    if site.axis is None:
        return "tensor"
    if site.block_size is None:
        return f"axis {site.axis}"
    kind = "blocks" if site.scale_bits is None else "low-power blocks"
    return f"axis {site.axis}, {kind} of {site.block_size}"


def _per_of_bias(site: BiasSite, placement: Placement) -> str:
    """Returns what a bias has a scale for: all of it where its weight has one scale."""
    weight = placement.site(site.weight)
    return "tensor" if weight is None or weight.axis is None else f"axis {site.axis}"


def _range(site: Site, config: QuantizationConfig) -> str:
    if site.root != site.tensor:
        return ""
    if site.fixed_range is not None:
        return "{:.6g} to {:.6g}".format(*site.fixed_range)
    return scheme_of(site, config)


def _origin(site: BiasSite) -> str:
    return f"bias: scale of '{site.input}' times scale of '{site.weight}'"


def _tie(site: Site) -> str:
    return "" if site.root == site.tensor else site.root
